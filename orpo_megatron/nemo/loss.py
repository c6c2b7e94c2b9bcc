"""The steps and the loss of a model, in the places where NeMo looks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.collections import llm
from nemo.lightning.megatron_parallel import MegatronLossReduction

from orpo_megatron.config import OrpoConfig
from orpo_megatron.core.step import Microbatch, make_forward, row_loss, take_microbatch


def register(model: llm.GPTModel, objective: OrpoConfig) -> None:
    """Has a model train and evaluate ORPO.

    The model stays of its class, and what a checkpoint records of it is untouched: NeMo's converters know both.

    Args:
        model: The model; changed.
        objective: Weight and averaging of the loss, and how the head works.
    """
    model.config.data_step_fn = data_step
    model.config.forward_step_fn = _make_forward_step(objective)
    model._training_loss_reduction = OrpoLossReduction(objective, by_length=False)
    model._validation_loss_reduction = OrpoLossReduction(objective, by_length=True)


def data_step(rows: Iterator[Any]) -> Microbatch:
    """Takes the next packed row; Lightning's iterator puts indices beside it."""
    batch = next(rows)
    return take_microbatch(batch[0] if isinstance(batch, tuple) else batch)


def _make_forward_step(objective: OrpoConfig) -> Callable[[llm.GPTModel, Microbatch], torch.Tensor]:
    """Returns NeMo's ``forward_step_fn``; the tokenizer that it may need comes with the weights, later than this."""
    forward: Callable[[Microbatch, torch.nn.Module], torch.Tensor] | None = None

    def forward_step(model: llm.GPTModel, microbatch: Microbatch) -> torch.Tensor:
        nonlocal forward
        if forward is None:
            forward = make_forward(objective, model.config.vocab_size or model.tokenizer.vocab_size)
        return forward(microbatch, model.module)

    return forward_step


class OrpoLossReduction(MegatronLossReduction):
    """ORPO's loss of a microbatch, and of a step.

    Attributes:
        totals: Metrics of the last step over its microbatches and all data-parallel ranks, as [sum, count] pairs.
    """

    def __init__(self, objective: OrpoConfig, by_length: bool) -> None:
        """Keeps the objective, and whether metrics also come by the length of responses."""
        super().__init__()
        self.objective, self.by_length = objective, by_length
        self.totals: dict[str, torch.Tensor] = {}

    def forward(self, batch: Microbatch, forward_out: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns ``core.step.row_loss`` of a microbatch: the scaled loss, and metrics as [sum, count] pairs.

        Args:
            batch: The microbatch.
            forward_out: Log-probs of its scored tokens, fp32 [n].
        """
        return row_loss(batch.share, self.objective, get_num_microbatches(), forward_out, by_length=self.by_length)

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Adds the metrics of a step up over microbatches and data-parallel ranks; returns its loss, fp32 []."""
        names = list(losses_reduced_per_micro_batch[0])
        totals = torch.stack([torch.stack([m[name] for name in names]) for m in losses_reduced_per_micro_batch]).sum(0)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        self.totals = dict(zip(names, totals, strict=True))
        total, count = self.totals["loss"]
        return (total / count).float()
