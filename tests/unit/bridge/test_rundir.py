"""A run's folder, and whether a recipe may go on from it."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from orpo_megatron.bridge.prepare import num_steps, prepare_run
from orpo_megatron.bridge.recipe import Recipe, build_recipe
from orpo_megatron.bridge.rundir import (
    check_same_run,
    last_metrics,
    latest_step,
    read_record,
    read_run,
    run_dir_of,
    trajectory,
    versions,
    write_model_card,
    write_records,
)
from orpo_megatron.config import ConfigError
from orpo_megatron.data.prepare import Prepared

Values = dict[str, Any]


def prepared_run(values: Values) -> tuple[Recipe, Prepared]:
    recipe = build_recipe(values)
    config = LlamaConfig(**recipe.hf_config or {})
    return recipe, prepare_run(recipe, config, 1, None, show_progress=False)


def written_then(values: Values, changes: Values) -> tuple[Path, Values, Values]:
    """Writes a run's records, and returns its folder, its trajectory and that of a changed recipe on the same data."""
    recipe, prepared = prepared_run(values)
    write_records(recipe, prepared)
    now = copy.deepcopy(values)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        now.setdefault(section, {})[key] = value
    record = read_record(recipe.run_dir)
    changed = build_recipe(now)
    plan = dataclasses.replace(prepared.plan, num_steps=num_steps(changed, len(prepared.store)))
    after = trajectory(changed, dataclasses.replace(prepared, plan=plan))
    return recipe.run_dir, record["trajectory"], after


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2},
        {"model__sequence_parallel": True, "model__recompute_granularity": "full"},
        {"logger__log_throughput": True, "logger__wandb_project": "p"},
        {"checkpoint__save_interval": 3, "ddp__overlap_grad_reduce": True, "dist__distributed_timeout_minutes": 5},
        {"run__export": False, "run__progress": "plain", "validation__eval_interval": 2},
        {"data__max_tokens_per_row": 300, "data__rows_per_step": 4, "data__num_workers": 1},
        {"data__eval": None, "env_vars__A": "b"},
        {"orpo__head": "recompute", "orpo__head_cache_gib": 4},
    ],
)
def test_a_run_may_go_on_with_another_cluster_and_other_logging(runnable: Values, changes: Values) -> None:
    folder, recorded, now = written_then(runnable, changes)
    check_same_run(folder, recorded, now)


def test_a_run_may_go_on_with_or_without_the_architecture_beside_its_weights(runnable: Values) -> None:
    runnable["model"]["hf"] = "org/model"
    folder, recorded, now = written_then(runnable, {"model__config": None})
    check_same_run(folder, recorded, now)
    assert recorded["model"] == {"hf": "org/model"}


def test_a_run_may_go_on_when_its_data_moved_and_epochs_are_spelt_as_steps(runnable: Values, tmp_path: Path) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(runnable["data"]["train"]).read_bytes())
    runnable["train"] = {"num_epochs": 2}
    folder, recorded, _ = written_then(runnable, {})
    runnable["train"] = {"train_iters": 6}  # 20 pairs, 8 a step: 3 steps an epoch
    runnable["data"]["train"] = str(moved)
    check_same_run(folder, recorded, trajectory(*prepared_run(runnable)))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"optimizer__lr": 2e-3}, "there optimizer.lr was 0.001, now it is 0.002."),
        ({"orpo__beta": 0.2}, "there orpo.beta was 0.1, now it is 0.2."),
        ({"orpo__nll_scope": "response"}, "there orpo.nll_scope was 'prompt_and_response', now it is 'response'."),
        ({"data__pairs_per_step": 4}, "there data.pairs_per_step was 8, now it is 4."),
        ({"data__shuffle": False}, "there data.shuffle was True, now it is False."),
        ({"train__train_iters": 9}, "there num_steps was 5, now it is 9."),
        ({"rng__seed": 5}, "there rng was None, now it is {'seed': 5}."),
        ({"scheduler__lr_warmup_iters": 2}, "there scheduler was None, now it is {'lr_warmup_iters': 2}."),
        ({"model__rotary_base": 500}, "there model.rotary_base was None, now it is 500."),
        # The first of several by name.
        ({"optimizer__lr": 1.0, "orpo__beta": 2.0, "optimizer__clip_grad": 0.5}, "there optimizer.clip_grad was None"),
    ],
)
def test_a_run_that_would_end_elsewhere_is_refused_by_the_first_difference(
    runnable: Values, changes: Values, difference: str
) -> None:
    folder, recorded, now = written_then(runnable, changes)
    with pytest.raises(ConfigError) as error:
        check_same_run(folder, recorded, now)
    message = str(error.value)
    assert message.startswith(f"{folder} holds checkpoints of another run: {difference}")
    assert message.endswith("Give another run.dir, or the old setting to go on.")


