"""What the NeMo way refuses, puts right and offers."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from forks import run_forked

from orpo_megatron.config import ConfigError


def tiny(**changes: Any) -> Any:
    """Returns the toy's parts, built, with changes such as ``model__config__hidden_dropout=0.1``."""
    import fiddle

    from orpo_megatron.nemo.recipes import tiny_cpu

    recipe = tiny_cpu()
    for path, value in changes.items():
        *owners, name = path.split("__")
        target: Any = recipe
        for owner in owners:
            target = getattr(target, owner)
        setattr(target, name, value)
    return fiddle.build(recipe).keywords


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__config__hidden_dropout": 0.1},
            r"model\.config\.hidden_dropout \(0\.1\) must be 0\.0: the loss would depend on how ranks are laid out\. "
            r"Set it so\.",
        ),
        ({"model__config__attention_dropout": 0.2}, r"model\.config\.attention_dropout \(0\.2\) must be 0\.0: "),
        ({"model__config__num_moe_experts": 4}, r"model\.config\.num_moe_experts \(4\) must be off: this version "),
        ({"model__config__forward_step_fn": print}, r"The model \(LlamaModel\) must be a GPTModel .* its own steps"),
        (
            {"model__config__transformer_layer_spec": dataclasses.dataclass},
            r"This model has layers of its own \(dataclass\), for which a machine without Transformer Engine",
        ),
        (
            {"trainer__strategy__virtual_pipeline_model_parallel_size": 2},
            r"trainer\.strategy\.virtual_pipeline_model_parallel_size \(2\) must be null: NeMo makes all chunks",
        ),
        ({"trainer__strategy__ddp": "pytorch"}, r"trainer\.strategy must be a MegatronStrategy with Megatron's "),
        ({"trainer__max_steps": -1}, r"trainer\.max_steps \(-1\) must be at least 1: the rows of a run are planned\."),
        ({"trainer__accumulate_grad_batches": 2}, r"trainer\.accumulate_grad_batches \(2\) must be 1: a step already"),
        ({"trainer__limit_val_batches": 3}, r"trainer\.limit_val_batches \(3\) must be left out: a step and an eval"),
        ({"trainer__strategy__tensor_model_parallel_size": 2}, r"\(1\) must be a multiple .* \(2 x 1 x 1 = 2\)\."),
        ({"data__pairs__tokenizer": None}, r"data\.pairs\.tokenizer is missing: the model has no Hugging Face token"),
        ({"data__pairs__train": "nowhere.jsonl"}, r"nowhere\.jsonl"),
        ({"data__pairs__overlong": "cut"}, r"data\.pairs\.overlong \('cut'\) must be one of drop, truncate\."),
        ({"objective__nll_scope": "all"}, r"objective\.nll_scope \('all'\) must be one of prompt_and_response, resp"),
        ({"data": None}, r"data \(NoneType\) must be a PreferenceDataModule of orpo_megatron\.nemo\."),
    ],
)
def test_what_would_not_be_exact_or_is_missing_is_one_message(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from orpo_megatron.nemo import orpo

    with pytest.raises(ConfigError, match=message):
        orpo(**tiny(**{"data__cache_dir": str(tmp_path), **changes}))


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"dropout": 0.1}, r"peft\.dropout \(0\.1\) must be 0\.0: the loss would depend on how ranks are laid out\."),
        ({"target_modules": ["output_layer"]}, r"peft\.target_modules \(output_layer\) must not hold the vocabulary"),
    ],
)
def test_adapters_leave_the_loss_exact(adapters: dict[str, Any], message: str) -> None:
    from nemo.collections.llm.peft import LoRA

    from orpo_megatron.nemo.fit import check_peft

    check_peft(None)
    check_peft(LoRA())
    with pytest.raises(ConfigError, match=message):
        check_peft(LoRA(**adapters))


def test_what_makes_no_other_model_is_put_right_and_said() -> None:
    from orpo_megatron.nemo.fit import check_model, fit_model

    parts = tiny(model__config__calculate_per_token_loss=True, trainer__strategy__ddp__check_for_nan_in_grad=True)
    check_model(parts["model"])
    changes = fit_model(parts["model"], parts["trainer"], share_prefix=False)
    assert changes == [
        "orpo() set model.config.calculate_per_token_loss from True to False: the loss is divided by counts of the "
        "whole global batch already.",
        "orpo() set trainer.strategy.ddp.check_for_nan_in_grad from True to False: one rank would fail while the "
        "others wait. Every step's loss and gradients are looked at on all ranks together.",
    ]
    assert not parts["trainer"].strategy.ddp_config.check_for_nan_in_grad
    assert not parts["model"].config.calculate_per_token_loss
    assert fit_model(parts["model"], parts["trainer"], share_prefix=False) == []


def test_what_a_checkpoint_records_of_a_model_stays_nemos() -> None:
    from nemo.collections.llm.gpt.model.base import GPTConfig

    from orpo_megatron.config import OrpoConfig
    from orpo_megatron.nemo.fit import fit_model
    from orpo_megatron.nemo.loss import register

    parts = tiny()
    model = parts["model"]
    fit_model(model, parts["trainer"], share_prefix=False)
    register(model, OrpoConfig())
    recorded = model.config.__io__
    for name in ("forward_step_fn", "data_step_fn", "transformer_layer_spec"):
        assert getattr(model.config, name) is not getattr(GPTConfig, name)
        assert getattr(recorded, name, getattr(GPTConfig, name)) is getattr(GPTConfig, name)


def test_every_recipe_is_nemos_own_with_pairs_for_data() -> None:
    from nemo.collections import llm

    from orpo_megatron.nemo import PreferenceDataModule, orpo
    from orpo_megatron.nemo.recipes import FACTORIES, MODELS

    for name in MODELS:
        recipe = FACTORIES[name](dir="runs/x", num_nodes=2)
        base = getattr(llm, name).finetune_recipe(dir="runs/x", name="orpo", num_nodes=2, peft_scheme="none")
        assert recipe.__fn_or_cls__ is orpo and recipe.data.__fn_or_cls__ is PreferenceDataModule
        assert recipe.model == base.model and recipe.optim == base.optim and recipe.resume == base.resume
        assert recipe.trainer.num_nodes == 2 and recipe.trainer.plugins == base.trainer.plugins
        assert recipe.trainer.strategy.virtual_pipeline_model_parallel_size is None
        strategy = recipe.trainer.strategy
        for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            assert getattr(strategy, size) == getattr(base.trainer.strategy, size)
        assert recipe.data.pairs.tokenizer == base.resume.restore_config.path.removeprefix("nemo://")
    adapters = FACTORIES["llama31_8b"](peft_scheme="lora").peft
    assert adapters.__fn_or_cls__ is llm.peft.LoRA and adapters.dim == 8


def test_processes_that_differ_hear_what_differs(tmp_path: Path) -> None:
    from orpo_megatron.nemo import orpo

    def start() -> str:
        with pytest.raises(ConfigError) as caught:
            orpo(**tiny(data__cache_dir=str(tmp_path), data__seed=int(os.environ["RANK"])))
        return str(caught.value)

    host = socket.gethostname()
    message = (
        f"data.seed differs between processes: 0 on rank 0 ({host}), 1 on rank 1 ({host}). Start the same recipe with "
        "the same overrides on every node."
    )
    assert run_forked(2, start) == [message, message]
