"""Bridge's ``ConfigContainer`` and data set provider for a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training import config as bridge_config
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import (
    MIXED_PRECISION_RECIPES,
    MixedPrecisionConfig,
    get_mixed_precision_config,
)
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from torch.utils.data import Dataset

from orpo_megatron.batch import PackedRow
from orpo_megatron.bridge.apply import apply_settings, build_settings
from orpo_megatron.bridge.prepare import local_model
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.bridge.rundir import CHECKPOINTS
from orpo_megatron.config import ConfigError, nearest
from orpo_megatron.data.dataset import PackedRows, collate_fn
from orpo_megatron.exact import exact_settings

TENSORBOARD = "tensorboard"
#: The sections that every container has, and those that it has only where a recipe writes them.
_SECTIONS = {
    "train": bridge_config.TrainingConfig,
    "validation": bridge_config.ValidationConfig,
    "optimizer": bridge_config.OptimizerConfig,
    "scheduler": bridge_config.SchedulerConfig,
    "ddp": bridge_config.DistributedDataParallelConfig,
    "checkpoint": bridge_config.CheckpointConfig,
    "logger": bridge_config.LoggerConfig,
    "dist": bridge_config.DistributedInitConfig,
    "rng": bridge_config.RNGConfig,
    "rerun_state_machine": bridge_config.RerunStateMachineConfig,
    "profiling": bridge_config.ProfilingConfig,
}
_OPTIONAL_SECTIONS = {
    "peft": LoRA,
    "ft": bridge_config.FaultToleranceConfig,
    "straggler": bridge_config.StragglerDetectionConfig,
    "nvrx_straggler": bridge_config.NVRxStragglerDetectionConfig,
    "comm_overlap": bridge_config.CommOverlapConfig,
    "tensor_inspect": bridge_config.TensorInspectConfig,
    "inprocess_restart": bridge_config.InProcessRestartConfig,
}


class RowStream(Dataset[PackedRow]):
    """Packed rows as Bridge's loaders take them, repeated where need be.

    Bridge reads one validation stream through all evaluations of a run, so it holds the rows once for each.
    """

    collate_fn = staticmethod(collate_fn)

    def __init__(self, rows: PackedRows, passes: int = 1) -> None:
        """Streams ``rows`` so many times."""
        self.rows, self.passes = rows, passes

    def __len__(self) -> int:
        """Returns the number of rows of all passes."""
        return len(self.rows) * self.passes

    def __getitem__(self, index: int) -> PackedRow:
        """Returns a row."""
        return self.rows[index % len(self.rows)]


@dataclass(kw_only=True)
class PreferenceData(DatasetProvider):
    """Hands Bridge's loaders the packed rows of a plan, in plan order, so that resuming is exact.

    The fields are what a checkpoint records; the data sets themselves are set by ``attach``.
    """

    seq_length: int
    rows_per_step: int
    content_hash: str
    dataloader_type: Literal["single"] = "single"
    num_workers: int = 0
    persistent_workers: bool = False
    pin_memory: bool = True

    def attach(self, train: RowStream, valid: RowStream | None) -> PreferenceData:
        """Sets the data sets."""
        self._train, self._valid = train, valid
        return self

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Returns the training rows and the validation rows, if any; there is no test set."""
        return self._train, self._valid, None


