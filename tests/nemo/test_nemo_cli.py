"""``nemo llm orpo``: help, dry run, and training from a factory with a YAML file over it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml
from test_nemo_training import check

from launch import PAIRS_PER_STEP, Command, TinyRecipe

NEMO = (str(Path(sys.executable).parent / "nemo"), "llm")


def nemo(tmp_path: Path, *arguments: str, processes: int | None = None) -> str:
    """Runs ``nemo llm ARGUMENTS``, under torchrun if ``processes`` are asked for; returns what it printed."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    command = [*(torchrun if processes else ()), *NEMO, *arguments]
    return Command(command, tmp_path / f"{len(list(tmp_path.iterdir()))}.txt", COLUMNS="200").succeed()


def test_nemo_llm_has_the_command(tmp_path: Path) -> None:
    output = nemo(tmp_path, "orpo", "--help")
    assert "Aligns a model by ORPO" in output
    for factory in ("llama31_8b", "mistral_7b", "tiny_cpu"):
        assert f"orpo_megatron.nemo.recipes.{factory}" in output


def test_a_dry_run_shows_a_recipe(tmp_path: Path) -> None:
    output = nemo(
        tmp_path,
        "orpo",
        "--dryrun",
        "--factory",
        "llama31_8b(num_nodes=2)",
        "data.pairs.train=my_pairs.jsonl",
        "objective.beta=0.25",
    )
    for setting in ("my_pairs.jsonl", "0.25", "meta-llama/Llama-3.1-8B", "LlamaModel", "Dry run for orpo"):
        assert setting in output


def test_a_factory_with_a_yaml_file_trains(tiny: TinyRecipe, weights: Path, recipe_run: Path, tmp_path: Path) -> None:
    """On two ranks, from the file that the README describes; the command line wins over the file."""
    changes = {
        "data": {
            "cache_dir": str(tmp_path / "cache"),
            "pairs": {"train": str(tiny.train_file), "eval": None, "pairs_per_step": 2},
        },
        "objective": {"beta": 0.1},
        "trainer": {"max_steps": 2},
        "resume": {"restore_config": {"_target_": "nemo.lightning.RestoreConfig", "path": str(weights)}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changes))
    run_dir = tmp_path / "run"
    nemo(
        tmp_path,
        *(
            "orpo",
            "--yes",
            "--factory",
            f"tiny_cpu(dir='{run_dir}', devices=2)",
            "--yaml",
            str(tmp_path / "mine.yaml"),
        ),
        f"data.pairs.pairs_per_step={PAIRS_PER_STEP}",
        processes=2,
    )
    check(run_dir, recipe_run, steps=2)


def test_an_error_is_one_message(tmp_path: Path) -> None:
    command = [*NEMO, "orpo", "--yes", "--factory", "tiny_cpu", "model.config.hidden_dropout=0.1"]
    outcome = Command(command, tmp_path / "log.txt").wait()
    assert outcome.code != 0
    assert re.search(r"model\.config\.hidden_dropout \(0\.1\) must be 0\.0", outcome.output)
