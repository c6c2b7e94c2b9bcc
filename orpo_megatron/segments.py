"""Per-token log-probs -> what the objective needs to know about each pair, over packed rows and context ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from orpo_megatron.batch import PackedRow
from orpo_megatron.loss import PairLogps


def zigzag_chunks(lengths: Sequence[int], cp_size: int, cp_rank: int) -> list[list[tuple[int, int]]]:
    """Returns which parts of each packed sequence a context-parallel rank holds.

    Megatron's zigzag: a sequence is cut into 2 * cp equal chunks and rank r holds chunks r and 2 * cp - 1 - r, so
    that causal attention costs every rank the same.

    Args:
        lengths: Tokens of each padded sequence.
        cp_size: Size of the context-parallel group; at 1 a rank holds whole sequences.
        cp_rank: Rank in that group.

    Returns:
        For each sequence the (start, stop) of its parts, counted from its own start, in order.

    Raises:
        ValueError: If a sequence cannot be cut into 2 * cp equal chunks.
    """
    if cp_size == 1:
        return [[(0, length)] for length in lengths]
    pieces = 2 * cp_size
    for length in lengths:
        if length % pieces:
            raise ValueError(
                f"A packed sequence of {length} tokens cannot be split over context parallel size {cp_size}: its "
                f"length must be a multiple of {pieces}. Pad it to {-(-length // pieces) * pieces} tokens."
            )
    mine = (cp_rank, pieces - 1 - cp_rank)
    return [[(length // pieces * i, length // pieces * (i + 1)) for i in mine] for length in lengths]


def zigzag_positions(lengths: Sequence[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Returns the positions in the whole row that a context-parallel rank holds, int64 [t/cp], on the CPU.

    Arguments and errors are those of ``zigzag_chunks``.
    """
    parts, offset = [], 0
    for length, chunks in zip(lengths, zigzag_chunks(lengths, cp_size, cp_rank), strict=True):
        parts += [torch.arange(offset + start, offset + stop) for start, stop in chunks]
        offset += length
    return torch.cat(parts)


class Span(NamedTuple):
    """Consecutive queries of a rank, and the keys of the whole row that they attend to.

    The last query attends to all of them, each one before to one key less.

    Attributes:
        num_queries: How many queries of the rank, in the order in which it holds them.
        keys: (start, stop) of the parts of the whole row, at most two, that hold the keys, in order.
    """

    num_queries: int
    keys: tuple[tuple[int, int], ...]


def attention_spans(row: PackedRow, cp_size: int = 1, cp_rank: int = 0) -> list[Span]:
    """Returns which keys each query of a row attends to.

    Causal attention inside each segment, and in a pair that shares its prompt from the rejected response to the
    prompt and to itself: in each span a causal mask that is aligned with the last query and the last key.

    Args:
        row: The whole row, on the CPU.
        cp_size: Size of the context-parallel group.
        cp_rank: Rank in that group, whose queries these are.

    Returns:
        The spans, whose queries follow one another as the rank holds them.

    Raises:
        ValueError: As ``zigzag_chunks``.
    """
    spans = []
    starts, lengths = row.cu_seqlens.tolist(), row.cu_seqlens.diff().tolist()
    ends = zip(row.prompt_ends.tolist(), row.chosen_ends.tolist(), strict=True)
    chunks_of = zigzag_chunks(lengths, cp_size, cp_rank)
    for begin, (prompt_end, chosen_end), chunks in zip(starts[:-1], ends, chunks_of, strict=True):
        for start, stop in chunks:
            fork = min(max(start, chosen_end), stop)
            if start < fork:
                spans.append(Span(fork - start, ((begin, begin + fork),)))
            if fork < stop:
                spans.append(Span(stop - fork, ((begin, begin + prompt_end), (begin + chosen_end, begin + stop))))
    return spans


def context_shard(row: PackedRow, cp_size: int, cp_rank: int) -> PackedRow:
    """Returns a context-parallel rank's share of a row.

    Args:
        row: The whole row, on the CPU.
        cp_size: Size of the context-parallel group.
        cp_rank: Rank in that group.

    Returns:
        The row with the tokens and scored positions that the rank holds; where segments start and end, and all counts,
        stay those of the whole row.

    Raises:
        ValueError: As ``zigzag_chunks``.
    """
    if cp_size == 1:
        return row
    held = zigzag_positions(row.cu_seqlens.diff().tolist(), cp_size, cp_rank)
    place = torch.full_like(row.tokens, -1)
    place[held] = torch.arange(len(held))
    places = place[row.score_positions]
    scored = places >= 0
    return replace(
        row,
        tokens=row.tokens[held],
        position_ids=row.position_ids[held],
        padding_mask=row.padding_mask[held],
        score_positions=places[scored],
        score_labels=row.score_labels[scored],
        score_is_response=row.score_is_response[scored],
        score_lengths=sum_per_sequence(scored, row.score_lengths).long(),
    )


def sum_per_sequence(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums consecutive runs of values.

    The sums stay in fp64: they are a few numbers a row, and so neither their order of summation nor a later
    all-reduce over ranks shows in fp32. `torch.segment_reduce` adds without atomics, so a run repeats bit by bit.

    Args:
        values: Any float dtype [n].
        lengths: Length of each run, int64 [sequences]; zeros are allowed, and they add up to ``n``.

    Returns:
        fp64 [sequences]; 0 for an empty run.
    """
    # unsafe=True skips a check of the lengths, which would wait for the device and refuses to have no run at all.
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True, initial=0)


def pair_logps(per_token_logps: torch.Tensor, row: PackedRow, cp_group: dist.ProcessGroup | None = None) -> PairLogps:
    """Averages log-probs over each response and sums them over the NLL scope of each chosen sequence.

    The NLL covers all scored tokens of a chosen sequence: which tokens those are, the plan has decided. Under context
    parallel one all-reduce adds up what the ranks hold of each sequence, 16 bytes a sequence.

    Args:
        per_token_logps: Log-prob of each scored token in nats, fp32 [n], in the order of ``row.score_positions``.
        row: The packed row that they belong to, or the rank's share of it (``context_shard``).
        cp_group: The context-parallel ranks that share the row; None means that ``row`` is whole.

    Returns:
        The pairs of the row, the same on every rank of ``cp_group``; empty tensors, attached to the graph, where it
        holds none. A gradient that is the same on every rank reaches each rank's own tokens once.
    """
    response_sums = sum_per_sequence(per_token_logps.where(row.score_is_response, 0.0), row.score_lengths)
    scored_sums = sum_per_sequence(per_token_logps, row.score_lengths)
    if cp_group is not None:
        response_sums, scored_sums = _SumOverRanks.apply(torch.stack((response_sums, scored_sums)), cp_group)

    # Sequences 2i and 2i + 1 are pair i. The dummy sequence of a row without pairs goes before anything is divided.
    sequences = 2 * len(row.pair_ids)
    logps = (response_sums[:sequences] / row.num_response_tokens[:sequences]).float()
    return PairLogps(
        chosen_logps=logps[0::2],
        rejected_logps=logps[1::2],
        nll_sums=-scored_sums[:sequences:2],
        nll_lengths=row.num_scored_tokens[:sequences:2],
    )


class _SumOverRanks(torch.autograd.Function):
    """Adds a tensor up over the ranks of a group; backward hands the gradient on as it is.

    Every rank computes the same loss from the sum, so each already has the whole gradient. A collective that adds up
    gradients as well (``torch.distributed.nn``) would scale it by the size of the group.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None
