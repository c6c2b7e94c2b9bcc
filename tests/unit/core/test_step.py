"""A row's share of the loss: scaled for the schedules, and adding up over rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.config import OrpoConfig
from orpo_megatron.data.dataset import PackedRows
from orpo_megatron.data.plan import PairLengths, make_plan
from orpo_megatron.data.tokens import TokenizedPair
from orpo_megatron.loss import orpo_loss
from orpo_megatron.metrics import METRICS
from orpo_megatron.segments import pair_logps

PAIRS = [(3, 4, 2), (1, 1, 5), (6, 2, 2), (2, 3, 1), (4, 5, 6)]  # tokens of prompt, chosen, rejected
WEIGHTS = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
LENGTHS = PairLengths(*(np.array(part, dtype=np.int64) for part in zip(*PAIRS, strict=True)))


class Store:
    """The pairs as a data set holds them; token ids say which token of which pair they are."""

    lengths = LENGTHS

    def __len__(self) -> int:
        return len(PAIRS)

    def __getitem__(self, index: int) -> TokenizedPair:
        parts = (100 * index + 10 * part + np.arange(size) for part, size in enumerate(PAIRS[index]))
        return TokenizedPair(*(part.astype(np.int32) for part in parts))


def rows_of(num_rows: int, sequence_multiple_of: int = 1) -> list[PackedRow]:
    """Returns the one step of all pairs, spread over so many rows."""
    plan = make_plan(
        LENGTHS,
        nll_scope="prompt_and_response",
        pairs_per_step=len(PAIRS),
        num_steps=1,
        seed=1,
        shuffle=False,
        max_tokens_per_row=100,
        rows_per_step=num_rows,
        sequence_multiple_of=sequence_multiple_of,
    )
    rows = PackedRows(Store(), plan, 0)
    return [rows[index] for index in range(len(rows))]


def logps_of(row: PackedRow, weights: torch.Tensor) -> torch.Tensor:
    """Returns log-probs that depend on the token and its place alone, to the last bit, through fp64 ``weights``."""
    place = row.position_ids[row.score_positions]
    features = torch.stack([row.score_labels / 500, place / 10, torch.ones(len(place))], dim=1)
    return -torch.nn.functional.softplus(features.double() @ weights).float()


def step_of(num_rows: int, objective: OrpoConfig) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns loss, gradient and metrics of a step as the schedules make them: shares divided by microbatches."""
    from orpo_megatron.core.step import row_loss

    weights = WEIGHTS.clone().requires_grad_()
    total, metrics = torch.zeros(()), {name: torch.zeros(2, dtype=torch.float64) for name in METRICS}
    for row in rows_of(num_rows):
        share, row_metrics = row_loss(row, objective, num_rows, logps_of(row, weights))
        total = total + share / num_rows
        metrics = {name: metrics[name] + row_metrics[name] for name in METRICS}
    (gradient,) = torch.autograd.grad(total, weights)
    return float(total.detach()), gradient, metrics


@pytest.mark.parametrize("reduction", ["tokens", "pairs"])
@pytest.mark.parametrize("num_rows", [2, 3, 7])  # of 7 rows two are empty
def test_a_step_is_the_same_in_any_number_of_rows(one_rank: None, reduction: Any, num_rows: int) -> None:
    objective = OrpoConfig(beta=0.3, nll_reduction=reduction)
    loss, gradient, metrics = step_of(1, objective)
    again, gradient_again, metrics_again = step_of(num_rows, objective)
    assert again == pytest.approx(loss, rel=2e-7)
    torch.testing.assert_close(gradient_again, gradient, rtol=1e-6, atol=0)
    for name in METRICS:
        tolerance = 2e-7 if name == "loss" else 1e-12  # the loss is fp32, the others sum in fp64
        torch.testing.assert_close(metrics_again[name], metrics[name], rtol=tolerance, atol=0)
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(loss, rel=1e-6)
    assert metrics["rewards/accuracies"][1] == 5


@pytest.mark.parametrize(("num_microbatches", "replicas"), [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_the_share_is_scaled_by_microbatches_and_replicas(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, num_microbatches: int, replicas: int
) -> None:
    from megatron.core import parallel_state

    from orpo_megatron.core.step import row_loss

    objective, row = OrpoConfig(beta=0.2), rows_of(2)[0]
    logps = logps_of(row, WEIGHTS)
    plain = orpo_loss(
        pair_logps(logps, row),
        beta=0.2,
        nll_reduction="tokens",
        num_nll_tokens=sum(prompt - 1 + chosen for prompt, chosen, _ in PAIRS),
        num_pairs=5,
    ).loss
    assert parallel_state.get_data_parallel_world_size() == 1
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: replicas)
    share, _ = row_loss(row, objective, num_microbatches, logps)
    assert float(share) == pytest.approx(float(plain) * num_microbatches * replicas, rel=1e-6)


class Model(torch.nn.Module):
    """Scores the row that it is handed, and keeps what it was called with."""

    def __init__(self, **config: Any) -> None:
        from megatron.core.transformer.transformer_config import TransformerConfig

        super().__init__()
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **config)
        self.pre_process = True
        self.weights = torch.nn.Parameter(WEIGHTS.clone())
        self.calls: list[dict[str, Any]] = []

    def forward(self, **arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return logps_of(arguments["output_processor_context"], self.weights)


@pytest.mark.parametrize("num_experts", [None, 2])
def test_the_forward_step_hands_the_model_a_packed_row_and_scores_it(one_rank: None, num_experts: int | None) -> None:
    from orpo_megatron.core.head import score_tokens
    from orpo_megatron.core.step import make_forward_step, row_loss

    first, second = rows_of(2, sequence_multiple_of=4)
    model = Model(num_moe_experts=num_experts)
    objective = OrpoConfig(beta=0.2, head="recompute", head_cache_gib=0.5)
    rows = iter([first, second])
    forward_step = make_forward_step(objective, lambda: 6)
    for row in (first, second):
        output, loss_function = forward_step(rows, model)
        share, _ = loss_function(output)
        assert float(share.detach()) == float(row_loss(row, objective, 6, logps_of(row, WEIGHTS))[0])
        call = SimpleNamespace(**model.calls[-1])
        assert torch.equal(call.input_ids, row.tokens[None]) and torch.equal(call.position_ids, row.position_ids[None])
        score = call.output_processor
        assert score.func is score_tokens and score.keywords == {"mode": "recompute", "cache_bytes": 2**29}
        assert call.attention_mask is None
        if num_experts:
            assert torch.equal(call.padding_mask, row.padding_mask[None]) and row.padding_mask.any()
        else:
            assert not hasattr(call, "padding_mask")  # an older Megatron-Core has none
        params = call.packed_seq_params
        assert params.qkv_format == "thd" and params.max_seqlen_q == params.max_seqlen_kv == row.max_seqlen
        assert torch.equal(params.cu_seqlens_q, row.cu_seqlens) and torch.equal(params.cu_seqlens_kv, row.cu_seqlens)
