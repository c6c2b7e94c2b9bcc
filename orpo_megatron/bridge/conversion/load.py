"""A Megatron checkpoint's whole model on one process, however it was split; in host memory, which holds any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.bridge.training.checkpointing import (
    _generate_model_state_dict,
    apply_peft_adapter_filter_to_state_dict,
)
from megatron.bridge.training.initialize import destroy_global_state
from megatron.bridge.training.model_load_save import load_model_config, temporary_distributed_context
from megatron.bridge.utils.instantiate_utils import instantiate
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.utils import unwrap_model

from orpo_megatron.bridge.conversion.checkpoint import (
    RUN_CONFIG,
    base_of,
    checkpoint_folder,
    is_hugging_face,
    stored_dtype,
)
from orpo_megatron.bridge.model import CompletedBridge, fit_to_machine, set_dtype


@contextmanager
def one_process() -> Iterator[None]:
    """Has Megatron run on this process alone, and forget it in the end, so that it can be set up anew."""
    try:
        with temporary_distributed_context("gloo"):
            yield
    finally:
        destroy_global_state()


def load_checkpoint_model(folder: Path, dtype: torch.dtype | None = None) -> list[torch.nn.Module]:
    """Loads a checkpoint's whole model into this one process.

    Adapters are loaded into the model that they were trained on, which the checkpoint names.

    Args:
        folder: From ``checkpoint_folder``.
        dtype: Dtype of the model; by default the checkpoint's.

    Returns:
        The model as one chunk, on the CPU.
    """
    provider, _ = load_model_config(str(folder))
    _unsplit(provider)
    set_dtype(provider, dtype or stored_dtype(folder))
    fit_to_machine(provider)
    base, adapters = base_of(folder), None
    if base is not None:
        adapters = instantiate(yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8"))["peft"])
        provider.register_pre_wrap_hook(lambda chunks: adapters(_load_base(chunks, Path(base)), training=False))
    provider.finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    _load_weights(chunks, folder, adapters)
    return chunks


def _unsplit(provider: Any) -> None:
    """Puts a model that was split over ranks on one."""
    provider.tensor_model_parallel_size = provider.pipeline_model_parallel_size = 1
    provider.context_parallel_size = provider.expert_model_parallel_size = 1
    provider.expert_tensor_parallel_size = 1
    provider.virtual_pipeline_model_parallel_size = provider.pipeline_model_parallel_layout = None
    provider.num_layers_in_first_pipeline_stage = provider.num_layers_in_last_pipeline_stage = None
    provider.sequence_parallel = False
    provider.perform_initialization = False
    provider.variable_seq_lengths = False


def _load_base(chunks: list[torch.nn.Module], base: Path) -> list[torch.nn.Module]:
    """Loads the model that adapters belong to."""
    if is_hugging_face(base):
        CompletedBridge.from_hf_pretrained(base, trust_remote_code=False).load_hf_weights(chunks)
    else:
        _load_weights(chunks, checkpoint_folder(base))
    return chunks


def _load_weights(chunks: list[torch.nn.Module], folder: Path, adapters: Any = None) -> None:
    """Loads weights straight into a model's parameters.

    Megatron-Core reads what it stores in parts, such as gated MLPs, into views of a parameter, and would then join
    them in a copy, half a model in all. With the parts already laid out there is nothing to join.

    Args:
        chunks: The model.
        folder: The checkpoint.
        adapters: What to load alone, or None for everything.
    """
    (model,) = unwrap_model(chunks)
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    wanted = _generate_model_state_dict([model], {"metadata": metadata})
    if adapters is not None:
        wanted = apply_peft_adapter_filter_to_state_dict(wanted, adapters)
    weights = {"model": {name: shard for name, shard in wanted["model"].items() if "_extra_state" not in name}}
    apply_factories(weights)
    dist_checkpointing.load(weights, str(folder))
