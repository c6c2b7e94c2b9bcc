"""Losses and gradients that are not finite: seen before the optimizer takes them, named, and kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.bridge.kept import load_rows, plain, save_step
from orpo_megatron.config import ConfigError, OrpoConfig, RunConfig
from orpo_megatron.data.dataset import pack_row
from orpo_megatron.data.tokens import TokenizedPair

VOCABULARY, BAD_TOKEN = 32, 31


def make_row(*pairs: int, first: int = 1, num_pairs: int = 3) -> PackedRow:
    """Returns a row of short pairs, whose prompt starts with the token ``first``."""
    texts = [TokenizedPair(*(np.array(part) for part in ([first, 2 + p, 3], [4, 5 + p], [6 + p]))) for p in pairs]
    return pack_row(
        texts,
        np.array(pairs, dtype=np.int64),
        nll_scope="response",
        sequence_multiple_of=1,
        pad_token_id=0,
        num_nll_tokens=2 * num_pairs,
        num_pairs=num_pairs,
    )


@pytest.fixture
def model(bridge_on_cpu: None, one_rank: None) -> Any:
    """Returns a GPT model of two layers, wrapped for data parallel, whose norms divide by 1e-19 at least."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from orpo_megatron.core.attention import packed_local_layer_spec

    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        normalization="RMSNorm",
        layernorm_epsilon=2e-38,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    gpt = GPTModel(
        config,
        packed_local_layer_spec(config),
        VOCABULARY,
        64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), gpt)
    wrapped.zero_grad_buffer()
    wrapped.train()
    return wrapped


def make_optimizer(model: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    return get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=False), [model])


def make_guard(tmp_path: Path, model: Any, policy: Any = "stop", optimizer: Any = None) -> Any:
    """Returns a guard that stands before ``optimizer``, at the start of step 7."""
    from orpo_megatron.bridge.guard import StepGuard

    run = RunConfig(str(tmp_path), on_nonfinite=policy)
    guard = StepGuard(run, OrpoConfig(), lambda pair: ("a.jsonl", pair + 1), keep_weights=False)
    state = SimpleNamespace(train_state=SimpleNamespace(step=6))
    context: Any = SimpleNamespace(model=[model], optimizer=optimizer or SimpleNamespace(step=None), state=state)
    guard.on_train_start(context)
    guard.on_train_step_start(context)
    return guard


def a_gradient(model: Any) -> torch.Tensor:
    gradient: torch.Tensor = model.module.output_layer.weight.main_grad
    return gradient


@pytest.mark.parametrize(
    ("loss", "gradient", "expected"),
    [
        (1.0, 0.5, (False, False)),
        (1.0, 3e38, (False, False)),  # their sum is infinite
        (1.0, math.nan, (False, True)),
        (1.0, -math.inf, (False, True)),
        (math.nan, 0.5, (True, False)),
        (math.inf, math.nan, (True, True)),
    ],
)
def test_what_is_not_finite_is_seen(
    model: Any, tmp_path: Path, loss: float, gradient: float, expected: tuple[bool, bool]
) -> None:
    guard = make_guard(tmp_path, model)
    a_gradient(model)[:2] = 3e38 if gradient == 3e38 else 0.0
    a_gradient(model)[3, 4] = gradient
    for value in (1.0, loss, 1.0):
        guard.observe(make_row(1), torch.tensor(value))
    assert guard.check() == expected
    guard.on_train_step_start(SimpleNamespace(state=SimpleNamespace(train_state=SimpleNamespace(step=7))))
    assert guard.check() == (False, expected[1])


def test_a_loss_scaler_sees_to_gradients_itself(model: Any, tmp_path: Path) -> None:
    model.module.config.fp16 = True
    guard = make_guard(tmp_path, model)
    a_gradient(model)[0, 0] = math.nan
    guard.observe(make_row(1), torch.tensor(1.0))
    assert guard.check() == (False, False)
    guard.observe(make_row(1), torch.tensor(math.nan))
    assert guard.check() == (True, False)


