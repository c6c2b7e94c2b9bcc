"""Starts the documented commands in processes of their own, reads what they leave behind, and compares runs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from orpo_megatron.bridge.parity import metric_errors

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "recipes" / "tiny_cpu.yaml"
TIMEOUT = 600.0  # a guard against hanging, on a machine that may be busy

BETA = 0.1
STEPS, EVAL_INTERVAL, SAVE_INTERVAL = 10, 5, 4
# An epoch of 25 pairs ends in a step of a single one, which leaves most rows without any.
TRAIN_PAIRS, EVAL_PAIRS, PAIRS_PER_STEP = 25, 10, 6
VOCABULARY = 1000
PAIRS_OF_STEPS = [6, 6, 6, 6, 1] * 2


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, and what it printed to both of its streams."""

    code: int
    output: str


class Command:
    """A running command in a session of its own, as a terminal or a scheduler would start it."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        prefix: Sequence[str] = (),
        python: str = sys.executable,
        **variables: str,
    ) -> None:
        """Starts ``prefix python arguments`` in the repository, offline, on the CPU, one thread a process."""
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        self.log = log
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [*prefix, python, *arguments],
                cwd=REPO,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """Returns what the command and its children have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        """Waits for the end; kills the command with all its children if that takes too long."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"Not done after {timeout:.0f} s:\n{self.output()}") from None
        return Outcome(code, self.output())

    def succeed(self) -> str:
        """Waits for the end, which must be a good one; returns what was printed."""
        outcome = self.wait()
        assert outcome.code == 0, outcome.output
        return outcome.output

    def kill(self) -> None:
        """Kills the command and all its children; torchrun puts each worker into a session of its own."""
        workers = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()  # first, so that it does not end its workers in its own way
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        self.process.wait()
        psutil.wait_procs(workers, timeout=30)

    def interrupt(self) -> None:
        """Does what Ctrl-C in a terminal does: SIGINT to the foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """Does what a scheduler does: SIGTERM to the process that it started, here torchrun."""
        self.process.terminate()

    def wait_for(self, run_dir: Path, step: int, name: str = "loss") -> None:
        """Waits until the run's metrics hold ``name`` of a step."""
        end = time.monotonic() + TIMEOUT
        while not any(record["step"] == step and name in record for record in read_metrics(run_dir)):
            if self.process.poll() is not None:
                raise AssertionError(f"The command ended before step {step}:\n{self.output()}")
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"Step {step} was not reached in {TIMEOUT:.0f} s:\n{self.output()}")
            time.sleep(0.02)


@dataclass(frozen=True)
class TinyRecipe:
    """The tiny recipe on a few pairs of the demo, with what all runs of it share.

    Attributes:
        cache_dir: Where tokenised data and the random model lie.
        train_file: The training pairs.
        eval_file: The held-out pairs.
        logs: Where commands print to.
        tokenizer: A tokenizer of :data:`VOCABULARY` tokens, whose logits cost a fiftieth of the recipe's; None for
            the recipe's own.
        python: The interpreter that runs them.
    """

    cache_dir: Path
    train_file: Path
    eval_file: Path
    logs: Path
    tokenizer: Path | None = None
    python: str = sys.executable

    def arguments(self, run_dir: Path, *overrides: str) -> list[str]:
        """Returns the recipe and its overrides as the command line takes them."""
        return [
            str(TINY),
            f"run.dir={run_dir}",
            f"run.cache_dir={self.cache_dir}",
            f"data.train={self.train_file}",
            f"data.eval={self.eval_file}",
            f"data.pairs_per_step={PAIRS_PER_STEP}",
            f"orpo.beta={BETA}",
            f"train.train_iters={STEPS}",
            f"validation.eval_interval={EVAL_INTERVAL}",
            f"checkpoint.save_interval={SAVE_INTERVAL}",
            *([f"data.tokenizer={self.tokenizer}", f"model.config.vocab_size={VOCABULARY}"] if self.tokenizer else ()),
            *overrides,
        ]

    def start(self, run_dir: Path, *overrides: str, processes: int | None = None) -> Command:
        """Starts training: under torchrun, or as the one plain process if ``processes`` is None."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return self.command(
            *(torchrun if processes else []), "-m", "orpo_megatron.train", *self.arguments(run_dir, *overrides)
        )

    def train(self, run_dir: Path, *overrides: str, processes: int | None = None) -> str:
        """Trains to the end; returns what was printed."""
        return self.start(run_dir, *overrides, processes=processes).succeed()

    def command(self, *arguments: str, prefix: Sequence[str] = (), **variables: str) -> Command:
        """Starts ``prefix python arguments`` with environment ``variables``, its output in a new file."""
        log = self.logs / f"{len(list(self.logs.iterdir()))}.txt"
        return Command(list(arguments), log, prefix, self.python, **variables)


def hub_folder(hub_id: str, home: Path) -> Path:
    """Makes the folder in which the hub's client, with HF_HOME ``home``, finds the files of a model."""
    repository, revision = home / "hub" / f"models--{hub_id.replace('/', '--')}", "0" * 40
    folder = repository / "snapshots" / revision
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return folder


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of a run's metrics, null as NaN; none where there is no file yet."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: math.nan if value is None else value for name, value in record.items()} for record in records]


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns metrics without the one figure that differs from run to run."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def latest_checkpoint(run_dir: Path) -> int:
    """Returns the step of the latest complete checkpoint."""
    return int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


def worst_errors(reference: list[dict[str, Any]], other: list[dict[str, Any]], beta: float) -> dict[str, float]:
    """Compares two runs line by line.

    Args:
        reference: Metrics of the run that is right.
        other: Metrics of the run in question.
        beta: Weight of the odds-ratio loss, which scales rewards.

    Returns:
        The largest error of each metric over all lines, as ``metric_errors`` defines it.
    """
    assert [sorted(record) for record in other] == [sorted(record) for record in reference]
    worst: dict[str, float] = {}
    for right, record in zip(timeless(reference), timeless(other), strict=True):
        for name, error in metric_errors(right, record, beta).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst
