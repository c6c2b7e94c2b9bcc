"""What a machine without Transformer Engine or a GPU does without: its layers and fused kernels."""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
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


def takes_local_layers() -> bool:
    """Returns whether models on this machine are built of local layers: it lacks Transformer Engine or a GPU."""
    return not (HAVE_TE and torch.cuda.is_available())


def turn_off_fusions(config: TransformerConfig) -> None:
    """Turns off every fused kernel of a model's configuration."""
    for name in FUSIONS:
        if hasattr(config, name):  # Megatron-Core 0.15 knows fewer
            setattr(config, name, False)
