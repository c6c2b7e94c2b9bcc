"""Attention within the segments of a packed row, and layers of Megatron-Core that have it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from orpo_megatron.core.norm import LocalNorm, check_norm
from orpo_megatron.core.row import RowParams
from orpo_megatron.core.varlen import attend


class PackedAttention(MegatronModule):
    """Causal core attention inside each segment of a packed row and never across.

    Megatron-Core's own local attention takes neither packed rows nor context parallel, and Transformer Engine's takes
    no pair that shares its prompt. This one takes nothing but rows described by ``row_params``. Under context parallel
    each rank holds the queries of its own positions and gathers the keys and values of the whole row.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments that Megatron-Core gives every core attention; heads and sizes follow from the data."""
        super().__init__(config)
        self.scale: float | None = kwargs.get("softmax_scale")
        self.window = attention_window(config)
        self.cp_group = kwargs["pg_collection"].cp
        check_softmax(config)

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
        """Attends within each segment.

        Args:
            query: [t/cp, heads/tp, dim]: the positions that ``zigzag_positions`` gives this context-parallel rank.
            key: [t/cp, groups/tp, dim], at the same positions.
            value: [t/cp, groups/tp, dim].
            attention_mask: Not used: what attends to what is the row's.
            packed_seq_params: Of the row, from ``row_params``.
            **kwargs: What Megatron-Core passes to attention of other kinds; not used.

        Returns:
            Context, [t/cp, heads/tp, dim].

        Raises:
            ValueError: If the row is not one of ours, or a sequence is longer than the model's attention window.
        """
        if not isinstance(packed_seq_params, RowParams):
            raise ValueError("PackedAttention needs the packed_seq_params that core/row.py makes of a packed row.")
        if self.window is not None and packed_seq_params.longest_sequence > self.window:
            raise ValueError(
                f"A sequence of {packed_seq_params.longest_sequence} tokens is longer than the model's attention "
                f"window ({self.window}), which needs Transformer Engine. Set data.max_length to at most the window, "
                "or train on a GPU with data.share_prefix off."
            )
        if packed_seq_params.gather_order is not None:
            gathered = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
            key, value = (x.index_select(0, packed_seq_params.gather_order) for x in gathered)
        return attend(query, key, value, packed_seq_params.spans, self.scale)


def attention_window(config: TransformerConfig) -> int | None:
    """Returns how many tokens, itself among them, a token of the model sees at most; None where it sees all before."""
    before = config.window_size[0] if config.window_size else -1
    return before + 1 if before >= 0 else None


def check_softmax(config: TransformerConfig) -> None:
    """Checks that a model's attention has the softmax of ``PackedAttention``.

    Raises:
        ValueError: If it has another one.
    """
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        raise ValueError(
            f"Attention with softmax_type {config.softmax_type} needs Transformer Engine: PackedAttention has the "
            "plain softmax only. Install Transformer Engine and train on a GPU, with data.share_prefix off."
        )


def check_local_layers(config: TransformerConfig) -> None:
    """Checks that a model can be built of local layers.

    Raises:
        ValueError: If it has latent attention, or a softmax or norm that no local layer has.
    """
    if config.multi_latent_attention:
        raise ValueError(
            "Multi-latent attention needs Transformer Engine: no local layer has it for packed rows. Install "
            "Transformer Engine and train on a GPU."
        )
    check_softmax(config)
    check_norm(config)


def packed_local_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Returns Megatron-Core's local layers with attention within packed sequences and norms for sequence parallel.

    An importable function on purpose: checkpoints name it, and a lambda would break the Hugging Face export.

    Args:
        config: Model configuration or provider.
        vp_stage: Virtual pipeline stage that the layers are for.

    Raises:
        ValueError: As ``check_local_layers``.
    """
    check_local_layers(config)
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


def shared_prefix_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Returns Megatron-Core's Transformer Engine layers with attention that takes pairs which share their prompt.

    An importable function, as ``packed_local_layer_spec``, with its arguments.
    """
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return block
