"""The head: hidden states of the last stage to log-probs of the scored tokens, in place of the logits of all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

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
    vocab_size: int | None = None,
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
        config: The model's configuration.
        context: The row that the hidden states belong to.
        vocab_size: Ids from there on are padding, and stay out of the softmax; by default those from the
            configuration's own ``vocab_size`` on, where it has one.
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
        vocab_size=vocab_size or getattr(config, "vocab_size", None),
        sequence_parallel=config.sequence_parallel,
        mode=mode,
        cache_bytes=cache_bytes,
    )


#: Whether this Megatron-Core takes an ``output_processor``.
_HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters


def call_with_head(
    model: torch.nn.Module, score: Callable[..., torch.Tensor], row: PackedRow, **inputs: Any
) -> torch.Tensor:
    """Calls a model that scores a row's tokens in place of returning logits: the one place that goes by version.

    Before Megatron-Core 0.18 a model has nowhere to register a head. There the head stands in for the ``forward`` of
    the output layer during the call, which is handed the same hidden states and weight; nothing of it stays.

    Args:
        model: A ``GPTModel``, wrapped or not.
        score: ``score_tokens`` with its settings.
        row: The row, or this rank's share of it.
        **inputs: What else the model's ``forward`` takes.

    Returns:
        What ``score`` returns on the last pipeline stage, hidden states on others.
    """
    if _HAS_OUTPUT_PROCESSOR:
        return model(**inputs, output_processor=score, output_processor_context=row)
    gpt: Any = unwrap_model(model)
    if not gpt.post_process:
        return model(**inputs)
    layer = gpt.output_layer

    def scores(hidden_states: torch.Tensor, weight: torch.Tensor | None = None, **kwargs: Any) -> Any:
        per_token_logps = score(
            hidden_states=hidden_states,
            output_layer=layer,
            output_weight=weight,
            scale_logits=lambda logits: logits,  # there is no such scaling yet
            config=gpt.config,
            context=row,
        )
        return per_token_logps[:, None, None], None  # where logits [s, b, v] and a bias are looked for

    layer.forward = scores
    try:
        return model(**inputs).reshape(-1)
    finally:
        del layer.forward
