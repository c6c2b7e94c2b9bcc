"""Packed rows: hand-computed layouts, and the counts and tokens of any data set against brute force."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from orpo_megatron.batch import PackedRow
from orpo_megatron.config import ConfigError
from orpo_megatron.data.dataset import PackedRows, collate_fn
from orpo_megatron.data.plan import NllScope, PairLengths, make_eval_plan, make_plan

PAD = 0


@dataclass(frozen=True)
class Pair:
    """Token ids of a pair."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    """Returns a pair of int32 token ids, as a memory-mapped store gives them."""
    return Pair(*(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)))


def lengths_of(store: list[Pair]) -> PairLengths:
    """Returns the token counts of a store."""
    return PairLengths(
        *(np.array([len(getattr(p, part)) for p in store]) for part in ("prompt", "chosen", "rejected"))
    )


def rows_of(store: list[Pair], nll_scope: NllScope = "prompt_and_response", **settings: Any) -> PackedRows:
    """Returns the rows of one epoch in file order, all pairs in one step, unless told otherwise."""
    defaults: dict[str, Any] = dict(pairs_per_step=len(store), seed=0, shuffle=False, max_tokens_per_row=1000)
    merged = {**defaults, **settings}
    merged.setdefault("num_steps", -(-len(store) // merged["pairs_per_step"]))
    return PackedRows(store, make_plan(lengths_of(store), nll_scope=nll_scope, **merged), PAD)


def every_row(dataset: PackedRows) -> list[PackedRow]:
    """Returns the rows of all steps."""
    return [dataset[i] for i in range(len(dataset))]


def values(row: PackedRow) -> dict[str, Any]:
    """Returns a row's fields as plain values."""
    return {name: v.tolist() if torch.is_tensor(v) else v for name, v in vars(row).items()}


def sequences(row: PackedRow) -> Iterator[tuple[list[int], list[int], list[int], list[bool]]]:
    """Yields tokens without padding, scored positions in the sequence, labels and is_response of each sequence."""
    ends = row.score_lengths.cumsum(0).tolist()
    for i, end in enumerate(ends):
        begin, (segment, side) = end - int(row.score_lengths[i]), divmod(i, 2) if row.shares_prefix else (i, 0)
        start, stop = row.cu_seqlens[segment : segment + 2].tolist()
        prompt, fork = int(row.prompt_ends[segment]), int(row.chosen_ends[segment])
        places = [*range(fork)] if side == 0 else [*range(prompt), *range(fork, stop - start)]
        places = [place for place in places if not row.padding_mask[start + place]]
        assert row.position_ids[[start + place for place in places]].tolist() == list(range(len(places)))
        tokens = row.tokens[[start + place for place in places]].tolist()
        positions = [places.index(position - start) for position in row.score_positions[begin:end].tolist()]
        yield tokens, positions, row.score_labels[begin:end].tolist(), row.score_is_response[begin:end].tolist()


A = pair([11, 12, 13], [21, 22], [31])
B = pair([14], [23], [32, 33])


def test_row_by_hand_prompt_and_response() -> None:
    """Pair A takes 5 + 4 tokens and comes first, pair B 2 + 3; the NLL covers 4 + 1 tokens."""
    dataset = rows_of([B, A])
    assert len(dataset) == 1
    assert values(dataset[0]) == {
        "tokens": [11, 12, 13, 21, 22, 11, 12, 13, 31, 14, 23, 14, 32, 33],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2],
        "padding_mask": [False] * 14,
        "cu_seqlens": [0, 5, 9, 11, 14],
        "prompt_ends": [5, 4, 2, 3],
        "chosen_ends": [5, 4, 2, 3],
        "score_positions": [0, 1, 2, 3, 7, 9, 11, 12],
        "score_labels": [12, 13, 21, 22, 31, 23, 32, 33],
        "score_is_response": [False, False, True, True, True, True, True, True],
        "score_lengths": [4, 1, 1, 2],
        "num_scored_tokens": [4, 1, 1, 2],
        "num_response_tokens": [2, 1, 1, 2],
        "pair_ids": [1, 0],
        "num_nll_tokens": 5,
        "num_pairs": 2,
    }


