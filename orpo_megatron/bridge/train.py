"""One ORPO run inside Megatron-Bridge's own training loop, from a prepared recipe to an exported model."""

from __future__ import annotations

import os
import shutil
import signal
import textwrap
from typing import Any

import torch
import yaml
from megatron.bridge.training.config import ConfigContainer, runtime_config_update
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils.yaml_utils import safe_yaml_representers
from megatron.core.num_microbatches_calculator import get_num_microbatches
from transformers import PretrainedConfig

from orpo_megatron.agreement import is_lost_peer
from orpo_megatron.bridge.apply import check_kept
from orpo_megatron.bridge.callbacks import RunMonitor
from orpo_megatron.bridge.container import PreferenceData, RowStream, make_container
from orpo_megatron.bridge.conversion.export import companions_of, write_model
from orpo_megatron.bridge.guard import StepGuard
from orpo_megatron.bridge.model import make_bridge, make_provider
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.bridge.rundir import CHECKPOINTS, latest_step, partial_export
from orpo_megatron.config import ConfigError, PeerError
from orpo_megatron.console import rank
from orpo_megatron.core.moe import has_auxiliary_loss
from orpo_megatron.core.step import make_forward_step
from orpo_megatron.data.dataset import PackedRows
from orpo_megatron.data.prepare import Prepared


def build(
    recipe: Recipe, hf_config: PretrainedConfig, prepared: Prepared, *, load_weights: bool, here: bool = True
) -> tuple[Any, ConfigContainer]:
    """Builds what a run hands to Bridge.

    Args:
        recipe: The recipe.
        hf_config: The model's Hugging Face configuration.
        prepared: Data and plans.
        load_weights: Whether weights come from Hugging Face.
        here: Whether it shall run on this machine; otherwise it is meant for one with GPUs.

    Returns:
        The converter between Hugging Face and Megatron, and Bridge's configuration.

    Raises:
        ConfigError: If Bridge does not know the model, or a setting does not fit.
    """
    bridge = make_bridge(recipe, hf_config, weights=here)
    frozen_base = bool(recipe.sections.get("peft"))  # Bridge loads it where it puts in the adapters
    plan, load_weights = prepared.plan, load_weights and not frozen_base
    provider = make_provider(recipe, bridge, load_weights=load_weights, here=here, share_prefix=plan.share_prefix)
    dataset = make_dataset(recipe, prepared, fill_empty_rows=has_auxiliary_loss(provider))
    container = make_container(
        recipe, provider, dataset, num_steps=plan.num_steps, eval_plan=prepared.eval_plan, here=here
    )
    return bridge, container


def validate(recipe: Recipe, hf_config: PretrainedConfig, prepared: Prepared, *, here: bool) -> str:
    """Has Bridge finalise and check its configuration, without starting anything.

    Returns:
        Bridge's whole configuration as YAML.

    Raises:
        ConfigError: Also for what Bridge finds.
    """
    _, container = build(recipe, hf_config, prepared, load_weights=False, here=here)
    base = container.checkpoint.pretrained_checkpoint
    if base and not os.path.exists(base):  # a hub id, in a dry run: Bridge asks for a path that is there
        container.checkpoint.pretrained_checkpoint = os.curdir
    finalise(container, recipe)
    container.checkpoint.pretrained_checkpoint = base
    with safe_yaml_representers():
        return yaml.safe_dump(container.to_dict())


def finalise(container: ConfigContainer, recipe: Recipe) -> None:
    """Has Bridge finalise and check its configuration, and checks what has become of the recipe's settings.

    Raises:
        ConfigError: For what Bridge finds, or if it would not do what the recipe says.
    """
    try:
        runtime_config_update(container)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"Megatron-Bridge refuses the recipe: {' '.join(str(error).split())}") from error
    model, chunks = container.model, recipe.parallel_size("virtual_pipeline_model")
    if (model.virtual_pipeline_model_parallel_size or 1) != chunks:
        raise ConfigError(
            f"model.virtual_pipeline_model_parallel_size ({chunks}) must be the "
            f"{model.virtual_pipeline_model_parallel_size} of model.pipeline_model_parallel_layout. Write both."
        )
    if chunks > 1 and model.batch_p2p_comm:
        raise ConfigError(
            "model.batch_p2p_comm (True) must be False under a virtual pipeline: batched exchange can cross its two "
            "directions. Leave it out."
        )
    check_kept(container, recipe)


