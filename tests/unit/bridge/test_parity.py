import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_megatron.bridge import parity
from orpo_megatron.bridge.parity import Comparison, GradientError
from orpo_megatron.bridge.recipe import Recipe, load_recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.data.dataset import pack_row
from orpo_megatron.data.plan import Padding, PairLengths, make_plan
from orpo_megatron.data.tokens import TokenizedPair

REPO = Path(__file__).parents[3]


def tiny(*overrides: str) -> Recipe:
    return load_recipe(str(REPO / "recipes" / "tiny_cpu.yaml"), overrides)


class TestParseSharding:
    def test_what_is_not_named_is_not_split(self) -> None:
        unsplit = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "etp": 1, "sp": False}
        assert parity.parse_sharding("") == unsplit
        assert parity.parse_sharding("tp=8,sp=true,vpp=2") == unsplit | {"tp": 8, "sp": True, "vpp": 2}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("tp", "must be a whole number"),
            ("tp=0", r"tp \(0\) must be a whole number of at least 1"),
            ("pp=-1", "must be a whole number"),
            ("sp=2", "must be true or false"),
            ("tensor=2", "tensor=2 is not a size of a sharding"),
        ],
    )
    def test_what_is_no_sharding_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            parity.parse_sharding(text)


class TestReferenceRecipe:
    def test_it_is_the_recipe_without_split_and_shortcuts(self) -> None:
        recipe = tiny(
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
            "model.recompute_granularity=full",
            "model.cp_comm_type=a2a",
            "model.context_parallel_size=2",
            "ddp.overlap_grad_reduce=true",
            "ddp.grad_reduce_in_fp32=true",
            "comm_overlap.overlap_grad_reduce=true",
            "orpo.beta=0.3",
        )

        reference = parity.reference_recipe(recipe, parity.parse_sharding("pp=2"))

        model = reference.sections["model"]
        assert {name: size for name, size in model.items() if size not in (1, None, False)} == {
            "pipeline_model_parallel_size": 2
        }
        assert reference.sections["ddp"] == {"grad_reduce_in_fp32": True, "use_distributed_optimizer": False}
        assert reference.sections["optimizer"]["use_distributed_optimizer"] is False
        assert "comm_overlap" not in reference.sections
        assert (reference.orpo.beta, reference.hf_config) == (0.3, recipe.hf_config)

    @pytest.mark.parametrize(("against", "kept"), [("pp=2", True), ("pp=4", False), ("pp=2,vpp=2", False)])
    def test_an_uneven_pipeline_keeps_its_layout_where_the_sizes_are_the_same(self, against: str, kept: bool) -> None:
        recipe = tiny("model.pipeline_model_parallel_size=2", "model.num_layers_in_first_pipeline_stage=1")

        reference = parity.reference_recipe(recipe, parity.parse_sharding(against))

        assert ("num_layers_in_first_pipeline_stage" in reference.sections["model"]) == kept

    def test_nothing_watches_or_saves_a_comparison(self) -> None:
        recipe = tiny("logger.wandb_project=p", "checkpoint.pretrained_checkpoint=weights", "peft.dim=8")

        quiet = parity.unobserved(recipe)

        assert quiet.data.eval is None
        assert set(recipe.sections) - set(quiet.sections) == {"logger", "validation"}
        assert quiet.sections["checkpoint"] == {"pretrained_checkpoint": "weights"}
        assert quiet.sections["peft"] == {"dim": 8}


def test_the_first_batch_has_the_pairs_of_a_plan_in_its_rows_whatever_the_padding() -> None:
    class Store(list[Any]):
        pad_token_id = 0

    class Pair:
        def __init__(self, prompt: int, chosen: int, rejected: int) -> None:
            self.prompt, self.chosen, self.rejected = (np.full(n, n) for n in (prompt, chosen, rejected))

    store = Store([Pair(3, 2, 4), Pair(5, 1, 1), Pair(2, 7, 3)])
    lengths = PairLengths(*(np.array(column) for column in ([3, 5, 2], [2, 1, 7], [4, 1, 3])))
    plan = make_plan(
        lengths,
        nll_scope="response",
        pairs_per_step=3,
        num_steps=1,
        seed=0,
        shuffle=False,
        max_tokens_per_row=64,
        rows_per_step=2,
    )

    packed = parity.first_batch(store, plan)  # type: ignore[arg-type]
    padded = parity.first_batch(store, plan, Padding(8, 8))  # type: ignore[arg-type]

    assert [row.pair_ids.tolist() for row in packed] == [row.pair_ids.tolist() for row in padded] == [[2], [0, 1]]
    assert [len(row.tokens) for row in packed] == [2 * 2 + 7 + 3, 2 * 3 + 2 + 4 + 2 * 5 + 1 + 1]
    assert [len(row.tokens) for row in padded] == [16 + 8, 8 + 8 + 8 + 8]
    rows = parity.first_batch(store, plan, Padding(1, 8))  # type: ignore[arg-type]
    assert [len(row.tokens) for row in rows] == [16, 24]
    assert {(row.num_pairs, row.num_nll_tokens) for row in packed + padded} == {(3, 2 + 1 + 7)}