def make_container(
    recipe: Recipe,
    provider: GPTModelProvider,
    dataset: PreferenceData,
    *,
    num_steps: int,
    eval_plan: Any,
    here: bool = True,
) -> ConfigContainer:
    """Builds Bridge's configuration for a recipe.

    Args:
        recipe: The recipe.
        provider: The model.
        dataset: The packed rows.
        num_steps: Optimizer steps.
        eval_plan: Plan of an evaluation, or None.
        here: Whether it shall run on this machine: adapters then need the folder of their frozen base model.

    Returns:
        The container; Bridge finalises and validates it when the run starts.

    Raises:
        ConfigError: If a value is not what Bridge's setting takes.
    """
    given = {name: section for name, section in recipe.sections.items() if section}
    classes = _SECTIONS | {name: cls for name, cls in _OPTIONAL_SECTIONS.items() if name in given}
    defaults = _defaults(recipe, dataset, num_steps, eval_plan)
    if recipe.sections.get("peft"):
        # LoRA loads its frozen base model by itself, before the adapters are put in.
        defaults["checkpoint"]["pretrained_checkpoint"] = local_model(recipe) if here else recipe.hf or "model.config"

    def build(name: str, cls: Any) -> Any:
        default = defaults.get(name, {})
        # null asks for the default; num_epochs has become train_iters.
        values = {k: v for k, v in given.get(name, {}).items() if not (v is None and k in default)}
        return build_settings(cls, {k: v for k, v in values.items() if k != "num_epochs"}, name, **default)

    return ConfigContainer(
        model=provider,
        dataset=dataset,
        # Bridge only asks it for the size of the vocabulary, and pads none that comes from elsewhere.
        tokenizer=TokenizerConfig(
            tokenizer_type="NullTokenizer", vocab_size=provider.vocab_size, use_tokenizer_vocab_size=True
        ),
        mixed_precision=_mixed_precision(given.get("mixed_precision")),
        env_vars=given.get("env_vars", {}),
        **{name: build(name, cls) for name, cls in classes.items()},
    )


def _defaults(recipe: Recipe, dataset: PreferenceData, num_steps: int, eval_plan: Any) -> dict[str, dict[str, Any]]:
    """Returns the settings that follow from the plan and the run, and our defaults where Bridge's do not fit."""
    checkpoints = str(recipe.run_dir / CHECKPOINTS)
    weight_decay = recipe.setting("optimizer.weight_decay", 0.0)
    # Bridge wants the two alike; what the recipe says of one holds for both.
    given = (recipe.setting(f"{section}.use_distributed_optimizer") for section in ("ddp", "optimizer"))
    distributed = next((value for value in given if value is not None), True)
    return {
        "train": {
            "train_iters": num_steps,
            "global_batch_size": dataset.rows_per_step,
            "micro_batch_size": 1,
            "exit_signal_handler": True,
        },
        "validation": {
            "eval_iters": eval_plan.num_steps if eval_plan else 0,
            "eval_global_batch_size": eval_plan.rows_per_step if eval_plan else dataset.rows_per_step,
            "eval_micro_batch_size": 1,
        },
        "optimizer": {
            "lr": 5e-6,
            "min_lr": 0.0,
            "weight_decay": weight_decay,
            "use_distributed_optimizer": distributed,
        },
        "scheduler": {"start_weight_decay": weight_decay, "end_weight_decay": weight_decay},
        "ddp": {"use_distributed_optimizer": distributed, "grad_reduce_in_fp32": True},
        "comm_overlap": {"tp_comm_overlap": False},
        "checkpoint": {
            "save": checkpoints,
            "load": checkpoints,
            "save_interval": min(num_steps, 500),
            # Bridge's own default ties the optimizer's state to the tensor and pipeline parallel sizes.
            "dist_ckpt_optim_fully_reshardable": True,
        },
        "logger": {"tensorboard_dir": str(recipe.run_dir / TENSORBOARD), "log_interval": 1},
        "dist": {"distributed_backend": "nccl" if torch.cuda.is_available() else "gloo"},
    }


def _mixed_precision(value: Any) -> Any:
    """Returns Bridge's precision setting: a name such as ``bf16_mixed``, an object, or None for fp32.

    What ``EXACT_SETTINGS`` has of a precision is put right in Bridge's own: those of FP8 hold the weights in FP8 as
    well, which stay in bf16 here.
    """
    if isinstance(value, str) and value.replace("-", "_") not in MIXED_PRECISION_RECIPES:
        raise ConfigError(
            f"mixed_precision ({value!r}) is no precision of Megatron-Bridge's."
            f"{nearest(value, (name for name in MIXED_PRECISION_RECIPES if '-' not in name))}"
        )
    if value is None:
        return None
    if isinstance(value, str):
        precision = get_mixed_precision_config(value)
        exact = {key: right for key, right in exact_settings("mixed_precision") if getattr(precision, key)}
        for key, right in exact.items():
            setattr(precision, key, right)
        return precision if exact else value
    return apply_settings(MixedPrecisionConfig(), value, "mixed_precision")
