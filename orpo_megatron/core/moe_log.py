"""The auxiliary losses of a mixture of experts, for the log (Megatron-Core >= 0.18)."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from orpo_megatron.core.moe import auxiliary_loss_names


def auxiliary_losses(config: TransformerConfig, num_microbatches: int) -> dict[str, float]:
    """Returns the routers' auxiliary losses in the training step that just ran, without their coefficients.

    Each is the mean over layers, microbatches and data-parallel ranks, which share the global balancing loss. All
    ranks must call it, before the losses are cleared (Bridge clears them when it logs the step); it changes nothing.

    Args:
        config: The model's configuration.
        num_microbatches: Microbatches of the step on this rank.
    """
    tracker, losses = get_moe_metrics_tracker(), dict[str, float]()
    for name in auxiliary_loss_names(config):
        tracker.ensure_initialized(name, config.num_layers)  # a stage may have no router
        values = tracker.metrics[name].values.double()
        # Each stage knows its own layers; the ranks of a balancing loss's group hold parts of it, every rank a z-loss.
        sharing = parallel_state.get_tensor_and_context_parallel_group()
        replicas = parallel_state.get_data_parallel_group()
        for group in (parallel_state.get_pipeline_model_parallel_group(), sharing, replicas):
            dist.all_reduce(values, group=group)
        copies = {"global_load_balancing_loss": 1, "z_loss": sharing.size() * replicas.size()}
        count = _num_moe_layers(config) * num_microbatches * copies.get(name, replicas.size())
        losses[name] = float(values.sum()) / count
    return losses


def _num_moe_layers(config: TransformerConfig) -> int:
    """Returns how many layers have a router."""
    frequency = config.moe_layer_freq
    return sum(frequency) if isinstance(frequency, list) else -(-config.num_layers // frequency)
