"""What a run writes while it trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orpo_megatron.config import OrpoConfig
from orpo_megatron.data.dataset import PackedRows
from orpo_megatron.data.plan import PairLengths, StepPlan, make_eval_plan, make_plan
from orpo_megatron.data.tokens import TokenizedPair
from orpo_megatron.metrics import AUXILIARY_LOSSES, METRICS


def no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file as a strict parser would."""
    return [json.loads(line, parse_constant=no_json) for line in path.read_text().splitlines()]


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
    from orpo_megatron.core.ranks import on_rank_0

    given = {name: torch.tensor([float(number)]) for number, name in enumerate(METRICS)}
    shuffled = dict(reversed(list(given.items())))
    assert list(on_rank_0(shuffled).items()) == [(name, float(number)) for number, name in enumerate(METRICS)]
    without = on_rank_0({})
    assert list(without) == list(METRICS) and all(math.isnan(value) for value in without.values())


def test_an_evaluation_brings_other_names_in_their_order(bridge_on_cpu: None, one_rank: None) -> None:
    from orpo_megatron.core.ranks import on_rank_0

    given = {name: torch.tensor(float(number)) for number, name in enumerate("abc")}
    assert list(on_rank_0(given, ["c", "a"]).items()) == [("c", 2.0), ("a", 0.0)]


class Pairs:
    """Pairs of so many prompt, chosen and rejected tokens; the token ids do not matter."""

    def __init__(self, *sizes: tuple[int, int, int]) -> None:
        self.sizes = sizes
        self.lengths = PairLengths(*(np.array(part) for part in zip(*sizes, strict=True)))

    def __getitem__(self, index: int) -> TokenizedPair:
        return TokenizedPair(*(np.ones(size, dtype=np.int32) for size in self.sizes[index]))

    def plan(self, num_steps: int) -> StepPlan:
        """Steps of two pairs in two rows, in file order."""
        return make_plan(self.lengths, pairs_per_step=2, num_steps=num_steps, seed=1, shuffle=False, **PLAN)  # type: ignore[arg-type]

    def eval_plan(self) -> StepPlan:
        """One pass in steps of three pairs in two rows."""
        return make_eval_plan(self.lengths, pairs_per_step=3, **PLAN)  # type: ignore[arg-type]


PLAN = dict(nll_scope="response", max_tokens_per_row=1000, rows_per_step=2)
# Tokens of both sides: 7 and 11 in step 0, 9 in step 1.
TRAINING = Pairs((2, 1, 2), (3, 2, 3), (2, 3, 2))
# The longer response is in the buckets 1-63, 64-255, 64-255 and 256-1023. The rows hold pairs 2; 0, 1; 3; none.
HELD_OUT = Pairs((2, 63, 5), (1, 6, 64), (2, 255, 255), (4, 256, 1))
LOSSES = {name: torch.tensor(0.5) for name in METRICS}