def test_row_by_hand_response_only_and_padded() -> None:
    """Each sequence ends in padding up to a multiple of 4; only responses are scored."""
    assert values(rows_of([A], nll_scope="response", sequence_multiple_of=4)[0]) == {
        "tokens": [11, 12, 13, 21, 22, PAD, PAD, PAD, 11, 12, 13, 31],
        "position_ids": [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3],
        "padding_mask": [False] * 5 + [True] * 3 + [False] * 4,
        "cu_seqlens": [0, 8, 12],
        "prompt_ends": [8, 4],
        "chosen_ends": [8, 4],
        "score_positions": [2, 3, 10],
        "score_labels": [21, 22, 31],
        "score_is_response": [True, True, True],
        "score_lengths": [2, 1],
        "num_scored_tokens": [2, 1],
        "num_response_tokens": [2, 1],
        "pair_ids": [0],
        "num_nll_tokens": 2,
        "num_pairs": 1,
    }


def test_row_by_hand_with_shared_prompts() -> None:
    """Pair A takes 3 + 2 + 1 tokens and two of padding, pair B 1 + 1 + 2; each prompt's end is scored twice."""
    row = rows_of([B, A], sequence_multiple_of=4, share_prefix=True)[0]
    assert row.shares_prefix and (row.max_seqlen, row.longest_sequence) == (8, 5)  # pair A; its chosen side
    assert values(row) == {
        "tokens": [11, 12, 13, 21, 22, 31, PAD, PAD, 14, 23, 32, 33],
        "position_ids": [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2],
        "padding_mask": [False] * 6 + [True] * 2 + [False] * 4,
        "cu_seqlens": [0, 8, 12],
        "prompt_ends": [3, 1],
        "chosen_ends": [5, 2],
        "score_positions": [0, 1, 2, 3, 2, 8, 8, 10],
        "score_labels": [12, 13, 21, 22, 31, 23, 32, 33],
        "score_is_response": [False, False, True, True, True, True, True, True],
        "score_lengths": [4, 1, 1, 2],
        "num_scored_tokens": [4, 1, 1, 2],
        "num_response_tokens": [2, 1, 1, 2],
        "pair_ids": [1, 0],
        "num_nll_tokens": 5,
        "num_pairs": 2,
    }


@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_rows_last_sequence_is_padded_to_what_the_row_takes(share_prefix: bool) -> None:
    """Instead of every sequence: pairs A and B take 5 + 4 + 2 + 3 tokens, or 6 + 4; of these 16 or 12 are a row."""
    plain = values(rows_of([B, A], share_prefix=share_prefix)[0])
    row = values(rows_of([B, A], share_prefix=share_prefix, row_length_multiple_of=4)[0])
    added = 2
    last = plain["cu_seqlens"][-1] - plain["cu_seqlens"][-2]
    assert row["tokens"] == plain["tokens"] + [PAD] * added
    assert row["padding_mask"] == plain["padding_mask"] + [True] * added
    # It goes on counting from the end of the sequence, which with a shared prompt is the rejected one's.
    ends = plain["position_ids"][-1]
    assert row["position_ids"] == plain["position_ids"] + [ends + 1, ends + 2]
    assert row["cu_seqlens"] == [*plain["cu_seqlens"][:-1], plain["cu_seqlens"][-1] + added]
    for name in ("prompt_ends", "chosen_ends"):
        end = plain[name][-1]
        assert row[name] == [*plain[name][:-1], end if share_prefix else last + added]
    same = {"score_positions", "score_labels", "score_is_response", "score_lengths", "num_scored_tokens"}
    assert {name: row[name] for name in same} == {name: plain[name] for name in same}


def test_a_row_without_pairs_has_the_length_that_a_row_takes() -> None:
    assert [len(row.tokens) for row in every_row(rows_of([A], rows_per_step=2, row_length_multiple_of=8))] == [16, 8]


NOTHING_SCORED: dict[str, Any] = {
    "score_positions": [],
    "score_labels": [],
    "score_is_response": [],
    "score_lengths": [0],
    "num_scored_tokens": [0],
    "num_response_tokens": [0],
    "pair_ids": [],
}


@pytest.mark.parametrize(("multiple", "length"), [(1, 2), (2, 2), (16, 16)])
def test_row_without_pairs(multiple: int, length: int) -> None:
    dataset = rows_of([A], rows_per_step=2, sequence_multiple_of=multiple)
    assert values(dataset[1]) == {
        "tokens": [PAD] * length,
        "position_ids": list(range(length)),
        "padding_mask": [True] * length,
        "cu_seqlens": [0, length],
        "prompt_ends": [length],
        "chosen_ends": [length],
        **NOTHING_SCORED,
        "num_nll_tokens": 4,
        "num_pairs": 1,
    }