def test_kept_rows_that_a_split_cannot_take_are_refused() -> None:
    spec = importlib.util.spec_from_file_location("verify_parity", REPO / "tools" / "verify_parity.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    row = pack_row(
        [TokenizedPair(*(np.arange(1, size + 1) for size in (3, 5, 1)))],
        np.array([0]),
        nll_scope="response",
        sequence_multiple_of=4,
        pad_token_id=0,
        num_nll_tokens=5,
        num_pairs=1,
    )
    assert row.cu_seqlens.tolist() == [0, 8, 12]
    tool.check_batch([row, row], "kept.pt", [Padding(1, 1), Padding(4, 6)], 2)
    for paddings, message in (
        ([Padding(8, 8), Padding(1, 1)], r"kept\.pt holds a sequence of 4 tokens .* take multiples of 8\. Use"),
        ([Padding(1, 1), Padding(4, 8)], r"kept\.pt holds a row of 12 tokens .* take multiples of 8\. Use"),
        ([Padding(1, 4), Padding(1, 5)], r"kept\.pt holds a row of 12 tokens .* take multiples of 20\. Use"),
    ):
        with pytest.raises(ConfigError, match=message):
            tool.check_batch([row, row], "kept.pt", paddings, 2)
    with pytest.raises(ConfigError, match=r"kept\.pt holds 2 rows, but the recipe plans 4 a step"):
        tool.check_batch([row, row], "kept.pt", [], 4)


class TestMetricErrors:
    RIGHT = {
        "loss": 2.0,
        "logps/chosen": -1.0,
        "logps/rejected": -4.0,
        "logps/margins": 1e-3,
        "rewards/margins": 1e-4,
        "rewards/accuracies": 0.5,
    }

    def errors(self, **changes: float) -> dict[str, float]:
        other = self.RIGHT | {name.replace("__", "/"): value for name, value in changes.items()}
        return {name: e for name, e in parity.metric_errors(self.RIGHT, other, beta=0.1).items() if e}

    def test_a_loss_is_measured_against_itself(self) -> None:
        assert self.errors(loss=2.5) == {"loss": 0.25}

    def test_a_difference_is_measured_against_the_larger_log_prob(self) -> None:
        # 4 nats: |2e-3 - 1e-3| / 4; a reward is beta times as large, and so is its scale.
        assert self.errors(logps__margins=2e-3) == {"logps/margins": pytest.approx(2.5e-4)}
        assert self.errors(rewards__margins=2e-4) == {"rewards/margins": pytest.approx(2.5e-4)}

    def test_a_count_is_equal_or_wrong(self) -> None:
        assert self.errors(rewards__accuracies=0.5000001) == {"rewards/accuracies": math.inf}

    def test_what_is_no_number_or_missing_is_wrong(self) -> None:
        assert self.errors(loss=math.nan) == {"loss": math.inf}
        assert parity.metric_errors({"loss": math.nan}, {"loss": math.nan}, 0.1) == {"loss": math.inf}
        assert parity.metric_errors({"loss": 1.0}, {"nll_loss": 1.0}, 0.1) == {"loss": math.inf, "nll_loss": math.inf}
        assert parity.metric_errors({"loss": 0.0}, {"loss": 1e-9}, 0.1) == {"loss": math.inf}

    def test_an_evaluations_names_are_understood(self) -> None:
        names = ("logps/chosen", "logps/rejected", "logps/margins")
        right = dict(zip((f"eval_{name}/64-255" for name in names), (-1.0, -2.0, 0.5), strict=True))

        errors = parity.metric_errors(right, right | {"eval_logps/margins/64-255": 0.7}, 0.1)

        assert errors["eval_logps/margins/64-255"] == pytest.approx(0.1)


