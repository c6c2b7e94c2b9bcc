"""The head: hidden states of the last stage to log-probs of the scored tokens, in place of the logits of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from orpo_megatron.batch import PackedRow
from orpo_megatron.logps import vocab_parallel_logps


def score_tokens(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    config: TransformerConfig,
    context: PackedRow,
    **kwargs: Any,
) -> torch.Tensor:
    """Scores a row's tokens: the ``output_processor`` of ``GPTModel.forward`` (Megatron-Core >= 0.18).

    Only positions that predict a scored token meet the vocabulary.

    Args:
        hidden_states: [s, 1, h], or [s/tp, 1, h] under sequence parallel.
        output_layer: The model's output layer.
        output_weight: The tied embedding [v/tp, h], or None where the output layer has its own.
        scale_logits: The model's scaling of logits.
        config: The model's configuration.
        context: The row that the hidden states belong to.
        **kwargs: What else Megatron-Core offers; not used.

    Returns:
        Log-probs of the row's scored tokens, fp32 [n], replicated over the tensor-parallel group.
    """
    tp_group = output_layer.tp_group
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
    scored = hidden_states[:, 0].index_select(0, context.score_positions)
    if not config.sequence_parallel:
        scored = copy_to_tensor_model_parallel_region(scored, group=tp_group)
    # The layer is not called, only read, so what waits for its weights to be gathered (overlap_param_gather) is.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    weight = output_layer.weight if output_weight is None else output_weight
    logits = scale_logits(F.linear(scored, weight, output_layer.bias))
    return vocab_parallel_logps(logits, context.score_labels, tp_group)
