"""What a user sees who got something wrong: one line that says what to do, before Megatron is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from launch import REPO, TinyRecipe

EXIT_ERROR = 2


def run_train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the training command as one plain process, every import noted on its standard error stream."""
    return subprocess.run(
        [sys.executable, "-m", "orpo_megatron.train", *arguments],
        cwd=REPO,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refusal(*arguments: str, **environment: str) -> str:
    """Returns the one line with which the command refuses; checks that there is nothing else to see."""
    done = run_train(*arguments, PYTHONPROFILEIMPORTTIME="1", **environment)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    errors = [line for line in said if line.startswith("error:")]
    assert done.returncode == EXIT_ERROR, done.stdout + "\n".join(said)
    assert len(errors) == 1 and said[-1] == errors[0], said
    assert "Traceback" not in done.stderr and done.stdout == ""
    modules = [line.split("|")[-1].strip() for line in imports]
    assert "yaml" in modules and [name for name in modules if name.startswith("megatron.")] == []
    return errors[0].removeprefix("error: ")


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Writes a data file, one row a line; text is written as it stands."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_misspelt_key(tiny: TinyRecipe, tmp_path: Path) -> None:
    assert refusal(*tiny.arguments(tmp_path / "run", "orpo.bta=0.3")) == (
        "orpo.bta is not a setting. Did you mean 'beta'?"
    )
    assert refusal(*tiny.arguments(tmp_path / "run", "optimiser.lr=0.3")) == (
        "optimiser is not a section of a recipe. Did you mean 'optimizer'?"
    )
    assert not (tmp_path / "run").exists()


def test_an_override_without_an_equals_sign(tiny: TinyRecipe, tmp_path: Path) -> None:
    assert refusal(*tiny.arguments(tmp_path / "run", "orpo.beta")) == (
        "orpo.beta is not an override. Write section.key=value, such as orpo.beta=0.2."
    )


def test_a_missing_recipe(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "none.yaml")) == f"There is no recipe at {tmp_path}/none.yaml."


def test_heads_that_do_not_divide(tiny: TinyRecipe, tmp_path: Path) -> None:
    heads = (
        "model.config.hidden_size=192",
        "model.config.num_attention_heads=12",
        "model.config.num_key_value_heads=4",
    )
    arguments = tiny.arguments(tmp_path / "run", *heads, "model.tensor_model_parallel_size=6")
    assert refusal(*arguments, WORLD_SIZE="6") == (
        "The model's 4 key-value heads cannot be split over model.tensor_model_parallel_size (6). Use 1 or 2 or 4."
    )
    arguments = tiny.arguments(tmp_path / "run", "model.tensor_model_parallel_size=8")
    assert refusal(*arguments, WORLD_SIZE="8") == (
        "The model's 4 attention heads cannot be split over model.tensor_model_parallel_size (8). Use 1 or 2 or 4."
    )


def test_a_world_that_does_not_fit(tiny: TinyRecipe, tmp_path: Path) -> None:
    arguments = tiny.arguments(tmp_path / "run", "model.tensor_model_parallel_size=2")
    assert refusal(*arguments, WORLD_SIZE="3") == (
        "The number of processes (3) must be a multiple of tensor x pipeline x context parallel size (2 x 1 x 1 = 2). "
        "Start 4 processes (torchrun --nproc-per-node), or split less."
    )


def test_a_missing_data_file(tiny: TinyRecipe, tmp_path: Path) -> None:
    message = refusal(*tiny.arguments(tmp_path / "run", f"data.train={tmp_path}/none.jsonl"))
    assert f"'{tmp_path}/none.jsonl'" in message and "Give " in message


def test_an_empty_data_set(tiny: TinyRecipe, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "empty.jsonl", [])
    assert refusal(*tiny.arguments(tmp_path / "run", f"data.train={path}")) == (
        f"Empty data set: {path} holds no rows."
    )


GOOD = {"prompt": "2 + 2?", "chosen": " 4.", "rejected": " 5, I think."}