class TestGradientErrors:
    def test_shards_of_a_parameter_share_their_largest_gradient(self) -> None:
        # The second shard's gradients are small, but they are of the same parameter.
        shards = [{"weight": GradientError(1e-3, 2.0, 4.0)}, {"weight": GradientError(2e-3, 1e-6, 0.0)}]
        merged = parity.merge_shards(shards)
        assert merged == {"weight": GradientError(2e-3, 2.0, 4.0)}
        assert parity.gradient_errors(merged) == {"weight": 1e-3}

    def test_a_tiny_gradient_is_measured_against_the_norm_of_all(self) -> None:
        # Norm of all: sqrt(9 + 16) = 5, its floor 5e-6.
        parameters = {"a": GradientError(0.0, 3.0, 9.0), "b": GradientError(1e-9, 4.0, 16.0)}
        tiny_one = {"c": GradientError(5e-7, 1e-8, 0.0)}
        assert parity.gradient_errors(parameters | tiny_one)["c"] == pytest.approx(0.1)

    def test_what_is_no_number_stays_wrong(self) -> None:
        shards = [{"weight": GradientError(math.inf, 1.0, 1.0)}, {"weight": GradientError(0.0, 1.0, 0.0)}]
        assert parity.gradient_errors(parity.merge_shards(shards)) == {"weight": math.inf}

    def test_without_any_gradient_only_nothing_is_right(self) -> None:
        assert parity.gradient_errors({"a": GradientError(0.0, 0.0, 0.0)}) == {"a": 0.0}
        assert parity.gradient_errors({"a": GradientError(1e-30, 0.0, 0.0)}) == {"a": math.inf}


class TestComparison:
    RIGHT = Comparison(
        reference={"loss": 2.0, "rewards/accuracies": 0.5},
        metrics={"loss": 2.0, "rewards/accuracies": 0.5},
        metric_errors={"loss": 0.0, "rewards/accuracies": 0.0},
        gradient_errors={"weight": 3e-6},
        unmatched=(),
        bound=1e-5,
    )

    def test_rounding_passes(self) -> None:
        assert self.RIGHT.passed
        assert self.RIGHT.verdict() == "PASS: the worst error is 3.0e-06, the bound 1e-05."
        assert "<" not in self.RIGHT.table()

    def test_a_wrong_gradient_fails_and_is_marked(self) -> None:
        wrong = replace(self.RIGHT, gradient_errors={"weight": 3e-6, "bias": 2e-5})
        assert not wrong.passed
        assert wrong.verdict() == "FAIL: 1 of 4 figures are wrong; the worst error is 2.0e-05, the bound 1e-05."
        marked = [line.split() for line in wrong.table().splitlines() if line.endswith("<")]
        assert marked == [["bias", "2.0e-05", "<"]]

    def test_a_parameter_of_one_side_fails_by_name(self) -> None:
        wrong = replace(self.RIGHT, unmatched=("head.weight",))
        assert not wrong.passed and wrong.verdict().startswith("FAIL: 1 of 4")
        assert "head.weight         trained on one side only" in wrong.table()

    def test_counts_decide_only_where_nothing_rounds(self) -> None:
        turned = replace(self.RIGHT, metric_errors={"loss": 0.0, "rewards/accuracies": math.inf})
        assert not turned.passed
        assert replace(turned, exact=False).passed
        assert replace(turned, exact=False).verdict().startswith("PASS: the worst error is 3.0e-06")

    def test_nothing_compared_is_no_pass(self) -> None:
        nothing = replace(self.RIGHT, gradient_errors={})
        assert not nothing.passed and nothing.verdict().startswith("FAIL: no parameter is trained")

    def test_metrics_have_a_tenth_of_the_bound_where_gradients_round(self) -> None:
        off = replace(
            self.RIGHT, bound=5e-2, exact=False, gradient_errors={"weight": 4e-2}, metric_errors={"loss": 6e-3}
        )
        assert off.failures == {"loss": 6e-3}
        assert replace(off, metric_errors={"loss": 4e-3}).passed

    def test_the_worst_ten_come_first(self) -> None:
        errors = {f"layer {index}": index * 1e-7 for index in range(12)}
        table = replace(self.RIGHT, gradient_errors=errors).table()
        assert "gradient, worst 10 of 12" in table
        assert [line.split()[1] for line in table.splitlines() if line.startswith("layer")] == [
            str(index) for index in range(11, 1, -1)
        ]


def test_the_bound_follows_the_precision() -> None:
    assert parity.bound_of(tiny(), None) == (1e-5, True)
    assert parity.bound_of(tiny("mixed_precision=bf16_mixed"), None) == (5e-2, False)
    assert parity.bound_of(tiny("mixed_precision=bf16_mixed"), 0.2) == (0.2, False)
    assert parity.bound_of(tiny("model.bf16=true"), None) == (5e-2, False)


def test_a_sharding_is_described_in_words() -> None:
    assert parity.describe_sharding(tiny(), 1) == "not split"
    split = tiny("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    assert parity.describe_sharding(split, 8) == "tensor 2, data 4, sequence"
