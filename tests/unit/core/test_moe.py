"""Padding and auxiliary losses of a mixture of experts, on one rank; two ranks are in test_two_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def tracker(one_rank: None) -> Iterator[Any]:
    """An empty tracker of Megatron-Core's, which this process drops again."""
    from megatron.core.transformer.moe import moe_logging

    moe_logging.destroy_moe_metrics_tracker()
    yield moe_logging.get_moe_metrics_tracker()
    moe_logging.destroy_moe_metrics_tracker()


def moe_config(**settings: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes: dict[str, Any] = dict(num_layers=4, hidden_size=8, num_attention_heads=2, num_moe_experts=4)
    return TransformerConfig(**{**sizes, **settings})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"moe_aux_loss_coeff": 0.01}, ["load_balancing_loss"]),
        ({"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "seq_aux_loss"}, ["seq_load_balancing_loss"]),
        (
            {
                "moe_aux_loss_coeff": [0.1, 0.0, 0.2],
                "moe_router_load_balancing_type": ["global_aux_loss", "aux_loss", "seq_aux_loss"],
            },
            ["global_load_balancing_loss", "seq_load_balancing_loss"],
        ),
        ({"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "none"}, []),
        ({"moe_z_loss_coeff": 1e-3}, ["z_loss"]),
        ({"moe_z_loss_coeff": 1e-3, "moe_aux_loss_coeff": 0.01}, ["load_balancing_loss", "z_loss"]),
        ({"num_moe_experts": None, "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 1e-3}, []),
    ],
)
def test_the_auxiliary_losses_that_are_on(megatron_on_cpu: None, settings: dict[str, Any], names: list[str]) -> None:
    from orpo_megatron.core.moe import auxiliary_loss_names, has_auxiliary_loss

    config = moe_config(**settings)
    assert auxiliary_loss_names(config) == names
    assert has_auxiliary_loss(config) is bool(names)


@pytest.mark.parametrize(
    ("num_layers", "frequency", "count"), [(4, 1, 4), (4, 2, 2), (5, 2, 3), (5, 3, 2), (5, 9, 1), (4, [0, 1, 1, 0], 2)]
)
def test_layers_with_a_router_are_counted(
    megatron_on_cpu: None, num_layers: int, frequency: int | list[int], count: int
) -> None:
    """A frequency of f means the first of every f layers."""
    from orpo_megatron.core.moe_log import _num_moe_layers

    assert _num_moe_layers(moe_config(num_layers=num_layers, moe_layer_freq=frequency)) == count


def test_a_loss_is_the_mean_over_layers_and_microbatches(tracker: Any) -> None:
    """Layers 1 and 3 have routers; two microbatches leave 2 + 4 and 1 + 5 in the tracker: 12 over 4."""
    from orpo_megatron.core.moe_log import auxiliary_losses

    config = moe_config(moe_layer_freq=2, moe_aux_loss_coeff=0.01, moe_z_loss_coeff=1e-3)
    for layer, value in ((1, 2.0), (3, 4.0), (1, 1.0), (3, 5.0)):
        tracker.record("load_balancing_loss", torch.tensor(value), layer, 4)
    for _ in range(2):  # it changes nothing
        assert auxiliary_losses(config, 2) == {"load_balancing_loss": 3.0, "z_loss": 0.0}
    assert tracker.metrics["load_balancing_loss"].values.tolist() == [3.0, 0.0, 9.0, 0.0]
    assert auxiliary_losses(moe_config(), 2) == {}


class Chunk(torch.nn.Module):
    """A model chunk, of which the mask depends on one attribute."""

    def __init__(self, pre_process: bool) -> None:
        super().__init__()
        self.pre_process = pre_process


@pytest.mark.parametrize("pre_process", [True, False])
def test_the_router_gets_the_mask_of_all_tokens_without_sequence_parallel(
    megatron_on_cpu: None, pre_process: bool
) -> None:
    from orpo_megatron.core.moe import router_padding_mask

    padding = torch.tensor([False, False, True, False, True, True])
    mask = router_padding_mask(padding, Chunk(pre_process), moe_config())
    assert mask is not None and torch.equal(mask, padding[None])
    assert router_padding_mask(padding, Chunk(pre_process), moe_config(num_moe_experts=None)) is None
