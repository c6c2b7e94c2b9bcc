"""Attention within packed sequences for models built of Megatron-Core's local layers (no Transformer Engine)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from orpo_megatron.core.norm import LocalNorm
from orpo_megatron.segments import zigzag_chunks, zigzag_positions


class PackedAttention(MegatronModule):
    """Causal core attention inside each packed sequence and never across: PyTorch's SDPA, one sequence at a time.

    Megatron-Core's own local attention takes neither packed rows nor context parallel. This one takes nothing but
    packed rows. Under context parallel each rank holds the queries of its own positions and gathers the keys and
    values of the whole row.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments that Megatron-Core gives every core attention; heads and sizes follow from the data."""
        super().__init__(config)
        self.scale: float | None = kwargs.get("softmax_scale")
        self.window: int | None = config.window_size[0] + 1 if config.window_size else None
        self.cp_group = kwargs["pg_collection"].cp
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
            query: [t/cp, heads/tp, dim]: the positions that ``zigzag_positions`` gives this context-parallel rank.
            key: [t/cp, groups/tp, dim], at the same positions.
            value: [t/cp, groups/tp, dim].
            attention_mask: Not used: causal within each sequence.
            packed_seq_params: Where the sequences start in the whole row (``cu_seqlens_q`` [sequences + 1]).
            **kwargs: What Megatron-Core passes to attention of other kinds; not used.

        Returns:
            Context, [t/cp, heads/tp, dim].

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
        key, value = self._whole_row(lengths, key, value)
        outputs, done = [], 0
        chunks_of = zigzag_chunks(lengths, self.cp_group.size(), self.cp_group.rank())
        for chunks, k, v in zip(chunks_of, key.split(lengths), value.split(lengths), strict=True):
            for start, stop in chunks:
                outputs.append(self._attend(query[done : done + stop - start], k[:stop], v[:stop]))
                done += stop - start
        return torch.cat(outputs)

    def _whole_row(self, lengths: list[int], *shards: torch.Tensor) -> list[torch.Tensor]:
        """Gathers what is split over context-parallel ranks, [t/cp, ...] each, into the row's order, [t, ...].

        Backward adds up the gradients of all ranks and gives each its own positions.
        """
        size = self.cp_group.size()
        if size == 1:
            return list(shards)
        gathered = torch.cat([zigzag_positions(lengths, size, rank) for rank in range(size)])
        order = gathered.argsort().to(shards[0].device)
        return [gather_from_sequence_parallel_region(x, group=self.cp_group)[order] for x in shards]

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends from the last positions of ``key`` to it, causally; [q, heads, dim] over [k, groups, dim]."""
        # [length, heads, dim] -> [1, heads, length, dim]
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        if len(query) == len(key):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        else:
            mask = causal_lower_right(len(query), len(key))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)


def packed_local_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Returns Megatron-Core's local layers with attention within packed sequences and norms for sequence parallel.

    An importable function on purpose: checkpoints name it, and a lambda would break the Hugging Face export.

    Args:
        config: Model configuration or provider.
        vp_stage: Virtual pipeline stage that the layers are for.

    Raises:
        ValueError: If the model has latent attention.
    """
    if config.multi_latent_attention:
        raise ValueError(
            "Multi-latent attention needs Transformer Engine: no local layer has it for packed rows. Install "
            "Transformer Engine and train on a GPU."
        )
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalNorm
        if attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = LocalNorm
    block.layer_norm = LocalNorm
    return block
