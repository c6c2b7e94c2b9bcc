"""Positions of the tokens of a packed row, which Megatron-Core would count from the start of each segment."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.utils import unwrap_model

from orpo_megatron.core.attention import PackedAttention
from orpo_megatron.core.row import RowParams


def follow_positions(model: torch.nn.Module) -> None:
    """Makes a model's rotary embedding follow the positions of ``RowParams``: Megatron-Core's own, where not fused.

    Megatron-Core counts positions from the start of each segment, whatever ``position_ids`` say, but takes frequencies
    as they are where there is one for each token of the row. That is right for pairs that share their prompt, and on a
    CPU faster for others: there the embedding else goes by segments, each of which costs autograd a copy of the row.
    Doing it again changes nothing.

    Source: ``_apply_rotary_pos_emb_thd`` of Megatron-Core 0.19.

    Args:
        model: A ``GPTModel``, wrapped or not.
    """
    gpt: Any = unwrap_model(model)
    rotary = getattr(gpt, "rotary_pos_emb", None)
    if type(rotary) in (RotaryEmbedding, YarnRotaryEmbedding) and not gpt.config.apply_rope_fusion:
        gpt.rotary_pos_emb = _RowPositions(rotary)


def check_takes_shared_prefix(model: torch.nn.Module) -> None:
    """Checks that a model takes rows whose pairs share their prompt.

    Args:
        model: A ``GPTModel``, wrapped or not, after ``follow_positions``.

    Raises:
        ValueError: If it would let the two responses of a pair see one another, or miscount positions.
    """
    gpt: Any = unwrap_model(model)
    for name, module in gpt.named_modules():
        if name.endswith(".core_attention") and not isinstance(module, PackedAttention):
            raise ValueError(
                f"{name} is {type(module).__name__}, which would let both responses of a pair see one another. Rows "
                "whose pairs share their prompt need PackedAttention: set data.share_prefix to off, or give the model "
                "a layer specification of core/attention.py."
            )
    kind = "latent" if gpt.config.multi_latent_attention else gpt.position_embedding_type
    if kind in ("rope", "yarn") and gpt.config.apply_rope_fusion:
        raise ValueError(
            "apply_rope_fusion (True) must be False for rows whose pairs share their prompt: the fused kernel counts "
            "positions itself. Turn it off, or set data.share_prefix to off."
        )
    rotary = getattr(gpt, "rotary_pos_emb", None)
    if kind in ("rope", "yarn") and not isinstance(rotary, _RowPositions):
        raise ValueError(
            f"rotary_pos_emb ({type(rotary).__name__}) must be Megatron-Core's own for rows whose pairs share their "
            "prompt: another one may count positions in its own way. Set data.share_prefix to off."
        )
    if kind not in ("rope", "yarn", "learned_absolute", "none"):
        raise ValueError(
            f"position_embedding_type ({kind}) must be rope, yarn, learned_absolute or none for rows whose pairs "
            "share their prompt. Set data.share_prefix to off."
        )


class _RowPositions(torch.nn.Module):
    """Stands in for a model's rotary embedding: frequencies of each token's own position in rows that say them."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.position_ids: torch.Tensor | None = None

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Returns how many positions there are, and keeps those of the row for the call that follows."""
        params = next((x for x in (*args, *kwargs.values()) if isinstance(x, RowParams)), None)
        self.position_ids = None if params is None else params.position_ids
        return int(self.rotary.get_rotary_seq_len(*args, **kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns frequencies [t, 1, 1, dim] of the whole row, or what the model's own embedding returns."""
        frequencies = self.rotary(*args, **kwargs)
        if self.position_ids is None:
            return frequencies
        if isinstance(frequencies, tuple):  # YaRN's come with a scale
            return frequencies[0].index_select(0, self.position_ids), *frequencies[1:]
        return frequencies.index_select(0, self.position_ids)
