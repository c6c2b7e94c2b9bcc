"""Metrics as sums and counts: by hand, and the same however pairs are spread."""

import math

import numpy as np
import pytest
import torch

from orpo_megatron.loss import PairLogps, orpo_loss
from orpo_megatron.metrics import (
    BY_LENGTH,
    LENGTH_BUCKETS,
    METRICS,
    averages,
    count_pairs,
    evaluation_metrics,
    length_bucket,
    step_metrics,
)


def two_pairs() -> PairLogps:
    """Probabilities 0.7 against 0.4 and 0.5 against 0.8; NLL sums 6 and 2 over 3 and 2 tokens."""
    return PairLogps(
        torch.tensor([0.7, 0.5]).log().requires_grad_(),
        torch.tensor([0.4, 0.8]).log().requires_grad_(),
        torch.tensor([6.0, 2.0], requires_grad=True),
        torch.tensor([3, 2]),
    )


def metrics_of(logps: PairLogps, beta: float, reduction: str = "tokens") -> dict[str, torch.Tensor]:
    """The metrics of ``logps`` as a part of a global batch of 2 pairs and 5 tokens."""
    loss = orpo_loss(logps, beta=beta, nll_reduction=reduction, num_nll_tokens=5, num_pairs=2)  # type: ignore[arg-type]
    return step_metrics(loss, logps, beta)


def test_by_hand() -> None:
    """Odds 7/3, 2/3, 1 and 4: odds ratios 3.5 and 0.25, odds-ratio losses ln(9/7) and ln 5."""
    found = averages(metrics_of(two_pairs(), beta=0.1))
    odds_loss = (math.log(9 / 7) + math.log(5)) / 2
    expected = {
        "loss": 1.6 + 0.1 * odds_loss,
        "nll_loss": 1.6,
        "odds_ratio_loss": odds_loss,
        "log_odds_ratio": -odds_loss,
        "log_odds_chosen": math.log(3.5 * 0.25) / 2,
        "rewards/chosen": 0.1 * math.log(0.7 * 0.5) / 2,
        "rewards/rejected": 0.1 * math.log(0.4 * 0.8) / 2,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.1 * math.log(0.7 * 0.5 / (0.4 * 0.8)) / 2,
        "logps/chosen": math.log(0.7 * 0.5) / 2,
        "logps/rejected": math.log(0.4 * 0.8) / 2,
        "logps/margins": math.log(0.7 * 0.5 / (0.4 * 0.8)) / 2,
        "capped_pairs": 0.0,
    }
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert list(found) == list(expected) == list(METRICS)


def test_pairs_first() -> None:
    """(6/3 + 2/2) / 2 = 1.5, counted in pairs."""
    metrics = metrics_of(two_pairs(), beta=0.0, reduction="pairs")
    assert metrics["nll_loss"].tolist() == [3.0, 2.0]
    assert averages(metrics)["loss"] == pytest.approx(1.5)


def test_beta_zero_shows_accuracies() -> None:
    found = averages(metrics_of(two_pairs(), beta=0.0))
    assert found["rewards/accuracies"] == 0.5
    assert found["rewards/margins"] == 0.0
    assert found["odds_ratio_loss"] > 0.9


