"""A run that was killed, interrupted or finished: the same command goes on from there, and nothing shows of it."""

import shutil
from pathlib import Path

import pytest

from launch import (
    BETA,
    EVAL_INTERVAL,
    SAVE_INTERVAL,
    STEPS,
    TinyRecipe,
    latest_checkpoint,
    read_metrics,
    timeless,
    worst_errors,
)

pytestmark = pytest.mark.slow


def test_killed_then_interrupted_run_equals_the_uninterrupted_one(
    tiny: TinyRecipe, reference_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    killed = tiny.start(run_dir, processes=1)
    killed.wait_for(run_dir, EVAL_INTERVAL, "eval_loss")
    killed.kill()
    # Steps and an evaluation beyond the checkpoint are written already; they must not stay.
    assert latest_checkpoint(run_dir) == SAVE_INTERVAL < EVAL_INTERVAL
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # a line that the kill cut off

    interrupted = tiny.start(run_dir, processes=1)
    interrupted.wait_for(run_dir, EVAL_INTERVAL + 1)
    interrupted.interrupt()
    outcome = interrupted.wait()
    assert outcome.code != 0
    stopped = latest_checkpoint(run_dir)
    assert EVAL_INTERVAL < stopped < STEPS
    assert f"Resuming after step {SAVE_INTERVAL}." in outcome.output
    assert f"Stopped at step {stopped} of {STEPS} as asked." in outcome.output
    assert "the same command goes on from there" in outcome.output
    assert read_metrics(run_dir)[-1]["step"] == stopped

    output = tiny.train(run_dir, processes=1)
    assert f"Resuming after step {stopped}." in output
    assert timeless(read_metrics(run_dir)) == timeless(read_metrics(reference_run))
    assert weights(run_dir) == weights(reference_run)


def test_another_cluster_shape_continues_the_trajectory(tiny: TinyRecipe, reference_run: Path, tmp_path: Path) -> None:
    """Steps 1 to 5 at tensor 2 on two ranks, 6 to 10 at pipeline 2 x data 2 on four."""
    run_dir = tmp_path / "run"
    rows = ("data.rows_per_step=4", "run.export=false")

    stopped = tiny.start(
        run_dir, *rows, "train.exit_interval=5", "model.tensor_model_parallel_size=2", processes=2
    ).wait()
    assert f"Stopped at step 5 of {STEPS} as asked." in stopped.output
    output = tiny.train(run_dir, *rows, "model.pipeline_model_parallel_size=2", processes=4)
    assert "Resuming after step 5." in output
    assert "processes    4 (pipeline 2, data 2)" in output

    worst = worst_errors(read_metrics(reference_run), read_metrics(run_dir), BETA)
    assert {name: error for name, error in worst.items() if not error <= 1e-5} == {}


def test_terminated_torchrun_saves_and_goes_on(tiny: TinyRecipe, reference_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    command = tiny.start(run_dir, "run.export=false", processes=2)
    command.wait_for(run_dir, 2)
    command.terminate()
    outcome = command.wait()
    assert outcome.code != 0
    stopped = latest_checkpoint(run_dir)
    assert 2 <= stopped < STEPS
    assert f"Stopped at step {stopped} of {STEPS} as asked." in outcome.output

    output = tiny.train(run_dir, "run.export=false", processes=2)
    assert f"Resuming after step {stopped}." in output
    worst = worst_errors(read_metrics(reference_run), read_metrics(run_dir), BETA)
    assert max(worst.values()) <= 1e-5


def test_finished_run_says_so_and_restores_its_export(
    tiny: TinyRecipe, reference_run: Path, finished_run: Path
) -> None:
    before = timeless(read_metrics(finished_run))

    output = tiny.train(finished_run)
    assert f"This run is finished: all of its {STEPS} steps are done." in output
    assert "processes" not in output  # nothing was started

    shutil.rmtree(finished_run / "hf")
    output = tiny.train(finished_run)
    assert "Its export is missing; writing it from the checkpoint." in output
    assert {path.name for path in (finished_run / "hf").iterdir()} == {
        p.name for p in (reference_run / "hf").iterdir()
    }
    assert weights(finished_run) == weights(reference_run)
    assert timeless(read_metrics(finished_run)) == before


@pytest.mark.parametrize("what", ["setting", "data"])
def test_run_dir_of_another_run_is_refused(tiny: TinyRecipe, finished_run: Path, what: str) -> None:
    override, message = {
        "setting": ("optimizer.lr=2.0e-3", "optimizer.lr was 0.001, now it is 0.002"),
        "data": (f"data.train={tiny.eval_file}", "content_hash was"),
    }[what]
    outcome = tiny.start(finished_run, override).wait()

    assert outcome.code == 2
    errors = [line for line in outcome.output.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {finished_run} holds checkpoints of another run: there ")
    assert message in errors[0]
    assert "Give another run.dir" in errors[0]
    assert "Traceback" not in outcome.output


def weights(run_dir: Path) -> bytes:
    """Returns the exported weights as they lie in the file."""
    return (run_dir / "hf" / "model.safetensors").read_bytes()
