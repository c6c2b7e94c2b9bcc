"""One global batch after another from the same weights, by each way in which people train with Megatron."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from launch import PAIRS_PER_STEP, REPO, TinyRecipe, hub_folder, read_metrics
from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import load_recipe
from orpo_megatron.data.sources import load_tokenizer
from readme import arguments, the

pytestmark = pytest.mark.slow

BOUND, STEPS = 1e-5, 2
LR = 1e-3  # of the tiny recipe, constant
Steps = list[dict[str, float]]


@pytest.fixture(scope="module")
def expected(reference_run: Path) -> Steps:
    """Loss and gradient norm of the first steps by ``orpo_megatron.train`` and a recipe."""
    steps = [record for record in read_metrics(reference_run) if "loss" in record]
    return [{name: record[name] for name in ("loss", "grad_norm")} for record in steps[:STEPS]]


@pytest.fixture(scope="module")
def weights(reference_run: Path) -> Path:
    """The Hugging Face folder that the run started from."""
    return Path(model_source(load_recipe(str(reference_run / "recipe.yaml"))))


def check(found: Steps, expected: Steps) -> None:
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=BOUND)
    assert expected[0]["loss"] != pytest.approx(expected[1]["loss"], rel=100 * BOUND)  # the bound means something


def test_a_recipe_of_bridges_own(tiny: TinyRecipe, weights: Path, expected: Steps, tmp_path: Path) -> None:
    """``pretrain(*orpo(config, ...))``."""
    folder, run_dir = hub_folder("meta-llama/Meta-Llama-3.1-8B", tmp_path / "home"), tmp_path / "run"
    shutil.copytree(weights, folder, dirs_exist_ok=True)
    recipe = load_recipe(str(REPO / "recipes" / "tiny_cpu.yaml"))
    load_tokenizer(recipe.tokenizer, tiny.cache_dir).save_pretrained(folder)
    command = the("bridge_recipe.py").replace("examples/demo/train.jsonl", str(tiny.train_file))
    optimizer = {"lr": LR, "min_lr": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "clip_grad": 1.0}
    schedule = {"lr_decay_style": "constant", "lr_warmup_iters": 0}
    no_decay = ("optimizer.weight_decay=0.0", "scheduler.start_weight_decay=0.0", "scheduler.end_weight_decay=0.0")
    tiny.command(
        *arguments(command.replace("runs/llama31_8b", str(run_dir))),
        f"logger.tensorboard_dir={run_dir}/tensorboard",
        *(f"optimizer.{name}={value}" for name, value in optimizer.items()),
        *(f"scheduler.{name}={value}" for name, value in schedule.items()),
        *no_decay,
        f"rng.seed={recipe.seed}",
        "mixed_precision=null",
        f"train.train_iters={STEPS}",
        f"train.global_batch_size={PAIRS_PER_STEP}",
        HF_HOME=str(tmp_path / "home"),
    ).succeed()
    check([{name: record[name] for name in ("loss", "grad_norm")} for record in read_metrics(run_dir)], expected)


@pytest.mark.parametrize("split", ["tensor", "data"])
def test_plain_megatron_core(
    tiny: TinyRecipe, weights: Path, expected: Steps, tmp_path: Path, bridge_on_cpu: None, split: str
) -> None:
    """``get_forward_backward_func()`` with ``make_forward_step(...)``, on two processes."""
    from orpo_megatron.bridge.convert import Options, import_model

    import_model(str(weights), tmp_path / "megatron", Options())
    command = the("megatron_core.py").replace("examples/demo/train.jsonl", str(tiny.train_file))
    output = tiny.command(
        *arguments(command if split == "tensor" else command.replace(" --tensor-parallel 2", "")),
        *("--pairs-per-step", str(PAIRS_PER_STEP), "--steps", str(STEPS)),
        *("--lr", str(LR), "--load", str(tmp_path / "megatron" / "iter_0000000"), "--cache-dir", str(tiny.cache_dir)),
    ).succeed()
    lines = re.findall(r"^step \d+  loss (\S+) .*grad_norm (\S+)$", output, re.MULTILINE)
    check([{"loss": float(loss), "grad_norm": float(norm)} for loss, norm in lines], expected)
