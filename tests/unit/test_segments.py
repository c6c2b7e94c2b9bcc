"""Sums over packed sequences, whole and shared out over context-parallel ranks: by hand and against slices."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from orpo_megatron.batch import PackedRow
from orpo_megatron.data.dataset import pack_row
from orpo_megatron.data.tokens import TokenizedPair
from orpo_megatron.loss import PairLogps
from orpo_megatron.segments import (
    attention_spans,
    context_shard,
    pair_logps,
    sum_per_sequence,
    zigzag_chunks,
    zigzag_positions,
)


def packed_row(is_response: list[list[bool]], num_pairs: int) -> PackedRow:
    """A row in which only what the sums look at has meaning: scored tokens per sequence and their kind."""
    flat = [flag for sequence in is_response for flag in sequence]
    zeros = torch.zeros(len(flat), dtype=torch.int64)
    lengths = torch.tensor([len(sequence) for sequence in is_response])
    return PackedRow(
        tokens=zeros,
        position_ids=zeros,
        padding_mask=zeros.bool(),
        cu_seqlens=torch.zeros(len(is_response) + 1, dtype=torch.int32),
        prompt_ends=torch.zeros(len(is_response), dtype=torch.int64),
        chosen_ends=torch.zeros(len(is_response), dtype=torch.int64),
        score_positions=zeros,
        score_labels=zeros,
        score_is_response=torch.tensor(flat, dtype=torch.bool),
        score_lengths=lengths,
        num_scored_tokens=lengths,
        num_response_tokens=torch.tensor([sum(sequence) for sequence in is_response]),
        pair_ids=torch.arange(num_pairs),
        num_nll_tokens=len(flat),
        num_pairs=num_pairs,
    )


def test_sum_per_sequence() -> None:
    """Runs of 2, 0, 3, 1 and 0; the gradient of each value is its run's."""
    values = torch.arange(1.0, 7.0, requires_grad=True)
    sums = sum_per_sequence(values, torch.tensor([2, 0, 3, 1, 0]))
    assert sums.tolist() == [3, 0, 12, 6, 0]
    assert sums.dtype == torch.float64
    (gradient,) = torch.autograd.grad(sums, values, torch.tensor([10.0, 20, 30, 40, 50], dtype=torch.float64))
    assert gradient.tolist() == [10, 10, 30, 30, 30, 40]
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("lengths", [[0], []])
def test_sum_of_nothing(lengths: list[int]) -> None:
    values = torch.zeros(0, requires_grad=True)
    sums = sum_per_sequence(values, torch.tensor(lengths, dtype=torch.int64))
    assert sums.tolist() == [0.0] * len(lengths)
    sums.sum().backward()
    assert values.grad is not None


def test_long_run_keeps_small_values() -> None:
    """2^24 + 1 + ... + 1 stands still in fp32; fp64 counts every one."""
    values = torch.ones(1001)
    values[0] = 2.0**24
    assert sum_per_sequence(values, torch.tensor([1001])).item() == 2**24 + 1000


def test_sum_repeats_bit_by_bit_and_matches_slices() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 40, (30,), generator=generator)
    values = torch.randn(int(lengths.sum()), generator=generator)
    sums = sum_per_sequence(values, lengths)
    expected = torch.stack([run.double().sum() for run in values.split(lengths.tolist())])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(sums, sum_per_sequence(values, lengths))


def test_pair_logps() -> None:
    """Two pairs under prompt_and_response: chosen prompts are in the NLL, not in the length-averaged log-probs.

    Sequences: [-1 | -2 -3], [-4], [-5 -6 | -7], [-8 -9 -10], prompt before the bar.
    """
    row = packed_row([[False, True, True], [True], [False, False, True], [True] * 3], num_pairs=2)
    values = -torch.arange(1.0, 11.0)
    logps = pair_logps(values, row)
    assert logps.chosen_logps.tolist() == [-2.5, -7.0]
    assert logps.rejected_logps.tolist() == [-4.0, -9.0]
    assert logps.nll_sums.tolist() == [6.0, 18.0]
    assert logps.nll_lengths.tolist() == [3, 3]
    assert logps.chosen_logps.dtype == logps.rejected_logps.dtype == torch.float32
    assert logps.nll_lengths.dtype == torch.int64


