"""Whether losses and gradients are finite, told before the optimizer takes them, on all ranks alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

#: Elements of a gradient buffer that are looked at in one go; 32 bits can number their bytes.
_PART = 2**28


def any_bad(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns whether any of some scalars is not finite, as a tensor on the device."""
    if not values:
        return torch.zeros((), dtype=torch.bool, device=torch.cuda.current_device())
    return ~torch.stack([value.float() for value in values]).isfinite().all()


def gradient_extremes(chunks: Iterable[Any]) -> list[torch.Tensor]:
    """Returns the least and the largest element of each gradient buffer, NaN where it holds one, without a copy.

    They cannot overflow, as a sum could. Of a distributed optimizer's buffers each rank's own shard is summed up and
    the rest is its own contribution; a rank without trainable parameters has no buffer.

    Args:
        chunks: The model's chunks, in Megatron's DistributedDataParallel.
    """
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parts = [part for buffer in buffers for part in buffer.grad_data.split(_PART)]
    return [extreme for part in parts for extreme in torch.aminmax(part)]


def on_any_rank(*bad: torch.Tensor) -> list[bool]:
    """Returns which of some findings a rank has made; all ranks call it, with 4 bytes for each.

    Args:
        *bad: Bool scalars on the device.
    """
    found = torch.stack(bad).int()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(one) for one in found.tolist()]