def context(step: int, **values: Any) -> SimpleNamespace:
    """Returns what Bridge hands to a callback in a dense run."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
    defaults = dict(
        state=SimpleNamespace(train_state=SimpleNamespace(step=step, do_valid=True)),
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.1 * (step + 1)}]),
        loss_dict=LOSSES,
        total_loss_dict=dict(LOSSES),
        grad_norm=2.0 if step else None,
        skipped_iter=False,
        model=[SimpleNamespace(config=config)],
    )
    return SimpleNamespace(**{**defaults, **values})


def records_of_step(run_dir: Path, step_context: SimpleNamespace, mode: str = "none") -> list[dict[str, Any]]:
    """Returns the lines that a run of one step writes."""
    from orpo_megatron.bridge.callbacks import RunMonitor

    monitor = RunMonitor(run_dir, TRAINING.plan(4), None, mode, None)
    monitor.on_train_start(step_context)
    monitor.on_train_step_start(step_context)
    monitor.on_train_step_end(step_context)
    monitor.close()
    return lines_of(run_dir / "metrics.jsonl")


def test_a_run_is_written_line_by_line_and_goes_on_where_its_checkpoint_is(
    bridge_on_cpu: None, one_rank: None, tmp_path: Path
) -> None:
    from orpo_megatron.bridge.callbacks import RunMonitor

    exported: list[Any] = []

    def train(first: int, last: int) -> SimpleNamespace:
        monitor = RunMonitor(tmp_path, TRAINING.plan(4), None, "none", exported.append)
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
    assert lines[0]["grad_norm"] is None and lines[1]["grad_norm"] == 2.0 and lines[0]["seconds"] > 0
    figures = ["step", *METRICS, "grad_norm", "learning_rate", "tokens", "pairs", "seconds"]
    assert all(list(line) == figures for line in lines[:4])  # no step was skipped, and there are no routers
    assert lines[4] == {"step": 4, **{f"eval_{name}": 0.5 for name in METRICS}}
    assert len(exported) == 2 and exported[1] == end.model
    assert end.state.train_state.do_valid is False  # the last step has been evaluated


def test_an_evaluation_reports_by_length_and_counts_its_pairs(
    bridge_on_cpu: None, one_rank: None, tmp_path: Path
) -> None:
    """Log-probs of -1 / (response tokens): averages of 1 / n and counts by hand, from rows to the record."""
    from orpo_megatron.bridge.callbacks import RunMonitor
    from orpo_megatron.core.step import row_loss

    plan = HELD_OUT.eval_plan()
    rows = PackedRows(HELD_OUT, plan, 0)
    assert [rows[index].pair_ids.tolist() for index in range(len(rows))] == [[2], [0, 1], [3], []]
    totals: dict[str, torch.Tensor] = {}
    for row in (rows[index] for index in range(len(rows))):
        values = -1 / row.num_response_tokens.repeat_interleave(row.score_lengths)
        _, metrics = row_loss(row, OrpoConfig(beta=0.5), 1, values, by_length=True)
        totals = {name: totals.get(name, 0) + metrics[name] for name in metrics}
    bridge = {name: total / count for name, (total, count) in totals.items()}  # 0 / 0 is NaN, as there
    assert math.isnan(bridge["logps/chosen/1024-up"])

    monitor = RunMonitor(tmp_path, TRAINING.plan(4), plan, "none", None)
    monitor.on_train_start(context(0))
    monitor.on_eval_end(context(3, total_loss_dict=bridge))
    monitor.close()

    (record,) = lines_of(tmp_path / "metrics.jsonl")
    counts = {"": 4, "/1-63": 1, "/64-255": 2, "/256-1023": 1}
    assert {
        name.removeprefix("eval_pairs"): record[name] for name in record if name.startswith("eval_pairs")
    } == counts
    assert {bucket: totals[f"logps/chosen{bucket}"][1] for bucket in counts} == counts
    assert record["eval_logps/chosen/64-255"] == pytest.approx(-(1 / 6 + 1 / 255) / 2, rel=1e-6)
    assert record["eval_logps/rejected/64-255"] == pytest.approx(-(1 / 64 + 1 / 255) / 2, rel=1e-6)
    assert record["eval_rewards/accuracies/1-63"] == 1 and record["eval_rewards/accuracies/64-255"] == 0
    assert record["eval_rewards/margins/256-1023"] == pytest.approx(0.5 * (1 - 1 / 256), rel=1e-6)
    assert not any("1024-up" in name for name in (*record, *bridge))  # Bridge logs what is left of it
    assert None not in record.values()


def test_a_skipped_step_says_so_and_its_values_are_null(
    bridge_on_cpu: None, one_rank: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = {**LOSSES, "loss": torch.tensor(float("nan")), "logps/margins": torch.tensor(float("-inf"))}
    skipped = context(1, loss_dict=broken, grad_norm=float("inf"), skipped_iter=True)
    (record,) = records_of_step(tmp_path, skipped, "plain")
    assert record["skipped"] is True
    assert [name for name, value in record.items() if value is None] == ["loss", "logps/margins", "grad_norm"]
    assert "step 2/4  loss nan  margin -inf  accuracy 0.50" in capfd.readouterr().err


def test_routers_add_their_losses(bridge_on_cpu: None, one_rank: None, tmp_path: Path) -> None:
    """Sums over three microbatches of 3 and 6 in two layers: a mean of 9 / (2 * 3)."""
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

    size = dict(num_layers=2, hidden_size=8, num_attention_heads=2)
    experts = dict(num_moe_experts=2, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1)
    config = TransformerConfig(**size, **experts, moe_z_loss_coeff=0.01)
    calculator.init_num_microbatches_calculator(0, None, 3, 1, 1)
    try:
        for name, values in (("load_balancing_loss", (3.0, 6.0)), ("z_loss", (0.5, 0.25))):
            for layer, value in enumerate(values, start=1):
                get_moe_metrics_tracker().record(name, torch.tensor(value), layer, 2)
        (record,) = records_of_step(tmp_path, context(1, model=[SimpleNamespace(config=config)]))
        assert float(get_moe_metrics_tracker().metrics["z_loss"].values.sum()) == 0.75  # left for Bridge's own log
    finally:
        destroy_moe_metrics_tracker()
        calculator.destroy_num_microbatches_calculator()
    assert record["load_balancing_loss"] == pytest.approx(1.5) and record["z_loss"] == pytest.approx(0.125)


def test_every_auxiliary_loss_is_described(megatron_on_cpu: None) -> None:
    from orpo_megatron.core.moe import _BALANCING_LOSSES

    assert set(AUXILIARY_LOSSES) == {*_BALANCING_LOSSES.values(), "z_loss"}
