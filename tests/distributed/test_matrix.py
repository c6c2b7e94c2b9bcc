"""One answer, at the level of gradients: every split against one process, packed or padded, in any microbatches.

The loss, all metrics and the gradient of every parameter, on every rank that holds a part or a copy of it. Processes
are dear to start, so that there is one launch for each number of them (``matrix.py``), which these tests read.
"""

import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS, MODELS, PAIRS, RAGGED_PAIRS, Case, Layout, cases

from launch import Command, Outcome

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

    @functools.cache
    def launch(processes: int) -> Outcome:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        script = str(Path(__file__).with_name("matrix.py"))
        command = Command([*torchrun, script, str(folder)], folder / f"log_{processes}.txt")
        try:
            return command.wait(TIMEOUT)
        except AssertionError as error:
            return Outcome(1, str(error))

    @functools.cache
    def read(processes: int) -> list[dict[str, Any]]:
        lines = (folder / f"world_{processes}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def of_world(processes: int) -> list[dict[str, Any]]:
        for number in (1, processes):  # a launch that failed is not tried again by the next test
            assert launch(number).code == 0, launch(number).output[-5000:]
        return read(processes)

    return of_world


def find(results: Results, name: str, kind: str, **values: Any) -> list[dict[str, Any]]:
    """Returns the records of a layout that have these values."""
    wanted = {"kind": kind, "layout": name, **values}
    return [r for r in results(LAYOUTS[name].processes) if {**r, **wanted} == r]


def beyond_bound(record: dict[str, Any]) -> dict[str, float]:
    errors = {**record["metrics"], **record["gradients"]}
    return {name: error for name, error in errors.items() if not error <= BOUND}


def which(wanted: Callable[[Layout], bool]) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if wanted(layout)]


def with_mutation(what: str) -> list[str]:
    return which(lambda layout: what in layout.mutations)


ALL_CASES = {
    f"{name}-{case.padding}-{case.scope}-{case.microbatches}{'' if case.pairs == PAIRS else '-ragged'}": (name, case)
    for name, layout in LAYOUTS.items()
    if not MODELS[layout.model].rounded
    for case in cases(layout)
}


@pytest.mark.parametrize(("name", "case"), ALL_CASES.values(), ids=ALL_CASES)
def test_every_gradient_and_metric_equals_one_process(results: Results, name: str, case: Case) -> None:
    (record,) = find(results, name, "case", **vars(case))

    assert beyond_bound(record) == {}
    assert record["unmatched"] == []
    parameters = MODELS[LAYOUTS[name].model].parameters
    assert (len(record["metrics"]), len(record["gradients"])) == (13, parameters)


@pytest.mark.parametrize("name", which(lambda layout: not MODELS[layout.model].rounded))
def test_an_evaluation_finds_what_training_finds_on_one_process(results: Results, name: str) -> None:
    """The metrics of a training step, and those of two of the length buckets as well."""
    (record,) = find(results, name, "evaluation")

    assert {metric: error for metric, error in record["metrics"].items() if not error <= BOUND} == {}
    assert len(record["metrics"]) == 13 + 2 * 6


@pytest.mark.parametrize("name", which(lambda layout: MODELS[layout.model].rounded))
def test_a_split_in_bf16_is_no_further_from_fp32_than_one_process(results: Results, name: str) -> None:
    """By the root mean square over a parameter's elements, at most half as far again: the largest is chance.

    It comes to 1.3 for a norm's 64 weights and to 1.2 for a matrix. That log-probs are added up in fp32 is seen in
    ``tests/unit/test_segments.py``: so few pairs could hide it here.
    """
    records = find(results, name, "case")

    assert len(records) == len(cases(LAYOUTS[name]))
    for record in records:
        alone, metrics = record["one_process"]["rms"], (record["metrics"], record["one_process"]["metrics"])
        assert len(alone) == MODELS[LAYOUTS[name].model].parameters
        assert all(1e-3 < error < 0.05 for error in alone.values())  # it does round
        further = {part: error / alone[part] for part, error in record["rms"].items()}
        assert {part: factor for part, factor in further.items() if not factor <= 1.5} == {}
        assert max(errors[loss] for errors in metrics for loss in ("loss", "nll_loss")) < 1e-3


@pytest.mark.parametrize("name", which(lambda layout: layout.model == "adapters"))
def test_adapters_alone_are_trained_and_saved(results: Results, name: str) -> None:
    (record,) = find(results, name, "adapters")

    assert len(record["trained"]) == 32 and all(".adapter." in part for part in record["trained"])
    assert record["saved"] == record["trained"]


@pytest.mark.parametrize("name", which(lambda layout: bool(layout.recomputed)))
def test_what_is_recomputed_runs_again(results: Results, name: str) -> None:
    """Every layer's part runs twice; of ``block``, one layer's on each pipeline stage."""
    layers = 2 if "pp2" in name else 4
    records = find(results, name, "case")
    assert [record["runs"] for record in records] == pytest.approx(
        [1 + (1 / layers if "block" in name else 1)] * len(cases(LAYOUTS[name]))
    )


@pytest.mark.parametrize("name", which(lambda layout: "ddp.bucket_size" in layout.settings))
def test_what_overlaps_is_in_several_parts(results: Results, name: str) -> None:
    (record,) = find(results, name, "session")

    assert record["bucket_groups"] >= 2


@pytest.mark.parametrize("name", ["dp4", "ep2 dp4"])
def test_a_rank_without_any_pair_takes_part(results: Results, name: str) -> None:
    (record,) = find(results, name, "case", pairs=RAGGED_PAIRS)

    assert record["idle"] == 1


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


@pytest.mark.parametrize("name", with_mutation("mask off"))
def test_routers_that_count_padding_are_seen(results: Results, name: str) -> None:
    (record,) = find(results, name, "mutation", mutation="mask off")

    wrong = beyond_bound(record)
    assert all(wrong[f"decoder.layers.{layer}.mlp.router.weight"] > 1e-2 for layer in range(4))
    assert not set(record["metrics"]) & set(wrong)  # no metric would have shown it


@pytest.mark.parametrize("name", with_mutation("not finalised"))
def test_gradients_that_are_not_reduced_are_seen(results: Results, name: str) -> None:
    """Tied embeddings and, under sequence parallel, norms are added up last; data-parallel ranks share all of them."""
    (record,) = find(results, name, "mutation", mutation="not finalised")

    split = "tp2 sp pp2" in name
    parts = [part for part in record["gradients"] if not split or re.search("norm|embedding", part)]
    assert sorted(beyond_bound(record)) == sorted(parts)
