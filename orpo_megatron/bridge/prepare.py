"""Everything of a run that can be done and checked before Megatron is imported: data, plan, layout, what is there."""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from orpo_megatron.bridge.prefix import prefix_conflict
from orpo_megatron.bridge.recipe import Recipe, check_layout
from orpo_megatron.config import ConfigError
from orpo_megatron.data.cache import build_once
from orpo_megatron.data.plan import Padding
from orpo_megatron.data.prepare import Prepared, padding_of, prepare_data
from orpo_megatron.data.sources import first_line, resolve

#: Keys of a config.json that do not say what is computed in training.
_NOT_ARCHITECTURE = {
    "_name_or_path",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "router_jitter_noise",
    "transformers_version",
    "use_cache",
}


def model_source(recipe: Recipe) -> str:
    """Returns the Hugging Face folder or id that the run's weights start from.

    Without ``model.hf``, weights of ``model.config`` are drawn from ``rng.seed`` by transformers, once and on one
    process, so that they are the same however the model is split; that is meant for toys and tests.

    Raises:
        ConfigError: If there is no such model, or transformers does not know the architecture.
    """
    if recipe.hf is not None:
        return resolve(recipe.hf, recipe.cache_dir)
    config = declared_config(recipe)
    identity = json.dumps([recipe.hf_config, recipe.seed], sort_keys=True)
    folder = recipe.cache_dir.absolute() / "models" / f"random-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def build(scratch: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        with torch.random.fork_rng(devices=[]), _said_of_config():
            torch.manual_seed(recipe.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(scratch)

    build_once(folder, build, Path.exists)
    return str(folder)


def local_model(recipe: Recipe) -> str:
    """Returns the folder that holds the run's first weights; those of a hub id are downloaded, once a machine.

    Raises:
        ConfigError: If they cannot be had.
    """
    source = model_source(recipe)
    if Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, allow_patterns=["*.json", "*.safetensors"])
    except (OSError, ValueError) as error:
        raise _no_model(recipe, error) from error


def declared_config(recipe: Recipe) -> PretrainedConfig:
    """Returns the architecture that the recipe gives as ``model.config``; nothing is downloaded or drawn.

    Raises:
        ConfigError: If transformers does not know it.
    """
    values = dict(recipe.hf_config or {})
    if values.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.config.model_type ({values.get('model_type')!r}) must be an architecture that transformers knows, "
            "such as llama or mistral."
        )
    with _said_of_config():
        return AutoConfig.for_model(**values)


@contextmanager
def _said_of_config() -> Iterator[None]:
    """Says in one line what transformers finds wrong with ``model.config``."""
    try:
        yield
    except Exception as error:  # a wrong size or name comes to light anywhere in transformers
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ConfigError(f"model.config is no language model that transformers can build: {reason}") from error


def load_hf_config(recipe: Recipe, *, dry_run: bool = False) -> PretrainedConfig:
    """Loads the model's Hugging Face configuration.

    Args:
        recipe: The recipe.
        dry_run: Whether to take its ``model.config``, if it has one, at its word: nothing is downloaded or drawn.

    Raises:
        ConfigError: If it is not there, not one that transformers knows, or not the one that the recipe declares.
    """
    if dry_run and recipe.hf_config is not None:
        return declared_config(recipe)
    source = model_source(recipe)
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _no_model(recipe, error) from error
    if recipe.hf is not None and recipe.hf_config is not None:
        _check_declared(recipe, found)
    return found


def _no_model(recipe: Recipe, error: Exception) -> ConfigError:
    """Returns what to say of a model that cannot be had."""
    return ConfigError(
        f"The model {recipe.hf} (model.hf) cannot be had: {first_line(error)} Give a Hugging Face folder or a GGUF "
        "file if this machine reaches no hub."
    )


def _check_declared(recipe: Recipe, found: PretrainedConfig) -> None:
    """Checks that the architecture in the recipe, with which it was checked dry, is that of its weights.

    Raises:
        ConfigError: Naming the first key that differs.
    """
    declared, theirs = declared_config(recipe).to_dict(), found.to_dict()
    for name, ours in declared.items():
        if name not in _NOT_ARCHITECTURE and ours != theirs.get(name):
            raise ConfigError(
                f"model.config.{name} ({ours!r}) must be {theirs.get(name)!r}, as in the config.json of {recipe.hf}. "
                "Correct it, or set model.config=null to take theirs."
            )


def prepare_run(
    recipe: Recipe,
    hf_config: PretrainedConfig,
    world_size: int,
    rows_per_step: int | None,
    show_progress: bool,
    *,
    here: bool = True,
) -> Prepared:
    """Tokenises what is not in the cache and plans the run; every rank may call it, one does the work.

    Args:
        recipe: The recipe.
        hf_config: The model's Hugging Face configuration.
        world_size: Number of ranks.
        rows_per_step: Rows of a step as a checkpoint fixed them, or None.
        show_progress: Whether this rank shows the progress of tokenising.
        here: Whether it shall run on this machine; otherwise it is planned for one with GPUs, if it is in a precision
            for them.

    Returns:
        Data and plans.

    Raises:
        ConfigError: If the data, the tokenizer or the layout do not fit.
    """
    import torch

    check_layout(recipe, hf_config, world_size)
    rows_at_once = recipe.data_parallel_size(world_size)
    if recipe.parallel_size("virtual_pipeline_model") > 1:
        # The interleaved schedule takes microbatches in groups, one for each stage by default.
        group = recipe.setting("model.microbatch_group_size_per_vp_stage", recipe.parallel_size("pipeline_model"))
        rows_at_once *= int(group)
    return prepare_data(
        recipe.data,
        tokenizer_name=recipe.tokenizer,
        cache_dir=recipe.cache_dir,
        vocab_size=getattr(hf_config, "vocab_size", None),
        nll_scope=recipe.orpo.nll_scope,
        seed=recipe.seed,
        num_steps=lambda num_pairs: num_steps(recipe, num_pairs),
        rows_multiple_of=rows_at_once,
        padding=padding(recipe),
        rows_per_step=rows_per_step,
        prefix_conflict=prefix_conflict(recipe, hf_config),
        on_gpu=torch.cuda.is_available() if here else bool(recipe.sections.get("mixed_precision")),
        show_progress=show_progress,
    )


def num_steps(recipe: Recipe, num_pairs: int) -> int:
    """Returns the optimizer steps that ``train.train_iters`` or ``train.num_epochs`` asks for."""
    iters = recipe.setting("train.train_iters")
    if iters is not None:
        return int(iters)
    steps_per_epoch = math.ceil(num_pairs / recipe.data.pairs_per_step)
    return math.ceil(round(steps_per_epoch * recipe.setting("train.num_epochs"), 6))


def padding(recipe: Recipe) -> Padding:
    """Returns what the recipe, kernels and the split of rows demand lengths to be a multiple of."""
    cp = recipe.parallel_size("context")
    ranks = (recipe.parallel_size("tensor_model") if recipe.setting("model.sequence_parallel") else 1) * cp
    precision = recipe.sections.get("mixed_precision") or {}
    if isinstance(precision, str):
        fp4, fp8, block = "fp4" in precision, "fp8" in precision, "mxfp8" in precision
    else:
        fp4, fp8 = bool(precision.get("fp4")), bool(precision.get("fp8"))
        block = precision.get("fp8_recipe") == "mxfp8"
    if fp4:
        raise ConfigError(f"mixed_precision ({precision}) must not be FP4: this version does not train with it.")
    return padding_of(ranks, cp, fp8=fp8, mxfp8=block, pad_to_multiple_of=recipe.data.pad_to_multiple_of)


def check_pretrained(recipe: Recipe, hf_config: PretrainedConfig) -> None:
    """Checks that ``checkpoint.pretrained_checkpoint``, if given, is of the recipe's model.

    Raises:
        ConfigError: If it is not a checkpoint, or a size differs.
    """
    path = recipe.setting("checkpoint.pretrained_checkpoint")
    if path is None:
        return
    from orpo_megatron.bridge.conversion.checkpoint import RUN_CONFIG, checkpoint_folder, is_hugging_face
    from orpo_megatron.bridge.rundir import TRACKER

    folder = Path(path)
    if is_hugging_face(folder):
        return  # Bridge takes it too
    found = checkpoint_folder(folder) / RUN_CONFIG
    if found.parent != folder and not (folder / TRACKER).is_file():  # Bridge would see none, and draw weights
        raise ConfigError(
            f"checkpoint.pretrained_checkpoint ({path}) must be a checkpoint, or a folder with {TRACKER}. Give "
            f"{found.parent}."
        )
    model = (yaml.safe_load(found.read_text(encoding="utf-8")) or {}).get("model") or {}
    pairs = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "ffn_hidden_size": "intermediate_size",
        "vocab_size": "vocab_size",
    }
    for megatron_name, hf_name in pairs.items():
        theirs, ours = model.get(megatron_name), getattr(hf_config, hf_name, None)
        if theirs is not None and ours is not None and theirs != ours:
            raise ConfigError(
                f"The checkpoint {found.parent} is of another model: its {megatron_name} is {theirs}, the recipe's "
                f"model has {ours}. Give the checkpoint's model as model.hf or model.config."
            )