def train(recipe: Recipe, hf_config: PretrainedConfig, prepared: Prepared) -> bool:
    """Trains, evaluates, saves and exports; resumes from the run's latest checkpoint if there is one.

    Args:
        recipe: The recipe.
        hf_config: The model's Hugging Face configuration.
        prepared: Data and plans.

    Returns:
        True if training reached its last step, False if a signal stopped it after saving a checkpoint.

    Raises:
        ConfigError: If Bridge does not know the model, a setting does not fit, a checkpoint cannot be loaded, or a
            step is not finite and ``run.on_nonfinite`` is ``stop``.
    """
    validate(recipe, hf_config, prepared, here=True)
    resuming = latest_step(recipe.run_dir / CHECKPOINTS) > 0
    from_checkpoint = resuming or recipe.setting("checkpoint.pretrained_checkpoint") is not None
    bridge, container = build(recipe, hf_config, prepared, load_weights=not from_checkpoint)
    monitor = RunMonitor(
        recipe.run_dir,
        prepared.plan,
        prepared.eval_plan,
        recipe.run.progress,
        (lambda model: export(recipe, bridge, model)) if recipe.run.export else None,
    )
    guard = StepGuard(recipe.run, recipe.orpo, prepared.store.source, keep_weights=not recipe.sections.get("peft"))
    # Bridge saves and stops on SIGTERM; Ctrl-C shall do the same.
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        forward_step = make_forward_step(recipe.orpo, get_num_microbatches, guard.observe)
        pretrain(container, forward_step, callbacks=[guard, monitor])
    except ConfigError:
        # torchrun terminates the other ranks once the first has ended; all are ending by themselves, and alike.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise PeerError(lost_peer_message(recipe, prepared, error)) from error
    except SystemExit as error:
        # Status 0 is how Bridge leaves its loop after a signal, its checkpoint saved; it also ends this way when
        # it cannot go on, and has then only logged why.
        if error.code != 0:
            raise ConfigError(
                f"Megatron-Bridge gave up. The end of {recipe.run_dir / 'logs' / f'rank_{rank()}.txt'} says why."
            ) from error
    finally:
        monitor.close()
    return monitor.finished


def lost_peer_message(recipe: Recipe, prepared: Prepared, error: Exception) -> str:
    """Returns what happened, and how to go on, when ``error`` says that another process is gone."""
    step = latest_step(recipe.run_dir / CHECKPOINTS)
    kept = f"goes on from step {step} ({recipe.run_dir / CHECKPOINTS})" if step else "starts anew (no checkpoint yet)"
    return (
        f"Rank {rank()} lost contact with another process: {textwrap.shorten(str(error), 200)} It ended, and says "
        f"why itself, or its node or the network failed. The same command {kept}, also on fewer nodes, as long as "
        f"their data-parallel size divides {prepared.plan.rows_per_step} (rows a step)."
    )


def make_dataset(recipe: Recipe, prepared: Prepared, fill_empty_rows: bool) -> PreferenceData:
    """Returns the packed rows of the run as Bridge's loaders take them; ``fill_empty_rows`` as ``PackedRows``."""
    pad = prepared.store.pad_token_id
    valid = None
    if prepared.eval_plan is not None and prepared.eval_store is not None:
        interval = recipe.setting("validation.eval_interval") or prepared.plan.num_steps
        passes = prepared.plan.num_steps // interval + 2
        valid = RowStream(PackedRows(prepared.eval_store, prepared.eval_plan, pad), passes)
    dataset = PreferenceData(
        seq_length=recipe.data.row_budget,
        rows_per_step=prepared.plan.rows_per_step,
        content_hash=prepared.store.content_hash,
        pin_memory=torch.cuda.is_available(),
    )
    return dataset.attach(RowStream(PackedRows(prepared.store, prepared.plan, pad, fill_empty_rows)), valid)


def export(recipe: Recipe, bridge: Any, model: list[torch.nn.Module]) -> None:
    """Writes the trained model beside its final place; all ranks call it, rank 0 writes.

    The folder is moved once the run's closing figures are known.
    """
    folder = partial_export(recipe.run_dir)
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    write_model(bridge, model, folder, companions_of(recipe) if rank() == 0 else None)