def test_capped_pairs_are_counted() -> None:
    logps = PairLogps(torch.tensor([-1.0, 0.0]), torch.tensor([-1.0, -1.0]), torch.ones(2), torch.tensor([3, 2]))
    assert metrics_of(logps, beta=0.1)["capped_pairs"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("reduction", ["tokens", "pairs"])
def test_microbatches_add_up(reduction: str) -> None:
    """Two microbatches of one pair and one of none, added up, average to the whole batch."""
    whole = two_pairs()
    fields = (whole.chosen_logps, whole.rejected_logps, whole.nll_sums, whole.nll_lengths)
    total = {name: torch.zeros(2, dtype=torch.float64) for name in METRICS}
    for pairs in (slice(0, 1), slice(1, 1), slice(1, 2)):
        metrics = metrics_of(PairLogps(*(field[pairs] for field in fields)), 0.1, reduction)
        total = {name: total[name] + metrics[name] for name in METRICS}
    assert averages(total) == pytest.approx(averages(metrics_of(whole, 0.1, reduction)), rel=1e-6)
    assert total["loss"][1] == 2


def test_detached_pairs_of_fp64() -> None:
    for name, values in metrics_of(two_pairs(), beta=0.1).items():
        assert values.shape == (2,) and values.dtype == torch.float64 and not values.requires_grad, name


def test_average_of_nothing_is_left_out() -> None:
    assert averages({"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([0.0, 0.0])}) == {"a": 1.5}


CHOSEN = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
REJECTED = [-2.0, -1.0, -5.0, -4.5, -4.0, -8.0]
RESPONSES = [[63, 1], [64, 63], [3, 255], [256, 256], [2, 1023], [1024, 5]]
"""The longer response lies on a bound of its bucket: one pair, two, two and one."""


def metrics_by_length(pairs: slice) -> dict[str, torch.Tensor]:
    """The metrics of those pairs at beta 0.5."""
    chosen, rejected = torch.tensor(CHOSEN)[pairs], torch.tensor(REJECTED)[pairs]
    logps = PairLogps(chosen, rejected, torch.ones(len(chosen)), torch.ones(len(chosen), dtype=torch.int64))
    loss = orpo_loss(logps, beta=0.5, nll_reduction="tokens", num_nll_tokens=6, num_pairs=6)
    return step_metrics(loss, logps, 0.5, torch.tensor(RESPONSES)[pairs])


def test_buckets_by_hand() -> None:
    """Pairs 0 | 1, 2 | 3, 4 | 5; the better side is chosen in 0, 2, 3 and 5."""
    found = metrics_by_length(slice(6))
    expected = {
        "rewards/accuracies": [[1, 1], [1, 2], [1, 2], [1, 1]],
        "rewards/margins": [[0.5, 1], [0.5, 2], [-0.25, 2], [1, 1]],
        "logps/chosen": [[-1, 1], [-5, 2], [-9, 2], [-6, 1]],
        "logps/rejected": [[-2, 1], [-6, 2], [-8.5, 2], [-8, 1]],
        "logps/margins": [[1, 1], [1, 2], [-0.5, 2], [2, 1]],
    }
    for name, buckets in expected.items():
        for bucket, values in zip(LENGTH_BUCKETS, buckets, strict=True):
            assert found[f"{name}/{bucket}"].tolist() == values, (name, bucket)
    odds = [p - math.log(1 - math.exp(p)) - (q - math.log(1 - math.exp(q))) for p, q in ((-2, -1), (-3, -5))]
    assert found["log_odds_chosen/64-255"].tolist() == pytest.approx([sum(odds), 2], rel=1e-6)
    assert list(found)[len(METRICS) :] == [f"{name}/{bucket}" for bucket in LENGTH_BUCKETS for name in BY_LENGTH]


def test_buckets_add_up_to_all_pairs() -> None:
    found = metrics_by_length(slice(6))
    for name in BY_LENGTH:
        total = torch.stack([found[f"{name}/{bucket}"] for bucket in LENGTH_BUCKETS]).sum(dim=0)
        torch.testing.assert_close(total, found[name], rtol=1e-12, atol=0)


def test_buckets_of_shards_add_up() -> None:
    """However pairs are spread, also with a shard of none, names are the same and sums add up."""
    whole = metrics_by_length(slice(6))
    shards = [metrics_by_length(pairs) for pairs in (slice(0, 2), slice(2, 2), slice(2, 5), slice(5, 6))]
    for name, values in whole.items():
        torch.testing.assert_close(sum(shard[name] for shard in shards), values, rtol=2e-7, atol=0)
    assert all(list(shard) == list(whole) for shard in shards)


def test_empty_buckets_are_left_out() -> None:
    """Pairs 3 to 5 are of the two upper buckets; host and device agree on what there is."""
    metrics = metrics_by_length(slice(3, 6))
    counts = count_pairs(np.array([256, 2, 1024]), np.array([256, 1023, 5]))
    assert counts == {"pairs": 3, "pairs/256-1023": 2, "pairs/1024-up": 1}
    assert metrics["logps/chosen/64-255"].tolist() == [0, 0]
    assert list(averages(metrics)) == evaluation_metrics(counts)
    assert len(evaluation_metrics(counts)) == len(METRICS) + 2 * len(BY_LENGTH)
    for bucket in LENGTH_BUCKETS:
        assert metrics[f"logps/chosen/{bucket}"][1] == counts.get(f"pairs/{bucket}", 0)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_bounds(kind: type) -> None:
    lengths = [1, 63, 64, 255, 256, 1023, 1024, 10**6]
    assert length_bucket(kind(lengths)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_training_has_no_buckets() -> None:
    assert list(metrics_of(two_pairs(), beta=0.1)) == list(METRICS)
