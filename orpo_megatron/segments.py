"""Per-token log-probs -> what the objective needs to know about each pair of a packed row."""

from __future__ import annotations

import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.loss import PairLogps


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


def pair_logps(per_token_logps: torch.Tensor, row: PackedRow) -> PairLogps:
    """Averages log-probs over each response and sums them over the NLL scope of each chosen sequence.

    The NLL covers all scored tokens of a chosen sequence: which tokens those are, the plan has decided.

    Args:
        per_token_logps: Log-prob of each scored token in nats, fp32 [n], in the order of ``row.score_positions``.
        row: The packed row that they belong to.

    Returns:
        The pairs of the row; empty tensors, attached to the graph, where it holds none.
    """
    in_response = row.score_is_response
    response_sums = sum_per_sequence(per_token_logps.where(in_response, 0.0), row.score_lengths)
    response_lengths = sum_per_sequence(in_response, row.score_lengths)
    scored_sums = sum_per_sequence(per_token_logps, row.score_lengths)

    # Sequences 2i and 2i + 1 are pair i. The dummy sequence of a row without pairs goes before anything is divided.
    sequences = 2 * len(row.pair_ids)
    logps = (response_sums[:sequences] / response_lengths[:sequences]).float()
    return PairLogps(
        chosen_logps=logps[0::2],
        rejected_logps=logps[1::2],
        nll_sums=-scored_sums[:sequences:2],
        nll_lengths=row.score_lengths[:sequences:2],
    )
