"""A step whose loss or gradient is NaN: all ranks stop or skip it alike, and say which pair it was."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import BETA, TINY, TinyRecipe, read_metrics, worst_errors
from orpo_megatron.bridge.kept import load_rows
from orpo_megatron.bridge.prepare import load_hf_config, model_source, prepare_run
from orpo_megatron.bridge.recipe import load_recipe
from orpo_megatron.data.prepare import Prepared

pytestmark = pytest.mark.slow

EPOCH, ROWS = 5, 4
#: The input embedding has weights of its own, so that a bad row of it touches only pairs that hold the token.
BASE = ("model.config.tie_word_embeddings=false", "data.eval=null", "validation.eval_interval=null")
BASE += (f"data.rows_per_step={ROWS}", f"train.train_iters={EPOCH}", "checkpoint.save_interval=1", "run.export=false")
#: The norm of an embedding of zeros divides by the square root of this: fp32 holds the quotient, but not its cube.
SMALL_EPSILON = "model.config.rms_norm_eps=2.0e-38"


@dataclass(frozen=True)
class BadModel:
    """A start model that cannot be trained on one pair.

    Attributes:
        overrides: What makes the recipe start from it.
        token: The token whose embedding is bad.
        pair: The only pair that holds it.
        step: The step that trains on the pair, counted from 1.
        row: The pair's row in that step.
        pairs: All pairs of that row.
        place: File and line of the pair.
    """

    overrides: tuple[str, ...]
    token: int
    pair: int
    step: int
    row: int
    pairs: list[int]
    place: str


def pick(prepared: Prepared) -> BadModel:
    """Finds a pair after the first step with a token of its own in its prompt, in a row that others share."""
    store, plan = prepared.store, prepared.plan
    tokens = [[*store[pair].prompt, *store[pair].chosen, *store[pair].rejected] for pair in range(len(store))]
    holders = Counter(token for of_pair in tokens for token in set(of_pair))
    for step in range(1, EPOCH - 1):
        for row, pairs in reversed(list(enumerate(plan.rows(step)))):
            for pair in pairs.tolist():
                own = [int(token) for token in store[pair].prompt if holders[token] == 1]
                if own and len(pairs) > 1:
                    file, line = store.source(pair)
                    return BadModel((), own[0], pair, step + 1, row, pairs.tolist(), f"pair {pair} ({file}:{line})")
    raise AssertionError("no pair has a token of its own")


@pytest.fixture
def bad_model(tiny: TinyRecipe, tmp_path: Path) -> Callable[..., BadModel]:
    def make(embedding: float, *overrides: str) -> BadModel:
        settings = (*BASE, *overrides)
        recipe = load_recipe(str(TINY), tiny.arguments(tmp_path / "run", *settings)[1:])
        prepared = prepare_run(recipe, load_hf_config(recipe), 2, None, show_progress=False)
        folder = tmp_path / "model"
        shutil.copytree(model_source(recipe), folder)
        weights = load_file(folder / "model.safetensors")
        bad = pick(prepared)
        weights["model.embed_tokens.weight"][bad.token] = embedding
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        start = (*settings[1:], "model.config=null", f"model.hf={folder}")
        start = tuple(setting for setting in start if not setting.startswith("model.config."))
        return BadModel(start, bad.token, bad.pair, bad.step, bad.row, bad.pairs, bad.place)

    return make


def stopped(tiny: TinyRecipe, run_dir: Path, *overrides: str) -> str:
    """Runs two processes, which must both end by themselves with the one message; returns it."""
    outcome = tiny.start(run_dir, *overrides, processes=2).wait(timeout=120)
    errors = [line for line in outcome.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, outcome.output
    message = errors[0].removeprefix("error: ")
    assert message in outcome.output[outcome.output.index("Root Cause") :]
    assert re.findall(r"exitcode +: (\S+) ", outcome.output) == ["2", "2"]
    assert outcome.output.count("Traceback") == 1  # torchrun's own
    return message


def check_kept(path: Path, bad: BadModel) -> None:
    """Checks that the file holds all rows of the step, the bad pair among them, where the plan has it."""
    rows = load_rows(path)
    assert len(rows) == ROWS
    assert [bad.token in row.tokens for row in rows] == [number == bad.row for number in range(ROWS)]
    assert rows[bad.row].pair_ids.tolist() == bad.pairs
    assert sum(len(row.pair_ids) for row in rows) == rows[0].num_pairs


def test_a_loss_stops_all_ranks(tiny: TinyRecipe, bad_model: Callable[..., BadModel], tmp_path: Path) -> None:
    bad = bad_model(math.nan)
    run_dir = tmp_path / "run"
    message = stopped(tiny, run_dir, *bad.overrides)
    path = run_dir / "nonfinite" / f"step_{bad.step:06d}.pt"
    assert message.startswith(
        f"Step {bad.step}: the loss is not finite on data rank {bad.row % 2}, microbatch {bad.row // 2}: "
    )
    assert bad.place in message and f"--batch {path}" in message and "run.on_nonfinite=skip" in message
    assert [int(pair) for pair in re.findall(r"pair (\d+)", message)] == bad.pairs
    check_kept(path, bad)
    losses = torch.tensor([entry["loss"] for entry in torch.load(path, weights_only=True)["rows"]])
    assert losses.isnan().tolist() == [number == bad.row for number in range(ROWS)]
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, bad.step))

    # What the message says replays the step: the rows that were kept, on the weights that they met.
    (replay,) = re.findall(
        r"(tools/verify_parity.py) RECIPE (--batch \S+) (checkpoint.pretrained_checkpoint=\S+)\.", message
    )
    recipe = tiny.arguments(tmp_path / "replay", *bad.overrides)
    outcome = tiny.command(replay[0], *recipe, *replay[1].split(), replay[2]).wait()
    assert outcome.code == 1, outcome.output
    assert re.search(r"^loss +nan +nan ", outcome.output, re.MULTILINE)
    assert f"in {ROWS} rows on 1 processes" in outcome.output


def test_a_step_is_skipped_on_all_ranks(tiny: TinyRecipe, bad_model: Callable[..., BadModel], tmp_path: Path) -> None:
    bad = bad_model(0.0, SMALL_EPSILON, "run.on_nonfinite=skip")
    # The search for the row runs the model once more: communication that overlaps with it must be left in order.
    overlap = ("ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true", "optimizer.overlap_param_gather=true")
    output = tiny.train(tmp_path / "two", *bad.overrides, *overlap, processes=2)
    place = f"data rank {bad.row % 2}, microbatch {bad.row // 2}: "
    lines = [line for line in output.splitlines() if line.endswith("The step is skipped on all ranks.")]
    assert len(lines) == 1 and lines[0].startswith(f"Step {bad.step}: the gradient is not finite on {place}")
    assert [int(pair) for pair in re.findall(r"pair (\d+)", lines[0])] == bad.pairs
    check_kept(tmp_path / "two" / "nonfinite" / f"step_{bad.step:06d}.pt", bad)
    tiny.train(tmp_path / "one", *bad.overrides)

    runs = [read_metrics(tmp_path / name) for name in ("one", "two")]
    for records in runs:
        assert [record["step"] for record in records if record.get("skipped")] == [bad.step]
        assert len(records) == EPOCH
    # Ranks that did not skip alike would have other weights from here on.
    taken = [[record for record in records if record["step"] != bad.step] for records in runs]
    worst = worst_errors(taken[0], taken[1], BETA)
    assert max(worst.values()) <= 1e-5, worst


def test_a_gradient_stops_all_ranks_and_its_row_is_found(
    tiny: TinyRecipe, bad_model: Callable[..., BadModel], tmp_path: Path
) -> None:
    bad = bad_model(0.0, SMALL_EPSILON, "model.pipeline_model_parallel_size=2")
    run_dir = tmp_path / "run"
    message = stopped(tiny, run_dir, *bad.overrides)
    path = run_dir / "nonfinite" / f"step_{bad.step:06d}.pt"
    assert message.startswith(f"Step {bad.step}: the gradient is not finite on data rank 0, microbatch {bad.row}: ")
    assert "Gradients that are not finite: embedding.word_embeddings.weight (pipeline rank 0)" in message
    assert bad.place in message and [int(pair) for pair in re.findall(r"pair (\d+)", message)] == bad.pairs
    check_kept(path, bad)
    losses = torch.tensor([entry["loss"] for entry in torch.load(path, weights_only=True)["rows"]])
    assert losses.isfinite().all()
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, bad.step))
