"""Reads what a run left behind in its folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orpo_megatron.config import ConfigError, OrpoConfig
from orpo_megatron.report.charts import Point

EVAL_PREFIX = "eval_"


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind.

    Attributes:
        name: The run folder's name.
        recipe: The resolved recipe, without its section ``record``.
        record: What the run recorded beside its settings: versions, data hash and the like.
        data: The data reports by role, ``train`` and perhaps ``eval``, and the step plan's summary as ``plan``.
        samples: Answers before and after training: ``prompt``, ``before``, ``after``.
        metrics: (step, value) by metric name, sorted by step; evaluations carry the prefix ``eval_``.
    """

    name: str
    recipe: dict[str, Any]
    record: dict[str, Any]
    data: dict[str, dict[str, Any]]
    samples: list[dict[str, str]]
    metrics: dict[str, list[Point]]

    @property
    def beta(self) -> float:
        """Weight of the odds-ratio loss."""
        return float(self.recipe.get("orpo", {}).get("beta", OrpoConfig.beta))

    def points(self, name: str) -> list[Point]:
        """Returns a metric's points, none where it was not recorded."""
        return self.metrics.get(name, [])


def read_run(run_dir: Path) -> RunRecord:
    """Reads what a run left behind, for :func:`orpo_megatron.report.write_report`."""
    recipe = yaml.safe_load(_text(run_dir / "recipe.yaml"))
    record = recipe.pop("record", {})
    samples = run_dir / "samples.json"
    return RunRecord(
        name=run_dir.resolve().name,
        recipe=recipe,
        record=record,
        data=json.loads(_text(run_dir / "data_report.json")),
        samples=json.loads(_text(samples)) if samples.is_file() else [],
        metrics=read_metrics(run_dir / "metrics.jsonl"),
    )


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """Reads a metrics file by column.

    Args:
        path: JSON lines, each with ``step`` and values by name; null counts as not a number.

    Returns:
        (step, value) by name, sorted by step. Where a step stands twice, as after a resume, the later line counts; a
        last line that was cut off, when the run was killed, does not.

    Raises:
        ConfigError: If the file is missing or a line is not a JSON object with a step.
    """
    columns: dict[str, dict[float, float]] = {}
    whole = _text(path).rpartition("\n")[0]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}, is not a JSON object with a step. Remove the line.") from error
        for name, value in values.items():
            columns.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return {name: sorted(column.items()) for name, column in columns.items()}


def _text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: a report is written from the folder of a run that has trained.")
    return path.read_text(encoding="utf-8")
