"""What ranks tell one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from orpo_megatron.metrics import METRICS


def on_rank_0(
    metrics: Mapping[str, torch.Tensor] | Mapping[str, float], names: Sequence[str] = tuple(METRICS)
) -> dict[str, float]:
    """Brings the metrics, which only the last pipeline stage knows, to rank 0, and to all others.

    Args:
        metrics: Averages by name; empty on every rank but those of the last pipeline stage.
        names: Which of them, the same on every rank.

    Returns:
        The metrics as floats, in the order of ``names``; a metric that counted nothing is NaN.
    """
    device = torch.cuda.current_device()
    values = torch.full((len(names),), float("nan"), dtype=torch.float64, device=device)
    if metrics:
        values = torch.stack(
            [torch.as_tensor(metrics[name], dtype=torch.float64, device=device).reshape(()) for name in names]
        )
    if dist.get_world_size() > 1:
        # Ranks number the places in a grid of parallel sizes, whatever its order of axes, so the last rank has the
        # last place along each of them: it lies on the last stage.
        dist.broadcast(values, src=dist.get_world_size() - 1)
    return dict(zip(names, values.tolist(), strict=True))


def from_all_ranks(mine: Any) -> list[Any]:
    """Returns what each rank gives, in the order of ranks; all ranks call it."""
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs
