"""Hugging Face to Megatron and back, on the CPU, with one copy of the model in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from orpo_megatron.bridge.conversion.checkpoint import checkpoint_folder, source_of, stored_dtype, stored_elements
from orpo_megatron.bridge.conversion.export import Companions, companions_of, generation_config, write_model
from orpo_megatron.bridge.conversion.families import find_family
from orpo_megatron.bridge.conversion.load import load_checkpoint_model, one_process
from orpo_megatron.bridge.conversion.mapping import unused_tensors
from orpo_megatron.bridge.conversion.place import in_gb, written_beside
from orpo_megatron.bridge.conversion.verify import compare, encode, load_tokenizer_of
from orpo_megatron.bridge.conversion.weights import SHARD_BYTES, StoredWeights, local_folder, read_headers, some
from orpo_megatron.bridge.model import CompletedBridge, fit_to_machine, make_bridge, set_dtype
from orpo_megatron.bridge.prepare import load_hf_config
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.bridge.rundir import RECIPE, read_run, run_dir_of, write_model_card
from orpo_megatron.config import ConfigError
from orpo_megatron.console import ByteProgress, say
from orpo_megatron.core.local import takes_local_layers
from orpo_megatron.data.sources import first_line

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class DifferentModelError(Exception):
    """A converted model gives other logits than the one it was converted from."""


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        dtype: Dtype of the weights that are written: a key of ``DTYPES``, or ``auto`` for that of what is read.
        shard_bytes: Largest size of a safetensors file.
        trust_remote_code: Whether to run code that comes with a Hugging Face model.
        texts: What to compare logits on before the result takes its place; nothing is compared without any.
    """

    dtype: str = "auto"
    shard_bytes: int = SHARD_BYTES
    trust_remote_code: bool = False
    texts: Sequence[str] = ()


def import_model(source: str, folder: Path, options: Options) -> None:
    """Turns a Hugging Face model into a Megatron checkpoint.

    Args:
        source: Id or folder.
        folder: The new folder.
        options: How.

    Raises:
        ConfigError: If there is no such model, or it cannot be converted here.
        DifferentModelError: If the checkpoint is of another model.
    """
    trust = options.trust_remote_code
    load_config(source, trust)
    stored = read_headers(local_folder(source))
    dtype = DTYPES.get(options.dtype, stored.dtype)
    tokens = encode(load_tokenizer_of(source, trust), options.texts) if options.texts else []
    with written_beside(folder, stored.num_bytes(dtype)) as partial:
        import_checkpoint(source, stored, partial, dtype, trust)
        if tokens:
            _verify(source, checkpoint_folder(partial), tokens, dtype, trust)


def export_model(run: Path, folder: Path, options: Options, hf: str | None = None) -> None:
    """Turns a Megatron checkpoint into a Hugging Face folder.

    Args:
        run: The folder of a run of ours, or of a checkpoint or several of Megatron-Bridge.
        folder: The new folder.
        options: How.
        hf: Id or folder of the Hugging Face model that it is one of. By default what the run's recipe or the
            checkpoint names.

    Raises:
        ConfigError: If there is no such checkpoint, or it cannot be converted here.
        DifferentModelError: If the folder holds another model.
    """
    checkpoint = checkpoint_folder(run)
    elements, trust = stored_elements(checkpoint), options.trust_remote_code
    dtype = DTYPES.get(options.dtype, stored_dtype(checkpoint))
    run_dir = run_dir_of(checkpoint.parent)
    from_recipe = hf is None and (run_dir / RECIPE).is_file()
    if from_recipe:
        recipe = read_run(run_dir)
        bridge, companions = make_bridge(recipe, load_hf_config(recipe)), companions_of(recipe)
    else:
        bridge, companions = _plain_bridge(checkpoint, hf or source_of(checkpoint), trust)
    if options.texts and companions.tokenizer is None:
        raise ConfigError("--verify needs a tokenizer, and the Hugging Face model has none. Leave --verify out.")
    with written_beside(folder, elements * dtype.itemsize) as partial:
        _export(bridge, companions, checkpoint, partial, DTYPES.get(options.dtype), options.shard_bytes)
        if from_recipe:
            write_model_card(recipe, partial, run_dir, int(checkpoint.name.removeprefix("iter_")))
        if options.texts:
            _verify(str(partial), checkpoint, encode(companions.tokenizer, options.texts), dtype, trust)


