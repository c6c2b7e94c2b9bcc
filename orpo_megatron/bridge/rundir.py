"""A run's folder: what lies in it, and whether a recipe may go on from there."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from orpo_megatron.bridge.prepare import prepare_run
from orpo_megatron.bridge.recipe import LAYOUT_SETTINGS, RECORD, Recipe, load_recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.console import rank
from orpo_megatron.data.prepare import Prepared
from orpo_megatron.modelcard import model_card
from orpo_megatron.versions import versions

RECIPE, DATA_REPORT, METRICS, CHECKPOINTS, HF = "recipe.yaml", "data_report.json", "metrics.jsonl", "checkpoints", "hf"

#: Where Megatron says which checkpoint is the latest that is whole.
TRACKER = "latest_checkpointed_iteration.txt"
#: Settings that a run may change when it goes on: none of them moves the trajectory.
_FREE_SECTIONS = {"run", "logger", "checkpoint", "dist", "ddp", "profiling", "straggler", "nvrx_straggler", "ft"} | {
    "validation", "comm_overlap", "env_vars", "tensor_inspect", "inprocess_restart", RECORD,
}  # fmt: skip
_FREE_ORPO = {"head", "head_cache_gib"}
#: The training data is compared by content, not by name.
_FREE_DATA = {
    "train",
    "eval",
    "eval_split",
    "num_workers",
    "max_bad_rows",
    "rows_per_step",
    "max_tokens_per_row",
    "share_prefix",
    "pad_to_multiple_of",
}
# The first two are compared as the number of steps, the others only interrupt a run.
_FREE_TRAIN = {"train_iters", "num_epochs", "exit_interval", "exit_duration_in_mins"}


def latest_step(checkpoints: Path) -> int:
    """Returns the step of the latest complete checkpoint in a folder of them, 0 where there is none.

    Raises:
        ConfigError: If the tracker file does not hold a step.
    """
    tracker = checkpoints / TRACKER
    if not tracker.is_file():
        return 0
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise ConfigError(f"{tracker} ({text!r}) must hold the step of a checkpoint. Write it, or remove the folder.")
    return int(text)


def run_dir_of(checkpoints: Path) -> Path:
    """Returns the run's folder, by that of its checkpoints: the same, or the one above where it is called so."""
    return checkpoints.parent if checkpoints.name == CHECKPOINTS else checkpoints


def partial_export(run_dir: Path) -> Path:
    """Returns where an export is written before it is complete."""
    return run_dir / f"{HF}.partial"


