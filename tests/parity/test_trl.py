"""The same pairs through TRL's own ORPOTrainer.

TRL's conventions (1.16), reproduced here by settings: the NLL covers the prompt and the response of the chosen side
(``nll_scope: prompt_and_response``), without the first token, which nothing predicts, and without padding; it is the
mean over all such tokens of the padded batch (``nll_reduction: tokens``, with the batch's own token count as the
denominator). Log-probs are averaged over response tokens. Its loss is NLL - mean(beta * log sigmoid(log odds ratio)).
TRL takes these means per microbatch; equality is for a batch that is one whole step.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.logps import vocab_parallel_logps
from orpo_megatron.loss import OrpoLoss, PairLogps, log_odds_ratio, odds_ratio_loss, orpo_loss
from orpo_megatron.metrics import averages, step_metrics
from orpo_megatron.segments import pair_logps

FILES = ["dpo_en_demo.sharegpt.json", "hh_harmless_base.jsonl.gz"]
BATCH = 2


def ours(trainer: Any, row: PackedRow) -> tuple[PairLogps, OrpoLoss]:
    """Each sequence of the row through the model by itself, then our log-probs, sums and loss."""
    starts = row.cu_seqlens.tolist()
    sequences = [row.tokens[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    logits = torch.cat([trainer.model(sequence[None]).logits[0] for sequence in sequences])
    logps = pair_logps(vocab_parallel_logps(logits[row.score_positions], row.score_labels), row)
    loss = orpo_loss(
        logps, beta=trainer.beta, nll_reduction="tokens", num_nll_tokens=row.num_nll_tokens, num_pairs=row.num_pairs
    )
    return logps, loss


def trl_odds(trainer: Any, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's log odds ratio and odds-ratio loss of each pair; it returns means, so one pair at a time."""
    results = [trainer.odds_ratio_loss(chosen[i : i + 1], rejected[i : i + 1]) for i in range(len(chosen))]
    return torch.stack([r[4] for r in results]), torch.cat([-r[0] / trainer.beta for r in results])


def assert_close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Within 1e-5 of the value itself, or of ``scale`` where the value is a difference."""
    allowed = 1e-5 * (expected if scale is None else scale).abs()
    assert ((found - expected).abs() <= allowed).all(), f"{found.tolist()} against TRL's {expected.tolist()}"


@pytest.mark.parametrize("name", FILES)
def test_real_pairs(name: str, trainer: Any, real_pairs: Callable, trl_batch: Callable, packed_row: Callable) -> None:
    """Per-pair log-probs, log odds ratios and losses, and TRL's own metrics, two pairs a batch."""
    pairs = real_pairs(name)
    assert len(pairs) == 8 and len({len(ids) for pair in pairs for ids in pair}) > 3
    odds_ratios: list[float] = []
    for start in range(0, len(pairs), BATCH):
        batch = trl_batch(pairs[start : start + BATCH])
        with torch.no_grad():
            chosen, rejected, _, _, nll = trainer.concatenated_forward(trainer.model, batch)
            loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
            logps, result = ours(trainer, packed_row(pairs[start : start + BATCH]))
        assert_close(logps.chosen_logps, chosen)
        assert_close(logps.rejected_logps, rejected)
        odds_ratio, odds_loss = trl_odds(trainer, chosen, rejected)
        largest = torch.maximum(chosen.abs(), rejected.abs())
        assert_close(result.log_odds_ratio, odds_ratio, scale=largest)
        assert_close(result.odds_ratio_loss, odds_loss, scale=largest.clamp(min=1) * odds_loss)
        assert_close(result.nll_sum.float() / result.nll_count, nll)
        assert_close(result.loss, loss)
        means = averages(step_metrics(result, logps, trainer.beta))
        for metric in metrics.keys() - {"logits/chosen", "logits/rejected"}:
            assert means[metric] == pytest.approx(metrics[metric], rel=1e-5, abs=1e-5 * largest.max().item()), metric
        odds_ratios += odds_ratio.tolist()
    assert max(odds_ratios) > 0.2 and min(odds_ratios) < -0.2, "the pairs are too alike to tell anything"


def test_gradients_of_every_parameter(
    trainer: Any, real_pairs: Callable, trl_batch: Callable, packed_row: Callable
) -> None:
    """One batch of real pairs backward through both: within 1e-5 of each parameter's largest gradient."""
    pairs = real_pairs(FILES[0])[:BATCH]
    parameters = dict(trainer.model.named_parameters())
    trl_loss, _ = trainer.get_batch_loss_metrics(trainer.model, trl_batch(pairs))
    expected = torch.autograd.grad(trl_loss, list(parameters.values()))
    found = torch.autograd.grad(ours(trainer, packed_row(pairs))[1].loss, list(parameters.values()))
    for name, ours_, theirs in zip(parameters, found, expected, strict=True):
        assert (ours_ - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_log_probs_nearer_to_zero(trainer: Any) -> None:
    """A trained model's range, -8 to -0.01, which a random model does not reach: values and gradients."""
    grid = -torch.logspace(-2, 0.9, 12)
    chosen, rejected = (values.contiguous().requires_grad_() for values in torch.cartesian_prod(grid, grid).T)
    odds_ratio, odds_loss = trl_odds(trainer, chosen, rejected)
    expected = torch.autograd.grad(odds_loss.sum(), [chosen, rejected])
    loss = odds_ratio_loss(chosen, rejected)
    found = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert_close(log_odds_ratio(chosen, rejected), odds_ratio, scale=odds_ratio.abs().clamp(min=1))
    assert_close(loss, odds_loss)
    for ours_, theirs in zip(found, expected, strict=True):
        assert_close(ours_, theirs)
