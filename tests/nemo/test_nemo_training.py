"""NeMo's loop trains and evaluates the recipe's pairs, from the same weights, to the recipe's own figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from forks import run_forked

from launch import BETA, EVAL_INTERVAL, PAIRS_PER_STEP, STEPS, TinyRecipe, read_metrics
from orpo_megatron.bridge.parity import metric_errors

BOUND = 1e-5
#: What only a run of orpo_megatron.train writes beside the metrics.
NOT_LOGGED = ("tokens", "pairs", "seconds", "learning_rate")
Records = dict[int, dict[str, float]]


def train(tiny: TinyRecipe, weights: Path, run_dir: Path, size: int = 1, **changes: Any) -> None:
    """Trains the toy with changes such as ``trainer__max_steps=4`` on so many ranks."""

    def run() -> None:
        import fiddle

        from orpo_megatron.nemo.recipes import tiny_cpu

        recipe = tiny_cpu(dir=str(run_dir), devices=size)
        pairs, settings = recipe.data.pairs, {"trainer__max_steps": STEPS, **changes}
        pairs.train, pairs.eval, pairs.pairs_per_step = str(tiny.train_file), str(tiny.eval_file), PAIRS_PER_STEP
        recipe.data.cache_dir = str(run_dir.parent / "cache")
        recipe.trainer.val_check_interval = EVAL_INTERVAL
        recipe.resume.restore_config = restore_from(weights)
        for path, value in settings.items():
            *owners, name = path.split("__")
            target: Any = recipe
            for owner in owners:
                target = getattr(target, owner)
            setattr(target, name, value)
        fiddle.build(recipe)()

    run_forked(size, run)


def restore_from(weights: Path) -> Any:
    import nemo_run

    from nemo import lightning as nl

    return nemo_run.Config(nl.RestoreConfig, path=str(weights), load_artifacts=False)


def read_events(run_dir: Path) -> Records:
    """Reads what TensorBoard's files of a run hold, fp32, by the number of steps done."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records: Records = {}
    files = sorted(run_dir.rglob("events.out.tfevents*"), key=lambda path: path.stat().st_mtime)
    assert files, f"no TensorBoard file in {run_dir}"
    for path in files:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                records.setdefault(int(event.step), {})[name] = event.value
    return records


def figures(records: Records) -> list[dict[str, float]]:
    """Returns the steps' and the evaluations' metrics of a NeMo run in the form of ``metrics.jsonl``."""
    training = [
        {"step": step + 1, **{k: v for k, v in record.items() if not k.startswith("eval_")}}
        for step, record in sorted(records.items())
        if "loss" in record
    ]
    evaluations = [
        {"step": step + 1, **{k: v for k, v in record.items() if k.startswith("eval_")}}
        for step, record in sorted(records.items())
        if "eval_loss" in record
    ]
    return training + evaluations


def expected(recipe_run: Path) -> list[dict[str, float]]:
    """Returns the recipe's metrics, rounded to fp32 as TensorBoard's are."""
    records = sorted(read_metrics(recipe_run), key=lambda record: "loss" not in record)
    return [{k: float(np.float32(v)) for k, v in record.items() if k not in NOT_LOGGED} for record in records]


def worst_error(right: list[dict[str, float]], ours: list[dict[str, float]]) -> float:
    """Compares every metric of every step and evaluation."""
    assert [record["step"] for record in ours] == [record["step"] for record in right]
    worst = 0.0
    for reference, record in zip(right, ours, strict=True):
        errors = metric_errors(reference, {name: record[name] for name in reference}, BETA)
        assert max(errors.values()) <= BOUND, (reference["step"], errors)
        worst = max(worst, *errors.values())
    return worst


def check(run_dir: Path, recipe_run: Path, steps: int | None = None) -> None:
    """Holds a run's training steps and evaluations, or its first training steps alone, against the recipe's."""
    right, ours = expected(recipe_run), figures(read_events(run_dir))
    assert len(right) == STEPS + STEPS // EVAL_INTERVAL and {"grad_norm", "loss"} <= right[0].keys()
    print(f"worst error {worst_error(right[:steps], ours[:steps]):.1e}")


@pytest.fixture(scope="module")
def straight(tiny: TinyRecipe, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process, straight through."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(tiny, weights, run_dir)
    return run_dir


def test_one_process_has_the_recipes_losses_and_gradient_norms(straight: Path, recipe_run: Path) -> None:
    check(straight, recipe_run)


LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {},
    "tensor 2 with sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline 2": {"pipeline_model_parallel_size": 2},
    "context 2": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_have_them_too(
    tiny: TinyRecipe, weights: Path, recipe_run: Path, tmp_path: Path, layout: str
) -> None:
    settings = {f"trainer__strategy__{name}": size for name, size in LAYOUTS[layout].items()}
    train(tiny, weights, tmp_path / "run", size=2, **settings)
    check(tmp_path / "run", recipe_run)


def test_a_run_goes_on_as_if_it_had_not_stopped(
    tiny: TinyRecipe, weights: Path, straight: Path, tmp_path: Path
) -> None:
    """It stops in step 7, refuses another order of pairs, and goes on from step 5, where the evaluation saved it.

    To the last bit; Lightning then puts later evaluations one step too early on TensorBoard's axis.
    """
    save = {"log__ckpt__every_n_train_steps": 4}
    with pytest.raises(AssertionError, match="stopped by the test"):
        train(tiny, weights, tmp_path / "run", trainer__callbacks=[StopInStep(7)], **save)
    assert [r["step"] for r in figures(read_events(tmp_path / "run")) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(AssertionError, match="there seed was 1234, now it is 7. Give the data and settings of that"):
        train(tiny, weights, tmp_path / "run", data__seed=7, **save)
    train(tiny, weights, tmp_path / "run", **save)
    ours, theirs = (figures(read_events(run_dir)) for run_dir in (tmp_path / "run", straight))
    training = [{k: v for k, v in r.items() if k not in ("epoch", "val_loss")} for r in ours if "loss" in r]
    assert training == [{k: v for k, v in r.items() if k not in ("epoch", "val_loss")} for r in theirs if "loss" in r]
    evaluations = [{k: v for k, v in r.items() if k != "step"} for r in ours if "eval_loss" in r]
    assert evaluations == [{k: v for k, v in r.items() if k != "step"} for r in theirs if "eval_loss" in r]
    assert len(training) == STEPS and len(evaluations) == 2


def test_a_gradient_that_is_not_finite_ends_all_ranks_alike(tiny: TinyRecipe, weights: Path, tmp_path: Path) -> None:
    """On one rank of two, whose loss is finite; the other one does not wait for it."""
    with pytest.raises(AssertionError) as failed:
        train(tiny, weights, tmp_path / "run", size=2, trainer__callbacks=[SpoilGradient(step=3, rank=1)])
    said = "In step 3 a gradient is not finite. The weights are still those before that step."
    assert str(failed.value).count(f"(False, 'ConfigError: {said}") == 2
    assert [r["step"] for r in figures(read_events(tmp_path / "run")) if "loss" in r] == [1, 2]


class SpoilGradient(pl.Callback):
    """Makes a gradient NaN, of one step on one rank."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            norms = [p for name, p in pl_module.named_parameters() if name.endswith("final_layernorm.weight")]
            norms[0].register_hook(lambda gradient: gradient * float("nan"))


class StopInStep(pl.Callback):
    """Ends a run as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError("stopped by the test")
