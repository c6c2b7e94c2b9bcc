"""Attention of many spans of queries, each to keys of its own: SDPA on a CPU, a variable-length kernel on a GPU.

A span's mask is causal and aligned with its last query and key, as FlashAttention defines it since 2.1.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from orpo_megatron.segments import Span


class Spans:
    """The spans of a row, as a CPU or a GPU's kernels take them; worked out when the first layer asks.

    Attributes:
        spans: From ``attention_spans``.
        num_keys: Length of the whole row.
        device: Where the row is.
    """

    def __init__(self, spans: Sequence[Span], num_keys: int, device: torch.device | str | int) -> None:
        """Keeps what it is given."""
        self.spans, self.num_keys, self.device = spans, num_keys, device
        self.query_sizes = [span.num_queries for span in spans]

    @cached_property
    def pieces(self) -> tuple[list[int], list[list[int]]]:
        """Sizes of the pieces of a row that is cut wherever a span's keys start or stop, and the pieces of each span.

        Autograd joins such pieces again in one pass, where it would add up a whole row for every slice.
        """
        cuts = sorted({0, self.num_keys, *(cut for span in self.spans for part in span.keys for cut in part)})
        place = {cut: i for i, cut in enumerate(cuts)}
        sizes = [after - before for before, after in pairwise(cuts)]
        return sizes, [[i for a, b in span.keys for i in range(place[a], place[b])] for span in self.spans]

    @cached_property
    def key_index(self) -> torch.Tensor:
        """The keys of all spans, one after another, int64 on the device."""
        parts = [torch.arange(start, stop) for span in self.spans for start, stop in span.keys]
        return self._moved(torch.cat(parts))

    @cached_property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Where the queries and the keys of each span start, int32 on the device, and the most that a span has."""
        keys = [sum(stop - start for start, stop in span.keys) for span in self.spans]
        starts = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (self.query_sizes, keys)]
        return self._moved(starts[0]), self._moved(starts[1]), max(self.query_sizes), max(keys)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sends a tensor to the GPU without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True)


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
        return _kernel()(query, key, value, *spans.lengths, scale=scale)
    sizes, pieces_of = spans.pieces
    key_pieces, value_pieces = key.split(sizes), value.split(sizes)
    outputs = []
    for q, pieces in zip(query.split(spans.query_sizes), pieces_of, strict=True):
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
