"""The paper's loss as it stands there, on a model of transformers: one sequence at a time, no packing, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from orpo_megatron.data.dataset import PairTokens


@dataclass
class Figures:
    """One pair's log-probs, fp64, in nats; ``nll`` is summed over the chosen sequence's tokens that count.

    The log odds ratio is of chosen over rejected, as defined: log p / (1 - p) of each length-averaged probability.
    """

    chosen: Any
    rejected: Any
    log_odds_ratio: Any
    nll: Any
    nll_tokens: int

    def as_numbers(self) -> Figures:
        return Figures(
            *(float(x) for x in (self.chosen, self.rejected, self.log_odds_ratio, self.nll)), self.nll_tokens
        )


def score(model: torch.nn.Module, pair: PairTokens, scope: str = "prompt_and_response") -> Figures:
    """Scores a pair; the NLL covers ``scope`` of the chosen sequence."""

    def logps(response: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.concatenate((pair.prompt, response)).astype(np.int64))
        log_probs = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        return log_probs.gather(1, ids[1:, None])[:, 0]  # one for each token but the first

    chosen_logps, rejected_logps = logps(pair.chosen), logps(pair.rejected)
    chosen, rejected = chosen_logps[-len(pair.chosen) :].mean(), rejected_logps[-len(pair.rejected) :].mean()
    counted = chosen_logps if scope == "prompt_and_response" else chosen_logps[-len(pair.chosen) :]
    odds = [p / (1 - p) for p in (chosen.exp(), rejected.exp())]
    return Figures(
        chosen=chosen,
        rejected=rejected,
        log_odds_ratio=torch.log(odds[0] / odds[1]),
        nll=-counted.sum(),
        nll_tokens=len(counted),
    )


def batch_loss(
    model: torch.nn.Module, pairs: Sequence[PairTokens], beta: float, scope: str = "prompt_and_response"
) -> torch.Tensor:
    """Returns the loss of a global batch: NLL per token, odds-ratio term per pair."""
    figures = [score(model, pair, scope) for pair in pairs]
    nll = torch.stack([f.nll for f in figures]).sum() / sum(f.nll_tokens for f in figures)
    return nll - beta * logsigmoid(torch.stack([f.log_odds_ratio for f in figures])).mean()
