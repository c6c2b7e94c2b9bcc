"""One answer, at the level of gradients: every split against one process, packed or padded, in any microbatches.

The loss, all metrics and the gradient of every parameter, on every rank that holds a part or a copy of it. Processes
are dear to start, so that there is one launch for each number of them (``matrix.py``), which these tests read.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS, MODELS, PAIRS, Case, cases

from launch import Command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron is not installed"),
]

BOUND = 1e-5
TIMEOUT = 600.0

Results = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What all layouts on a number of processes came to."""
    folder = tmp_path_factory.mktemp("matrix")

    def launch(processes: int) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        script = str(Path(__file__).with_name("matrix.py"))
        outcome = Command([*torchrun, script, str(folder)], folder / f"log_{processes}.txt").wait(TIMEOUT)
        assert outcome.code == 0, outcome.output[-5000:]

    @functools.cache
    def of_world(processes: int) -> list[dict[str, Any]]:
        if processes != 1:
            of_world(1)
        launch(processes)
        path = folder / f"world_{processes}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return of_world


def find(results: Results, name: str, kind: str, **values: Any) -> list[dict[str, Any]]:
    """Returns the records of a layout that have these values."""
    wanted = {"kind": kind, "layout": name, **values}
    return [r for r in results(LAYOUTS[name].processes) if {**r, **wanted} == r]


def beyond_bound(record: dict[str, Any]) -> dict[str, float]:
    errors = {**record["metrics"], **record["gradients"]}
    return {name: error for name, error in errors.items() if not error <= BOUND}


def with_mutation(what: str) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if what in layout.mutations]


ALL_CASES = {
    f"{name}-{case.padding}-{case.scope}-{case.microbatches}{'' if case.pairs == PAIRS else '-ragged'}": (name, case)
    for name, layout in LAYOUTS.items()
    for case in cases(layout)
}


@pytest.mark.parametrize(("name", "case"), ALL_CASES.values(), ids=ALL_CASES)
def test_every_gradient_and_metric_equals_one_process(results: Results, name: str, case: Case) -> None:
    (record,) = find(results, name, "case", **vars(case))

    assert beyond_bound(record) == {}
    assert record["unmatched"] == []
    parameters = MODELS[LAYOUTS[name].model].parameters
    assert (len(record["metrics"]), len(record["gradients"])) == (13, parameters)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.model == "adapters"])
def test_adapters_alone_are_trained_and_saved(results: Results, name: str) -> None:
    (record,) = find(results, name, "adapters")

    assert len(record["trained"]) == 32 and all(".adapter." in part for part in record["trained"])
    assert record["saved"] == record["trained"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_session_leaves_nothing_behind(results: Results, name: str) -> None:
    (record,) = find(results, name, "left")

    alive, all_of_them = record["parameters"]
    assert alive == 0 and all_of_them > 0
    assert record["groups"] == 1  # the one of all ranks


@pytest.mark.parametrize("name", with_mutation("loss doubled"))
def test_a_doubled_loss_is_seen_everywhere(results: Results, name: str) -> None:
    (record,) = find(results, name, "mutation", mutation="loss doubled")

    assert set(record["gradients"]) <= set(beyond_bound(record))
    assert all(error == pytest.approx(1, rel=0.01) for error in record["gradients"].values())
    assert record["metrics"]["loss"] == pytest.approx(0, abs=BOUND)


@pytest.mark.parametrize("name", with_mutation("copy off"))
def test_a_wrong_copy_on_one_rank_is_seen_where_it_is(results: Results, name: str) -> None:
    (off,) = find(results, name, "mutation", mutation="copy off")
    (nan,) = find(results, name, "mutation", mutation="copy NaN")

    assert beyond_bound(off) == {"decoder.final_layernorm.weight": pytest.approx(1e-3, rel=0.01)}
    assert beyond_bound(nan) == {"decoder.final_layernorm.weight": float("inf")}


@pytest.mark.parametrize("name", with_mutation("pairs missing"))
def test_missing_pairs_are_seen_in_metrics_and_gradients(results: Results, name: str) -> None:
    (record,) = find(results, name, "mutation", mutation="pairs missing")

    wrong = beyond_bound(record)
    assert {"logps/chosen", "nll_loss", "embedding.word_embeddings.weight"} <= set(wrong)
