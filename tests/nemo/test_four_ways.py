"""One global batch after another from the same weights, by each of the four ways in which people train with Megatron.

NeMo runs here; the other three are the README's commands, in the environment that has Megatron-Bridge.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path

import pytest
from test_nemo_training import figures, read_events, train

from launch import PAIRS_PER_STEP, TinyRecipe, hub_folder, read_metrics
from readme import arguments, the

BOUND, STEPS = 1e-5, 2
LR, SEED = "1e-3", "1234"  # of the tiny recipe
Steps = list[dict[str, float]]


def test_all_four_have_one_loss_and_one_gradient_norm(
    tiny: TinyRecipe, recipe_run: Path, weights: Path, tmp_path: Path
) -> None:
    elsewhere = dataclasses.replace(tiny, python=os.environ["RECIPE_PYTHON"])
    (source,) = (tiny.cache_dir / "models").glob("random-*")
    train(tiny, weights, tmp_path / "nemo" / "run")
    ways = {
        "a recipe": first_steps(read_metrics(recipe_run)),
        "Bridge's own recipe": with_bridge(elsewhere, source, tmp_path / "bridge"),
        "a Megatron-Core loop": with_megatron_core(elsewhere, source, tmp_path / "core"),
        "NeMo 2.x": first_steps(figures(read_events(tmp_path / "nemo" / "run"))),
    }
    expected = ways["a recipe"]
    assert expected[0]["loss"] != pytest.approx(expected[1]["loss"], rel=100 * BOUND)  # so the bound means something
    for way, steps in ways.items():
        assert len(steps) == STEPS, way
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=BOUND), way


def first_steps(records: Steps) -> Steps:
    steps = [record for record in records if "loss" in record]
    return [{name: record[name] for name in ("loss", "grad_norm")} for record in steps[:STEPS]]


def with_bridge(tiny: TinyRecipe, source: Path, folder: Path) -> Steps:
    """``pretrain(*orpo(config, ...))``, tensor parallel 2."""
    hub, run_dir = hub_folder("meta-llama/Meta-Llama-3.1-8B", folder / "home"), folder / "run"
    shutil.copytree(source, hub, dirs_exist_ok=True)
    (tokenizer,) = (tiny.cache_dir / "models").glob("*-tokenizer")  # as the recipe's run has converted it
    shutil.copytree(tokenizer, hub, dirs_exist_ok=True)
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
        f"rng.seed={SEED}",
        "mixed_precision=null",
        f"train.train_iters={STEPS}",
        f"train.global_batch_size={PAIRS_PER_STEP}",
        HF_HOME=str(folder / "home"),
    ).succeed()
    return first_steps(read_metrics(run_dir))


def with_megatron_core(tiny: TinyRecipe, source: Path, folder: Path) -> Steps:
    """``get_forward_backward_func()`` with ``make_forward_step(...)``, tensor and data parallel 2."""
    tiny.command("tools/convert.py", "import", str(source), str(folder)).succeed()
    command = the("megatron_core.py").replace("examples/demo/train.jsonl", str(tiny.train_file))
    command = command.replace("--nproc-per-node 2", "--nproc-per-node 4")
    output = tiny.command(
        *arguments(command),
        *("--pairs-per-step", str(PAIRS_PER_STEP), "--steps", str(STEPS), "--lr", LR),
        *("--load", str(folder / "iter_0000000"), "--cache-dir", str(tiny.cache_dir)),
    ).succeed()
    lines = re.findall(r"^step \d+  loss (\S+) .*grad_norm (\S+)$", output, re.MULTILINE)
    return [{"loss": float(loss), "grad_norm": float(norm)} for loss, norm in lines]
