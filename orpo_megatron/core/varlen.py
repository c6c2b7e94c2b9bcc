"""Attention of many spans of queries, each to keys of its own: SDPA on a CPU, a variable-length kernel on a GPU.

A span's mask is causal and aligned with its last query and key, as FlashAttention defines it since 2.1.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from orpo_megatron.segments import Span


class Spans:
    """The spans of a row, as a CPU or a GPU's kernels take them."""

    def __init__(self, spans: Sequence[Span], num_keys: int, device: torch.device | str | int) -> None:
        """Takes the spans of ``attention_spans`` and the length of the whole row.

        What a GPU's kernels need goes there without waiting for it.
        """
        queries = [span.num_queries for span in spans]
        if torch.device(device).type != "cuda":
            # The row is cut wherever a span's keys start or stop: autograd joins such pieces again in one pass, where
            # it would add up a whole row for every slice.
            cuts = sorted({0, num_keys, *(cut for span in spans for part in span.keys for cut in part)})
            place = {cut: i for i, cut in enumerate(cuts)}
            self.query_sizes = queries
            self.piece_sizes = [after - before for before, after in pairwise(cuts)]
            self.pieces_of = [
                [i for part in span.keys for i in range(place[part[0]], place[part[1]])] for span in spans
            ]
            return
        keys = [sum(stop - start for start, stop in span.keys) for span in spans]
        index = torch.cat([torch.arange(start, stop) for span in spans for start, stop in span.keys])
        self.max_queries, self.max_keys = max(queries), max(keys)
        self.key_index, self.cu_queries, self.cu_keys = (
            x.pin_memory().to(device, non_blocking=True)
            for x in (index, *(torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (queries, keys)))
        )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float | None = None
) -> torch.Tensor:
    """Returns causal attention of each span's queries to its keys.

    Args:
        query: [queries, heads, dim], the spans' queries one after another.
        key: [t, groups, dim], of the whole row; each group serves heads / groups heads.
        value: [t, groups, dim].
        spans: The spans of the row.
        scale: What scores are multiplied by; 1 / sqrt(dim) where it is None.

    Returns:
        [queries, heads, dim].

    Raises:
        RuntimeError: On a GPU, where neither PyTorch nor flash-attn has a variable-length kernel.
    """
    if query.is_cuda:
        key, value = (x.index_select(0, spans.key_index) for x in (key, value))
        lengths = (spans.cu_queries, spans.cu_keys, spans.max_queries, spans.max_keys)
        return _kernel()(query, key, value, *lengths, scale=scale)
    key_pieces, value_pieces = key.split(spans.piece_sizes), value.split(spans.piece_sizes)
    outputs = []
    for q, pieces in zip(query.split(spans.query_sizes), spans.pieces_of, strict=True):
        k, v = (torch.cat([x[i] for i in pieces]) for x in (key_pieces, value_pieces))
        outputs.append(_attend_span(q, k, v, scale))
    return torch.cat(outputs)


def _attend_span(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Attends from the last positions of ``key`` to it, causally; [q, heads, dim] over [k, groups, dim]."""
    # [length, heads, dim] -> [1, heads, length, dim]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    if len(query) == len(key):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        mask = causal_lower_right(len(query), len(key))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


@cache
def _kernel() -> Callable[..., Any]:
    """Returns a variable-length kernel for GPUs: PyTorch's (2.11 or later), else flash-attn's.

    It takes queries, keys, values, where the spans of queries and of keys start, the longest of each, and the scale.
    """
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" in inspect.signature(varlen_attn).parameters:
            return partial(varlen_attn, window_size=(-1, 0), enable_gqa=True)
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise RuntimeError(
            "PackedAttention on a GPU needs PyTorch 2.11 or flash-attn 2.1; this is PyTorch "
            f"{torch.__version__} without flash-attn. Install one of them, or set data.share_prefix to off."
        ) from error
    return lambda *args, scale: flash_attn_varlen_func(*args, softmax_scale=scale, causal=True)
