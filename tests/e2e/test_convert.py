"""tools/convert.py, both ways, and training from what it wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from launch import STEPS, Outcome, TinyRecipe, read_metrics, timeless
from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import load_recipe
from orpo_megatron.bridge.rundir import read_record

pytestmark = pytest.mark.slow

CONVERT = "tools/convert.py"


@pytest.fixture(scope="module")
def start_model(tiny: TinyRecipe, reference_run: Path) -> Path:
    """The Hugging Face folder of random weights that every tiny run starts from."""
    return Path(model_source(load_recipe(str(reference_run / "recipe.yaml"))))


@pytest.fixture(scope="module")
def imported(tiny: TinyRecipe, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("imported") / "megatron"
    arguments = [CONVERT, "import", str(start_model), str(folder), "--cache-dir", str(tiny.cache_dir)]
    assert f"Written: {folder}" in tiny.command(*arguments).succeed()
    return folder


def test_training_starts_from_an_imported_checkpoint(
    tiny: TinyRecipe, reference_run: Path, start_model: Path, imported: Path, tmp_path: Path
) -> None:
    # model.hf names other weights of the same shape, so the figures can only come from the checkpoint.
    torch.manual_seed(7)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(start_model), dtype=torch.float32)
    other.save_pretrained(tmp_path / "other")

    tiny.train(
        tmp_path / "run",
        f"model.hf={tmp_path / 'other'}",
        "model.config=null",
        f"checkpoint.pretrained_checkpoint={imported}",
        f"data.rows_per_step={read_record(reference_run)['rows_per_step']}",
        "data.eval=null",
        "validation.eval_interval=null",
        "train.train_iters=2",
        "run.export=false",
    )

    expected = [record for record in timeless(read_metrics(reference_run)) if "loss" in record][:2]
    assert timeless(read_metrics(tmp_path / "run")) == expected


def test_checkpoint_of_another_model_is_refused(tiny: TinyRecipe, imported: Path, tmp_path: Path) -> None:
    outcome = tiny.start(
        tmp_path / "run", f"checkpoint.pretrained_checkpoint={imported}", "model.config.hidden_size=64"
    ).wait()
    assert_refused(
        outcome,
        f"error: The checkpoint {imported / 'iter_0000000'} is of another model: its hidden_size is 128, the "
        "recipe's model has 64. Give the checkpoint's model as model.hf or model.config.",
    )


def test_exported_checkpoint_equals_the_exported_run(tiny: TinyRecipe, reference_run: Path, tmp_path: Path) -> None:
    checkpoint, folder = reference_run / "checkpoints" / f"iter_{STEPS:07d}", tmp_path / "hf"

    tiny.command(CONVERT, "export", str(checkpoint), str(folder), "--cache-dir", str(tiny.cache_dir)).succeed()

    expected, weights = (load_file(path / "model.safetensors") for path in (reference_run / "hf", folder))
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert {path.name for path in folder.iterdir()} == {path.name for path in (reference_run / "hf").iterdir()}


def test_folder_with_content_is_left_alone(tiny: TinyRecipe, reference_run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    outcome = tiny.command(CONVERT, "export", str(reference_run), str(tmp_path)).wait()
    assert_refused(outcome, f"error: {tmp_path} is not empty. Give another folder, or empty it.")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def assert_refused(outcome: Outcome, message: str) -> None:
    """Checks that a command ended with this one line and nothing like a traceback."""
    lines = outcome.output.splitlines()
    assert [line for line in lines if "error" in line.lower()] == [message]
    assert "Traceback" not in outcome.output
    assert outcome.code == 2
