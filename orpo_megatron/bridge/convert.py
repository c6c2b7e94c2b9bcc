"""Hugging Face to Megatron and back, on a CPU or a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.model_load_save import (
    build_and_load_model,
    load_model_config,
    temporary_distributed_context,
)
from transformers import GenerationConfig, PretrainedConfig

from orpo_megatron.bridge.model import fit_to_machine, make_bridge, set_dtype
from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.data.sources import load_tokenizer


def write_artifacts(recipe: Recipe, bridge: Any, folder: Path) -> None:
    """Writes what belongs to a Hugging Face model beside its weights.

    That is the configuration, the tokenizer with the chat template that the run used, and the generation settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hf_config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.cache_dir, recipe.data.chat_template)
    config = hf_config.to_dict()
    config.pop("auto_map", None)
    type(hf_config).from_dict(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _generation_config(recipe, tokenizer).save_pretrained(folder)


def _generation_config(recipe: Recipe, tokenizer: Any) -> GenerationConfig:
    """Returns the base model's generation settings, or plain ones that stop at the tokenizer's EOS."""
    try:
        return GenerationConfig.from_pretrained(model_source(recipe))
    except OSError:
        pass  # a model need not have any
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )


def checkpoint_folder(path: Path) -> Path:
    """Returns the folder of one checkpoint: ``path`` itself, or the latest below it.

    Raises:
        ConfigError: If there is none.
    """
    for root in (path, path / "checkpoints"):
        if (root / "run_config.yaml").is_file():
            return root
        tracker = root / "latest_checkpointed_iteration.txt"
        if tracker.is_file():  # a newer folder may be there that was never completed
            latest = root / f"iter_{int(tracker.read_text()):07d}"
            if not (latest / "run_config.yaml").is_file():
                raise ConfigError(f"{latest}, the latest checkpoint by {tracker}, is not whole. Name an earlier one.")
            return latest
        found = sorted(root.glob("iter_*/run_config.yaml"))
        if found:
            return found[-1].parent
    raise ConfigError(f"{path} holds no Megatron checkpoint (no run_config.yaml in it or in an iter_* folder).")


def load_checkpoint_model(folder: Path) -> list[torch.nn.Module]:
    """Loads a checkpoint's whole model into this one process.

    Args:
        folder: From ``checkpoint_folder``.

    Returns:
        The model as one chunk.
    """
    provider, megatron_args = load_model_config(str(folder))
    provider.tensor_model_parallel_size = provider.pipeline_model_parallel_size = 1
    provider.context_parallel_size = provider.expert_model_parallel_size = 1
    provider.expert_tensor_parallel_size = 1
    provider.virtual_pipeline_model_parallel_size = None
    provider.sequence_parallel = False
    provider.perform_initialization = False
    provider.variable_seq_lengths = False
    fit_to_machine(provider)
    model = build_and_load_model(
        str(folder), provider, None, megatron_args, use_cpu_init=not torch.cuda.is_available()
    )
    return model if isinstance(model, list) else [model]


def import_checkpoint(model: str, folder: Path) -> None:
    """Writes a Hugging Face model as a Megatron checkpoint, without optimizer state.

    Args:
        model: Hugging Face id or folder.
        folder: Where to write; a recipe takes it as ``checkpoint.pretrained_checkpoint``.
    """
    bridge = AutoBridge.from_hf_pretrained(model, trust_remote_code=False)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.hidden_dropout = provider.attention_dropout = 0.0
    set_dtype(provider, torch.float32)
    fit_to_machine(provider)
    provider.finalize()
    on_cpu = not torch.cuda.is_available()
    with temporary_distributed_context("gloo" if on_cpu else "nccl"):
        chunks = provider.provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=not torch.cuda.is_available()
        )
        bridge.save_megatron_model(chunks, folder)


def export_checkpoint(recipe: Recipe, hf_config: PretrainedConfig, checkpoint: Path, folder: Path) -> None:
    """Writes a run's checkpoint as a Hugging Face folder: weights, configuration, tokenizer, generation settings.

    Args:
        recipe: The run's recipe.
        hf_config: The model's Hugging Face configuration.
        checkpoint: A checkpoint, or a folder of them; the latest is taken.
        folder: Where to write; what is there is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    bridge = make_bridge(recipe, hf_config)
    with temporary_distributed_context("nccl" if torch.cuda.is_available() else "gloo"):
        model = load_checkpoint_model(checkpoint_folder(checkpoint))
        write_artifacts(recipe, bridge, folder)
        bridge.save_hf_weights(model, folder, show_progress=False)