def test_a_run_with_other_data_is_refused(runnable: Values) -> None:
    folder, recorded, _ = written_then(runnable, {})
    with open(runnable["data"]["train"], "a") as file:
        file.write(json.dumps({"prompt": "One more", "chosen": "yes", "rejected": "no"}) + "\n")
    now = trajectory(*prepared_run(runnable))
    with pytest.raises(ConfigError, match=f"there content_hash was '{recorded['content_hash']}', now it is '"):
        check_same_run(folder, recorded, now)


def test_what_a_run_writes_reads_back(runnable: Values) -> None:
    recipe, prepared = prepared_run(runnable)
    assert read_record(recipe.run_dir) == {}
    write_records(recipe, prepared)
    assert read_run(recipe.run_dir) == recipe
    record = read_record(recipe.run_dir)
    assert record["rows_per_step"] == prepared.plan.rows_per_step == 2
    assert record["content_hash"] == prepared.store.content_hash
    assert record["versions"] == versions() and record["versions"]["torch"] == importlib.metadata.version("torch")
    assert "parallel" not in yaml.safe_dump(record["trajectory"])
    report = json.loads((recipe.run_dir / "data_report.json").read_text())
    assert (report["train"]["num_pairs"], report["eval"]["num_pairs"], report["plan"]["num_steps"]) == (20, 6, 5)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_run(tmp_path)
    assert str(error.value) == f"{tmp_path} holds no run (no recipe.yaml). Give the run.dir of a run."


def test_the_latest_step_is_what_the_tracker_says(tmp_path: Path) -> None:
    assert latest_step(tmp_path) == 0
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("120\n")
    assert latest_step(tmp_path) == 120
    tracker.write_text("")
    with pytest.raises(ConfigError, match=r"iteration.txt \(''\) must hold the step of a checkpoint. Write it, or"):
        latest_step(tmp_path)


def test_a_run_is_found_by_its_checkpoints() -> None:
    assert run_dir_of(Path("/results/a/checkpoints")) == run_dir_of(Path("/results/a")) == Path("/results/a")


def test_the_last_metrics_are_of_the_last_step_and_evaluation(tmp_path: Path) -> None:
    assert last_metrics(tmp_path) == {}
    lines = [
        {"step": 1, "loss": 3.0, "only_first": 1.0},
        {"step": 1, "eval_loss": 2.5},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_metrics(tmp_path) == {"step": 3, "loss": 2.0, "only_first": 1.0, "eval_loss": 2.5}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the run was killed
    assert last_metrics(tmp_path)["step"] == 3


def test_the_model_card_is_written_from_the_runs_folder(runnable: Values, tmp_path: Path) -> None:
    recipe, prepared = prepared_run(runnable)
    write_records(recipe, prepared)
    (recipe.run_dir / "metrics.jsonl").write_text(json.dumps({"step": 5, "eval_loss": 1.25}) + "\n")
    write_model_card(recipe, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "20 preference pairs" in card and "`orpo.beta` | 0.1 |" in card and "## Data" in card
    assert re.search(r"\| Loss \| +\| 1\.25 \|", card)
    assert f"| torch | {importlib.metadata.version('torch')} |" in card
    (recipe.run_dir / "data_report.json").unlink()
    write_model_card(recipe, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "on preference pairs." in card and "## Data" not in card and "`orpo.beta` | 0.1 |" in card
