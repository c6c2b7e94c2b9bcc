"""The fused head against a plain matrix product behind `vocab_parallel_logps`, and both against fp64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orpo_megatron import elementwise
from orpo_megatron import logps as module
from orpo_megatron.logps import fused_logps, vocab_parallel_logps

TOKENS, HIDDEN, VOCAB, SCORED, NUM_IDS = 24, 12, 98, 31, 90
MODES = ("cache", "recompute")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes 31 rows five chunks of four blocks: seams everywhere."""
    for name in ("_CHUNK_BYTES", "_SMALL_CHUNK_BYTES"):
        monkeypatch.setattr(module, name, 4 * VOCAB * 7)
    monkeypatch.setattr(elementwise, "_BLOCK_BYTES", 4 * VOCAB * 2)


class Example:
    """Hidden states, weight and bias; positions, some of them twice; labels; an upstream gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = {"hidden": (TOKENS, HIDDEN), "weight": (VOCAB, HIDDEN), "bias": (VOCAB,)}
        self.leaves = {
            name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in shapes.items()
        }
        self.positions = torch.randint(TOKENS, (SCORED,), generator=generator)
        self.labels = torch.randint(NUM_IDS, (SCORED,), generator=generator)
        self.upstream = torch.randn(SCORED, generator=generator)

    def exact(self, scale: float = 1.0, vocab_size: int | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Values and gradients in fp64, all logits at once."""
        hidden, weight, bias = (leaf.detach().double().requires_grad_() for leaf in self.leaves.values())
        logits = scale * (hidden[self.positions] @ weight.t() + bias)
        values = logits[:, :vocab_size].log_softmax(dim=1).gather(1, self.labels[:, None])[:, 0]
        return values.detach(), list(torch.autograd.grad(values, [hidden, weight, bias], self.upstream.double()))

    def fused(self, **settings: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden, weight, bias = self.leaves.values()
        values = fused_logps(hidden, weight, self.labels, positions=self.positions, bias=bias, **settings)
        return values, list(torch.autograd.grad(values, list(self.leaves.values()), self.upstream))

    def twin(self, scale: float = 1.0, vocab_size: int | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden, weight, bias = self.leaves.values()
        logits = scale * torch.nn.functional.linear(hidden[self.positions], weight, bias)
        values = vocab_parallel_logps(logits, self.labels, vocab_size=vocab_size)
        return values, list(torch.autograd.grad(values, list(self.leaves.values()), self.upstream))


def worst(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Returns the largest error, relative to the largest element of each tensor."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("vocab_size", [None, NUM_IDS])
def test_fp32(mode: Any, scale: float, vocab_size: int | None) -> None:
    example = Example()
    values, gradients = example.fused(mode=mode, logit_scale=scale, vocab_size=vocab_size)
    exact, exact_gradients = example.exact(scale, vocab_size)
    assert values.dtype == torch.float32
    assert worst([values, *gradients], [exact, *exact_gradients]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_bf16_is_no_further_from_the_truth_than_the_twin(mode: Any) -> None:
    example = Example(torch.bfloat16)
    exact, exact_gradients = example.exact()
    fused, twin = ([values, *gradients] for values, gradients in (example.fused(mode=mode), example.twin()))
    for ours, theirs, right in zip(fused, twin, [exact, *exact_gradients], strict=True):
        assert ours.dtype == theirs.dtype
        ours_off, theirs_off = ((x.double() - right).square().mean().sqrt().item() for x in (ours, theirs))
        assert ours_off <= 1.1 * theirs_off


def test_all_positions_in_order() -> None:
    hidden, weight, _ = Example().leaves.values()
    labels = torch.arange(TOKENS)
    assert torch.equal(
        fused_logps(hidden, weight, labels), fused_logps(hidden, weight, labels, positions=torch.arange(TOKENS))
    )


def test_auto_caches_within_the_budget() -> None:
    """What is kept shows in the memory that backward holds on to."""
    example = Example()
    hidden, weight, _ = example.leaves.values()
    needed = SCORED * VOCAB * 4
    for budget, cached in ((needed, True), (needed - 1, False)):
        values = fused_logps(hidden, weight, example.labels, positions=example.positions, cache_bytes=budget)
        assert (values.grad_fn.kept is not None) == cached  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", MODES)
def test_a_second_backward_gives_the_same(mode: Any) -> None:
    example = Example()
    hidden, weight, _ = example.leaves.values()
    values = fused_logps(hidden, weight, example.labels, positions=example.positions, mode=mode)
    first = torch.autograd.grad(values, [hidden, weight], example.upstream, retain_graph=True)
    second = torch.autograd.grad(values, [hidden, weight], example.upstream)
    assert worst(list(second), [gradient.double() for gradient in first]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weight(mode: Any) -> None:
    example = Example()
    hidden, weight, bias = example.leaves.values()
    values = fused_logps(
        hidden, weight.detach(), example.labels, positions=example.positions, bias=bias.detach(), mode=mode
    )
    (gradient,) = torch.autograd.grad(values, hidden, example.upstream)
    assert worst([gradient], [example.exact()[1][0]]) < 1e-6


def test_nothing_is_kept_without_gradients() -> None:
    example = Example()
    hidden, weight, bias = example.leaves.values()
    with torch.no_grad():
        values = fused_logps(hidden, weight, example.labels, positions=example.positions, bias=bias, mode="cache")
    assert not values.requires_grad
    assert worst([values], [example.exact()[0]]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_goes_into_main_grad(dtype: torch.dtype, mode: Any) -> None:
    """As Megatron's DistributedDataParallel keeps it: fp32, added to what is there, with a stand-in for autograd."""
    example = Example(dtype)
    hidden, weight, _ = example.leaves.values()
    weight.main_grad = torch.ones(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    values = fused_logps(hidden, weight, example.labels, positions=example.positions, mode=mode)
    for added, tied in ((1, False), (2, True)):
        weight.zero_out_wgrad = tied  # type: ignore[attr-defined]
        (returned,) = torch.autograd.grad(values, weight, example.upstream, retain_graph=True, allow_unused=True)
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert returned is None if tied else returned.shape == weight.shape
        double = weight.detach().double().requires_grad_()
        exact = (hidden.detach().double()[example.positions] @ double.t()).log_softmax(1)
        exact = exact.gather(1, example.labels[:, None])[:, 0]
        (right,) = torch.autograd.grad(exact, double, example.upstream.double())
        bound = 1e-6 if dtype == torch.float32 else 0.02
        assert worst([(weight.main_grad - 1) / added], [right]) < bound  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(mode: Any) -> None:
    hidden, weight, _ = Example().leaves.values()
    none = torch.zeros(0, dtype=torch.int64)
    values = fused_logps(hidden, weight, none, positions=none, mode=mode)
    gradients = torch.autograd.grad(values.sum(), [hidden, weight])
    assert values.shape == (0,)
    assert [gradient.abs().sum().item() for gradient in gradients] == [0, 0]


def test_bad_input() -> None:
    hidden, weight, _ = Example().leaves.values()
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mode \('fast'\) must be one of auto, cache, recompute\."):
        fused_logps(hidden, weight, labels, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"hidden \(torch\.float32\) and weight \(torch\.bfloat16\) must have one dtype"
    ):
        fused_logps(hidden, weight.bfloat16(), torch.arange(TOKENS))
    with pytest.raises(ValueError, match=r"There are 24 positions to score but 3 labels"):
        fused_logps(hidden, weight, labels)
    for label in (-100, len(weight)):
        labels = torch.full((TOKENS,), label)
        with pytest.raises(
            ValueError,
            match=rf"labels hold {label}, which must be at least 0 and below the vocabulary's {len(weight)}\.",
        ):
            fused_logps(hidden, weight, labels)
    with pytest.raises(ValueError, match=r"labels hold 5, which must be at least 0 and below the vocabulary's 5\."):
        fused_logps(hidden, weight, torch.full((TOKENS,), 5), vocab_size=5)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "head.md"


def run_page() -> dict[str, Any]:
    """Runs the code of the page on the head, one block after another; returns what it defines."""
    defined: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, defined)
    return defined


def test_the_page_on_the_head() -> None:
    """Against the model itself, DPO's loss is log 2; gradients of both examples as by a log-softmax of all logits."""
    page = run_page()
    assert page["loss"].item() == pytest.approx(0.6931472)
    hidden, weight = (page[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    labels, positions = page["tokens"][page["positions"] + 1], page["positions"]
    logps = (hidden @ weight.t()).log_softmax(dim=1)[positions, labels]
    sums = torch.stack([logps[:3].sum(), logps[3:].sum()])
    dpo = page["dpo_loss"](sums, sums.detach())
    grpo = page["grpo_loss"](logps, logps.detach(), page["advantages"])
    gradients = torch.autograd.grad(dpo + grpo, [hidden, weight])
    assert worst([page["hidden"].grad, page["weight"].grad], list(gradients)) < 1e-6


def page_rank(rank: int, folder: str) -> None:
    """Runs the page's step under tensor parallel on one of two ranks, 11 ids padded to 12."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    page = run_page()
    hidden = page["hidden"].detach().requires_grad_()
    shard = torch.cat([page["weight"].detach(), torch.zeros(1, 16)]).chunk(2)[rank].clone().requires_grad_()
    given = {name: page[name] for name in ("tokens", "positions", "sequence")}
    reference = torch.tensor([-5.0, -7.0])
    loss = page["dpo_step"](hidden, shard, **given, reference=reference, vocab_size=11, tp_group=dist.group.WORLD)
    torch.save((loss, hidden.grad, shard.grad), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_the_page_on_the_head_under_tensor_parallel(tmp_path: Path) -> None:
    mp.spawn(page_rank, args=(str(tmp_path),), nprocs=2)
    (loss, hidden, left), (other_loss, _, right) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    page = run_page()
    leaves = [page[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
    labels, positions = page["tokens"][page["positions"] + 1], page["positions"]
    logps = (leaves[0] @ leaves[1].t()).log_softmax(dim=1)[positions, labels]
    sums = torch.stack([logps[:3].sum(), logps[3:].sum()])
    exact = page["dpo_loss"](sums, torch.tensor([-5.0, -7.0]).double())
    gradients = torch.autograd.grad(exact, leaves)
    assert loss == other_loss and loss.item() == pytest.approx(exact.item(), rel=1e-6)
    weight = torch.cat([left, right])
    assert worst([hidden, weight[:11]], list(gradients)) < 1e-6 and not weight[11:].any()


CASES = [(mode, split, ids) for mode in MODES for split in (False, True) for ids in (None, NUM_IDS, 49, 40)]


def rank_main(rank: int, folder: str) -> None:
    """Runs all cases on one of two ranks, counts collectives, and leaves values and gradients in ``folder``."""
    torch.set_num_threads(1)
    module._CHUNK_BYTES = module._SMALL_CHUNK_BYTES = 4 * VOCAB // 2 * 7
    elementwise._BLOCK_BYTES = 4 * VOCAB // 2 * 2
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    calls: list[str] = []
    for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"):
        plain = getattr(dist, name)

        def counted(*args: Any, plain: Any = plain, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return plain(*args, **kwargs)

        setattr(dist, name, counted)
    example, results = Example(), []
    for mode, split, ids in CASES:
        calls.clear()
        hidden, weight, bias = (leaf.detach() for leaf in example.leaves.values())
        mine = hidden.chunk(2)[rank] if split else hidden
        leaves = [x.clone().requires_grad_() for x in (mine, weight.chunk(2)[rank], bias.chunk(2)[rank])]
        values = fused_logps(
            leaves[0],
            leaves[1],
            example.labels.clamp(max=(ids or VOCAB) - 1),
            positions=example.positions,
            bias=leaves[2],
            vocab_size=ids,
            tp_group=dist.group.WORLD,
            sequence_parallel=split,
            mode=mode,
        )
        gradients = torch.autograd.grad(values, leaves, example.upstream)
        results.append((values.detach(), gradients, list(calls)))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """Replicated values, and gradients of each shard, as in one process; so few collectives."""
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    left, right = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for (_, split, ids), one, other in zip(CASES, left, right, strict=True):
        example = Example()
        example.labels = example.labels.clamp(max=(ids or VOCAB) - 1)
        exact, exact_gradients = example.exact(vocab_size=ids)
        assert torch.equal(one[0], other[0])
        hidden = torch.cat([one[1][0], other[1][0]]) if split else one[1][0]
        whole = [torch.cat([a, b]) for a, b in zip(one[1][1:], other[1][1:], strict=True)]
        assert worst([one[0], hidden, *whole], [exact, *exact_gradients]) < 1e-6
        assert split or torch.equal(one[1][0], other[1][0])
        backward = ["all_gather_into_tensor", "reduce_scatter_tensor"] if split else ["all_reduce"]
        assert one[2] == other[2] == [*(["all_gather_into_tensor"] if split else []), "all_gather", *backward]
