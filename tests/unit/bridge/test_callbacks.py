"""What a run writes while it trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from orpo_megatron.data.plan import PairLengths, make_plan
from orpo_megatron.metrics import METRICS


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": NaN}', '{"step": 2, "eval_loss": 2.5}']
    path.write_text("\n".join([*lines, '{"step": 3, "loss": 2.0}', '{"step": 10, "loss": 1.0}', '{"step": 1, "lo']))
    return path


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 4), (9, 4), (10, 5)])
def test_later_lines_and_a_cut_last_line_are_dropped(
    bridge_on_cpu: None, metrics_file: Path, step: int, kept: int
) -> None:
    from orpo_megatron.bridge.callbacks import keep_until

    before = metrics_file.read_text().splitlines()
    keep_until(metrics_file, step)
    assert metrics_file.read_text() == "".join(f"{line}\n" for line in before[:kept])
    assert [path.name for path in metrics_file.parent.iterdir()] == ["metrics.jsonl"]


def test_there_need_not_be_a_metrics_file(bridge_on_cpu: None, tmp_path: Path) -> None:
    from orpo_megatron.bridge.callbacks import keep_until

    keep_until(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_one_process_keeps_its_metrics_in_order(bridge_on_cpu: None, one_rank: None) -> None:
    from orpo_megatron.bridge.callbacks import on_rank_0

    given = {name: torch.tensor([float(number)]) for number, name in enumerate(METRICS)}
    shuffled = dict(reversed(list(given.items())))
    assert list(on_rank_0(shuffled).items()) == [(name, float(number)) for number, name in enumerate(METRICS)]
    without = on_rank_0({})
    assert list(without) == list(METRICS) and all(math.isnan(value) for value in without.values())


def test_a_run_is_written_line_by_line_and_goes_on_where_its_checkpoint_is(
    bridge_on_cpu: None, one_rank: None, tmp_path: Path
) -> None:
    from orpo_megatron.bridge.callbacks import RunMonitor

    # Tokens of both sides: 7 and 11 in step 0, 9 in step 1.
    lengths = PairLengths(np.array([2, 3, 2]), np.array([1, 2, 3]), np.array([2, 3, 2]))
    settings = dict(nll_scope="response", pairs_per_step=2, seed=1, shuffle=False, max_tokens_per_row=20)
    plan = make_plan(lengths, num_steps=4, **settings)  # type: ignore[arg-type]
    losses = {name: torch.tensor(0.5) for name in METRICS}
    exported = []

    def context(step: int) -> SimpleNamespace:
        return SimpleNamespace(
            state=SimpleNamespace(train_state=SimpleNamespace(step=step, do_valid=True)),
            optimizer=SimpleNamespace(param_groups=[{"lr": 0.1 * (step + 1)}]),
            loss_dict=losses,
            total_loss_dict=losses,
            grad_norm=2.0 if step else None,
            model="model",
        )

    def train(first: int, last: int) -> SimpleNamespace:
        monitor = RunMonitor(tmp_path, plan, "none", exported.append)
        monitor.on_train_start(context(first))
        for step in range(first, last):
            monitor.on_train_step_start(context(step))
            monitor.on_train_step_end(context(step))
        monitor.on_eval_end(context(last))
        end = context(last)
        monitor.on_train_end(end)
        monitor.close()
        assert monitor.finished
        return end

    train(0, 3)
    end = train(2, 4)  # its last checkpoint was that of step 2
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (1, False),
        (2, False),
        (3, False),
        (4, False),
        (4, True),
    ]
    assert [line["tokens"] for line in lines[:4]] == [18, 9, 18, 9]
    assert [line["pairs"] for line in lines[:4]] == [2, 1, 2, 1]
    assert [line["learning_rate"] for line in lines[:4]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert math.isnan(lines[0]["grad_norm"]) and lines[1]["grad_norm"] == 2.0 and lines[0]["seconds"] > 0
    assert lines[4] == {"step": 4, **{f"eval_{name}": 0.5 for name in METRICS}}
    assert exported == ["model", "model"]
    assert end.state.train_state.do_valid is False  # the last step has been evaluated
