"""The head in Megatron-Core 0.15, which has no output processor, against the logits of the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from forks import run_forked

from orpo_megatron.batch import PackedRow
from orpo_megatron.config import OrpoConfig
from orpo_megatron.data.dataset import pack_row
from orpo_megatron.data.tokens import TokenizedPair

VOCAB = 64


def alone(function: Callable[[], None]) -> None:
    """Runs a function in a fork of its own: a process group in this process would not survive the forks of others."""

    def run() -> None:
        from orpo_megatron import cpu

        cpu.activate()
        import torch.distributed as dist
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        dist.init_process_group("gloo")
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        function()

    run_forked(1, run)


def make_model(tied: bool) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from orpo_megatron.core.attention import packed_local_layer_spec

    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        packed_local_layer_spec(config),
        VOCAB,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )


def row_of(lengths: list[tuple[int, int, int]], share_prefix: bool = False) -> PackedRow:
    generator = np.random.default_rng(0)
    pairs = [TokenizedPair(*(generator.integers(0, VOCAB, n).astype(np.int32) for n in sizes)) for sizes in lengths]
    return pack_row(
        pairs,
        np.arange(len(pairs)),
        nll_scope="prompt_and_response",
        sequence_multiple_of=1,
        pad_token_id=0,
        num_nll_tokens=9,
        num_pairs=2,
        share_prefix=share_prefix,
    )


def test_this_megatron_core_has_no_output_processor() -> None:
    from orpo_megatron.core import head

    assert not head._HAS_OUTPUT_PROCESSOR


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lengths", [[(3, 4, 5), (2, 1, 2)], []], ids=["two pairs", "no pair"])
def test_log_probs_and_gradients_are_those_of_the_logits(tied: bool, lengths: list[tuple[int, int, int]]) -> None:
    alone(lambda: compare_with_logits(tied, lengths))


def compare_with_logits(tied: bool, lengths: list[tuple[int, int, int]]) -> None:
    from orpo_megatron.core.row import row_params
    from orpo_megatron.core.step import make_forward, take_microbatch

    model, row = make_model(tied), row_of(lengths)
    ours = make_forward(OrpoConfig())(take_microbatch(row), model)
    logits = model(
        row.tokens[None], row.position_ids[None], None, packed_seq_params=row_params(row, "cpu")
    )[0]  # the output layer is its own again  # fmt: skip
    theirs = logits.log_softmax(-1)[row.score_positions, row.score_labels]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(-1, 1, len(theirs))
    gradients = [
        torch.autograd.grad((scores * upstream).sum(), list(model.parameters()), allow_unused=True)
        for scores in (ours, theirs)
    ]
    for ours_of, theirs_of in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_of, theirs_of, rtol=1e-5, atol=1e-5)


def test_an_error_in_the_call_leaves_the_output_layer_as_it_was() -> None:
    alone(fail_in_the_call)


def fail_in_the_call() -> None:
    from orpo_megatron.core.head import call_with_head
    from orpo_megatron.core.row import row_params

    model, row = make_model(True), row_of([(3, 4, 5)])

    def broken(**arguments: Any) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call_with_head(
            model,
            broken,
            row,
            input_ids=row.tokens[None],
            position_ids=row.position_ids[None],
            attention_mask=None,
            packed_seq_params=row_params(row, "cpu"),
        )
    assert "forward" not in vars(model.output_layer)


def test_a_shared_prompt_has_the_log_probs_of_two() -> None:
    alone(compare_with_two_prompts)


def compare_with_two_prompts() -> None:
    from orpo_megatron.core.step import make_forward, take_microbatch

    model, lengths = make_model(True), [(3, 4, 5), (2, 1, 2)]
    apart, shared = (
        make_forward(OrpoConfig())(take_microbatch(row_of(lengths, share)), model) for share in (False, True)
    )
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)
