"""Metrics as sums and counts: by hand, and the same however pairs are spread."""

import math

import pytest
import torch

from orpo_megatron.loss import PairLogps, orpo_loss
from orpo_megatron.metrics import METRICS, averages, step_metrics


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
