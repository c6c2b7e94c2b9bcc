"""The step plan: hand-computed cases, the properties that hold for any data, and the errors."""

from __future__ import annotations

import pickle
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_megatron.config import ConfigError
from orpo_megatron.data.packing import balance, longest_rows
from orpo_megatron.data.plan import PairLengths, PairOrder, StepPlan, make_eval_plan, make_plan, round_up

# Tokens of both sides, 2 * prompt + chosen + rejected: 13, 15, 12, 7, 13.
FIVE = PairLengths(np.array([4, 2, 3, 1, 5]), np.array([3, 6, 2, 2, 1]), np.array([2, 5, 4, 3, 2]))


def plan_of(lengths: PairLengths, **settings: Any) -> StepPlan:
    """Returns a plan in file order, two pairs a step, for one epoch, unless told otherwise."""
    defaults = dict(nll_scope="prompt_and_response", pairs_per_step=2, seed=0, shuffle=False, max_tokens_per_row=20)
    merged = {**defaults, **settings}
    merged.setdefault("num_steps", -(-len(lengths) // merged["pairs_per_step"]))
    return make_plan(lengths, **merged)


def as_lists(arrays: list[np.ndarray]) -> list[list[int]]:
    """Returns index arrays as lists."""
    return [array.tolist() for array in arrays]


@st.composite
def lengths_of_pairs(draw: st.DrawFn) -> PairLengths:
    """Draws 1 to 24 pairs of 1 to 30 tokens a part."""
    num_pairs = draw(st.integers(1, 24))
    part = st.lists(st.integers(1, 30), min_size=num_pairs, max_size=num_pairs)
    return PairLengths(*(np.array(draw(part), dtype=np.int32) for _ in range(3)))


@st.composite
def plan_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Draws settings; the budget is what the longest pair can take (2 * 64 tokens padded) and up to twice that."""
    sequence_multiple_of = draw(st.sampled_from([1, 2, 16]))
    return dict(
        pairs_per_step=draw(st.integers(1, 9)),
        num_steps=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 2**32)),
        shuffle=draw(st.booleans()),
        max_tokens_per_row=draw(st.integers(128, 256)),
        rows_multiple_of=draw(st.integers(1, 3)),
        sequence_multiple_of=sequence_multiple_of,
        row_length_multiple_of=sequence_multiple_of * draw(st.sampled_from([1, 2, 4])),
    )


def test_padded_tokens_are_two_sequences_each_padded_by_itself() -> None:
    assert FIVE.padded_tokens(1).tolist() == [13, 15, 12, 7, 13]
    # Sequences 7 and 6, 8 and 7, 5 and 7, 3 and 4, 6 and 7, each up to a multiple of 4.
    assert FIVE.padded_tokens(4).tolist() == [16, 16, 16, 8, 16]


def test_padded_tokens_of_a_shared_prompt_are_one_segment() -> None:
    once = (FIVE.padded_tokens(1) - FIVE.prompt).tolist()
    assert FIVE.padded_tokens(1, share_prefix=True).tolist() == once
    assert FIVE.padded_tokens(4, share_prefix=True).tolist() == [-(-tokens // 4) * 4 for tokens in once]


def test_steps_in_file_order_keep_the_ragged_one_and_repeat() -> None:
    plan = plan_of(FIVE, num_steps=4)
    assert plan.steps_per_epoch == 3
    assert [plan.pairs(step).tolist() for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert [plan.num_pairs(step) for step in range(4)] == [2, 2, 1, 2]


@pytest.mark.parametrize(
    ("nll_scope", "expected"),
    # prompt + chosen - 1 of the pairs: 6, 7, 4, 2, 5; chosen: 3, 6, 2, 2, 1.
    [("prompt_and_response", [13, 6, 5]), ("response", [9, 4, 1])],
)
def test_num_nll_tokens(nll_scope: str, expected: list[int]) -> None:
    plan = plan_of(FIVE, nll_scope=nll_scope)
    assert [plan.num_nll_tokens(step) for step in range(3)] == expected


def test_one_row_count_serves_every_step() -> None:
    # 13 + 15 tokens need two rows of 20; 12 + 7 would fit one.
    plan = plan_of(FIVE)
    assert plan.rows_per_step == 2
    assert [as_lists(plan.rows(step)) for step in range(3)] == [[[1], [0]], [[2], [3]], [[4], []]]
    assert as_lists(plan_of(FIVE, rows_multiple_of=3).rows(0)) == [[1], [0], []]
    assert as_lists(plan_of(FIVE, rows_per_step=4).rows(1)) == [[2], [3], [], []]


def test_row_count_covers_the_steps_that_are_run_and_no_others() -> None:
    lengths = PairLengths(np.full(4, 1), np.array([1, 1, 9, 9]), np.array([1, 1, 9, 9]))  # 4, 4, 20 and 20 tokens
    assert plan_of(lengths, num_steps=1).rows_per_step == 1
    assert plan_of(lengths, num_steps=2).rows_per_step == 2
    assert plan_of(lengths, num_steps=3).rows_per_step == 2


def test_row_count_covers_every_epoch() -> None:
    """Pairs of 4, 4, 20 and 20 tokens: the long two meet in the second epoch only."""
    lengths = PairLengths(np.full(4, 1), np.array([1, 1, 9, 9]), np.array([1, 1, 9, 9]))
    settings: dict[str, Any] = dict(shuffle=True, seed=0, max_tokens_per_row=24)
    assert [plan_of(lengths, **settings).pairs(step).tolist() for step in range(4)] == [[0, 2], [1, 3], [3, 2], [1, 0]]
    assert plan_of(lengths, **settings, num_steps=2).rows_per_step == 1
    assert plan_of(lengths, **settings, num_steps=4).rows_per_step == 2


def test_balance_by_hand() -> None:
    # 7 and 6 open the rows, 5 joins 6, 4 joins 7, and 3 goes to the lower of two rows of 11.
    assert balance([3, 7, 5, 4, 6], 2) == ([[1, 3, 0], [4, 2]], [14, 11])
    assert balance([5, 5, 5], 2) == ([[0, 2], [1]], [10, 5])
    assert balance([5], 3) == ([[0], [], []], [5, 0, 0])


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=20), min_size=1, max_size=9), st.integers(1, 12))
def test_longest_rows_of_many_steps_are_those_of_balance(steps: list[list[int]], num_rows: int) -> None:
    costs = np.array([step + [0] * (20 - len(step)) for step in steps], dtype=np.int64)
    with mock.patch("orpo_megatron.data.packing.STEPS_AT_ONCE", 4):
        assert longest_rows(costs, num_rows).tolist() == [max(balance(step, num_rows)[1]) for step in steps]


def test_longest_rows_by_hand() -> None:
    """7 and 6 open the rows, 5 joins 6, 4 joins 7, 3 makes one 14; two items in two rows; one item."""
    costs = np.array([[3, 7, 5, 4, 6], [0, 9, 0, 0, 8], [1, 0, 0, 0, 0]])
    assert longest_rows(costs, 2).tolist() == [14, 9, 1]
    assert longest_rows(costs, 7).tolist() == [7, 9, 1]


def test_row_count_grows_where_the_token_total_would_fit() -> None:
    """14, 12, 10, 8 and 6 tokens are 50, less than two rows of 26, but the longest row comes out as 28."""
    lengths = PairLengths(np.ones(5, int), np.array([6, 5, 4, 3, 2]), np.array([6, 5, 4, 3, 2]))
    assert plan_of(lengths, pairs_per_step=5, max_tokens_per_row=28).rows_per_step == 2
    assert plan_of(lengths, pairs_per_step=5, max_tokens_per_row=26).rows_per_step == 3


def test_shuffled_order_is_what_it_was() -> None:
    """Literals, because a run must continue with the same pairs on any platform and after any upgrade."""
    order = PairOrder(num_pairs=8, pairs_per_step=4, seed=42)
    assert order.epoch(0).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]
    assert order.epoch(1).tolist() == [4, 5, 3, 0, 2, 7, 1, 6]
    assert order.pairs(3).tolist() == [2, 7, 1, 6]
    assert PairOrder(num_pairs=8, pairs_per_step=4, seed=43).epoch(0).tolist() == [0, 6, 4, 5, 2, 1, 3, 7]


@given(lengths_of_pairs(), plan_settings())
def test_every_epoch_visits_every_pair_once(lengths: PairLengths, settings: dict[str, Any]) -> None:
    plan = plan_of(lengths, **settings)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        pairs = np.concatenate([plan.pairs(step) for step in steps])
        assert sorted(pairs.tolist()) == list(range(len(lengths)))


@given(lengths_of_pairs(), plan_settings(), plan_settings())
def test_pairs_of_a_step_do_not_depend_on_how_it_is_packed(
    lengths: PairLengths, settings: dict[str, Any], other: dict[str, Any]
) -> None:
    kept = {name: settings[name] for name in ("pairs_per_step", "num_steps", "seed", "shuffle")}
    one, two = plan_of(lengths, **settings), plan_of(lengths, **{**other, **kept})
    for step in range(settings["num_steps"]):
        assert one.pairs(step).tolist() == two.pairs(step).tolist()
        assert sorted(np.concatenate(two.rows(step)).tolist()) == sorted(one.pairs(step).tolist())
        assert one.num_nll_tokens(step) == two.num_nll_tokens(step)


@given(lengths_of_pairs(), plan_settings(), st.sampled_from(["prompt_and_response", "response"]))
def test_denominators_are_those_of_the_pairs_in_the_rows(
    lengths: PairLengths, settings: dict[str, Any], nll_scope: str
) -> None:
    """Counted pair by pair; a step's first tokens, which nothing predicts, are not in its NLL."""
    plan = plan_of(lengths, nll_scope=nll_scope, **settings)
    eval_settings = {k: v for k, v in settings.items() if k not in ("num_steps", "seed", "shuffle")}
    eval_plan = make_eval_plan(lengths, nll_scope=nll_scope, **eval_settings)  # type: ignore[arg-type]

    def counted(pairs: list[int]) -> tuple[int, int]:
        scored_prompts = sum(int(lengths.prompt[p]) - 1 for p in pairs) if nll_scope != "response" else 0
        return scored_prompts + sum(int(lengths.chosen[p]) for p in pairs), len(pairs)

    for step in range(plan.num_steps):
        in_rows = np.concatenate(plan.rows(step)).tolist()
        assert (plan.num_nll_tokens(step), plan.num_pairs(step)) == counted(in_rows)
    for step in range(eval_plan.num_steps):
        whole_set = counted(list(range(len(lengths))))
        assert (eval_plan.num_nll_tokens(step), eval_plan.num_pairs(step)) == whole_set


@given(lengths_of_pairs(), plan_settings())
def test_rows_fit_the_budget_and_fewer_would_not(lengths: PairLengths, settings: dict[str, Any]) -> None:
    plan = plan_of(lengths, **settings)
    costs, multiple = lengths.padded_tokens(plan.sequence_multiple_of), settings["rows_multiple_of"]
    assert plan.rows_per_step % multiple == 0
    for step in range(plan.num_steps):
        rows = plan.rows(step)
        assert len(rows) == plan.rows_per_step
        assert all(round_up(costs[row].sum(), plan.row_length_multiple_of) <= plan.max_tokens_per_row for row in rows)
    for rows_per_step in range(multiple, plan.rows_per_step, multiple):
        loads = [max(balance(costs[plan.pairs(s)].tolist(), rows_per_step)[1]) for s in range(plan.num_steps)]
        assert round_up(max(loads), plan.row_length_multiple_of) > plan.max_tokens_per_row


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 10))
def test_one_row_more_never_makes_the_longest_longer(costs: list[int], num_rows: int) -> None:
    assert max(balance(costs, num_rows + 1)[1]) <= max(balance(costs, num_rows)[1])


