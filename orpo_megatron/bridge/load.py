"""A Megatron checkpoint's whole model on one process, however it was split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.bridge.training.checkpointing import (
    _generate_model_state_dict,
    _load_model_weights_from_checkpoint,
    apply_peft_adapter_filter_to_state_dict,
)
from megatron.bridge.training.model_load_save import build_and_load_model, load_model_config
from megatron.bridge.utils.instantiate_utils import instantiate
from megatron.core import dist_checkpointing

from orpo_megatron.bridge.checkpoint import RUN_CONFIG, base_of, checkpoint_folder, is_hugging_face
from orpo_megatron.bridge.model import CompletedBridge, fit_to_machine, set_dtype


def load_checkpoint_model(folder: Path, dtype: torch.dtype | None = None) -> list[torch.nn.Module]:
    """Loads a checkpoint's whole model into this one process.

    Adapters are loaded into the model that they were trained on, which the checkpoint names.

    Args:
        folder: From ``checkpoint_folder``.
        dtype: Dtype of the model; by default the checkpoint's.

    Returns:
        The model as one chunk.
    """
    provider, megatron_args = load_model_config(str(folder))
    _unsplit(provider)
    if dtype is not None:
        set_dtype(provider, dtype)
    fit_to_machine(provider)
    base, on_cpu = base_of(folder), not torch.cuda.is_available()
    if base is not None:
        return _load_adapters(provider, folder, Path(base), on_cpu)
    model = build_and_load_model(str(folder), provider, None, megatron_args, use_cpu_init=on_cpu)
    return model if isinstance(model, list) else [model]


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


def _load_adapters(provider: Any, folder: Path, base: Path, on_cpu: bool) -> list[torch.nn.Module]:
    """Builds the model that adapters belong to, and loads both."""
    adapters = instantiate(yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8"))["peft"])

    def load_base(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        if is_hugging_face(base):
            CompletedBridge.from_hf_pretrained(base, trust_remote_code=False).load_hf_weights(chunks)
        else:
            _load_model_weights_from_checkpoint(str(checkpoint_folder(base)), chunks)
        return adapters(chunks, training=False)

    provider.register_pre_wrap_hook(load_base)
    provider.finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=on_cpu)
    wanted = apply_peft_adapter_filter_to_state_dict(_generate_model_state_dict(chunks, {}), adapters)
    chunks[0].load_state_dict(dist_checkpointing.load(wanted, str(folder))["model"], strict=False)
    return chunks
