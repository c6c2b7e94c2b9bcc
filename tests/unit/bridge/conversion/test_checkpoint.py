"""Which folder is a Megatron checkpoint, what it holds by its metadata, and what is said of one that is not whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import save_file

from orpo_megatron.bridge.conversion.checkpoint import (
    base_of,
    checkpoint_folder,
    source_of,
    stored_dtype,
    stored_elements,
)
from orpo_megatron.config import ConfigError


def make_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    """Writes tensors as Megatron's distributed checkpoints hold them, and Bridge's settings."""
    dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    weights = {"decoder.weight": torch.zeros(3, 4), "optimizer.state.exp_avg.decoder.weight": torch.zeros(3, 4)}
    model = {"bf16": True, "hf_model_id": "org/name"}
    for step in (4, 8):
        make_checkpoint(tmp_path / "checkpoints" / f"iter_{step:07d}", weights, model=model)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("8")
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        stored_elements(checkpoint_folder(path))
    return str(error.value)


def test_the_latest_of_a_run_or_the_one_that_is_named(run_dir: Path) -> None:
    first, latest = (run_dir / "checkpoints" / f"iter_000000{step}" for step in (4, 8))
    assert checkpoint_folder(run_dir) == checkpoint_folder(run_dir / "checkpoints") == latest
    assert checkpoint_folder(first) == first
    assert (source_of(latest), stored_dtype(latest)) == ("org/name", torch.bfloat16)


def test_elements_are_the_models_without_the_optimizers(run_dir: Path) -> None:
    assert stored_elements(checkpoint_folder(run_dir)) == 12


def test_a_checkpoint_that_says_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "plain", {"weight": torch.zeros(2)})
    assert (source_of(folder), stored_dtype(folder)) == (None, torch.float32)


def test_a_folder_that_is_not_there_or_holds_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == (
        f"There is no folder {tmp_path / 'none'}. Give the run.dir of a run or the folder of a checkpoint."
    )
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no Megatron checkpoint (no run_config.yaml in it or in an iter_* folder)."
    )


def test_a_checkpoint_that_was_never_completed(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "iter_0000008" / "run_config.yaml").unlink()
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert refusal(run_dir) == (
        f"{run_dir / 'checkpoints' / 'iter_0000008'}, the latest by {tracker}, is not whole. Name an earlier one."
    )


@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut short"])
def test_a_file_that_is_missing_or_cut_short(run_dir: Path, cut: bool) -> None:
    latest = checkpoint_folder(run_dir)
    (file,) = latest.glob("*.distcp")
    content = file.read_bytes()
    file.unlink()
    if cut:
        file.write_bytes(content[:-1])
    assert refusal(run_dir) == (
        f"{latest} is not whole: {file.name} of its 1 files is missing or cut short. Name another checkpoint, or copy "
        "it again."
    )
    (latest / ".metadata").unlink()
    assert refusal(run_dir) == f"{latest} lacks .metadata, which says what it holds. Name another checkpoint."


def test_adapters_count_as_the_model_that_they_belong_to(tmp_path: Path) -> None:
    base = tmp_path / "base"
    settings = {"peft": {"dim": 2}, "checkpoint": {"pretrained_checkpoint": str(base)}}
    folder = make_checkpoint(tmp_path / "lora", {"decoder.adapter.linear_in.weight": torch.zeros(2, 2)}, **settings)
    assert refusal(folder) == (
        f"{folder} holds adapters to {base} (checkpoint.pretrained_checkpoint), which is gone. Put it back."
    )
    make_checkpoint(base / "iter_0000000", {"decoder.weight": torch.zeros(5, 5)})
    assert stored_elements(folder) == 25
    (base / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(6, 6)}, base / "model.safetensors")
    assert (base_of(folder), stored_elements(folder)) == (str(base), 36)


def test_a_nemo_2_checkpoint_is_told_by_its_folders(tmp_path: Path) -> None:
    for name in ("context", "weights"):
        (tmp_path / name).mkdir()
    expected = (
        f"{tmp_path} is a NeMo 2 checkpoint (context/ and weights/), which only NeMo reads. In an environment with "
        f"nemo-toolkit 2.x: nemo llm export path={tmp_path} target=hf output_path=FOLDER, or from Python "
        "nemo.collections.llm.export_ckpt(path, 'hf', output_path)."
    )
    assert refusal(tmp_path) == expected
    assert refusal(tmp_path / "weights") == expected
