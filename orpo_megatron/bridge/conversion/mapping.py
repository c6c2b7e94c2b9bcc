"""Which parameter of a Megatron model comes from which Hugging Face tensor, and that none is forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config, unwrap_model

from orpo_megatron.bridge.conversion.weights import some
from orpo_megatron.config import ConfigError


def check_covered(tasks: Iterable[Any], chunks: Sequence[torch.nn.Module]) -> None:
    """Checks that every parameter on this rank is converted; Bridge 0.6 logs those that are not, and goes on.

    Args:
        tasks: Bridge's conversion tasks.
        chunks: The model.

    Raises:
        ConfigError: If one is not: on import it would keep whatever its memory holds.
    """
    covered = {
        (task.vp_stage, task.param_name) for task in tasks if task is not None and task.megatron_module is not None
    }
    tied = getattr(get_model_config(chunks[0]), "share_embeddings_and_output_weights", False)
    forgotten = [
        name
        for stage, chunk in enumerate(unwrap_model(list(chunks)))
        for name, _ in chunk.named_parameters()
        if (stage, name) not in covered and ".adapter." not in name and not (tied and "output_layer" in name)
    ]
    if forgotten:
        raise ConfigError(
            f"{len(forgotten)} of the model's parameters would not be converted ({some(forgotten)}): the Hugging Face "
            "weights lack them, or Megatron-Bridge does not know their names in the layers that this machine takes."
        )


def unused_tensors(tasks: Iterable[Any], stored: Iterable[str]) -> list[str]:
    """Returns the Hugging Face tensors that no parameter comes from."""
    used: set[str] = set()
    for task in tasks:
        names = task.mapping.hf_param
        used |= {names} if isinstance(names, str) else set(names.values())
    return sorted(set(stored) - used)