def test_too_many_bad_rows(tiny: TinyRecipe, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "some_bad.jsonl", [GOOD] * 8 + [{**GOOD, "chosen": " "}, '{"prompt": '])
    message = refusal(*tiny.arguments(tmp_path / "run", f"data.train={path}"))
    assert message.startswith(
        "2 of 10 rows of the train data cannot be used (1 empty response, 1 broken JSON), more than data.max_bad_rows "
        "(0.05) allows."
    )
    assert f"{path}:9: empty response in 'chosen'; {path}:10: broken JSON" in message
    assert message.endswith("or raise data.max_bad_rows.")


def test_a_missing_model_folder(tiny: TinyRecipe, tmp_path: Path) -> None:
    model = tmp_path / "no_model"
    message = refusal(*tiny.arguments(tmp_path / "run", "model.config=null", f"model.hf={model}"))
    assert message == (
        f"Model or tokenizer '{model}': there is no such file or folder. Give a folder, a GGUF file, a hub id "
        "(org/name) or package:NAME/FILE."
    )


def test_a_checkpoint_of_another_model(tiny: TinyRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "megatron" / "iter_0000007"
    folder.mkdir(parents=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": {"num_layers": 4, "hidden_size": 64}}))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
    message = refusal(*tiny.arguments(tmp_path / "run", f"checkpoint.pretrained_checkpoint={folder.parent}"))
    assert message == (
        f"The checkpoint {folder} is of another model: its hidden_size is 64, the recipe's model has 128. Give the "
        "checkpoint's model as model.hf or model.config."
    )


def test_under_torchrun_every_process_ends_and_the_summary_says_why(tiny: TinyRecipe, tmp_path: Path) -> None:
    started = time.monotonic()
    command = tiny.start(tmp_path / "run", "orpo.bta=0.3", processes=2)
    family = [command.process.pid]
    while command.process.poll() is None and time.monotonic() < started + 120:
        try:
            family += [child.pid for child in psutil.Process(command.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    outcome = command.wait(timeout=60)
    assert time.monotonic() - started < 60
    assert outcome.code != 0 and len(set(family)) >= 3
    message = "orpo.bta is not a setting. Did you mean 'beta'?"
    assert [line for line in outcome.output.splitlines() if line.startswith("error:")] == [f"error: {message}"]
    summary = outcome.output[outcome.output.index("Root Cause") :]
    assert message in summary and re.search(r"exitcode +: 2 ", summary)
    assert [pid for pid in family if psutil.pid_exists(pid)] == []


USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}
BAD_ROWS: list[tuple[Any, str]] = [
    ('{"prompt": "2 + 2?", ', "broken JSON"),
    ("3", "wrong type (the row is a number"),
    ({"prompt": "2 + 2?", "chosen": " 4."}, "missing field 'rejected'"),
    ({**GOOD, "chosen": "  "}, "empty response in 'chosen'"),
    ({**GOOD, "rejected": " 4."}, "equal responses"),
    ({**GOOD, "prompt": ""}, "empty prompt"),
    ({"prompt": [ASSISTANT], "chosen": "4.", "rejected": "5."}, "roles out of order (message 1 is 'assistant'"),
    (
        {"prompt": "Else?", "chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "5."}]},
        "prompt differs from the conversation",
    ),
    (
        {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "3 + 3?"}, ASSISTANT]},
        "no shared beginning (message 1 differs",
    ),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "tie in an implicit prompt"),
    ({**GOOD, "prompt": "word " * 200}, "prompt too long"),
    ({**GOOD, "chosen": " word" * 300}, "response too long"),
]


def test_a_dry_run_names_every_bad_row_and_trains_nothing(tiny: TinyRecipe, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "all_bad.jsonl", [*(row for row, _ in BAD_ROWS), *[GOOD] * 8])
    run_dir = tmp_path / "run"
    done = run_train(*tiny.arguments(run_dir, f"data.train={path}", "data.max_bad_rows=20"), "--dry-run")
    assert done.returncode == 0, done.stderr
    for line, (_, reason) in enumerate(BAD_ROWS, start=1):
        assert f"    {path}:{line}: {reason}" in done.stderr
    assert "train data: 8 pairs of 20 rows" in done.stderr and "Nothing was trained (--dry-run)." in done.stderr
    resolved = yaml.safe_load(done.stdout)
    assert resolved["bridge"]["model"]["num_layers"] == 4 and resolved["data"]["pairs_per_step"] == 6
    assert not run_dir.exists()
