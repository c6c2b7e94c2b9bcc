"""Megatron's settings at which the loss is exact, under Megatron-Bridge's names for their sections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from orpo_megatron.config import ConfigError

_LAYOUT = "the loss would depend on how ranks are laid out"
_VARYING = "rows differ in length"
_MASTERS = "the optimizer would start from what FP8 weights held before the model's were loaded into them"
#: Settings that must keep the value at which a run is exact and whole, and why. The section ``model`` is
#: Megatron-Core's ``TransformerConfig``.
EXACT_SETTINGS: dict[str, tuple[Any, str]] = {
    "model.hidden_dropout": (0.0, _LAYOUT),
    "model.attention_dropout": (0.0, _LAYOUT),
    "peft.dropout": (0.0, _LAYOUT),
    "model.calculate_per_token_loss": (False, "the loss is divided by counts of the whole global batch already"),
    "ddp.check_for_nan_in_grad": (False, "one rank would fail while the others wait, see run.on_nonfinite"),
    "ddp.check_for_large_grads": (False, "one rank would fail while the others wait, see run.on_nonfinite"),
    "ddp.use_megatron_fsdp": (False, "the loss is tested with Megatron's DistributedDataParallel only"),
    "dist.use_megatron_fsdp": (False, "the loss is tested with Megatron's DistributedDataParallel only"),
    "dist.use_torch_fsdp2": (False, "the loss is tested with Megatron's DistributedDataParallel only"),
    "dist.use_decentralized_pg": (False, "the loss asks Megatron-Core's parallel_state for its groups"),
    "model.moe_expert_capacity_factor": (None, _LAYOUT),
    "model.moe_expert_rank_capacity_factor": (None, _LAYOUT),
    "model.moe_input_jitter_eps": (None, _LAYOUT),
    "model.moe_router_force_load_balancing": (False, "it routes at random"),
    "model.moe_router_force_biased": (None, "it routes at random"),
    "model.tp_comm_overlap": (False, f"its buffers have one size, and {_VARYING}"),
    "comm_overlap.tp_comm_overlap": (False, f"its buffers have one size, and {_VARYING}"),
    "model.overlap_moe_expert_parallel_comm": (False, "its schedule takes no output processor"),
    "comm_overlap.overlap_moe_expert_parallel_comm": (False, "its schedule takes no output processor"),
    "model.defer_embedding_wgrad_compute": (False, "the head computes that gradient at once"),
    "comm_overlap.defer_embedding_wgrad_compute": (False, "the head computes that gradient at once"),
    "model.hybrid_context_parallel": (False, "its schedule packs rows by itself"),
    "model.cuda_graph_impl": ("none", f"a graph has one size, and {_VARYING}"),
    "model.enable_cuda_graph": (False, f"a graph has one size, and {_VARYING}"),
    "model.external_cuda_graph": (False, f"a graph has one size, and {_VARYING}"),
    "mixed_precision.fp8_param_gather": (False, _MASTERS),
    "mixed_precision.fp8_param": (False, _MASTERS),
    "mixed_precision.reuse_grad_buf_for_mxfp8_param_ag": (False, "it goes with fp8_param_gather"),
}


def exact_settings(section: str) -> Iterator[tuple[str, Any]]:
    """Yields the settings of a section that must keep one value, with that value."""
    for name, (value, _) in EXACT_SETTINGS.items():
        if name.startswith(f"{section}."):
            yield name.removeprefix(f"{section}."), value


def check_adapted_modules(target_modules: Iterable[str]) -> None:
    """Checks that adapters, of the section ``peft``, leave the vocabulary's layers alone.

    Raises:
        ConfigError: If one of their target modules is such a layer.
    """
    for module in target_modules:
        if "output_layer" in str(module) or "word_embeddings" in str(module):
            raise ConfigError(
                f"peft.target_modules ({module}) must not hold the vocabulary's layers: the head reads their weights, "
                "past any adapter. Leave it out."
            )