def _plain_bridge(checkpoint: Path, hf: str | None, trust_remote_code: bool) -> tuple[Any, Companions]:
    """Returns converter and companions for a checkpoint that no run of ours made, from the model ``hf``."""
    if hf is None:
        raise ConfigError(
            f"{checkpoint} does not say which Hugging Face model it is one of. Give --hf ID_OR_FOLDER, for its "
            "configuration and tokenizer."
        )
    hf_config = load_config(hf, trust_remote_code)
    bridge = CompletedBridge.from_hf_config(hf_config)
    bridge.hf_model_id, bridge.trust_remote_code = hf, trust_remote_code
    try:
        tokenizer = load_tokenizer_of(hf, trust_remote_code)
    except ConfigError:
        tokenizer = None
        say(f"{hf} has no tokenizer, so none is written.")
    return bridge, Companions(tokenizer, generation_config(hf, tokenizer))


def _verify(hf: str, checkpoint: Path, tokens: Sequence[torch.Tensor], dtype: torch.dtype, trust: bool) -> None:
    """Compares both sides of a conversion and says the verdict.

    Raises:
        DifferentModelError: If they differ.
    """
    say("Comparing logits ...")
    verdict = compare(hf, checkpoint, tokens, dtype, trust)
    say(str(verdict))
    if not verdict.passed:
        raise DifferentModelError("The conversion gave another model, so nothing was written.")


def load_config(source: str, trust_remote_code: bool) -> PretrainedConfig:
    """Loads a Hugging Face model's configuration, and checks that it can be converted on this machine.

    Args:
        source: Folder or id.
        trust_remote_code: Whether to run code that comes with it.

    Raises:
        ConfigError: If it cannot be had, or not converted.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"The model {source} cannot be had: {first_line(error)} Give a folder with config.json, a GGUF file or a "
            "hub id; --trust-remote-code runs code that comes with a model."
        ) from error
    family = find_family(config)
    if not family.takes_head and takes_local_layers():
        raise ConfigError(
            f"{family.architecture} becomes Megatron's {family.target.__name__}, which needs Transformer Engine. "
            "Convert it on a GPU with Transformer Engine."
        )
    return config


def import_checkpoint(
    source: str, stored: StoredWeights, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False
) -> None:
    """Writes a Hugging Face model as a Megatron checkpoint, without optimizer state.

    Weights are read one tensor at a time into the one model, which is given up piece by piece as it is written.

    Args:
        source: Hugging Face id or folder.
        stored: What its files hold.
        folder: Where to write; a recipe takes it as ``checkpoint.pretrained_checkpoint``.
        dtype: Dtype of the weights.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        ConfigError: If this machine cannot build the model, or a parameter has no tensor to come from.
    """
    bridge = _WatchedBridge.from_hf_pretrained(source, trust_remote_code=trust_remote_code)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.perform_initialization = False
    provider.hidden_dropout = provider.attention_dropout = 0.0
    set_dtype(provider, dtype)
    fit_to_machine(provider)
    provider.finalize()
    with one_process():
        chunks = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        with ByteProgress("Reading", stored.num_bytes(stored.dtype)) as progress:
            bridge.watch = progress.add
            try:
                bridge.load_hf_weights(chunks)
            except ValueError as error:
                raise ConfigError(
                    f"The weights of {source} do not fit its config.json: {' '.join(str(error).split())}"
                ) from error
        unused = unused_tensors(bridge.get_conversion_tasks(chunks), stored.num_elements)
        if unused:
            say(f"{len(unused)} tensors of {source} have no place in the Megatron model: {some(unused)}.")
        say(f"Writing {in_gb(stored.num_bytes(dtype))} ...")
        bridge.save_megatron_model(chunks, folder, low_memory_save=True)


class _WatchedBridge(CompletedBridge):
    """A bridge that tells ``watch`` how many bytes it has read."""

    watch: Callable[[int], None]

    @property
    def _model_bridge(self) -> Any:
        bridge = super()._model_bridge
        read = bridge.maybe_modify_loaded_hf_weight

        def watched(names: Any, hf_state: Any) -> Any:
            weights = read(names, hf_state)
            for weight in weights.values() if isinstance(weights, dict) else [weights]:
                self.watch(weight.numel() * weight.element_size())
            return weights

        bridge.maybe_modify_loaded_hf_weight = watched
        return bridge


def export_checkpoint(recipe: Recipe, hf_config: PretrainedConfig, checkpoint: Path, folder: Path) -> None:
    """Writes a run's checkpoint as a Hugging Face folder: weights, configuration, tokenizer, generation settings.

    Args:
        recipe: The run's recipe.
        hf_config: The model's Hugging Face configuration.
        checkpoint: A checkpoint, or a folder of them; the latest is taken.
        folder: Where to write; what is there is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    _export(make_bridge(recipe, hf_config), companions_of(recipe), checkpoint_folder(checkpoint), folder)


def _export(
    bridge: Any,
    companions: Companions,
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Loads a checkpoint and writes it."""
    with one_process():
        say(f"Loading {checkpoint} ...")
        chunks = load_checkpoint_model(checkpoint)
        write_model(bridge, chunks, folder, companions, dtype=dtype, shard_bytes=shard_bytes)
