"""A recipe's values in Bridge's configuration objects."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from orpo_megatron.bridge.apply import apply_settings, build_settings
from orpo_megatron.config import ConfigError


@dataclass
class Target:
    """Fields of the kinds that Bridge's classes have."""

    lr: float = 1.0
    steps: int | None = None
    style: Literal["linear", "cosine"] | None = None
    params_dtype: torch.dtype = torch.float32
    anything: Any = None
    betas: tuple[float, float] = (0.9, 0.95)
    names: list[str] | None = None


@dataclass
class Unresolved:
    """A field whose type is not there at run time."""

    thing: "NotThere" = 3  # type: ignore[name-defined] # noqa: F821


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        apply_settings(Target(), values, "section")
    return str(error.value)


def test_values_land_in_their_fields_with_their_types() -> None:
    target = Target()
    values = {"lr": 1, "steps": 3, "style": "cosine", "params_dtype": "bfloat16", "anything": {"a": [1]}}
    assert apply_settings(target, values, "section") is target
    assert target == Target(1.0, 3, "cosine", torch.bfloat16, {"a": [1]})
    assert type(target.lr) is float
    assert apply_settings(Target(), {"params_dtype": "torch.float16"}, "section").params_dtype is torch.float16
    assert apply_settings(Target(steps=3), {"steps": None}, "section").steps is None


def test_a_recipe_wins_over_our_defaults() -> None:
    assert build_settings(Target, {"lr": 0.5}, "section", lr=0.1, steps=7) == Target(lr=0.5, steps=7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrr": 1}, "section.lrr is not a setting of Target. Did you mean 'lr'?"),
        ({"lr": "fast"}, "section.lr ('fast') must be of type float."),
        ({"lr": None}, "section.lr (None) must be of type float."),
        ({"steps": 2.5}, "section.steps (2.5) must be of type int or null."),
        ({"steps": True}, "section.steps (True) must be of type int or null."),
        ({"style": "cosin"}, "section.style ('cosin') must be "),
        ({"params_dtype": "float31"}, "section.params_dtype ('float31') must be a dtype such as float32 or bfloat16."),
        ({"params_dtype": "nn"}, "section.params_dtype ('nn') must be a dtype such as float32 or bfloat16."),
    ],
)
def test_a_value_that_does_not_fit_is_named(values: dict[str, Any], message: str) -> None:
    assert refusal(values).startswith(message)


def test_a_type_that_cannot_be_resolved_is_not_checked() -> None:
    assert apply_settings(Unresolved(), {"thing": "text"}, "section").thing == "text"


def test_bridges_own_classes_are_checked(bridge_on_cpu: None) -> None:
    from megatron.bridge.training import config as bridge_config
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

    for cls, section, values, message in (
        (bridge_config.OptimizerConfig, "optimizer", {"lr": "5e-6x"}, "optimizer.lr ('5e-6x') must be of type float"),
        (bridge_config.TrainingConfig, "train", {"manual_gc": 1}, "train.manual_gc (1) must be of type bool"),
        (bridge_config.SchedulerConfig, "scheduler", {"lr_warmup_iters": "1"}, "scheduler.lr_warmup_iters ('1') must"),
        (bridge_config.CheckpointConfig, "checkpoint", {"save_interval": "x"}, "checkpoint.save_interval ('x') must"),
        (bridge_config.LoggerConfig, "logger", {"log_interval": 0.5}, "logger.log_interval (0.5) must be of type int"),
        (MixedPrecisionConfig, "mixed_precision", {"params_dtype": "half16"}, "mixed_precision.params_dtype ('half16"),
    ):
        with pytest.raises(ConfigError) as error:
            build_settings(cls, values, section)
        assert str(error.value).startswith(message)
        assert dataclasses.is_dataclass(cls)


def test_a_precision_that_bridge_does_not_know_is_named(bridge_on_cpu: None) -> None:
    from orpo_megatron.bridge.container import _mixed_precision

    assert _mixed_precision(None) is None and _mixed_precision("bf16-mixed") == "bf16-mixed"
    assert _mixed_precision({"bf16": True, "params_dtype": "bfloat16"}).params_dtype is torch.bfloat16
    with pytest.raises(ConfigError) as error:
        _mixed_precision("bf16_mixd")
    assert str(error.value) == (
        "mixed_precision ('bf16_mixd') is no precision of Megatron-Bridge's. Did you mean 'bf16_mixed'?"
    )