def test_eval_plan_is_one_pass_with_the_denominators_of_the_set() -> None:
    plan = make_eval_plan(FIVE, nll_scope="response", pairs_per_step=2, max_tokens_per_row=20, rows_multiple_of=2)
    assert plan.num_steps == 3
    assert [plan.pairs(step).tolist() for step in range(3)] == [[0, 1], [2, 3], [4]]
    assert [plan.num_nll_tokens(step) for step in range(3)] == [14, 14, 14]
    assert [plan.num_pairs(step) for step in range(3)] == [5, 5, 5]


def test_summary_by_hand() -> None:
    summary = plan_of(FIVE, num_steps=4).summary()
    # Steps of 28, 19, 13 and 28 tokens in two rows, the longer of 15, 12, 13 and 15.
    assert (summary.num_tokens, summary.tokens_per_step, summary.longest_row) == (88, 22.0, 15)
    assert summary.fill == pytest.approx((28 / 30 + 19 / 24 + 13 / 26 + 28 / 30) / 4)
    assert str(summary).splitlines() == [
        "pairs        5, 2 a step",
        "steps        4 (1.33 epochs)",
        "tokens       88, 22 a step",
        "rows a step  2, 79.0% filled",
        "longest row  15 tokens of 20 allowed",
    ]


@given(lengths_of_pairs(), plan_settings())
def test_summary_is_that_of_every_step_packed_by_itself(lengths: PairLengths, settings: dict[str, Any]) -> None:
    plan = plan_of(lengths, **settings)
    summary, costs = plan.summary(), lengths.padded_tokens(plan.sequence_multiple_of)
    of_steps = [max(costs[row].sum() for row in plan.rows(step)) for step in range(plan.num_steps)]
    longest = [round_up(int(tokens), plan.row_length_multiple_of) for tokens in of_steps]
    num_tokens = [plan.num_tokens(step) for step in range(plan.num_steps)]
    assert (summary.num_tokens, summary.longest_row) == (sum(num_tokens), max(longest))
    fill = [tokens / (plan.rows_per_step * most) for tokens, most in zip(num_tokens, longest, strict=True)]
    assert summary.fill == pytest.approx(sum(fill) / plan.num_steps, rel=1e-12)


