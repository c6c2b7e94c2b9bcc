"""Vocabulary-parallel log-probs against torch's log_softmax in fp64, alone and over two gloo ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orpo_megatron.logps import vocab_parallel_logps


def unsharded_logps(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int | None = None) -> torch.Tensor:
    """The readable twin: all of the vocabulary, fp64."""
    return logits.double()[:, :vocab_size].log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


def example(n: int, width: int, labels_below: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Logits of uneven size (rows scaled from 0.1 to 30, one shifted by 1,000), labels, upstream gradients."""
    generator = torch.Generator().manual_seed(n + width)
    logits = torch.randn(n, width, generator=generator) * torch.logspace(-1, 1.5, n)[:, None]
    logits[n // 2] += 1000
    labels = torch.randint(labels_below, (n,), generator=generator)
    return [logits.to(dtype), labels, torch.randn(n, generator=generator)]


@pytest.mark.parametrize("vocab_size", [None, 23])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_unsharded(dtype: torch.dtype, tolerance: float, vocab_size: int | None) -> None:
    """Values are fp32 for any dtype; the gradient comes in the logits' dtype; the logits stay as they were."""
    logits, labels, upstream = example(n=17, width=29, labels_below=23, dtype=dtype)
    before = logits.clone()
    logits.requires_grad_()
    logps = vocab_parallel_logps(logits, labels, vocab_size=vocab_size)
    expected = unsharded_logps(logits, labels, vocab_size)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(logps, logits, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream.double())
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-6)
    assert torch.equal(logits, before)


def test_padding_ids_get_no_gradient_and_no_probability() -> None:
    """Three equal ids and a huge padding id: log(1/3), and exactly 0 for the padding."""
    logits = torch.tensor([[2.0, 2.0, 2.0, 1e4]], requires_grad=True)
    logps = vocab_parallel_logps(logits, torch.tensor([1]), vocab_size=3)
    assert logps.item() == pytest.approx(-1.0986123)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3, 0.0])


def test_keeps_digits_of_near_certain_tokens() -> None:
    """Logits 500 and 487: log p is -2.26e-6, which a sum of maximum and log-sum would round to a multiple of 3e-5."""
    logits = torch.tensor([[500.0, 487.0]], requires_grad=True)
    logps = vocab_parallel_logps(logits, torch.tensor([0]))
    assert logps.item() == pytest.approx(-2.2603e-6, abs=6e-8)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([2.2603e-6, -2.2603e-6], abs=1.2e-7)


def test_no_tokens() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    logps = vocab_parallel_logps(logits, torch.zeros(0, dtype=torch.int64))
    logps.sum().backward()
    assert logps.shape == (0,)
    assert logits.grad is not None and logits.grad.shape == (0, 5)


def test_saves_no_second_copy_of_the_logits() -> None:
    """What autograd keeps for backward, beside the logits themselves, is one number or flag a token."""
    logits, labels, _ = example(n=8, width=64, labels_below=64)
    logits.requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vocab_parallel_logps(logits, labels)
    assert [tensor.shape for tensor in kept if tensor.data_ptr() != logits.data_ptr()] == [(8,)] * (len(kept) - 1)


VOCAB_SIZES = [None, 26, 16, 13]  # of 32 ids over two ranks: all; rank 1 half padding; rank 1 all; rank 0 as well


def rank_main(rank: int, folder: str) -> None:
    """Runs all cases on one of two ranks, counts collectives, and leaves values and gradients in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    calls: list[str] = []
    gather = dist.all_gather

    def counting_gather(outputs: list[torch.Tensor], value: torch.Tensor, group: dist.ProcessGroup) -> None:
        calls.append(f"{list(value.shape)} {value.dtype}")
        gather(outputs, value, group=group)

    dist.all_gather = counting_gather  # type: ignore[assignment]
    results = []
    for vocab_size in VOCAB_SIZES:
        logits, labels, upstream = example(n=19, width=32, labels_below=vocab_size or 32)
        shard = logits.chunk(2, dim=1)[rank].contiguous().requires_grad_()
        logps = vocab_parallel_logps(shard, labels, dist.group.WORLD, vocab_size)
        (gradient,) = torch.autograd.grad(logps, shard, upstream)
        results.append((logps.detach(), gradient))
    torch.save({"results": results, "calls": calls}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """Values on both ranks, and the two shards of the gradient, equal the unsharded ones; one all-gather a call."""
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0]["calls"] == ranks[1]["calls"] == ["[3, 19] torch.float32"] * len(VOCAB_SIZES)
    for case, vocab_size in enumerate(VOCAB_SIZES):
        logits, labels, upstream = example(n=19, width=32, labels_below=vocab_size or 32)
        logits.requires_grad_()
        expected = unsharded_logps(logits, labels, vocab_size)
        (expected_gradient,) = torch.autograd.grad(expected, logits, upstream.double())
        (logps, left), (other_logps, right) = (rank["results"][case] for rank in ranks)
        assert torch.equal(logps, other_logps)
        torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat([left, right], dim=1), expected_gradient, rtol=1e-5, atol=1e-6)
