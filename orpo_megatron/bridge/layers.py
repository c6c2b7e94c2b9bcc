"""The layers that a model is built of: its own, or those of Megatron-Core that can stand in for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.bridge.models.olmoe.olmoe_provider import OLMoESelfAttention, olmoe_layer_spec
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from orpo_megatron.config import ConfigError
from orpo_megatron.core.attention import check_local_layers, packed_local_layer_spec, shared_prefix_layer_spec

LayerSpec = Callable[..., TransformerBlockSubmodules]


def olmoe_local_layer_spec(config: GPTModelProvider, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Returns ``packed_local_layer_spec`` with OLMoE's attention, which norms queries and keys over all heads.

    An importable function, as that one, with its arguments.
    """
    block = packed_local_layer_spec(config, vp_stage)
    for layer in block.layer_specs:
        layer.submodules.self_attention.module = OLMoESelfAttention
    return block


#: Megatron-Core's plain decoder layers, as a model or a checkpoint of ours names them.
_PLAIN: tuple[Any, ...] = (
    default_layer_spec,
    get_gpt_decoder_block_spec,
    packed_local_layer_spec,
    shared_prefix_layer_spec,
)
#: What stands in for layers on a machine without Transformer Engine.
_LOCAL: dict[Any, LayerSpec] = {
    **dict.fromkeys(_PLAIN, packed_local_layer_spec),
    olmoe_layer_spec: olmoe_local_layer_spec,
    olmoe_local_layer_spec: olmoe_local_layer_spec,
}
#: What stands in for layers where pairs share their prompt.
_SHARED_PREFIX: dict[Any, LayerSpec] = dict.fromkeys(_PLAIN, shared_prefix_layer_spec)


def is_local(provider: GPTModelProvider) -> bool:
    """Returns whether the model is built of Megatron-Core's local layers."""
    return provider.transformer_layer_spec in _LOCAL.values()


def use_local_layers(provider: GPTModelProvider) -> None:
    """Builds a model of Megatron-Core's local layers, which need no Transformer Engine.

    Raises:
        ConfigError: If it has layers of its own that nothing can stand in for, or settings that no local layer has.
    """
    what, remedy = "a machine without Transformer Engine", "Train it on a GPU with Transformer Engine."
    if type(provider).provide is not GPTModelProvider.provide:
        raise ConfigError(f"{type(provider).__name__} builds its model in its own way, which {what} cannot. {remedy}")
    provider.transformer_layer_spec = _stand_in(provider, _LOCAL, what, remedy)
    try:
        check_local_layers(provider)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def use_shared_prefix_layers(provider: GPTModelProvider) -> None:
    """Builds a model of layers that take pairs which share their prompt.

    Raises:
        ConfigError: If it has layers of its own that nothing can stand in for.
    """
    remedy = "Set data.share_prefix to off."
    provider.transformer_layer_spec = _stand_in(provider, _SHARED_PREFIX, "data.share_prefix on", remedy)
    provider.apply_rope_fusion = False


def _stand_in(provider: GPTModelProvider, known: dict[Any, LayerSpec], what: str, remedy: str) -> LayerSpec:
    spec = provider.transformer_layer_spec
    function = getattr(spec, "func", spec)  # of a partial
    if function not in known:
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(f"This model has layers of its own ({name}), for which {what} has no stand-in. {remedy}")
    return known[function]
