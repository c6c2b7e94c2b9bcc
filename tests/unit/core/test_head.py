"""The head on one process against the log-softmax of all logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_megatron.batch import PackedRow

TOKENS, HIDDEN, VOCAB = 11, 8, 30


def scored_row(positions: list[int], labels: list[int]) -> PackedRow:
    """A row of which only the scored tokens have meaning."""
    nothing = torch.zeros(TOKENS, dtype=torch.int64)
    return PackedRow(
        tokens=nothing,
        position_ids=nothing,
        padding_mask=nothing.bool(),
        cu_seqlens=torch.tensor([0, TOKENS], dtype=torch.int32),
        prompt_ends=torch.tensor([TOKENS]),
        chosen_ends=torch.tensor([TOKENS]),
        score_positions=torch.tensor(positions, dtype=torch.int64),
        score_labels=torch.tensor(labels, dtype=torch.int64),
        score_is_response=torch.ones(len(positions), dtype=torch.bool),
        score_lengths=torch.tensor([len(positions)]),
        num_scored_tokens=torch.tensor([len(positions)]),
        num_response_tokens=torch.tensor([len(positions)]),
        pair_ids=torch.arange(1),
        num_nll_tokens=len(positions),
        num_pairs=1,
    )


def make_head(tied: bool, bias: bool) -> dict[str, Any]:
    """Returns what GPTModel hands the head, with weights of a fixed seed."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, requires_grad=True)
    layer = SimpleNamespace(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        weight=None if tied else weight,
        bias=torch.randn(VOCAB, generator=generator, requires_grad=True) if bias else None,
        _forward_pre_hooks={},  # no weights to wait for
    )
    return {
        "hidden_states": hidden,
        "output_layer": layer,
        "output_weight": weight if tied else None,
        "scale_logits": lambda logits: logits * 0.5,
        "config": SimpleNamespace(sequence_parallel=False),
        "labels": None,  # Megatron-Core passes more than the head uses
    }


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, False), (False, True)])
def test_scores_and_gradients_are_those_of_a_log_softmax(one_rank: None, tied: bool, bias: bool) -> None:
    from orpo_megatron.core.head import score_tokens

    positions, labels = [0, 3, 3, 9, 4], [29, 0, 7, 7, 12]
    head = make_head(tied, bias)
    hidden, layer = head["hidden_states"], head["output_layer"]
    weight = head["output_weight"] if tied else layer.weight
    parameters = [hidden, weight, *([layer.bias] if bias else [])]
    ours = score_tokens(**head, context=scored_row(positions, labels))
    logits = 0.5 * torch.nn.functional.linear(
        hidden[:, 0].double(), weight.double(), layer.bias.double() if bias else None
    )
    theirs = logits.log_softmax(dim=-1)[positions, labels]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.25])
    gradients = torch.autograd.grad(ours, parameters, upstream)
    for mine, reference in zip(gradients, torch.autograd.grad(theirs, parameters, upstream.double()), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6 * float(reference.abs().max()))


class Products(TorchDispatchMode):
    """Notes the shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.mm:
            self.shapes.append(tuple(result.shape))
        return result


def test_only_scored_positions_meet_the_vocabulary(one_rank: None) -> None:
    from orpo_megatron.core.head import score_tokens

    head = make_head(tied=True, bias=False)
    with Products() as products:
        score_tokens(**head, context=scored_row([2, 5], [1, 1]))
    assert products.shapes == [(2, VOCAB)]


@pytest.mark.parametrize(("mode", "budget", "cached"), [("auto", 480, True), ("auto", 479, False), ("cache", 0, True)])
def test_the_mode_and_its_budget_reach_the_head(one_rank: None, mode: Any, budget: int, cached: bool) -> None:
    """4 tokens of 30 logits of 4 bytes."""
    from orpo_megatron.core.head import score_tokens

    head = make_head(tied=True, bias=False)
    scores = score_tokens(**head, context=scored_row([1, 2, 3, 4], [5, 6, 7, 8]), mode=mode, cache_bytes=budget)
    assert (scores.grad_fn.kept is not None) == cached  # type: ignore[union-attr]


def test_padding_of_the_vocabulary_stays_out(one_rank: None) -> None:
    """Of 30 rows of the weight, 27 are ids: the other three move nothing and are not moved."""
    from orpo_megatron.core.head import score_tokens

    head = make_head(tied=True, bias=False)
    hidden, weight = head["hidden_states"], head["output_weight"]
    head["config"].vocab_size = 27
    positions, labels = [0, 3, 9], [26, 0, 7]
    ours = score_tokens(**head, context=scored_row(positions, labels))
    theirs = (0.5 * hidden[:, 0].double() @ weight[:27].double().t()).log_softmax(dim=-1)[positions, labels]
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.sum(), weight)
    assert not gradient[27:].any() and gradient[:27].any(dim=1).all()


def test_a_row_without_scored_tokens_still_reaches_every_parameter(one_rank: None) -> None:
    from orpo_megatron.core.head import score_tokens

    head = make_head(tied=True, bias=False)
    scores = score_tokens(**head, context=scored_row([], []))
    gradients = torch.autograd.grad(scores.sum(), [head["hidden_states"], head["output_weight"]])
    assert scores.shape == (0,) and all(float(gradient.abs().max()) == 0.0 for gradient in gradients)