def test_a_finite_step_is_taken_and_another_is_not(model: Any, tmp_path: Path, capfd: Any) -> None:
    optimizer = make_optimizer(model)
    weight = model.module.output_layer.weight
    guard = make_guard(tmp_path, model, "skip", optimizer)
    a_gradient(model).fill_(0.5)
    guard.observe(make_row(1), torch.tensor(1.0))
    before = weight.detach().clone()
    successful, norm, _ = optimizer.step()
    assert successful and norm == pytest.approx(0.5 * math.sqrt(weight.numel()))
    assert ((before - weight).detach() > 0.09).all()

    before = weight.detach().clone()
    guard.observe(make_row(2), torch.tensor(math.nan))
    assert optimizer.step() == (False, None, None)
    assert torch.equal(weight, before)
    assert "Step 7: the loss is not finite on data rank 0, microbatch 1: pair 2 (a.jsonl:3)." in capfd.readouterr().err

    optimizer = make_optimizer(model)
    guard = make_guard(tmp_path, model, "stop", optimizer)
    guard.observe(make_row(2), torch.tensor(math.nan))
    with pytest.raises(ConfigError, match="No rank has taken the step. .* run.on_nonfinite=skip goes on"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_the_message_names_rows_pairs_and_parameters(model: Any, tmp_path: Path) -> None:
    guard = make_guard(tmp_path, model)
    for value, row in zip([1.0, math.nan, math.inf], [make_row(0), make_row(5, 1), make_row()], strict=True):
        guard.observe(row, torch.tensor(value))
    for name in ("output_layer", "embedding.word_embeddings", "decoder.final_layernorm"):
        model.module.get_parameter(f"{name}.weight").main_grad.fill_(math.nan)
    path = tmp_path / "nonfinite" / "step_000007.pt"
    assert guard.report(bad_loss=True) == (
        "Step 7: the loss is not finite on data rank 0, microbatch 1: pair 5 (a.jsonl:6), pair 1 (a.jsonl:2); "
        "data rank 0, microbatch 2: no pairs. Gradients that are not finite: embedding.word_embeddings.weight, "
        f"decoder.final_layernorm.weight, output_layer.weight. Its rows are kept in {path}; replay them with "
        f"tools/verify_parity.py RECIPE --batch {path}. No rank has taken the step. Look at these pairs, or lower "
        "optimizer.lr; the same command with run.on_nonfinite=skip goes on from the latest checkpoint without such "
        "steps."
    )


def test_a_message_names_a_few(model: Any, tmp_path: Path) -> None:
    guard = make_guard(tmp_path, model)
    for parameter in model.module.parameters():
        parameter.main_grad.fill_(math.inf)
    for pair in range(5):
        guard.observe(make_row(pair), torch.tensor(math.nan))
    message = guard.report(bad_loss=True)
    assert (
        "microbatch 2: pair 2 (a.jsonl:3); and more. Gradients that are not finite: " in message
        and "microbatch 3" not in message
    )
    assert message.count(".weight") == 3 and ".weight, and more. Its rows" in message


def test_rows_come_back_as_they_were(model: Any, tmp_path: Path) -> None:
    guard = make_guard(tmp_path, model)
    rows = [make_row(4, 2), make_row(), make_row(9)]
    for row, loss in zip(rows, [0.25, 0.0, math.nan], strict=True):
        guard.observe(row, torch.tensor(loss))
    guard.report(bad_loss=True)
    path = tmp_path / "nonfinite" / "step_000007.pt"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    for row, loaded in zip(rows, load_rows(path), strict=True):
        for field in fields(PackedRow):
            value, other = getattr(row, field.name), getattr(loaded, field.name)
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other
    values = torch.load(path, weights_only=True)
    assert values["step"] == 7 and [entry["microbatch"] for entry in values["rows"]] == [0, 1, 2]
    assert [entry["loss"] for entry in values["rows"][:2]] == [0.25, 0.0]


def test_rows_are_kept_in_the_order_of_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "step.pt"
    replicas = [[(0.1 * pair, plain(make_row(pair))) for pair in pairs] for pairs in ([0, 2, 4], [1, 3, 5])]
    save_step(path, 3, "words", replicas)
    assert [row.pair_ids.tolist() for row in load_rows(path)] == [[0], [1], [2], [3], [4], [5]]
    values = torch.load(path, weights_only=True)
    assert (values["step"], values["what"]) == (3, "words")
    assert [(entry["data_rank"], entry["microbatch"]) for entry in values["rows"]] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2),
    ]  # fmt: skip
    assert [entry["loss"] for entry in values["rows"]] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.pt cannot be read: No such file or directory."):
        load_rows(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("rows")
    torch.save({"rows": [{"row": {"tokens": torch.ones(2)}}]}, tmp_path / "other.pt")
    for name in ("text", "other"):
        with pytest.raises(ConfigError, match=rf"{name}.pt does not hold a step .* Give a file of nonfinite/ in a"):
            load_rows(tmp_path / f"{name}.pt")


def test_a_file_that_cannot_be_written_does_not_hide_the_message(model: Any, tmp_path: Path) -> None:
    (tmp_path / "nonfinite").write_text("in the way")
    guard = make_guard(tmp_path, model)
    guard.observe(make_row(3), torch.tensor(math.nan))
    message = guard.report(bad_loss=True)
    assert "pair 3 (a.jsonl:4). Its rows could not be kept: [Errno 17] File exists: " in message
    assert "--batch" not in message


def test_the_row_of_a_gradient_is_found(model: Any, tmp_path: Path) -> None:
    # The norm's backward takes the cube of 1 / sqrt(2e-38): infinite in fp32, and times 0 it is NaN.
    with torch.no_grad():
        model.module.embedding.word_embeddings.weight[BAD_TOKEN] = 0.0
    guard = make_guard(tmp_path, model)
    rows = [make_row(0), make_row(5, first=BAD_TOKEN), make_row(8)]
    run(model, rows, guard.observe)
    assert guard.check() == (False, True)
    message = guard.report(bad_loss=False)
    assert message.startswith("Step 7: the gradient is not finite on data rank 0, microbatch 1: pair 5 (a.jsonl:6).")
    assert "Gradients that are not finite: embedding.word_embeddings.weight, " in message

    guard = make_guard(tmp_path, model)
    for row in rows[::2]:
        guard.observe(row, torch.tensor(1.0))
    a_gradient(model)[0, 0] = math.nan  # as a fault of the machine would
    assert "the gradient is not finite though it is for each row alone." in guard.report(bad_loss=False)


def test_the_search_leaves_the_settings_and_the_weights(model: Any, tmp_path: Path) -> None:
    from megatron.core.utils import get_model_config

    from orpo_megatron.bridge.guard import bad_rows

    config = get_model_config(model)
    config.finalize_model_grads_func = config.no_sync_func = model.no_sync
    weights = [parameter.detach().clone() for parameter in model.module.parameters()]
    assert bad_rows([model], [make_row(0), make_row()], OrpoConfig()) == [False, False]
    assert config.finalize_model_grads_func == config.no_sync_func == model.no_sync
    assert config.grad_sync_func is None and all(group.is_last_microbatch for group in model.bucket_groups)
    assert all(torch.equal(*pair) for pair in zip(weights, model.module.parameters(), strict=True))


def test_only_training_is_observed_whole_and_not_scaled(model: Any) -> None:
    seen: list[tuple[PackedRow, torch.Tensor]] = []
    rows = [make_row(0, 1), make_row(2)]
    (first, second) = run(model, rows, lambda row, loss: seen.append((row, loss)))
    assert all(got is row for (got, _), row in zip(seen, rows, strict=True))
    total = sum(float(loss) for _, loss in seen)
    share, count = (first["loss"] + second["loss"]).tolist()
    assert total == pytest.approx(share / count, rel=1e-6)
    assert not any(loss.requires_grad for _, loss in seen)
    model.eval()
    run(model, rows, lambda row, loss: seen.append((row, loss)))
    assert len(seen) == 2


def run(model: Any, rows: list[PackedRow], observe: Any) -> Any:
    """Runs rows forward and backward through Megatron's schedule; returns the metrics of each."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from orpo_megatron.core.step import make_forward_step

    iterator: Iterator[PackedRow] = iter(rows)
    return get_forward_backward_func()(
        forward_step_func=make_forward_step(OrpoConfig(), lambda: len(rows), observe),
        data_iterator=iterator,
        model=model,
        num_microbatches=len(rows),
        seq_length=64,
        micro_batch_size=1,
        forward_only=False,
    )