def test_pair_logps_of_responses_only() -> None:
    """Under the scope ``response`` no prompt token is scored, so the NLL is the response's sum."""
    logps = pair_logps(torch.tensor([-2.0, -3.0, -4.0]), packed_row([[True, True], [True]], num_pairs=1))
    assert logps.chosen_logps.tolist() == [-2.5]
    assert logps.rejected_logps.tolist() == [-4.0]
    assert logps.nll_sums.tolist() == [5.0]


def test_pair_logps_gradient() -> None:
    """Weights 1, 10 and 100 on chosen, rejected and NLL land on the right tokens."""
    values = torch.full((6,), -1.0, requires_grad=True)
    logps = pair_logps(values, packed_row([[False, True, True], [True, True, True]], num_pairs=1))
    (logps.chosen_logps + 30 * logps.rejected_logps + 100 * logps.nll_sums).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-100, -99.5, -99.5, 10, 10, 10])


def test_row_without_pairs() -> None:
    """The dummy sequence's 0/0 reaches neither values nor gradients."""
    weight = torch.ones(2, requires_grad=True)
    logps = pair_logps(weight[:0], packed_row([[]], num_pairs=0))
    for values in (logps.chosen_logps, logps.rejected_logps, logps.nll_sums):
        assert values.shape == (0,) and values.requires_grad
    assert logps.nll_lengths.shape == (0,)
    with torch.autograd.set_detect_anomaly(True):  # raises on a NaN, also one that would vanish on its way
        (logps.chosen_logps.sum() + logps.rejected_logps.sum() + logps.nll_sums.sum()).backward()
    assert weight.grad is not None and weight.grad.tolist() == [0, 0]


def row_of(
    sizes: list[tuple[int, int, int]], multiple: int, response_only: bool = False, share: bool = False, whole: int = 1
) -> PackedRow:
    """The row of pairs of so many prompt, chosen and rejected tokens, with token ids from 1 on."""
    pairs = [TokenizedPair(*np.split(np.arange(1, sum(parts) + 1), np.cumsum(parts)[:2])) for parts in sizes]
    return pack_row(
        pairs,
        np.arange(len(pairs)),
        nll_scope="response" if response_only else "prompt_and_response",
        sequence_multiple_of=multiple,
        row_length_multiple_of=whole,
        pad_token_id=0,
        num_nll_tokens=1,
        num_pairs=1,
        share_prefix=share,
    )


def shards_of(row: PackedRow, cp_size: int) -> list[PackedRow]:
    return [context_shard(row, cp_size, rank) for rank in range(cp_size)]


def test_zigzag_by_hand() -> None:
    """8 and 16 tokens over two ranks: chunks of 2 and of 4, of which rank 0 holds the outer two."""
    assert zigzag_positions([8], 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_positions([8], 2, 1).tolist() == [2, 3, 4, 5]
    assert zigzag_positions([16], 2, 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert zigzag_positions([16], 2, 1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert zigzag_positions([8, 16], 2, 0).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert zigzag_chunks([8, 16], 2, 1) == [[(2, 4), (4, 6)], [(4, 8), (8, 12)]]
    assert [zigzag_positions([8], 4, rank).tolist() for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert zigzag_chunks([5, 1], 1, 0) == [[(0, 5)], [(0, 1)]]  # any length where nothing is split
    assert zigzag_positions([8], 2, 0).dtype == torch.int64


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 5))
def test_every_position_is_held_by_one_rank(chunks: list[int], cp_size: int) -> None:
    """And causal attention costs every rank the same: the positions that each holds add up to the same."""
    lengths = [2 * cp_size * chunk for chunk in chunks]
    held = [zigzag_positions(lengths, cp_size, rank) for rank in range(cp_size)]
    assert torch.cat(held).sort().values.tolist() == list(range(sum(lengths)))
    assert len({int(positions.sum()) for positions in held}) == 1
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    for rank, positions in enumerate(held):
        assert len(positions) == sum(lengths) // cp_size
        parts = zip(starts, zigzag_chunks(lengths, cp_size, rank), strict=True)
        assert positions.tolist() == [start + i for start, chunks in parts for part in chunks for i in range(*part)]


@pytest.mark.parametrize(("cp_size", "length", "multiple", "padded"), [(2, 6, 4, 8), (3, 8, 6, 12), (4, 1, 8, 8)])
def test_a_sequence_that_cannot_be_cut_is_refused(cp_size: int, length: int, multiple: int, padded: int) -> None:
    for split in (zigzag_chunks, zigzag_positions):
        with pytest.raises(ValueError) as error:
            split([24, length], cp_size, 0)
        assert str(error.value) == (
            f"A packed sequence of {length} tokens cannot be split over context parallel size {cp_size}: its length "
            f"must be a multiple of {multiple}. Pad it to {padded} tokens."
        )


@pytest.mark.parametrize("share", [False, True])
def test_a_row_padded_as_a_whole_is_cut_into_shares_of_one_length(share: bool) -> None:
    """Sequences in multiples of 4, for context parallel 2, and the row of 12, for tensor parallel 3 beneath."""
    plain, row = (row_of([(3, 4, 1), (2, 6, 9)], multiple=4, share=share, whole=whole) for whole in (4, 12))
    assert len(row.tokens) % 12 == 0 != len(plain.tokens) % 12
    shards, of_plain = shards_of(row, 2), shards_of(plain, 2)
    assert [len(shard.tokens) for shard in shards] == [len(row.tokens) // 2] * 2
    for name in ("score_labels", "score_is_response"):  # in another order: the last sequence is cut elsewhere
        mine, theirs = (torch.cat([getattr(shard, name) for shard in of]).sort().values for of in (shards, of_plain))
        assert mine.tolist() == theirs.tolist()
    for shard in shards:  # each label is still that of the token after its position
        places = shard.position_ids[shard.score_positions]
        tokens = shard.tokens[shard.score_positions]
        assert len(places) == len(shard.score_labels) and not shard.padding_mask[shard.score_positions].any()
        assert (tokens > 0).all()


def test_context_shard_by_hand() -> None:
    """A pair of 3 + 4 and 3 + 1 tokens, padded to 8 and 4, over two ranks.

    Chosen: tokens 1 to 7 and one padding; scored are 2 to 7, at positions 0 to 5. Rejected: tokens 1 to 3 and 8;
    scored is 8, at position 2 of the sequence. Rank 0 holds positions 0 1 6 7 and 8 11, rank 1 holds 2 to 5 and 9 10.
    """
    row = row_of([(3, 4, 1)], multiple=4)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 8]
    first, second = shards_of(row, 2)
    assert first.tokens.tolist() == [1, 2, 7, 0, 1, 8]
    assert second.tokens.tolist() == [3, 4, 5, 6, 2, 3]
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 3]
    assert second.position_ids.tolist() == [2, 3, 4, 5, 1, 2]
    assert first.padding_mask.tolist() == [False, False, False, True, False, False]
    assert second.padding_mask.tolist() == [False] * 6
    assert (first.score_positions.tolist(), first.score_labels.tolist()) == ([0, 1], [2, 3])
    assert (second.score_positions.tolist(), second.score_labels.tolist()) == ([0, 1, 2, 3, 5], [4, 5, 6, 7, 8])
    assert first.score_is_response.tolist() == [False, False]
    assert second.score_is_response.tolist() == [True] * 5
    assert (first.score_lengths.tolist(), second.score_lengths.tolist()) == ([2, 0], [4, 1])
    for shard in (first, second):  # what is said of the whole row stays
        assert shard.cu_seqlens.tolist() == [0, 8, 12]
        assert (shard.num_scored_tokens.tolist(), shard.num_response_tokens.tolist()) == ([6, 1], [4, 1])
        assert shard.pair_ids.tolist() == [0]
        assert shard.score_lengths.dtype == torch.int64 and shard.score_positions.dtype == torch.int64
    assert context_shard(row, 1, 0) is row


def test_context_shard_of_a_row_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="A packed sequence of 7 tokens cannot be split over context parallel size 2"):
        context_shard(row_of([(3, 4, 1)], multiple=1), 2, 0)


def test_attention_spans_by_hand() -> None:
    """A pair of 3 + 4 and 3 + 1 tokens: two sequences; or one segment of 8, whose last token sees the first three."""
    assert attention_spans(row_of([(3, 4, 1)], 1)) == [(7, ((0, 7),)), (4, ((7, 11),))]
    shared = row_of([(3, 4, 1), (1, 1, 2)], 8, share=True)
    assert attention_spans(shared) == [
        (7, ((0, 7),)),
        (1, ((0, 3), (7, 8))),
        (2, ((8, 10),)),
        (6, ((8, 9), (10, 16))),
    ]
    # Chunks of 2: rank 0 holds 0 1 and 6 7, of which 6 is chosen and 7 rejected; of the second pair 8 9 and 14 15.
    assert attention_spans(shared, 2, 0) == [
        (2, ((0, 2),)),
        (1, ((0, 7),)),
        (1, ((0, 3), (7, 8))),
        (2, ((8, 10),)),
        (2, ((8, 9), (10, 16))),
    ]
    assert attention_spans(shared, 2, 1) == [
        (2, ((0, 4),)),
        (2, ((0, 6),)),
        (2, ((8, 9), (10, 12))),
        (2, ((8, 9), (10, 14))),
    ]


def allowed_by_spans(row: PackedRow, cp_size: int) -> torch.Tensor:
    """Returns which position of the row attends to which, bool [t, t], as the spans of all ranks say."""
    allowed = torch.zeros(len(row.tokens), len(row.tokens), dtype=torch.bool)
    for rank in range(cp_size):
        held = zigzag_positions(row.cu_seqlens.diff().tolist(), cp_size, rank).tolist()
        for num_queries, parts in attention_spans(row, cp_size, rank):
            queries, held = held[:num_queries], held[num_queries:]
            keys = [key for part in parts for key in range(*part)]
            for i, query in enumerate(queries):
                allowed[query, keys[: len(keys) - num_queries + i + 1]] = True
        assert not held
    return allowed


pair_sizes = st.lists(st.tuples(*[st.integers(1, 9)] * 3), max_size=5)


@given(pair_sizes, st.sampled_from([1, 2, 4]), st.integers(1, 2), st.booleans())
def test_every_scored_token_is_scored_by_one_rank(
    sizes: list[tuple[int, int, int]], cp_size: int, chunk: int, response_only: bool
) -> None:
    """Also the last token of each sequence, which the one before it predicts, wherever chunks are cut."""
    row = row_of(sizes, 2 * cp_size * chunk, response_only)
    starts = row.cu_seqlens[:-1].tolist()
    seen: list[tuple[int, int, int, bool]] = []
    for rank, shard in enumerate(shards_of(row, cp_size)):
        assert len(shard.tokens) == len(shard.position_ids) == len(shard.padding_mask) == len(row.tokens) // cp_size
        held = zigzag_positions(row.cu_seqlens.diff().tolist(), cp_size, rank)
        sequences = torch.repeat_interleave(torch.arange(len(starts)), shard.score_lengths)
        positions = held[shard.score_positions]
        labels, flags = shard.score_labels.tolist(), shard.score_is_response.tolist()
        seen += zip(sequences.tolist(), positions.tolist(), labels, flags, strict=True)
    expected = []
    for i, (prompt, *responses) in enumerate(sizes):
        for side, response in enumerate(responses):
            start, before = starts[2 * i + side], 0 if side == 0 else responses[0]
            ids = [*range(1, prompt + 1), *range(prompt + before + 1, prompt + before + response + 1)]
            first = 1 if side == 0 and not response_only else prompt
            expected += [(2 * i + side, start + at - 1, ids[at], at >= prompt) for at in range(first, len(ids))]
    assert sorted(seen) == expected
    total = torch.stack([shard.score_lengths for shard in shards_of(row, cp_size)]).sum(dim=0)
    assert torch.equal(total, row.num_scored_tokens)


@given(pair_sizes, st.sampled_from([1, 2, 4]), st.integers(1, 2), st.booleans())
def test_each_token_attends_to_its_own_sequence_up_to_itself(
    sizes: list[tuple[int, int, int]], cp_size: int, chunk: int, share: bool
) -> None:
    """As separate sequences say it, looked up by sequence and position; padding may attend to anything before."""
    row = row_of(sizes, 2 * cp_size * chunk, share=share)
    allowed = allowed_by_spans(row, cp_size)
    starts = row.cu_seqlens.tolist()
    for segment, (start, stop) in enumerate(itertools.pairwise(starts)):
        assert not allowed[start:stop, :start].any() and not allowed[start:stop, stop:].any()
        prompt, fork = int(row.prompt_ends[segment]), int(row.chosen_ends[segment])
        for i in range(stop - start):
            own = [*range(i + 1)] if i < fork else [*range(prompt), *range(fork, i + 1)]
            if not row.padding_mask[start + i]:
                assert allowed[start + i, start:stop].nonzero()[:, 0].tolist() == own


FIGURES = ("chosen_logps", "rejected_logps", "nll_sums")


def weighted(logps: PairLogps, weights: torch.Tensor) -> torch.Tensor:
    """A sum in which every figure of every pair has a weight of its own."""
    figures = torch.cat([getattr(logps, name) for name in FIGURES])
    return (figures * weights[: len(figures)]).sum()


@given(pair_sizes, st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_sums_and_gradients_of_the_shards_add_up_to_those_of_the_row(
    sizes: list[tuple[int, int, int]], cp_size: int, response_only: bool, share: bool, seed: int
) -> None:
    row = row_of(sizes, 2 * cp_size, response_only, share)
    row = replace(row, score_labels=torch.arange(len(row.score_labels)))  # says which value is whose
    generator = torch.Generator().manual_seed(seed)
    values = (-4 * torch.rand(len(row.score_labels), generator=generator)).requires_grad_()
    weights = torch.randn(3 * len(sizes), generator=generator, dtype=torch.float64)
    whole = pair_logps(values, row)
    shares = [pair_logps(values[shard.score_labels], shard) for shard in shards_of(row, cp_size)]
    for name in FIGURES:
        total = torch.stack([getattr(share, name) for share in shares]).sum(dim=0)
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-6, atol=1e-6)
    for share in shares:
        assert torch.equal(share.nll_lengths, whole.nll_lengths)
    (gradient,) = torch.autograd.grad(weighted(whole, weights), values)
    (shared,) = torch.autograd.grad(sum(weighted(share, weights) for share in shares), values)
    torch.testing.assert_close(shared, gradient, rtol=1e-6, atol=1e-6)


#: Pairs of two ranks' rows: a response of one token, which one rank alone scores, and a row without pairs.
ROWS_OF_TWO_RANKS: list[list[tuple[int, int, int]]] = [[(3, 4, 1), (1, 9, 2), (6, 1, 5)], [(2, 1, 1)], []]


def example(sizes: list[tuple[int, int, int]]) -> tuple[PackedRow, torch.Tensor, torch.Tensor]:
    """A row for two ranks whose labels number its scored tokens, a log-prob of each, and weights of the pairs."""
    row = row_of(sizes, multiple=4)
    n = len(row.score_labels)
    generator = torch.Generator().manual_seed(n)
    values = -4 * torch.rand(n, generator=generator)
    weights = torch.randn(3 * len(sizes), generator=generator, dtype=torch.float64)
    return replace(row, score_labels=torch.arange(n)), values, weights


def rank_main(rank: int, folder: str) -> None:
    """Runs all rows on one of two context-parallel ranks; leaves pairs and gradients in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for sizes in ROWS_OF_TWO_RANKS:
        row, values, weights = example(sizes)
        shard = context_shard(row, 2, rank)
        mine = values[shard.score_labels].requires_grad_()
        logps = pair_logps(mine, shard, dist.group.WORLD)
        (gradient,) = torch.autograd.grad(weighted(logps, weights), mine)
        results.append(([getattr(logps, name).detach() for name in (*FIGURES, "nll_lengths")], gradient))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """Both ranks know the pairs of the whole row, and each token's gradient arrives once, not once a rank."""
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for case, sizes in enumerate(ROWS_OF_TWO_RANKS):
        row, values, weights = example(sizes)
        values.requires_grad_()
        whole = pair_logps(values, row)
        (expected,) = torch.autograd.grad(weighted(whole, weights), values)
        assert expected.abs().min() > 0 if sizes else len(expected) == 0
        for rank, shard in enumerate(shards_of(row, 2)):
            pairs, gradient = ranks[rank][case]
            for ours, other, name in zip(pairs, ranks[0][case][0], (*FIGURES, "nll_lengths"), strict=True):
                assert torch.equal(ours, other)
                torch.testing.assert_close(ours, getattr(whole, name).detach(), rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient, expected[shard.score_labels], rtol=1e-6, atol=0)
