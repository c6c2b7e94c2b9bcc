"""What a mixture of experts needs beside the loss: padding kept from the router, and which losses it adds."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model

#: What Megatron-Core calls the auxiliary losses of a kind of load balancing.
_BALANCING_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def router_padding_mask(
    padding_mask: torch.Tensor, model: torch.nn.Module, config: TransformerConfig
) -> torch.Tensor | None:
    """Returns the mask by which routers leave padding out of their auxiliary losses.

    Megatron-Core splits the mask for sequence parallel where the embedding is, on the first stage; later stages must
    be given the part that belongs to their tokens.

    Args:
        padding_mask: True where a token is padding, bool [t/cp].
        model: The model chunk that is about to run.
        config: Its configuration.

    Returns:
        The mask, bool [1, t/cp], or [1, t/cp/tp] on later stages under sequence parallel; None for a dense model.
    """
    if not config.num_moe_experts:
        return None
    mask = padding_mask.unsqueeze(0)
    if not config.sequence_parallel or get_attr_wrapped_model(model, "pre_process"):
        return mask
    tp_group = parallel_state.get_tensor_model_parallel_group()
    return mask.chunk(tp_group.size(), dim=1)[tp_group.rank()]


def has_auxiliary_loss(config: TransformerConfig) -> bool:
    """Returns whether the routers add losses of their own in training."""
    return bool(auxiliary_loss_names(config))


def auxiliary_loss_names(config: TransformerConfig) -> list[str]:
    """Returns the names of the auxiliary losses that are on."""
    if not config.num_moe_experts:
        return []
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, coefficients = [kinds], [coefficients]
    names = [_BALANCING_LOSSES[k] for k, c in zip(kinds, coefficients, strict=True) if k in _BALANCING_LOSSES and c]
    return names + (["z_loss"] if config.moe_z_loss_coeff else [])
