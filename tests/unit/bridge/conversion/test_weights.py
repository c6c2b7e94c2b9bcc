"""What safetensors headers say, what is wrong with a folder, and shards that are written as tensors come."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from orpo_megatron.bridge.conversion.weights import INDEX, SINGLE, local_folder, read_headers, write_shards
from orpo_megatron.config import ConfigError


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a folder's files, with the file that each lies in checked against the index."""
    found, files = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & found.keys()
        found.update(part)
        files.update(dict.fromkeys(part, file.name))
    if len(set(files.values())) > 1:
        assert json.loads((folder / INDEX).read_text())["weight_map"] == files
    return found


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three tensors of 24, 16 and 8 bytes in two files."""
    tensors = {"a": torch.arange(6.0), "b": torch.arange(4.0), "c": torch.ones(4, dtype=torch.bfloat16)}
    write_shards(tensors.items(), tmp_path, 40)
    return tmp_path


def test_tensors_fill_a_file_to_its_size_and_no_further(sharded: Path) -> None:
    assert sorted(path.name for path in sharded.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"] == {"total_size": 48}
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    assert {name: tensor.tolist() for name, tensor in tensors_of(sharded).items()} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [0, 1, 2, 3],
        "c": [1, 1, 1, 1],
    }
    with safe_open(sharded / "model-00001-of-00002.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_file_has_no_index_and_a_larger_tensor_a_file_of_its_own(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tensors = {"a": torch.zeros(1), "b": torch.zeros(100), "c": torch.zeros(1)}
    for folder, size in ((whole, 408), (parts, 8)):
        folder.mkdir()
        assert write_shards(tensors.items(), folder, size) == {"a", "b", "c"}
    assert [path.name for path in whole.iterdir()] == [SINGLE]
    assert sorted(path.name for path in parts.glob("*.safetensors")) == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_no_more_than_one_file_is_held(tmp_path: Path) -> None:
    """Each tensor is gone by the time that the second one after it comes, since a file holds one."""
    alive: list[int] = []

    class Weight(torch.Tensor):
        def __del__(self) -> None:
            alive.pop()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(5):
            weight = torch.zeros(10).as_subclass(Weight)
            alive.append(number)
            assert len(alive) <= 2
            yield f"w{number}", weight
            del weight

    write_shards(weights(), tmp_path, 40)
    assert len(tensors_of(tmp_path)) == 5


def test_headers(sharded: Path) -> None:
    stored = read_headers(sharded)
    assert stored.num_elements == {"a": 6, "b": 4, "c": 4}
    assert stored.dtype is torch.float32  # of ten elements; four are bf16
    assert (stored.num_bytes(torch.float32), stored.num_bytes(torch.bfloat16)) == (56, 28)
    assert local_folder(str(sharded)) == sharded


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_headers(folder)
    return str(error.value)


def test_a_file_that_is_missing(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert refusal(sharded) == (
        f"{sharded} lacks model-00002-of-00002.safetensors, 1 of the 2 files that {INDEX} names. Fetch the "
        "model again."
    )


def test_a_file_that_is_cut_short(sharded: Path) -> None:
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert refusal(sharded).startswith(f"{file} is not whole: ") and refusal(sharded).endswith(" Fetch it again.")


def test_a_tensor_that_is_missing(sharded: Path) -> None:
    save_file({"a": torch.zeros(6)}, sharded / "model-00001-of-00002.safetensors")
    assert refusal(sharded) == f"{sharded / INDEX} names tensors that no file holds: b. Fetch it again."


def test_an_index_that_is_none(sharded: Path) -> None:
    (sharded / INDEX).write_text("[]")
    assert refusal(sharded) == f"{sharded / INDEX} is no index of safetensors files (weight_map). Fetch it again."


def test_no_weights_and_weights_of_another_kind(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} holds no weights (*.safetensors). Give the folder of a whole model."
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds pytorch_model.bin but no safetensors files. Load it with transformers where you trust it, "
        "and save it again (save_pretrained)."
    )


def test_quantised_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8, dtype=torch.int8), "scale": torch.ones(1)}, tmp_path / SINGLE)
    assert refusal(tmp_path) == (
        f"The weights in {tmp_path} are quantised (I8). Give the model in bf16, fp16 or fp32."
    )


def test_a_model_that_no_hub_is_reached_for() -> None:
    with pytest.raises(
        ConfigError, match="^The files of no-such/model cannot be had: .* Give a folder if this machine"
    ):
        local_folder("no-such/model")
