"""What Megatron-Core's layers are told about a packed row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from orpo_megatron.batch import PackedRow
from orpo_megatron.core.varlen import Spans
from orpo_megatron.segments import attention_spans, zigzag_positions


@dataclass
class RowParams(PackedSeqParams):
    """Megatron-Core's description of a packed row, and what ``PackedAttention`` and rotary embeddings need beside it.

    Attributes:
        spans: What each query of this rank attends to.
        gather_order: Where each position of the whole row lies in what context-parallel ranks gather, int64 [t]; None
            where the rank holds the whole row.
        longest_sequence: Tokens of the longest sequence, without padding.
        position_ids: Position of each token of the whole row in its own sequence, int64 [t].
    """

    spans: Spans = field(default_factory=lambda: Spans([], 0, "cpu"))
    gather_order: torch.Tensor | None = None
    longest_sequence: int = 0
    position_ids: torch.Tensor | None = None


def row_params(row: PackedRow, device: torch.device | str | int, cp_size: int = 1, cp_rank: int = 0) -> RowParams:
    """Returns what Megatron-Core needs to keep attention inside the row's segments.

    Args:
        row: The whole row, on the CPU, so that no length has to be read from a GPU.
        device: Where the tensors go.
        cp_size: Size of the context-parallel group.
        cp_rank: Rank in that group.
    """
    order = None
    if cp_size > 1:
        lengths = row.cu_seqlens.diff().tolist()
        held = torch.cat([zigzag_positions(lengths, cp_size, rank) for rank in range(cp_size)])
        order = held.argsort().to(device, non_blocking=True)
    cu_seqlens, max_seqlen = row.cu_seqlens.to(device, non_blocking=True), row.max_seqlen
    # Megatron-Core's unfused rotary embedding, which shared prompts take, reads single lengths: on the host that is
    # free, on a GPU each would wait for it. PackedAttention does not look at these, as Transformer Engine's would.
    on_host = row.cu_seqlens if row.shares_prefix else None
    return RowParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=on_host,
        cu_seqlens_kv_padded=on_host,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        spans=Spans(attention_spans(row, cp_size, cp_rank), int(row.cu_seqlens[-1]), device),
        gather_order=order,
        longest_sequence=row.longest_sequence,
        position_ids=row.position_ids.to(device, non_blocking=True),
    )
