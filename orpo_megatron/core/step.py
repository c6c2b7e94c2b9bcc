"""The forward step and its loss function: what ``get_forward_backward_func`` calls for every microbatch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from orpo_megatron.batch import PackedRow
from orpo_megatron.config import OrpoConfig
from orpo_megatron.core.head import call_with_head, score_tokens
from orpo_megatron.core.moe import router_padding_mask
from orpo_megatron.core.positions import check_takes_shared_prefix, follow_positions
from orpo_megatron.core.row import row_params
from orpo_megatron.loss import orpo_loss
from orpo_megatron.metrics import step_metrics
from orpo_megatron.segments import context_shard, pair_logps

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
ForwardStep = Callable[[Iterator[PackedRow], torch.nn.Module], tuple[torch.Tensor, LossFunction]]
Observer = Callable[[PackedRow, torch.Tensor], None]


@dataclass(frozen=True)
class Microbatch:
    """One packed row, as a rank takes it from its data.

    Attributes:
        row: The whole row, on the CPU.
        share: What this context-parallel rank holds of it, on its device.
    """

    row: PackedRow
    share: PackedRow


def take_microbatch(row: PackedRow) -> Microbatch:
    """Returns a row with this rank's share of it."""
    cp_group = parallel_state.get_context_parallel_group()
    share = context_shard(row, cp_group.size(), cp_group.rank())
    return Microbatch(row, share.to(torch.cuda.current_device()))


def make_forward(
    objective: OrpoConfig, vocab_size: int | None = None
) -> Callable[[Microbatch, torch.nn.Module], torch.Tensor]:
    """Makes the call of the model, which has the head in place of its logits.

    Args:
        objective: Says how the head works.
        vocab_size: Ids of the vocabulary without padding, where the model's configuration does not tell
            (see ``score_tokens``).

    Returns:
        ``forward(microbatch, model)``, which returns log-probs of the share's scored tokens, fp32 [n], on the last
        pipeline stage, and hidden states on others.
    """
    head = partial(score_tokens, mode=objective.head, cache_bytes=int(objective.head_cache_gib * 2**30))
    score = head if vocab_size is None else partial(head, vocab_size=vocab_size)
    checked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def forward(microbatch: Microbatch, model: torch.nn.Module) -> torch.Tensor:
        row, share = microbatch.row, microbatch.share
        cp_group = parallel_state.get_context_parallel_group()
        if row.shares_prefix or not share.tokens.is_cuda:
            follow_positions(model)
        if row.shares_prefix and model not in checked:
            check_takes_shared_prefix(model)
            checked.add(model)
        padding_mask = router_padding_mask(share.padding_mask, model, get_model_config(model))
        return call_with_head(
            model,
            score,
            share,
            input_ids=share.tokens.unsqueeze(0),
            position_ids=share.position_ids.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=row_params(row, share.tokens.device, cp_group.size(), cp_group.rank()),
            **({} if padding_mask is None else {"padding_mask": padding_mask}),
        )

    return forward


def make_forward_step(
    objective: OrpoConfig, num_microbatches: Callable[[], int], observe: Observer | None = None
) -> ForwardStep:
    """Makes the forward step of an ORPO run.

    Args:
        objective: Weight and averaging of the loss, and how the head works; its ``nll_scope`` is the plan's by now.
        num_microbatches: Tells how many microbatches the running step has on this rank.
        observe: Is handed each training microbatch on the last pipeline stage: the whole row, and its share of the
            global batch's loss, detached.

    Returns:
        ``forward_step(data_iterator, model) -> (output, loss_function)`` for Megatron-Core's schedules. It takes
        one ``PackedRow`` a microbatch and wants ``config.calculate_per_token_loss`` to be False.
    """
    forward = make_forward(objective)

    def forward_step(data_iterator: Iterator[PackedRow], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        microbatch = take_microbatch(next(data_iterator))
        output = forward(microbatch, model)
        seen = partial(observe, microbatch.row) if observe is not None and model.training else None
        return output, partial(
            row_loss, microbatch.share, objective, num_microbatches(), by_length=not model.training, observe=seen
        )

    return forward_step


def row_loss(
    row: PackedRow,
    objective: OrpoConfig,
    num_microbatches: int,
    per_token_logps: torch.Tensor,
    *,
    by_length: bool = False,
    observe: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Turns one row's log-probs into its share of the global batch's loss, and its metrics.

    The row's loss is divided by the counts of the whole global batch. The schedules divide what they are given by
    the number of microbatches and average gradients over data-parallel ranks, so both factors are put in here
    beforehand; the sum over all rows is then exactly the loss of the global batch. Context-parallel ranks all compute
    the loss of their common row; the schedules multiply it by their number, and the average takes it out again.

    Args:
        row: The row, or this context-parallel rank's share of it.
        objective: Weight and averaging of the loss.
        num_microbatches: Microbatches of this step on this rank.
        per_token_logps: Log-probs of the row's scored tokens, fp32 [n].
        by_length: Whether metrics also come by the length of a pair's responses, as an evaluation reports them.
        observe: Is handed the loss before it is scaled, detached.

    Returns:
        The scaled loss (scalar), and the metrics as [sum, count] pairs.
    """
    cp_group = parallel_state.get_context_parallel_group()
    logps = pair_logps(per_token_logps, row, cp_group if cp_group.size() > 1 else None)
    loss = orpo_loss(
        logps,
        beta=objective.beta,
        nll_reduction=objective.nll_reduction,
        num_nll_tokens=row.num_nll_tokens,
        num_pairs=row.num_pairs,
    )
    response_lengths = row.num_response_tokens[: 2 * len(row.pair_ids)].view(-1, 2) if by_length else None
    metrics = step_metrics(loss, logps, objective.beta, response_lengths)
    if observe is not None:
        observe(loss.loss.detach())
    scale = num_microbatches * parallel_state.get_data_parallel_world_size()
    return loss.loss * scale, metrics
