"""Hugging Face weights on disk: what safetensors files hold, read from their headers, and new ones, shard by shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from orpo_megatron.config import ConfigError
from orpo_megatron.data.sources import first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: As transformers shards a model.
SHARD_BYTES = 5 * 10**9
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_SAVE_AS_SAFETENSORS = "Load it with transformers where you trust it, and save it again (save_pretrained)."


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a Hugging Face folder.

    Attributes:
        num_elements: Elements of each tensor by its name.
        dtype: What most elements are stored as.
    """

    num_elements: dict[str, int]
    dtype: torch.dtype

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Returns the size of all tensors once they are ``dtype``."""
        return sum(self.num_elements.values()) * dtype.itemsize


def local_folder(model: str, patterns: Sequence[str] = ("*.safetensors", INDEX)) -> Path:
    """Returns the folder of a model, fetching files from the hub where the model is no folder.

    Args:
        model: Folder or id.
        patterns: The files that are needed; by default the weights.

    Raises:
        ConfigError: If they cannot be had.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The files of {model} cannot be had: {first_line(error)} Give a folder if this machine reaches no hub."
        ) from error


def read_headers(folder: Path) -> StoredWeights:
    """Reads what a Hugging Face folder holds, without its data.

    Args:
        folder: With one or more safetensors files, and their index if they are shards.

    Raises:
        ConfigError: If there are none, one is missing or cut short, or a tensor of the index is in none of them.
    """
    files = _files(folder)
    elements: dict[str, int] = {}
    dtypes: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    header = tensors.get_slice(name)
                    elements[name] = torch.Size(header.get_shape()).numel()
                    dtypes[header.get_dtype()] += elements[name]
        except SafetensorError as error:
            raise ConfigError(f"{file} is not whole: {first_line(error)} Fetch it again.") from error
    lacking = sorted(_index(folder).keys() - elements.keys())
    if lacking:
        raise ConfigError(f"{folder / INDEX} names tensors that no file holds: {some(lacking)}. Fetch it again.")
    stored = dtypes.most_common(1)[0][0] if dtypes else "F32"
    if stored not in _DTYPES:
        raise ConfigError(f"The weights in {folder} are quantised ({stored}). Give the model in bf16, fp16 or fp32.")
    return StoredWeights(elements, _DTYPES[stored])


def _index(folder: Path) -> dict[str, str]:
    """Returns the file of each tensor as the index of a sharded model gives it; empty where there is none."""
    path = folder / INDEX
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"]) if path.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no index of safetensors files (weight_map). Fetch it again.") from error


def _files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder."""
    named = sorted({folder / file for file in _index(folder).values()})
    missing = [file.name for file in named if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {some(missing)}, {len(missing)} of the {len(named)} files that {INDEX} names. Fetch the "
            "model again."
        )
    files = named or sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for ending in ("bin", "pt", "pth") for path in folder.glob(f"*.{ending}"))
        if others:
            raise ConfigError(f"{folder} holds {some(others)} but no safetensors files. {_SAVE_AS_SAFETENSORS}")
        raise ConfigError(f"{folder} holds no weights (*.safetensors). Give the folder of a whole model.")
    return files


def some(names: list[str], most: int = 3) -> str:
    """Names a few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_shards(
    weights: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> set[str]:
    """Writes tensors as they come, holding no more than one file's worth of them.

    Args:
        weights: Names and tensors.
        folder: Where to write; there already.
        shard_bytes: Largest size of a file's tensors; a larger tensor has a file of its own.

    Returns:
        The names.
    """
    files: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = held = 0

    def flush() -> None:
        save_file(shard, _unnumbered(folder, len(files)), metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, weight in weights:
        size = weight.numel() * weight.element_size()
        if shard and held + size > shard_bytes:
            flush()
            held = 0
        shard[name] = weight.contiguous()
        total, held = total + size, held + size
    flush()
    _name(folder, files, total)
    return {name for names in files for name in names}


def _unnumbered(folder: Path, number: int) -> Path:
    """Returns the name of a file while it is not known how many there will be."""
    return folder / f"shard-{number}.safetensors"


def _name(folder: Path, files: list[list[str]], total: int) -> None:
    """Gives files the names that transformers looks for, and an index if there are several."""
    if len(files) == 1:
        _unnumbered(folder, 0).rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        _unnumbered(folder, number).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
