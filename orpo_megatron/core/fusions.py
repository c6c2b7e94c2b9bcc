"""Fused kernels, which a machine without Transformer Engine or a GPU does without."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_fusion",
    "persist_layer_norm",
)


def turn_off_fusions(config: TransformerConfig) -> None:
    """Turns off every fused kernel of a model's configuration."""
    for name in FUSIONS:
        if hasattr(config, name):  # Megatron-Core 0.15 knows fewer
            setattr(config, name, False)
