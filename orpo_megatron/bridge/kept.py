"""The file that keeps a step whose loss or gradient was not finite: its rows, to run them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.config import ConfigError

FOLDER = "nonfinite"


def plain(row: PackedRow) -> dict[str, Any]:
    """Returns a row's fields by name, tensors and numbers."""
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def save_step(path: Path, step: int, what: str, replicas: Sequence[Sequence[tuple[float, dict[str, Any]]]]) -> None:
    """Writes a step's rows in the plan's order, all at once or not at all.

    Args:
        path: The file; its folder is made.
        step: The step, counted from 1.
        what: What was not finite, in words.
        replicas: For each data-parallel rank the loss and the row (``plain``) of each microbatch.

    Raises:
        OSError, RuntimeError: If it cannot be written; ``torch.save`` tells of a full disk as a RuntimeError.
    """
    rows = [
        {"data_rank": rank, "microbatch": number, "loss": loss, "row": row}
        for number, microbatch in enumerate(zip(*replicas, strict=True))
        for rank, (loss, row) in enumerate(microbatch)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    torch.save({"step": step, "what": what, "rows": rows}, fresh)
    fresh.replace(path)


def load_rows(path: str | Path) -> list[PackedRow]:
    """Returns the rows of a global batch that ``save_step`` kept.

    Args:
        path: The file.

    Returns:
        All rows of the step in the plan's order, on the host: row ``i`` went to data-parallel rank ``i % size``.

    Raises:
        ConfigError: If there is no such file, or it holds something else.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        return [PackedRow(**entry["row"]) for entry in values["rows"]]
    except OSError as error:
        raise ConfigError(f"The step in {path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # torch.load reads bytes as instructions: another file fails in any way
        raise ConfigError(
            f"{path} does not hold a step as this version keeps it. Give a file of {FOLDER}/ in a run's folder."
        ) from error
