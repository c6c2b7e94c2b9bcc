"""The benchmarks' own arithmetic; nothing here is timed against a bound."""

import json
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common, head, head_candidates, step_vs_trl
from benchmarks.common import Bar, Ratio, Timings, interleaved, peak, peak_bytes, table
from benchmarks.head_candidates import Case, Shape
from benchmarks.step_sides import STATE_BYTES, StepFigures, trl_features

TOY = Shape("toy", 200, 32, 301)
CPU = torch.device("cpu")


def test_candidates_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = interleaved(candidates, 2, before=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" * 3
    assert {name: len(taken.rounds) for name, taken in timings.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """In the third round the machine was ten times slower for both: the ratio does not see it."""
    slow, fast = Timings((2.0, 3.0, 20.0)), Timings((1.0, 1.0, 10.0))
    assert slow.ratio_to(fast) == Ratio(median=2.0, low=2.0, high=3.0)
    assert str(slow.ratio_to(fast)) == "2.00 (2.00-3.00)"
    assert slow.median == 3.0


def test_a_peak_is_the_largest_running_sum() -> None:
    assert peak([4, 4, -4, 3, -7]) == 8
    assert peak([-5, 2]) == 0
    assert peak([]) == 0


def test_peak_memory_counts_temporaries_and_no_more() -> None:
    """1 MiB in, a product and its exponential of 1 MiB each; then the product goes before the softmax comes."""
    values = torch.randn(512, 512)

    def work() -> torch.Tensor:
        product = values @ values
        exponential = product.exp()
        del product
        return exponential.softmax(dim=-1)

    assert peak_bytes(work) == 2 * 2**20
    assert peak_bytes(lambda: values @ values) == 2**20


@pytest.mark.parametrize(
    ("value", "at_most", "passed"),
    [(0.75, True, True), (0.76, True, False), (2.5, False, False), (0.75, False, True), (float("nan"), True, False)],
)
def test_a_bar(value: float, at_most: bool, passed: bool) -> None:
    bound = 0.75 if at_most or value < 1 else 2.6
    bar = Bar("figure", value, bound, at_most)
    assert bar.passed is passed
    assert str(bar).startswith("PASS" if passed else "MISSED")


def test_a_table_aligns_its_columns() -> None:
    assert table(("", "s"), [("a", 1), ("long", 10)]) == "       s\na      1\nlong  10"


def test_a_result_file_says_what_ran_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    path = common.write_results("toy", "python -m benchmarks.toy", {"ratio": 0.5})
    record = json.loads(path.read_text())
    assert (record["benchmark"], record["command"], record["results"]) == (
        "toy",
        "python -m benchmarks.toy",
        {"ratio": 0.5},
    )
    assert record["machine"]["cores"] >= 1 and record["machine"]["memory_gib"] > 0
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("layout", ["one_pair", "many_pairs"])
def test_drawn_pairs_fill_the_row(layout: head_candidates.Layout) -> None:
    lengths = head_candidates.pair_lengths(layout, 4096)
    tokens = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths)
    prompts = sum(2 * prompt for prompt, _, _ in lengths)
    assert tokens == pytest.approx(4096, rel=0.02)
    assert prompts / tokens == pytest.approx(0.28, abs=0.02)
    assert (len(lengths) == 1) == (layout == "one_pair")
    assert min(min(each) for each in lengths) >= 1


@pytest.mark.parametrize("layout", ["one_pair", "many_pairs"])
def test_all_heads_have_one_answer(layout: head_candidates.Layout) -> None:
    """TRL's head and Liger's on the padded batch, Megatron-Core's and ours on the packed row: loss and gradients."""
    pytest.importorskip("trl.experimental.orpo")
    pytest.importorskip("liger_kernel.chunked_loss")
    case = Case(TOY, layout, torch.float32, CPU)
    heads = {
        "cache": lambda c: head_candidates.ours(c, "cache"),
        "recompute": lambda c: head_candidates.ours(c, "recompute"),
        "trl": lambda c: head_candidates.trl(c, head_candidates._trl_trainer(CPU)),
        "liger": head_candidates.Liger(compiled=False),
    }
    expected = head_candidates.in_fp64(case).item()
    reference = head_candidates.gradients(case, head_candidates.in_fp64)
    for name, candidate in heads.items():
        assert candidate(case).item() == pytest.approx(expected, rel=1e-5), name
        for found, right in zip(head_candidates.gradients(case, candidate), reference, strict=True):
            assert (found - right).abs().max() <= 1e-5 * right.abs().max(), name


def test_liger_goes_on_uncompiled_where_compiling_fails() -> None:
    pytest.importorskip("liger_kernel.chunked_loss")
    case = Case(TOY, "one_pair", torch.float32, CPU)
    liger = head_candidates.Liger(compiled=True)

    def fails(*args: object, **kwargs: object) -> None:
        raise AssertionError("sources must not be empty for symbol s17")

    liger.loss = fails
    assert liger(case).item() == pytest.approx(head_candidates.in_fp64(case).item(), rel=1e-5)
    assert liger.note == "compiled=False: torch.compile failed on it in this run"


def test_heads_are_held_to_the_fastest_peer() -> None:
    def figures(over_trl: float, cache_over_it: float, memory: float) -> dict:
        spread = {"low": 0.0, "high": 9.0}
        return {
            "over_trl": {"median": over_trl, **spread},
            "cache_over_it": {"median": cache_over_it, **spread},
            "memory_over_trl": memory,
        }

    measured = {
        "ours cache": figures(0.7, 1.0, 0.4),
        "ours recompute": figures(0.9, 0.77, 0.1),
        "TRL": figures(1.0, 0.7, 1.0),
        "Liger": figures(0.78, 0.9, 0.5),
    }
    bars = {bar.name: (bar.value, bar.passed) for bar in head.bars_of("toy", TOY, measured)}
    assert bars == {
        "toy: recompute's memory over TRL's": (0.1, True),
        "toy: cache's time over TRL's": (0.7, True),
        "toy: cache's time over the best peer's (Liger)": (0.9, False),
    }


def test_memory_above_state_is_the_same_where_gradients_come_and_go() -> None:
    """10 parameters: 120 bytes rest with weights and moments alone, 160 with gradients; both peak at 200 in all."""
    common_figures = {"seconds": 1.0, "loss": 1.0, "rss_bytes": 0, "num_parameters": 10}
    dropped = StepFigures(peak_bytes=80, rest_bytes=120, **common_figures)
    kept = StepFigures(peak_bytes=40, rest_bytes=160, **common_figures)
    assert dropped.above_state == kept.above_state == 200 - 10 * STATE_BYTES


def test_steps_are_summed_up_without_the_warm_up_and_the_one_for_memory() -> None:
    def steps(seconds: list[float], peak: int) -> list[StepFigures]:
        return [StepFigures(s, 2.0, peak, STATE_BYTES, 5, num_parameters=1) for s in seconds]

    figures = {"shared": steps([9, 1, 2, 1, 9], 30), "trl": steps([9, 4, 4, 4, 9], 100)}
    candidates = step_vs_trl.candidates_of(4, 512)
    summary = step_vs_trl.summarise(figures, candidates, tokens=[7, 100, 300, 100, 7])
    assert summary["shared"]["useful_tokens_per_second"] == 100
    assert summary["shared"]["speed"] == {"median": 4.0, "low": 2.0, "high": 4.0}
    assert summary["shared"]["memory"] == 0.3 and summary["shared"]["loss_difference"] == 0.0
    bars = step_vs_trl.bars_of(4, summary, candidates)
    assert [(bar.value, bar.bound, bar.passed) for bar in bars] == [
        (0.0, 1e-4, True),
        (4.0, 2.5, True),
        (0.3, 0.4, True),
    ]


def test_trls_columns_of_a_pair() -> None:
    pair = head_candidates.Ids(np.array([5, 6]), np.array([7]), np.array([8, 9]))
    features = trl_features(pair)
    assert features["chosen_input_ids"] == [5, 6, 7] and features["chosen_labels"] == [-100, -100, 7]
    assert features["rejected_input_ids"] == [5, 6, 8, 9] and features["rejected_labels"] == [-100, -100, 8, 9]
    assert features["prompt_input_ids"] == [5, 6] and features["rejected_attention_mask"] == [1] * 4


def ignores_sigterm(connection: Connection, workload: Any, settings: dict[str, Any]) -> None:
    """A side, as ours are: SIGTERM asks them for a checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection.send("ready")
    signal.pause()


def test_a_side_that_ignores_sigterm_is_ended() -> None:
    """Else a benchmark of which one side ran out of memory would wait for the others for ever."""
    candidate = step_vs_trl.Candidate("", ignores_sigterm, {})
    side = step_vs_trl.Side("stubborn", candidate, None)  # type: ignore[arg-type]
    side.stop()
    assert side.process.exitcode == -signal.SIGKILL
