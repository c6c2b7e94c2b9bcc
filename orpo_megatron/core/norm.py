"""Normalisation for models built of Megatron-Core's local layers (no Transformer Engine)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_KINDS: dict[str, Any] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class LocalNorm:
    """PyTorch's ``RMSNorm`` or ``LayerNorm``, marked so that it trains under sequence parallel.

    There each tensor-parallel rank normalises its own tokens, so the gradients of the weights are partial sums.
    Megatron-Core adds them up over the ranks if a parameter says ``sequence_parallel``; its own local norm does
    not, and therefore refuses sequence parallel.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        """Takes the arguments that Megatron-Core gives every norm.

        Args:
            config: Says which norm it is.
            hidden_size: Size of the last dimension.
            eps: Added to the variance.
            **kwargs: What Megatron-Core passes to norms of other kinds; not used.

        Returns:
            The norm, a ``torch.nn.Module``.

        Raises:
            ValueError: If the norm is another one, or its weight is stored minus 1.
        """
        check_norm(config)
        norm: torch.nn.Module = _KINDS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def check_norm(config: TransformerConfig) -> None:
    """Checks that a model's norms are ones that ``LocalNorm`` can be.

    Raises:
        ValueError: If they are others, or their weights are stored minus 1.
    """
    if config.normalization not in _KINDS or config.layernorm_zero_centered_gamma:
        raise ValueError(
            f"The model's norm ({config.normalization}, layernorm_zero_centered_gamma "
            f"{config.layernorm_zero_centered_gamma}) needs Transformer Engine: without it there are only "
            f"{' and '.join(_KINDS)} with plain weights. Install Transformer Engine and train on a GPU."
        )
