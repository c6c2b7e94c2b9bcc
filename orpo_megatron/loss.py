"""The ORPO objective: length-averaged log-probs of preference pairs -> a scalar to minimise.

Torch only, and blind to parallelism: whoever calls passes the denominators of the whole global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

EPSILON = 2.0**-24
"""Floor of q = 1 - p, on both sides, in values and gradients.

It is fp32's own resolution below 1: under it, q = 1 - exp(l) is rounding noise of the model's log-softmax. The
gradient with respect to l_rejected truly grows as 1 / (1 - p_r), while the softmax behind it shrinks as (1 - p_r).
Flooring q at the resolution keeps their product, and with it any amplified noise, of order 1.
"""


@dataclass(frozen=True)
class PairLogps:
    """What the objective needs to know about the pairs of one microbatch.

    Attributes:
        chosen_logps: Length-averaged log-prob of each chosen response in nats per token, fp32 [pairs].
        rejected_logps: The same for the rejected responses, fp32 [pairs].
        nll_sums: Sum of -log p over the NLL scope of each chosen sequence, in nats, fp32 or fp64 [pairs].
        nll_lengths: How many tokens each of these sums covers, int64 [pairs].
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    nll_sums: torch.Tensor
    nll_lengths: torch.Tensor


@dataclass(frozen=True)
class OrpoLoss:
    """One microbatch's share of the objective, and the pieces that metrics are made of.

    Attributes:
        loss: Share of the global batch's loss, fp32 scalar; the shares of all microbatches add up to the loss.
        nll_sum: Numerator of the NLL over this microbatch, detached fp64 scalar.
        nll_count: What ``nll_sum`` counts: tokens, or pairs where each pair is averaged first. int64 scalar.
        log_odds_ratio: Detached fp32 [pairs].
        odds_ratio_loss: Unweighted (without beta), detached fp32 [pairs].
        num_pairs: Pairs in the whole global batch.
    """

    loss: torch.Tensor
    nll_sum: torch.Tensor
    nll_count: torch.Tensor
    log_odds_ratio: torch.Tensor
    odds_ratio_loss: torch.Tensor
    num_pairs: int


def log_odds_ratio(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> torch.Tensor:
    """Returns log(odds_chosen / odds_rejected) of each pair, where odds = p / (1 - p).

    Source: arXiv 2403.07691, eq. 4 and 5.

    Args:
        chosen_logps: Length-averaged log-probs l <= 0 in nats per token, any float dtype [pairs]. What rounding
            left slightly above 0 counts as 0.
        rejected_logps: The same for the rejected responses [pairs].

    Returns:
        fp32 [pairs], finite for finite input. Gradients come in the dtype of the inputs.
    """
    return _LogOddsRatio.apply(chosen_logps, rejected_logps)


def odds_ratio_loss(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> torch.Tensor:
    """Returns -log sigmoid(log odds ratio) of each pair, without the weight beta.

    Source: arXiv 2403.07691, eq. 7.

    Args:
        chosen_logps: As for `log_odds_ratio` [pairs].
        rejected_logps: As for `log_odds_ratio` [pairs].

    Returns:
        fp32 [pairs], finite for finite input. Gradients come in the dtype of the inputs.
    """
    return _OddsRatioLoss.apply(chosen_logps, rejected_logps)


def capped_pairs(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> torch.Tensor:
    """Returns where 1 - p of either side fell below `EPSILON` and was floored, bool [pairs]."""
    return (-torch.expm1(chosen_logps.double()) < EPSILON) | (-torch.expm1(rejected_logps.double()) < EPSILON)


def orpo_loss(
    logps: PairLogps,
    *,
    beta: float,
    nll_reduction: Literal["tokens", "pairs"],
    num_nll_tokens: int,
    num_pairs: int,
) -> OrpoLoss:
    """Returns one microbatch's share of NLL + beta * odds-ratio loss.

    Source: arXiv 2403.07691, eq. 6.

    Args:
        logps: The pairs of this microbatch, possibly none.
        beta: Weight of the odds-ratio loss, the paper's lambda. At 0 its gradient is not formed at all.
        nll_reduction: ``tokens`` averages the NLL over tokens, ``pairs`` over each pair first and then over pairs.
        num_nll_tokens: NLL tokens in the whole global batch, over all microbatches and ranks.
        num_pairs: Pairs in the whole global batch.

    Returns:
        The share and its pieces. Without pairs the share is 0 and still attached to the graph.
    """
    if nll_reduction == "tokens":
        nll_sum, nll_count, nll_denominator = logps.nll_sums.double().sum(), logps.nll_lengths.sum(), num_nll_tokens
    else:
        nll_sum = (logps.nll_sums.double() / logps.nll_lengths).sum()
        nll_count, nll_denominator = torch.tensor(len(logps.nll_sums), device=nll_sum.device), num_pairs
    loss = nll_sum / nll_denominator
    odds_losses = odds_ratio_loss(logps.chosen_logps, logps.rejected_logps)
    if beta != 0:
        loss = loss + beta * odds_losses.double().sum() / num_pairs
    return OrpoLoss(
        loss=loss.float(),
        nll_sum=nll_sum.detach(),
        nll_count=nll_count,
        log_odds_ratio=log_odds_ratio(logps.chosen_logps.detach(), logps.rejected_logps.detach()),
        odds_ratio_loss=odds_losses.detach(),
        num_pairs=num_pairs,
    )


def _odds(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns x = log odds ratio, q_c and q_r, fp64 [pairs].

    In fp32 all digits of x would be lost where the two sides are nearly equal.
    """
    l_c, l_r = chosen_logps.double().clamp(max=0), rejected_logps.double().clamp(max=0)
    q_c, q_r = (-torch.expm1(l_c)).clamp(min=EPSILON), (-torch.expm1(l_r)).clamp(min=EPSILON)
    return (l_c - l_r) - (q_c.log() - q_r.log()), q_c, q_r


class _LogOddsRatio(torch.autograd.Function):
    """x with dx/dl_c = 1/q_c and dx/dl_r = -1/q_r."""

    @staticmethod
    def forward(ctx: Any, chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> torch.Tensor:
        x, q_c, q_r = _odds(chosen_logps, rejected_logps)
        ctx.save_for_backward(q_c, q_r)
        ctx.dtypes = chosen_logps.dtype, rejected_logps.dtype
        return x.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_c, q_r = ctx.saved_tensors
        return (grad / q_c).to(ctx.dtypes[0]), (-grad / q_r).to(ctx.dtypes[1])


class _OddsRatioLoss(torch.autograd.Function):
    """L = -log sigmoid(x) with dL/dl_c = -p_r/D and dL/dl_r = p_r q_c / (q_r D), where D = p_r q_c + p_c q_r.

    Since sigmoid(-x) = p_r q_c / D these are -sigmoid(-x)/q_c and sigmoid(-x)/q_r, the form taken here: the floor
    keeps x finite as p -> 1, and fp64 x serves where p_r and p_c both underflow and D becomes 0.
    """

    @staticmethod
    def forward(ctx: Any, chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> torch.Tensor:
        x, q_c, q_r = _odds(chosen_logps, rejected_logps)
        ctx.save_for_backward(torch.sigmoid(-x), q_c, q_r)
        ctx.dtypes = chosen_logps.dtype, rejected_logps.dtype
        return -torch.nn.functional.logsigmoid(x).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, q_c, q_r = ctx.saved_tensors
        return (-grad * weight / q_c).to(ctx.dtypes[0]), (grad * weight / q_r).to(ctx.dtypes[1])
