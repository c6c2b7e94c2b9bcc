"""Attention within packed sequences for models built of Megatron-Core's local layers (no Transformer Engine)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class PackedAttention(MegatronModule):
    """Causal core attention inside each packed sequence and never across: PyTorch's SDPA, one sequence at a time.

    Megatron-Core's own local attention takes no packed rows. This one takes nothing else.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments that Megatron-Core gives every core attention; heads and sizes follow from the data."""
        super().__init__(config)
        self.scale: float | None = kwargs.get("softmax_scale")
        self.window: int | None = config.window_size[0] + 1 if config.window_size else None
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise ValueError(
                f"Attention with softmax_type {config.softmax_type} needs Transformer Engine: PackedAttention has the "
                "plain softmax only. Install Transformer Engine and train on a GPU."
            )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        /,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attends within each sequence.

        Args:
            query: [t, heads/tp, dim].
            key: [t, groups/tp, dim].
            value: [t, groups/tp, dim].
            attention_mask: Not used: causal within each sequence.
            packed_seq_params: Where the sequences start (``cu_seqlens_q`` [sequences + 1]).
            **kwargs: What Megatron-Core passes to attention of other kinds; not used.

        Returns:
            Context, [t, heads/tp, dim].

        Raises:
            ValueError: If the row is not packed, or a sequence is longer than the model's attention window.
        """
        if packed_seq_params is None:
            raise ValueError("PackedAttention needs packed_seq_params: it takes packed rows only.")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if self.window is not None and max(lengths) > self.window:
            raise ValueError(
                f"A sequence of {max(lengths)} tokens is longer than the model's attention window ({self.window}), "
                "which needs Transformer Engine. Set data.max_length to at most the window, or train on a GPU."
            )
        outputs = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
            # [length, heads, dim] -> [1, heads, length, dim]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            outputs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)


def packed_local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Returns Megatron-Core's local layer specification with attention within packed sequences.

    An importable function on purpose: checkpoints name it, and a lambda would break the Hugging Face export.

    Args:
        config: Model configuration or provider.
    """
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec
