"""Sums over packed sequences, by hand and against slices."""

import pytest
import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.segments import pair_logps, sum_per_sequence


def packed_row(is_response: list[list[bool]], num_pairs: int) -> PackedRow:
    """A row in which only what the sums look at has meaning: scored tokens per sequence and their kind."""
    flat = [flag for sequence in is_response for flag in sequence]
    zeros = torch.zeros(len(flat), dtype=torch.int64)
    return PackedRow(
        tokens=zeros,
        position_ids=zeros,
        padding_mask=zeros.bool(),
        cu_seqlens=torch.zeros(len(is_response) + 1, dtype=torch.int32),
        score_positions=zeros,
        score_labels=zeros,
        score_is_response=torch.tensor(flat, dtype=torch.bool),
        score_lengths=torch.tensor([len(sequence) for sequence in is_response]),
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
