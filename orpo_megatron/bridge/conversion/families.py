"""The model families that Megatron-Bridge converts, read from its registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.conversion import model_bridge
from megatron.core.models.gpt import GPTModel
from transformers import PretrainedConfig

from orpo_megatron.config import ConfigError


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture that Megatron-Bridge converts.

    Attributes:
        architecture: Its name, as ``architectures`` of a config.json gives it.
        source: What it is registered by: its class, or its name where transformers has no such class.
        target: The Megatron model that it becomes.
    """

    architecture: str
    source: Any
    target: type

    @property
    def takes_head(self) -> bool:
        """Whether it becomes the model whose forward takes the ORPO head (``output_processor``)."""
        return self.target is GPTModel


def known_families() -> dict[str, Family]:
    """Returns all families in Bridge's registry, those of this package among them, by architecture."""
    targets = {_name(source): target for source, target in model_bridge.stream_weights_megatron_to_hf._exact_types}
    sources = {_name(source): source for source in model_bridge.get_model_bridge._exact_types}
    return {name: Family(name, sources[name], targets[name]) for name in sorted(sources)}


def _name(source: Any) -> str:
    """Returns the name of an architecture that is registered by class or by name."""
    return source if isinstance(source, str) else source.__name__


def find_family(hf_config: PretrainedConfig) -> Family:
    """Returns the family of a model.

    Raises:
        ConfigError: If Bridge does not know it.
    """
    known = known_families()
    names = hf_config.architectures or []
    family = next((known[name] for name in names if name in known), None)
    if family is None:
        name = ", ".join(names) or f"{hf_config.model_type} (config.json names no architectures)"
        raise ConfigError(f"Megatron-Bridge has no bridge for {name}. It has these: {', '.join(known)}.")
    return family