def test_a_filled_row_without_pairs() -> None:
    """The chosen side of the step's first pair (B in step 0, A in step 1) stands in, real tokens, none scored."""
    plan = rows_of([B, A], pairs_per_step=1, rows_per_step=2, sequence_multiple_of=4).plan
    filled = PackedRows([B, A], plan, PAD, fill_empty_rows=True)
    assert values(filled[1]) == {
        "tokens": [14, 23, PAD, PAD],
        "position_ids": [0, 1, 2, 3],
        "padding_mask": [False, False, True, True],
        "cu_seqlens": [0, 4],
        "prompt_ends": [4],
        "chosen_ends": [4],
        **NOTHING_SCORED,
        "num_nll_tokens": 1,
        "num_pairs": 1,
    }
    assert filled[3].tokens.tolist() == [11, 12, 13, 21, 22, PAD, PAD, PAD]
    assert filled[3].padding_mask.tolist() == [False] * 5 + [True] * 3
    plain = PackedRows([B, A], plan, PAD)
    for index in (0, 2):  # rows with pairs are as they were
        assert values(filled[index]) == values(plain[index])


@pytest.mark.parametrize(("rows_per_step", "fill"), [(1, False), (2, False), (2, True)])
def test_types(rows_per_step: int, fill: bool) -> None:
    row = PackedRows([A], rows_of([A], rows_per_step=rows_per_step).plan, PAD, fill)[rows_per_step - 1]
    dtypes = {name: v.dtype for name, v in vars(row).items() if torch.is_tensor(v)}
    assert dtypes.pop("cu_seqlens") == torch.int32
    assert dtypes.pop("padding_mask") == dtypes.pop("score_is_response") == torch.bool
    assert set(dtypes.values()) == {torch.int64}


@st.composite
def stores(draw: st.DrawFn) -> list[Pair]:
    """Draws 1 to 12 pairs whose token ids, from 1, are all different."""
    sizes = draw(st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=12))
    ids = iter(range(1, 1000))
    return [pair(*([next(ids) for _ in range(size)] for size in part)) for part in sizes]


@given(
    stores(),
    st.sampled_from(["prompt_and_response", "response"]),
    st.sampled_from([(1, 1), (8, 8), (1, 16), (4, 16)]),
    st.integers(1, 5),
    st.booleans(),
)
def test_rows_hold_the_pairs_and_the_plan_counts_them(
    store: list[Pair], nll_scope: NllScope, multiples: tuple[int, int], pairs_per_step: int, share_prefix: bool
) -> None:
    dataset = rows_of(
        store,
        nll_scope,
        pairs_per_step=pairs_per_step,
        shuffle=True,
        max_tokens_per_row=64,
        sequence_multiple_of=multiples[0],
        row_length_multiple_of=multiples[1],
        share_prefix=share_prefix,
    )
    plan, seen = dataset.plan, []
    for step in range(plan.num_steps):
        rows = [dataset[step * plan.rows_per_step + i] for i in range(plan.rows_per_step)]
        num_nll_tokens = 0
        for row in rows:
            assert len(row.tokens) == len(row.position_ids) == row.cu_seqlens[-1] <= 64
            assert not (row.cu_seqlens % multiples[0]).any() and not len(row.tokens) % multiples[1]
            assert row.shares_prefix == (share_prefix and len(row.pair_ids) > 0)
            sides = list(sequences(row))
            for i, pair_id in enumerate(row.pair_ids.tolist()):
                expected = store[pair_id]
                for side, response in enumerate((expected.chosen.tolist(), expected.rejected.tolist())):
                    prompt = expected.prompt.tolist()
                    tokens, positions, labels, is_response = sides[2 * i + side]
                    assert tokens == prompt + response
                    assert labels == [tokens[position + 1] for position in positions]
                    assert [label for label, flag in zip(labels, is_response, strict=True) if flag] == response
                    scored_prompt = prompt[1:] if side == 0 and nll_scope == "prompt_and_response" else []
                    assert labels == scored_prompt + response
            num_nll_tokens += int(row.score_lengths[: 2 * len(row.pair_ids) : 2].sum())
        assert {row.num_nll_tokens for row in rows} == {num_nll_tokens}
        assert {row.num_pairs for row in rows} == {sum(len(row.pair_ids) for row in rows)}
        seen += [pair_id for row in rows for pair_id in row.pair_ids.tolist()]
    assert sorted(seen) == list(range(len(store)))


@given(stores())
def test_one_step_in_one_two_or_four_rows_covers_the_same_pairs(store: list[Pair]) -> None:
    def of_step(rows_per_step: int) -> list[Any]:
        rows = every_row(rows_of(store, rows_per_step=rows_per_step))
        assert len(rows) == rows_per_step
        return sorted(
            (pair_id, *list(sequences(row))[2 * i : 2 * i + 2], row.num_nll_tokens, row.num_pairs)
            for row in rows
            for i, pair_id in enumerate(row.pair_ids.tolist())
        )

    assert of_step(1) == of_step(2) == of_step(4)


@given(
    stores(),
    st.sampled_from(["prompt_and_response", "response"]),
    st.sampled_from([1, 2, 3, 4, 8, 12]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
)
def test_denominators_are_what_the_rows_hold(
    store: list[Pair],
    nll_scope: NllScope,
    multiple: int,
    pairs_per_step: int,
    rows_multiple_of: int,
    rows_to_spare: int,
    fill: bool,
) -> None:
    """In any number of rows, with any padding: of a step in training, of all steps in an evaluation."""
    shared: dict[str, Any] = dict(
        nll_scope=nll_scope,
        pairs_per_step=pairs_per_step,
        max_tokens_per_row=64,
        rows_multiple_of=rows_multiple_of,
        sequence_multiple_of=multiple,
        row_length_multiple_of=multiple * (1 + fill),
    )
    lengths = lengths_of(store)
    num_steps = 2 * -(-len(store) // pairs_per_step)
    train: dict[str, Any] = dict(**shared, num_steps=num_steps, seed=3, shuffle=True)
    fewest = make_plan(lengths, **train).rows_per_step
    plan = make_plan(lengths, **train, rows_per_step=fewest + rows_to_spare * rows_multiple_of)
    eval_plan = make_eval_plan(lengths, **shared)

    def held(rows: list[PackedRow]) -> tuple[int, int]:
        chosen = [row.num_scored_tokens[: 2 * len(row.pair_ids) : 2] for row in rows]
        return int(torch.cat(chosen).sum()), sum(len(row.pair_ids) for row in rows)

    rows, size = every_row(PackedRows(store, plan, PAD, fill)), plan.rows_per_step
    assert len(rows) == num_steps * size and size % rows_multiple_of == 0
    for step in range(num_steps):
        of_step = rows[step * size : (step + 1) * size]
        denominators = (plan.num_nll_tokens(step), plan.num_pairs(step))
        assert held(of_step) == denominators
        assert {(row.num_nll_tokens, row.num_pairs) for row in of_step} == {denominators}
    rows = every_row(PackedRows(store, eval_plan, PAD, fill))
    assert {(row.num_nll_tokens, row.num_pairs) for row in rows} == {held(rows)}
    assert held(rows)[1] == len(store)


def test_eval_rows_carry_the_denominators_of_the_set() -> None:
    store = [A, B, A]
    plan = make_eval_plan(lengths_of(store), nll_scope="response", pairs_per_step=2, max_tokens_per_row=20)
    rows = every_row(PackedRows(store, plan, PAD))
    assert [row.pair_ids.tolist() for row in rows] == [[0, 1], [2]]
    assert [(row.num_nll_tokens, row.num_pairs) for row in rows] == [(5, 3), (5, 3)]


def test_workers_read_the_same_rows_in_order() -> None:
    dataset = rows_of([A, B, A, B, B], pairs_per_step=2, num_steps=6, shuffle=True, max_tokens_per_row=9)
    expected = [values(row) for row in every_row(dataset)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert [values(row) for row in every_row(copy)] == expected
    loader = DataLoader(dataset, batch_size=1, collate_fn=collate_fn, num_workers=2)
    assert [values(row) for row in loader] == expected


def test_index_outside_the_run_is_refused() -> None:
    dataset = rows_of([A])
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"Row {index} is outside the plan's 1 rows"):
            dataset[index]


def test_microbatch_of_two_rows_is_refused() -> None:
    row = rows_of([A])[0]
    assert collate_fn([row]) is row
    with pytest.raises(ConfigError, match=r"micro_batch_size \(2\) must be 1"):
        collate_fn([row, row])
