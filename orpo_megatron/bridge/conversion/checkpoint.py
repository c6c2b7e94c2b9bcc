"""Megatron checkpoints on disk: which folder is one, what lies in it, and whether all of it is there."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from orpo_megatron.bridge.conversion.weights import read_headers, some
from orpo_megatron.bridge.rundir import CHECKPOINTS, TRACKER, latest_step
from orpo_megatron.config import ConfigError

RUN_CONFIG = "run_config.yaml"
_NEMO = (
    "{path} is a NeMo 2 checkpoint (context/ and weights/), which only NeMo reads. In an environment with "
    "nemo-toolkit 2.x: nemo llm export path={path} target=hf output_path=FOLDER, or from Python "
    "nemo.collections.llm.export_ckpt(path, 'hf', output_path)."
)


def checkpoint_folder(path: Path) -> Path:
    """Returns the folder of one checkpoint: ``path`` itself, or the latest below it.

    Raises:
        ConfigError: If there is none.
    """
    for root in (path, path.parent):
        if (root / "context").is_dir() and (root / "weights").is_dir():
            raise ConfigError(_NEMO.format(path=root))
    for root in (path, path / CHECKPOINTS):
        if (root / RUN_CONFIG).is_file():
            return root
        if step := latest_step(root):  # a newer folder may be there that was never completed
            latest = root / f"iter_{step:07d}"
            if not (latest / RUN_CONFIG).is_file():
                raise ConfigError(f"{latest}, the latest by {root / TRACKER}, is not whole. Name an earlier one.")
            return latest
        found = sorted(root.glob(f"iter_*/{RUN_CONFIG}"))
        if found:
            return found[-1].parent
    if not path.is_dir():
        raise ConfigError(f"There is no folder {path}. Give the run.dir of a run or the folder of a checkpoint.")
    raise ConfigError(f"{path} holds no Megatron checkpoint (no {RUN_CONFIG} in it or in an iter_* folder).")


def stored_elements(checkpoint: Path) -> int:
    """Returns the number of elements of a checkpoint's model, from its metadata; checks that its files are whole.

    Args:
        checkpoint: From ``checkpoint_folder``.

    Raises:
        ConfigError: If a file is missing or cut short, here or where the model lies that adapters belong to.
    """
    base = base_of(checkpoint)
    elements = sum(_tensor_sizes(checkpoint).values())
    if base is None:
        return elements
    folder = Path(base)
    if not folder.is_dir():
        raise ConfigError(
            f"{checkpoint} holds adapters to {base} (checkpoint.pretrained_checkpoint), which is gone. Put it back."
        )
    if is_hugging_face(folder):
        return sum(read_headers(folder).num_elements.values())
    return stored_elements(checkpoint_folder(folder))


def _tensor_sizes(checkpoint: Path) -> dict[str, int]:
    """Returns the elements of each tensor of a checkpoint but the optimizer's."""
    if not (checkpoint / ".metadata").is_file():
        raise ConfigError(f"{checkpoint} lacks .metadata, which says what it holds. Name another checkpoint.")
    metadata = FileSystemReader(checkpoint).read_metadata()
    ends: dict[str, int] = defaultdict(int)
    for piece in (metadata.storage_data or {}).values():
        ends[piece.relative_path] = max(ends[piece.relative_path], piece.offset + piece.length)
    broken = [name for name, end in sorted(ends.items()) if not _reaches(checkpoint / name, end)]
    if broken:
        raise ConfigError(
            f"{checkpoint} is not whole: {some(broken)} of its {len(ends)} files is missing or cut short. Name "
            "another checkpoint, or copy it again."
        )
    return {
        name: torch.Size(stored.size).numel()
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and "optimizer" not in name
    }


def _reaches(path: Path, end: int) -> bool:
    """Returns whether a file is there and has so many bytes."""
    return path.is_file() and path.stat().st_size >= end


def is_hugging_face(folder: Path) -> bool:
    """Returns whether a folder is a Hugging Face model rather than a Megatron checkpoint."""
    return (folder / "config.json").is_file()


def base_of(checkpoint: Path) -> str | None:
    """Returns the model that a checkpoint of adapters belongs to; None where it holds a whole model."""
    settings = _settings(checkpoint)
    return (settings.get("checkpoint") or {}).get("pretrained_checkpoint") if settings.get("peft") else None


def source_of(checkpoint: Path) -> str | None:
    """Returns the Hugging Face model that a checkpoint of Bridge says it comes from; None where it says nothing."""
    return (_settings(checkpoint).get("model") or {}).get("hf_model_id")


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """Returns the dtype of a checkpoint's model."""
    model = _settings(checkpoint).get("model") or {}
    return torch.bfloat16 if model.get("bf16") else torch.float16 if model.get("fp16") else torch.float32


def _settings(checkpoint: Path) -> dict[str, Any]:
    """Returns what Bridge wrote about the run beside a checkpoint, as plain values."""
    return yaml.safe_load((checkpoint / RUN_CONFIG).read_text(encoding="utf-8")) or {}
