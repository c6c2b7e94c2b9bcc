"""What ranks tell one another beside tensors."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def from_all_ranks(mine: Any) -> list[Any]:
    """Returns what each rank gives, in the order of ranks; all ranks call it."""
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs
