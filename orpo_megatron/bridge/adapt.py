"""ORPO from one of Megatron-Bridge's own configurations: ``pretrain(*orpo(config, "pairs.jsonl", beta=0.1))``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import get_mixed_precision_config
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from megatron.core.num_microbatches_calculator import get_num_microbatches
from transformers import PretrainedConfig

from orpo_megatron.agreement import Peers
from orpo_megatron.bridge.callbacks import RunMonitor
from orpo_megatron.bridge.common import prepare_alike
from orpo_megatron.bridge.guard import StepGuard
from orpo_megatron.bridge.model import check_provider, fit_to_rows, make_bridge
from orpo_megatron.bridge.prepare import load_hf_config, local_model
from orpo_megatron.bridge.recipe import LAYOUT_SETTINGS, Recipe, build_recipe
from orpo_megatron.bridge.rundir import latest_step, plan_run, run_dir_of, write_records
from orpo_megatron.bridge.train import make_dataset
from orpo_megatron.config import ConfigError
from orpo_megatron.console import rank, say
from orpo_megatron.core.moe import has_auxiliary_loss
from orpo_megatron.core.step import ForwardStep, make_forward_step
from orpo_megatron.data.prepare import Prepared
from orpo_megatron.exact import EXACT_SETTINGS
from orpo_megatron.facts import start_facts

#: Another way to spread weights or ranks altogether: not put right by turning it off.
_STRATEGIES = ("fsdp", "decentralized_pg", "hybrid_context_parallel")
#: What is read of the model's settings: how it is split, and what decides whether a prompt can be shared.
_MODEL_SETTINGS = (
    *(
        f"{kind}_parallel_size"
        for kind in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context", "expert_model")
    ),
    *sorted(name.removeprefix("model.") for name in LAYOUT_SETTINGS if name.startswith("model.")),
    "sequence_parallel",
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    "moe_z_loss_coeff",
)
#: What a recipe would refuse, and Bridge has off by default.
_REFUSED_SETTINGS = {
    "train": ("rampup_batch_size", "step_batch_size_schedule"),
    "checkpoint": ("ckpt_step", "finetune", "non_persistent_ckpt_type"),
}
_PLAIN = (bool, int, float, str, list)


def orpo(
    config: ConfigContainer,
    data: str | Mapping[str, Any],
    *,
    hf: str | None = None,
    run: Mapping[str, Any] | None = None,
    num_epochs: float | None = None,
    **objective: Any,
) -> tuple[ConfigContainer, ForwardStep, list[Callback]]:
    """Turns a Megatron-Bridge configuration of a text model into an ORPO run.

    What has no place in one is replaced (data set, tokenizer, batch sizes in rows), what would make the loss depend on
    how ranks are laid out is set right, and each such change is said. All else stays: model, split, optimizer,
    schedule, precision, adapters, logging, checkpoints.

    Args:
        config: From a recipe function of Bridge's, with your changes; changed in place. ``train.global_batch_size`` is
            taken as the pairs of a step, ``train.train_iters`` as their number.
        data: The training pairs, or the settings of a recipe's section ``data`` (``DataConfig``).
        hf: Hugging Face id or folder of weights, tokenizer and architecture; by default what the configuration names.
            Weights come from there unless there is a checkpoint to resume from in ``checkpoint.load``, or one is given
            as ``checkpoint.pretrained_checkpoint``.
        run: The settings of a recipe's section ``run`` (``RunConfig``). By default the folder is ``checkpoint.save``,
            or the one that holds it where it is called ``checkpoints``. Nothing is exported;
            ``tools/convert.py export`` does that.
        num_epochs: Passes over the pairs, in place of ``train.train_iters``.
        **objective: The settings of a recipe's section ``orpo`` (``OrpoConfig``), such as ``beta``.

    Returns:
        What Bridge's ``pretrain`` takes: configuration, forward step and callbacks.

    Raises:
        ConfigError: If something does not fit, cannot be exact, or differs between the processes of torchrun.
    """

    def read() -> tuple[Recipe, list[str]]:
        changes = _set_right(config) + _fit_to_machine(config)
        return _read(config, data, hf, run, num_epochs, objective), changes

    peers = Peers.join(timeout=60.0 * config.dist.distributed_timeout_minutes)
    recipe, changes = peers.settle("reading of the configuration", read, lambda found: start_facts(found[0].as_dict()))
    hf_config, prepared, step = prepare_alike(peers, recipe, lambda: _prepare(config, recipe))
    changes += _take_rows(config, recipe, prepared)
    if config.checkpoint.pretrained_checkpoint is None and (step == 0 or config.peft is not None):
        _start_from(config, recipe, hf_config)
    if rank() == 0:
        write_records(recipe, prepared)
    for line in (prepared.store.report.summary(), prepared.plan.summary(), *changes):
        say(str(line))
    guard = StepGuard(recipe.run, recipe.orpo, prepared.store.source, keep_weights=config.peft is None)
    monitor = RunMonitor(recipe.run_dir, prepared.plan, prepared.eval_plan, recipe.run.progress, export=None)
    return config, make_forward_step(recipe.orpo, get_num_microbatches, guard.observe), [guard, monitor]


def _read(
    config: ConfigContainer,
    data: str | Mapping[str, Any],
    hf: str | None,
    run: Mapping[str, Any] | None,
    num_epochs: float | None,
    objective: Mapping[str, Any],
) -> Recipe:
    """Reads a configuration as the recipe that it amounts to.

    Raises:
        ConfigError: If it has no folder to save to or no model, or a recipe would not be allowed to say the same.
    """
    if config.checkpoint.save is None:
        raise ConfigError("config.checkpoint.save is missing: a run needs a folder. Set it.")
    hf = hf or getattr(config.model, "hf_model_id", None) or getattr(config.tokenizer, "tokenizer_model", None)
    if hf is None:
        raise ConfigError(
            "The configuration names no Hugging Face model (model.hf_model_id or tokenizer.tokenizer_model), which "
            "weights and tokenizer come from. Give orpo(..., hf=ID_OR_FOLDER)."
        )
    if (run or {}).get("export"):
        raise ConfigError(
            "run.export (True) must be False: a configuration of Bridge exports nothing. Leave it out, and run "
            "tools/convert.py export on the run's folder afterwards."
        )
    given = {"train": data} if isinstance(data, str) else dict(data)
    precision = config.mixed_precision
    refused = {section: _switched_on(getattr(config, section), names) for section, names in _REFUSED_SETTINGS.items()}
    length = {"num_epochs": num_epochs} if num_epochs else {"train_iters": config.train.train_iters}
    sections = {
        "model": {"hf": str(hf), **_given(config.model, _MODEL_SETTINGS)},
        **refused,
        "train": {**length, **refused["train"]},
        "validation": {"eval_interval": config.validation.eval_interval if given.get("eval") else None},
        "rng": {"seed": config.rng.seed},
        "optimizer": _changed(config.optimizer),
        "scheduler": _changed(config.scheduler),
        "mixed_precision": precision if isinstance(precision, str | None) else _changed(precision),
        "peft": _changed(config.peft) or None,
    }
    return build_recipe(
        {
            "orpo": dict(objective),
            "data": {"pairs_per_step": config.train.global_batch_size, **given},
            "run": {
                "dir": str(run_dir_of(Path(config.checkpoint.save))),
                "progress": "none",
                "export": False,
                **(run or {}),
            },
            **{name: section for name, section in sections.items() if section},
        }
    )


def _given(settings: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the plain values among some settings."""
    values = {name: getattr(settings, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, _PLAIN)}


def _switched_on(settings: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns those of some settings that ask for something."""
    return {name: value for name in names if (value := getattr(settings, name, None))}


def _changed(settings: Any) -> dict[str, Any]:
    """Returns the plain settings of a configuration object that are not their class's defaults."""
    if settings is None:
        return {}
    names = [f.name for f in dataclasses.fields(settings) if f.init and not f.name.startswith("_")]
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    return {name: value for name, value in _given(settings, tuple(names)).items() if value != defaults[name]}


def _prepare(config: ConfigContainer, recipe: Recipe) -> tuple[PretrainedConfig, Prepared, int]:
    """Reads model and data and plans; returns the model's configuration, the plans and the step to go on from."""
    hf_config = load_hf_config(recipe)
    _check_same_model(config, recipe, hf_config)
    return hf_config, *plan_run(recipe, hf_config, int(os.environ.get("WORLD_SIZE", "1")), _checkpoints(config))


def _checkpoints(config: ConfigContainer) -> Path:
    """Returns the folder of checkpoints that a run goes on from and saves to.

    Raises:
        ConfigError: If it would save over checkpoints without going on from them, or elsewhere than it goes on from.
    """
    save, load = Path(config.checkpoint.save), config.checkpoint.load
    if load is not None and Path(load).absolute() == save.absolute():
        return save
    for name, folder in (("save", save), ("load", Path(load) if load else save)):
        if step := latest_step(folder):
            raise ConfigError(
                f"config.checkpoint.{name} ({folder}) holds a run at step {step}, so checkpoint.save ({save}) and "
                f"checkpoint.load ({load}) must be one folder: a run goes on where it saves. Set both to it to go on, "
                "or save to another folder; checkpoint.pretrained_checkpoint starts from weights of another run."
            )
    return save


def _check_same_model(config: ConfigContainer, recipe: Recipe, hf_config: PretrainedConfig) -> None:
    """Checks that the configuration's model is the one that the weights are of.

    Raises:
        ConfigError: If a size differs.
    """
    names = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "vocab_size": "vocab_size"}
    for name, hf_name in names.items():
        ours, theirs = getattr(config.model, name), getattr(hf_config, hf_name, None)
        if theirs is not None and ours is not None and ours != theirs:
            raise ConfigError(
                f"config.model.{name} ({ours}) must be {theirs}, as {recipe.hf} has it. Make the model from there "
                "(AutoBridge.from_hf_pretrained), or name the right one in orpo(..., hf=...)."
            )


def _set_right(config: ConfigContainer) -> list[str]:
    """Gives every setting the value at which the loss is exact; returns what was changed, in words.

    Raises:
        ConfigError: If that would be another way to spread the model altogether.
    """
    changes = []
    if isinstance(config.mixed_precision, str):
        config.mixed_precision = get_mixed_precision_config(config.mixed_precision)
    for name, (exact, reason) in EXACT_SETTINGS.items():
        section, key = name.split(".")
        target = getattr(config, section, None)
        value = getattr(target, key, None)
        if value in (None, exact):
            continue
        if any(word in key for word in _STRATEGIES):
            raise ConfigError(f"config.{name} ({value}) must be {exact}: {reason}. Turn it off.")
        setattr(target, key, exact)
        changes.append(f"orpo() set {name} from {value} to {exact}: {reason}.")
    return changes


def _fit_to_machine(config: ConfigContainer) -> list[str]:
    """Has a configuration run on the CPU where there is no GPU; returns what was changed, in words."""
    if torch.cuda.is_available():
        return []
    config.dist.distributed_backend = "gloo"
    optimizer, changes = config.optimizer, []
    if optimizer.use_precision_aware_optimizer:
        optimizer.use_precision_aware_optimizer = False
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            setattr(optimizer, name, torch.float32)
        changes.append("optimizer.use_precision_aware_optimizer off: it needs Transformer Engine")
    if config.checkpoint.async_save:
        config.checkpoint.async_save = False
        changes.append("checkpoint.async_save off: its writer waits for a GPU for ever")
    return [f"orpo() turned {change}." for change in changes]


def _take_rows(config: ConfigContainer, recipe: Recipe, prepared: Prepared) -> list[str]:
    """Has a configuration train on the rows of the plan; returns what that changed of the model, in words."""
    plan, eval_plan, model = prepared.plan, prepared.eval_plan, config.model
    names = tuple(f.name for f in dataclasses.fields(model))
    before = _given(model, names)
    fit_to_rows(model, recipe, here=True, share_prefix=plan.share_prefix)
    after = _given(model, names)
    changed = [f"{name} from {old} to {after[name]}" for name, old in before.items() if after.get(name, old) != old]
    check_provider(model, recipe, here=True, share_prefix=plan.share_prefix)
    config.dataset = make_dataset(recipe, prepared, fill_empty_rows=has_auxiliary_loss(model))
    # Bridge only asks it for the size of the vocabulary.
    config.tokenizer = TokenizerConfig(
        tokenizer_type="NullTokenizer", vocab_size=model.vocab_size, use_tokenizer_vocab_size=True
    )
    config.train.train_iters, config.train.train_samples = plan.num_steps, None
    config.train.global_batch_size, config.train.micro_batch_size = plan.rows_per_step, 1
    config.train.rampup_batch_size = None
    config.validation.eval_iters = eval_plan.num_steps if eval_plan else 0
    config.validation.eval_global_batch_size = eval_plan.rows_per_step if eval_plan else plan.rows_per_step
    config.validation.eval_micro_batch_size = 1
    return [f"orpo() set of the model, for packed rows on this machine: {', '.join(changed)}."] if changed else []


def _start_from(config: ConfigContainer, recipe: Recipe, hf_config: PretrainedConfig) -> None:
    """Has a run start from Hugging Face weights; adapters take them as a checkpoint, which Bridge loads beneath."""
    if config.peft is not None:
        config.checkpoint.pretrained_checkpoint = local_model(recipe)
        return
    bridge = make_bridge(recipe, hf_config)
    config.model.perform_initialization = False
    config.model.register_pre_wrap_hook(bridge.load_hf_weights)