def trajectory(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Returns what decides which model a run ends in: the data and the settings, but for the shape of the cluster."""
    values = {name: section for name, section in recipe.as_dict().items() if name not in _FREE_SECTIONS and section}
    values["orpo"] = {k: v for k, v in values["orpo"].items() if k not in _FREE_ORPO}
    values["data"] = {k: v for k, v in values["data"].items() if k not in _FREE_DATA}
    values["train"] = {k: v for k, v in values.get("train", {}).items() if k not in _FREE_TRAIN}
    values["model"] = {k: v for k, v in values["model"].items() if "parallel" not in k and "recompute" not in k}
    if recipe.hf is not None:
        values["model"].pop("config", None)  # model.hf says it too
    values = {
        name: {k: v for k, v in section.items() if f"{name}.{k}" not in LAYOUT_SETTINGS}
        if isinstance(section, dict)
        else section
        for name, section in values.items()
    }
    return {**values, "num_steps": prepared.plan.num_steps, "content_hash": prepared.store.content_hash}


def read_record(run_dir: Path) -> dict[str, Any]:
    """Returns what the run wrote about itself when it last started; empty where there is no run."""
    path = run_dir / RECIPE
    return ((yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(RECORD) or {}) if path.is_file() else {}


def plan_run(
    recipe: Recipe, hf_config: PretrainedConfig, world_size: int, checkpoints: Path, *, here: bool = True
) -> tuple[Prepared, int]:
    """Prepares data and plans as the latest checkpoint wants them, if there is one.

    Args:
        recipe: The recipe.
        hf_config: The model's Hugging Face configuration.
        world_size: Number of ranks.
        checkpoints: The folder that the run saves to and goes on from.
        here: As in ``prepare_run``.

    Returns:
        Data and plans, and the step that the run goes on from, 0 at its start.

    Raises:
        ConfigError: If something does not fit, or the checkpoint is of another run.
    """
    step, record = latest_step(checkpoints), read_record(recipe.run_dir)
    rows_per_step = record.get("rows_per_step") if step else None
    if rows_per_step and recipe.data.rows_per_step not in (None, rows_per_step):
        raise ConfigError(
            f"data.rows_per_step ({recipe.data.rows_per_step}) must stay {rows_per_step}, as in the checkpoints of "
            f"{recipe.run_dir}. Leave it out, or give another run.dir."
        )
    prepared = prepare_run(recipe, hf_config, world_size, rows_per_step, show_progress=rank() == 0, here=here)
    if step:
        check_same_run(recipe.run_dir, record.get("trajectory") or {}, trajectory(recipe, prepared))
    return prepared, step


def make_record(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Returns what a run writes about itself beside its settings."""
    return {
        "versions": versions(),
        "rows_per_step": prepared.plan.rows_per_step,
        "content_hash": prepared.store.content_hash,
        "trajectory": trajectory(recipe, prepared),
    }


def write_records(recipe: Recipe, prepared: Prepared) -> None:
    """Writes ``recipe.yaml`` (resolved, with versions and data hash) and ``data_report.json``."""
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    values = {**recipe.as_dict(), RECORD: make_record(recipe, prepared)}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    fresh = recipe.run_dir / f".{RECIPE}"
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(recipe.run_dir / RECIPE)  # at once: other ranks may be reading it
    reports = {"train": prepared.store.report.to_dict(), "plan": vars(prepared.plan.summary())}
    if prepared.eval_store is not None:
        reports["eval"] = prepared.eval_store.report.to_dict()
    (recipe.run_dir / DATA_REPORT).write_text(json.dumps(reports, indent=2), encoding="utf-8")


def check_same_run(run_dir: Path, recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks that the checkpoints in a run's folder belong to the recipe that is about to go on from them.

    Args:
        run_dir: The folder.
        recorded: ``trajectory`` as the run recorded it.
        now: ``trajectory`` of the recipe.

    Raises:
        ConfigError: Naming the first setting that differs.
    """
    for name in sorted({*recorded, *now}):
        old, new = recorded.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(k for k in sorted({*old, *new}) if old.get(k) != new.get(k))
            name, old, new = f"{name}.{key}", old.get(key), new.get(key)
        raise ConfigError(
            f"{run_dir} holds checkpoints of another run: there {name} was {old!r}, now it is {new!r}. Give another "
            "run.dir, or the old setting to go on."
        )


def read_run(run_dir: Path) -> Recipe:
    """Reads the recipe that a run left behind.

    Raises:
        ConfigError: If the folder holds no run.
    """
    if not (run_dir / RECIPE).is_file():
        raise ConfigError(f"{run_dir} holds no run (no {RECIPE}). Give the run.dir of a run.")
    return load_recipe(str(run_dir / RECIPE))


def last_metrics(run_dir: Path, step: int | None = None) -> dict[str, Any]:
    """Returns the run's last training figures, and its last evaluation's with their prefix ``eval_``.

    Args:
        run_dir: The folder of the run.
        step: Look no further than this step.
    """
    metrics: dict[str, Any] = {}
    for record in read_metrics(run_dir / METRICS):
        if step is None or record["step"] <= step:
            metrics.update(record)
    return metrics


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file, if it is there, but for one that was cut off when the run was killed."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def write_model_card(recipe: Recipe, folder: Path, run_dir: Path | None = None, step: int | None = None) -> None:
    """Writes the exported model's ``README.md`` from what lies in the run's folder.

    Args:
        recipe: The run's recipe.
        folder: The exported model.
        run_dir: Where the run lies, if it was moved since.
        step: The step of the checkpoint, if it is not the last.
    """
    run_dir = run_dir or recipe.run_dir
    report = run_dir / DATA_REPORT
    reports = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    card = model_card(
        base_model=recipe.hf or "",
        recipe=recipe.as_dict(),
        data_report=reports.get("train"),
        metrics=last_metrics(run_dir, step),
        versions=versions(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
