"""What packed rows and an exact loss ask of a NeMo model and trainer: checked, and set where nothing is lost by it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import default_layer_spec, gpt_data_step, gpt_forward_step
from nemo.lightning import MegatronStrategy
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from orpo_megatron.config import ConfigError
from orpo_megatron.core.attention import packed_local_layer_spec, shared_prefix_layer_spec
from orpo_megatron.core.local import takes_local_layers, turn_off_fusions
from orpo_megatron.exact import EXACT_SETTINGS, check_adapted_modules

#: What makes no other model, so that it is set and said rather than refused.
_SET_RIGHT = ("calculate_per_token_loss",)
#: Settings of Transformer Engine's attention, which rows with shared prompts do without.
_OF_ITS_ATTENTION = ("cp_comm_type", "fp8_dot_product_attention")


def check_model(model: Any) -> None:
    """Checks that a model can train ORPO here.

    Raises:
        ConfigError: If it is no plain GPT model, or a setting would make the loss depend on how ranks are laid out.
    """
    if not isinstance(model, llm.GPTModel) or (
        model.config.forward_step_fn is not gpt_forward_step or model.config.data_step_fn is not gpt_data_step
    ):
        raise ConfigError(
            f"The model ({type(model).__name__}) must be a GPTModel of nemo.collections.llm with its own steps: "
            "others take other inputs."
        )
    config = model.config
    for name, (exact, reason) in EXACT_SETTINGS.items():
        section, _, key = name.partition(".")
        value = getattr(config, key, None) if section == "model" else None
        if value not in (None, exact) and key not in _SET_RIGHT:
            raise ConfigError(f"model.config.{key} ({value}) must be {exact}: {reason}. Set it so.")
    refused = {
        "num_moe_experts": "this version trains a mixture of experts through Megatron-Bridge only",
        "mtp_num_layers": "this version does not train multi-token prediction",
        "multi_latent_attention": "it is not tested with NeMo",
        "use_transformer_engine_full_layer_spec": "those layers take no packed rows",
    }
    for key, reason in refused.items():
        if getattr(config, key, None):
            raise ConfigError(f"model.config.{key} ({getattr(config, key)}) must be off: {reason}.")
    if takes_local_layers() and config.transformer_layer_spec is not default_layer_spec:
        spec = config.transformer_layer_spec
        raise ConfigError(
            f"This model has layers of its own ({getattr(spec, '__name__', type(spec).__name__)}), for which a "
            "machine without Transformer Engine has no stand-in. Train it on a GPU with Transformer Engine."
        )


def check_trainer(trainer: pl.Trainer, has_eval: bool) -> None:
    """Checks that a trainer runs ORPO exactly.

    Raises:
        ConfigError: If a setting would make the loss depend on how ranks are laid out, or would be without effect.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, MegatronStrategy) or strategy.ddp_config is None or strategy._fsdp is not None:
        raise ConfigError(
            "trainer.strategy must be a MegatronStrategy with Megatron's DistributedDataParallel: the loss is tested "
            "with nothing else."
        )
    if strategy.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError(
            f"trainer.strategy.virtual_pipeline_model_parallel_size ({strategy.virtual_pipeline_model_parallel_size}) "
            "must be null: NeMo makes all chunks but the first anew, without the loss. Leave it out."
        )
    if trainer.max_steps < 1:
        raise ConfigError(
            f"trainer.max_steps ({trainer.max_steps}) must be at least 1: the rows of a run are planned."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches ({trainer.accumulate_grad_batches}) must be 1: a step already has "
            "data.pairs.pairs_per_step pairs, in as many microbatches as they need."
        )
    for name in ("limit_train_batches", "limit_val_batches"):
        whole = (None, 1, 1.0) if has_eval or name == "limit_train_batches" else (None, 0, 0.0, 1, 1.0)
        if getattr(trainer, name) not in whole:
            raise ConfigError(
                f"trainer.{name} ({getattr(trainer, name)}) must be left out: a step and an evaluation always cover "
                "all of their pairs."
            )
    for callback in trainer.callbacks:
        wanted = getattr(callback, "user_comm_overlap_cfg", None)
        for key in ("tp_comm_overlap", "defer_embedding_wgrad_compute"):
            if isinstance(callback, MegatronCommOverlapCallback) and getattr(wanted, key, None):
                reason = EXACT_SETTINGS[f"comm_overlap.{key}"][1]
                raise ConfigError(f"MegatronCommOverlapCallback.{key} (True) must be off: {reason}. Leave it out.")
    if torch.cuda.is_available() and isinstance(trainer.accelerator, CPUAccelerator):
        raise ConfigError(
            "trainer.accelerator (cpu) must be gpu where PyTorch sees a GPU. To run on the CPU, set "
            "CUDA_VISIBLE_DEVICES= (empty)."
        )
    if torch.cuda.is_available() and str(trainer.precision) not in ("bf16-mixed", "16-mixed"):
        raise ConfigError(
            f"trainer.plugins ({trainer.precision}) must be bf16_mixed on a GPU: packed attention takes bf16 or fp16."
        )


def check_peft(peft: Any) -> None:
    """Checks that adapters leave the loss exact.

    Raises:
        ConfigError: If they drop values at random or adapt the vocabulary's layers.
    """
    dropout = getattr(peft, "dropout", 0.0)
    if dropout:
        exact, reason = EXACT_SETTINGS["peft.dropout"]
        raise ConfigError(f"peft.dropout ({dropout}) must be {exact}: {reason}. Set it so.")
    check_adapted_modules(getattr(peft, "target_modules", None) or ())


def prefix_conflict(config: Any) -> str | None:
    """Returns what of a model a prompt that is computed once does not go with, in words, if there is anything."""
    for name in _OF_ITS_ATTENTION:
        if getattr(config, name, None):
            return f"model.config.{name}, a setting of another attention"
    if config.transformer_layer_spec is not default_layer_spec:
        return "layers of the model's own"
    return None


def fit_model(model: llm.GPTModel, trainer: pl.Trainer, share_prefix: bool) -> list[str]:
    """Sets what packed rows ask of a model, and what this machine does.

    Args:
        model: The model, not yet built; its configuration is changed, but not what a checkpoint records of it.
        trainer: Its trainer.
        share_prefix: Whether it has to take pairs that share their prompt.

    Returns:
        What was changed of what the user may have set, in words.
    """
    config, changes = model.config, []
    if config.calculate_per_token_loss:
        reason = EXACT_SETTINGS["model.calculate_per_token_loss"][1]
        changes.append(f"orpo() set model.config.calculate_per_token_loss from True to False: {reason}.")
    config.calculate_per_token_loss = config.cross_entropy_loss_fusion = False
    for key in ("check_for_nan_in_grad", "check_for_large_grads"):
        if getattr(trainer.strategy.ddp_config, key, False):
            setattr(trainer.strategy.ddp_config, key, False)
            changes.append(
                f"orpo() set trainer.strategy.ddp.{key} from True to False: one rank would fail while the others "
                "wait. Every step's loss and gradients are looked at on all ranks together."
            )
    # Rows differ in length, so pipeline stages must exchange shapes; Megatron-Core ties that to this dispatcher.
    config.variable_seq_lengths = trainer.strategy.pipeline_model_parallel_size > 1
    config.moe_token_dispatcher_type = "alltoall"
    if share_prefix:
        config.transformer_layer_spec, config.apply_rope_fusion = shared_prefix_layer_spec, False
    if takes_local_layers():
        config.transformer_layer_spec = packed_local_layer_spec
        turn_off_fusions(config)
        config.use_cpu_initialization = not torch.cuda.is_available()
    return changes
