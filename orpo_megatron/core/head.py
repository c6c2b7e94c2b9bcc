"""The head: hidden states of the last stage to log-probs of the scored tokens, in place of the logits of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from orpo_megatron.batch import PackedRow
from orpo_megatron.logps import CACHE_BYTES, HeadMode, fused_logps


def score_tokens(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    config: TransformerConfig,
    context: PackedRow,
    mode: HeadMode = "auto",
    cache_bytes: int = CACHE_BYTES,
    **kwargs: Any,
) -> torch.Tensor:
    """Scores a row's tokens: the ``output_processor`` of ``GPTModel.forward`` (Megatron-Core >= 0.18).

    Only positions that predict a scored token meet the vocabulary.

    Args:
        hidden_states: [s, 1, h], or [s/tp, 1, h] under sequence parallel.
        output_layer: The model's output layer.
        output_weight: The tied embedding [v/tp, h], or None where the output layer has its own.
        scale_logits: The model's scaling of logits.
        config: The model's configuration. Where it has a ``vocab_size``, as Bridge's does, ids from there on are
            padding, and stay out of the softmax.
        context: The row that the hidden states belong to.
        mode: As in `fused_logps`.
        cache_bytes: As in `fused_logps`.
        **kwargs: What else Megatron-Core offers; not used.

    Returns:
        Log-probs of the row's scored tokens, fp32 [n], replicated over the tensor-parallel group.
    """
    # The layer is not called, only read, so what waits for its weights to be gathered (overlap_param_gather) is.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    return fused_logps(
        hidden_states[:, 0],
        output_layer.weight if output_weight is None else output_weight,
        context.score_labels,
        positions=context.score_positions,
        bias=output_layer.bias,
        logit_scale=float(scale_logits(torch.ones(()))),  # on the host, which nothing has to wait for
        tp_group=output_layer.tp_group,
        vocab_size=getattr(config, "vocab_size", None),
        sequence_parallel=config.sequence_parallel,
        mode=mode,
        cache_bytes=cache_bytes,
    )