def test_a_step_is_packed_once_for_all_of_its_rows() -> None:
    plan = plan_of(FIVE)
    with mock.patch("orpo_megatron.data.plan.balance", side_effect=balance) as packed:
        assert as_lists(plan.rows(0)) == as_lists(plan.rows(0)) == [[1], [0]]
        assert as_lists(plan_of(FIVE, rows_per_step=3).rows(0)) == [[1], [0], []]  # another plan has its own
    assert packed.call_count == 2
    with pytest.raises(ValueError, match="read-only"):
        plan.rows(0)[0][0] = 7


def test_plan_survives_pickling() -> None:
    plan = plan_of(FIVE, shuffle=True, seed=7, num_steps=6)
    copy = pickle.loads(pickle.dumps(plan))
    assert [as_lists(copy.rows(step)) for step in range(6)] == [as_lists(plan.rows(step)) for step in range(6)]


def test_budget_below_the_longest_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_tokens_per_row \(14\).*pair 1 takes 15 tokens.*at least 15"):
        plan_of(FIVE, max_tokens_per_row=14)
    with pytest.raises(ConfigError, match=r"pair 0 takes 16 tokens"):
        plan_of(FIVE, max_tokens_per_row=15, sequence_multiple_of=4)
    with pytest.raises(ConfigError, match=r"max_tokens_per_row \(15\).*pair 1 takes 16 tokens.*at least 16"):
        plan_of(FIVE, max_tokens_per_row=15, row_length_multiple_of=8)
    assert plan_of(FIVE, max_tokens_per_row=16, row_length_multiple_of=8).summary().longest_row == 16


def test_row_count_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rows_per_step \(6\) must be a multiple of 4.*Use 4 or"):
        plan_of(FIVE, rows_multiple_of=4, rows_per_step=6)
    with pytest.raises(ConfigError, match=r"rows_per_step \(3\) must be a multiple of 2.*Use 2 or"):
        plan_of(FIVE, rows_multiple_of=2, rows_per_step=3)
    with pytest.raises(ConfigError, match=r"rows_per_step \(1\).*max_tokens_per_row \(20\).*takes 2 rows"):
        plan_of(FIVE, rows_per_step=1)


def test_empty_part_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt of pair 1 has no tokens"):
        PairLengths(np.array([1, 0]), np.array([1, 1]), np.array([1, 1]))
