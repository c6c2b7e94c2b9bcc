"""A Megatron model as a Hugging Face folder: weights, configuration, tokenizer, generation settings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core.utils import unwrap_model
from transformers import GenerationConfig, PretrainedConfig

from orpo_megatron.bridge.conversion.weights import SHARD_BYTES, local_folder, some, write_shards
from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.console import ByteProgress, rank
from orpo_megatron.data.sources import load_tokenizer

#: What some models store although transformers works it out.
_BUFFER = r"rotary_emb\.inv_freq$"


@dataclass(frozen=True)
class Companions:
    """What belongs to a Hugging Face model beside its weights and its configuration.

    Attributes:
        tokenizer: With the chat template to go with the model; None where there is none.
        generation: Generation settings, or None.
    """

    tokenizer: Any
    generation: GenerationConfig | None


def companions_of(recipe: Recipe) -> Companions:
    """Returns what belongs to the model of a run: the tokenizer and chat template that it used."""
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.cache_dir, recipe.data.chat_template)
    generation = generation_config(model_source(recipe), tokenizer)
    if generation is not None:
        ends, end = generation.eos_token_id, tokenizer.eos_token_id
        if end not in (ends if isinstance(ends, list) else [ends]):  # it has learned to end with this one
            generation.eos_token_id, generation.pad_token_id = end, _padding(tokenizer)
    return Companions(tokenizer, generation)


def generation_config(source: str, tokenizer: Any) -> GenerationConfig | None:
    """Returns a model's own generation settings, or plain ones that stop at the tokenizer's EOS."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        pass  # a model need not have any
    if tokenizer is None:
        return None
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=_padding(tokenizer)
    )


def _padding(tokenizer: Any) -> int:
    """Returns the id that rows are padded with: that of EOS where there is none of its own."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def write_model(
    bridge: Any,
    chunks: list[torch.nn.Module],
    folder: Path,
    companions: Companions | None,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a Hugging Face folder; all ranks call it, rank 0 writes.

    Rank 0 holds one shard of whole weights on the host, beside its part of the model.

    Args:
        bridge: From ``make_bridge``.
        chunks: The model.
        folder: Where to write.
        companions: What to write beside the weights; needed on rank 0 only.
        dtype: Dtype of the weights; by default each keeps its own.
        shard_bytes: Largest size of a file.

    Raises:
        ConfigError: If Bridge leaves out a tensor that the Hugging Face model has.
    """
    weights = bridge.export_hf_weights(chunks, cpu=True, show_progress=False, weight_dtype=dtype)
    if companions is not None and rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        stored = dtype or next(unwrap_model(chunks)[0].parameters()).dtype
        _write_companions(bridge, folder, companions, stored)
        tied = _tied(bridge.hf_pretrained)
        kept = ((name, weight) for name, weight in weights if name not in tied)
        written = write_shards(_shown(kept, _num_elements(chunks) * stored.itemsize), folder, shard_bytes)
        check_whole(bridge.hf_pretrained, written)
    else:
        for _ in weights:
            pass
    if dist.is_initialized():
        dist.barrier()


def _tied(hf_pretrained: Any) -> set[str]:
    """Returns the tensors that transformers ties to others; without files to follow, Bridge writes them twice."""
    if not isinstance(hf_pretrained, PretrainedConfig) or not getattr(hf_pretrained, "tie_word_embeddings", False):
        return set()
    return set(getattr(_class_of(hf_pretrained), "_tied_weights_keys", None) or ())


def _class_of(hf_config: PretrainedConfig) -> Any:
    """Returns the class of a model in transformers; None if it is not there."""
    return getattr(transformers, (hf_config.architectures or [""])[0], None)


def _num_elements(chunks: list[torch.nn.Module]) -> int:
    """Returns the size of this rank's part of a model, which is the whole of it on one process."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def _shown(weights: Any, num_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Shows progress while weights pass."""
    with ByteProgress("Writing", num_bytes) as progress:
        for name, weight in weights:
            yield name, weight
            progress.add(weight.numel() * weight.element_size())


def _write_companions(bridge: Any, folder: Path, companions: Companions, dtype: torch.dtype) -> None:
    """Writes the configuration, which says the weights' dtype, and what else belongs to a model."""
    hf_config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)
    values = hf_config.to_dict()
    if bridge.trust_remote_code:
        source = bridge.hf_model_id or bridge.hf_pretrained.model_name_or_path
        for file in local_folder(str(source), ["*.py"]).glob("*.py"):
            shutil.copy(file, folder)
    else:
        values.pop("auto_map", None)
    config = type(hf_config).from_dict(values)
    config.dtype = dtype
    config.save_pretrained(folder)
    for companion in (companions.tokenizer, companions.generation):
        if companion is not None:
            companion.save_pretrained(folder)


def check_whole(hf_pretrained: Any, written: set[str]) -> None:
    """Checks that what was written is all of a Hugging Face model, where its tensors are known.

    Args:
        hf_pretrained: Bridge's handle of the model, or its configuration alone.
        written: Names of the tensors that were written.

    Raises:
        ConfigError: If one is missing that transformers would look for.
    """
    if isinstance(hf_pretrained, PretrainedConfig):
        return
    ignored = [*(getattr(_class_of(hf_pretrained.config), "_keys_to_ignore_on_load_unexpected", None) or ()), _BUFFER]
    missing = sorted(set(hf_pretrained.state.source.get_all_keys()) - written)
    missing = [name for name in missing if not any(re.search(pattern, name) for pattern in ignored)]
    if missing:
        raise ConfigError(
            f"{len(missing)} tensors of {hf_pretrained.model_name_or_path} were not written ({some(missing)}): "
            "Megatron-Bridge does not convert them back."
        )
