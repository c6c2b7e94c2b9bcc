"""The only place that names a metric.

Every metric is a pair [sum, count]: pairs add up over microbatches and ranks, and only the total is divided.
"""

from __future__ import annotations

from collections.abc import Mapping

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


def step_metrics(loss: OrpoLoss, logps: PairLogps, beta: float) -> dict[str, torch.Tensor]:
    """Returns the metrics of one microbatch.

    Args:
        loss: The microbatch's share of the objective.
        logps: The pairs that it was computed from.
        beta: Weight of the odds-ratio loss.

    Returns:
        [sum, count] for each name in `METRICS`, in that order, detached fp64 [2]: exact for any count of tokens.
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
    return {name: metrics[name] for name in METRICS}


def averages(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns sum / count of each metric; one that counted nothing is left out."""
    totals = {name: values.tolist() for name, values in metrics.items()}
    return {name: total / count for name, (total, count) in totals.items() if count}
