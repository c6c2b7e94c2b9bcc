"""The only place that names a metric.

Every metric is a pair [sum, count]: pairs add up over microbatches and ranks, and only the total is divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch

from orpo_megatron.loss import OrpoLoss, PairLogps, capped_pairs

METRICS: dict[str, str] = {
    "loss": "What is minimised: NLL plus beta times the odds-ratio loss.",
    "nll_loss": "Negative log-likelihood of the chosen sequences, nats per token.",
    "odds_ratio_loss": "Mean of -log sigmoid(log odds ratio), without beta.",
    "log_odds_ratio": "Mean of log sigmoid(log odds ratio); TRL's name for minus the odds-ratio loss.",
    "log_odds_chosen": "Mean log odds ratio of chosen over rejected; TRL's name.",
    "rewards/chosen": "Beta times logps/chosen.",
    "rewards/rejected": "Beta times logps/rejected.",
    "rewards/accuracies": "Fraction of pairs whose chosen response has the higher length-averaged log-prob.",
    "rewards/margins": "Beta times logps/margins.",
    "logps/chosen": "Mean length-averaged log-prob of the chosen responses, nats per token.",
    "logps/rejected": "Mean length-averaged log-prob of the rejected responses, nats per token.",
    "logps/margins": "logps/chosen minus logps/rejected.",
    "capped_pairs": "Fraction of pairs with a side so probable that 1 - p was floored.",
}
"""Name -> meaning in one line, in the order of a report."""

AUXILIARY_LOSSES: dict[str, str] = {
    "load_balancing_loss": "How unevenly the experts are used, over a microbatch; 1 if evenly.",
    "seq_load_balancing_loss": "The same, over each sequence that the router knows of.",
    "global_load_balancing_loss": "The same, over all that was routed since the step began, on all data ranks.",
    "z_loss": "Mean square of the log-sum-exp of the router's logits.",
}
"""What routers of a mixture of experts add to a training step, under Megatron-Core's names, without coefficients."""

LENGTH_BOUNDS = (64, 256, 1024)
LENGTH_BUCKETS = ("1-63", "64-255", "256-1023", "1024-up")
"""Pairs by the tokens of their longer response. No sign in these names is one that TensorBoard or MLflow replaces."""

BY_LENGTH = (
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logps/margins",
    "log_odds_chosen",
)
"""What an evaluation also knows of each length bucket, under the name ``metric/bucket``."""

Lengths = TypeVar("Lengths", torch.Tensor, np.ndarray)


def length_bucket(lengths: Lengths) -> Lengths:
    """Returns the index in `LENGTH_BUCKETS` of each length, integers of the same shape."""
    bucket = 0 * lengths
    for bound in LENGTH_BOUNDS:
        bucket = bucket + (lengths >= bound)
    return bucket


def count_pairs(chosen_lengths: np.ndarray, rejected_lengths: np.ndarray) -> dict[str, int]:
    """Counts the pairs of an evaluation.

    Args:
        chosen_lengths: Tokens of each chosen response, int [pairs].
        rejected_lengths: Tokens of each rejected response, int [pairs].

    Returns:
        All pairs as ``pairs``, those of each bucket as ``pairs/bucket``; a bucket without pairs is left out.
    """
    buckets = length_bucket(np.maximum(chosen_lengths, rejected_lengths))
    counts = np.bincount(buckets, minlength=len(LENGTH_BUCKETS)).tolist()
    found = {f"pairs/{bucket}": count for bucket, count in zip(LENGTH_BUCKETS, counts, strict=True) if count}
    return {"pairs": len(buckets), **found}


def evaluation_metrics(counts: Mapping[str, int]) -> list[str]:
    """Returns the names of the averages of an evaluation whose pairs are ``counts``, as `count_pairs` returns them."""
    buckets = [bucket for bucket in LENGTH_BUCKETS if f"pairs/{bucket}" in counts]
    return [*METRICS, *(f"{name}/{bucket}" for bucket in buckets for name in BY_LENGTH)]


def step_metrics(
    loss: OrpoLoss, logps: PairLogps, beta: float, response_lengths: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Returns the metrics of one microbatch.

    Args:
        loss: The microbatch's share of the objective.
        logps: The pairs that it was computed from.
        beta: Weight of the odds-ratio loss.
        response_lengths: Tokens of the chosen and the rejected response of each pair, int64 [pairs, 2], for an
            evaluation's metrics by length; None leaves these out.

    Returns:
        [sum, count] for each name in `METRICS`, in that order, and then for each bucket, with pairs or without, so
        that all microbatches know the same names. Detached fp64 [2]: exact for any count of tokens.
    """
    chosen, rejected = logps.chosen_logps.detach().double(), logps.rejected_logps.detach().double()
    per_pair = {
        "odds_ratio_loss": loss.odds_ratio_loss,
        "log_odds_ratio": -loss.odds_ratio_loss,
        "log_odds_chosen": loss.log_odds_ratio,
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        # Not the rewards but the log-probs are compared, so that beta 0 still shows accuracies.
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/margins": chosen - rejected,
        "capped_pairs": capped_pairs(chosen, rejected),
    }
    pairs = torch.tensor(float(len(chosen)), dtype=torch.float64, device=chosen.device)
    metrics = {name: torch.stack([values.double().sum(), pairs]) for name, values in per_pair.items()}
    # A share is already divided by the pairs of the whole global batch: [loss * pairs, pairs] once added up.
    metrics["loss"] = torch.stack([loss.loss.detach().double() * loss.num_pairs, pairs])
    metrics["nll_loss"] = torch.stack([loss.nll_sum, loss.nll_count.double()])
    ordered = {name: metrics[name] for name in METRICS}
    if response_lengths is not None:
        ordered |= _by_length(per_pair, response_lengths.amax(dim=1))
    return ordered


def _by_length(per_pair: Mapping[str, torch.Tensor], lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns [sum, count] of each metric over the pairs of each length bucket; ``lengths`` is int64 [pairs]."""
    buckets = torch.arange(len(LENGTH_BUCKETS), device=lengths.device)
    members = length_bucket(lengths).unsqueeze(1) == buckets
    counts = members.sum(dim=0).double()
    sums = {name: per_pair[name].double().unsqueeze(1).where(members, 0.0).sum(dim=0) for name in BY_LENGTH}
    return {
        f"{name}/{bucket}": torch.stack([sums[name][index], counts[index]])
        for index, bucket in enumerate(LENGTH_BUCKETS)
        for name in BY_LENGTH
    }


def averages(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns sum / count of each metric; one that counted nothing is left out."""
    totals = {name: values.tolist() for name, values in metrics.items()}
    return {name: total / count for name, (total, count) in totals.items() if count}
