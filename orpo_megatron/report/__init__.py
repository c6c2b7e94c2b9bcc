"""The report of a run: one HTML file with curves, samples, data counts and recipe, readable with no network."""

from __future__ import annotations

from pathlib import Path

from orpo_megatron.report.page import page
from orpo_megatron.report.run import read_run


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run's folder.

    Args:
        run_dir: Folder that holds ``metrics.jsonl``, ``recipe.yaml``, ``data_report.json`` and, where there are
            samples, ``samples.json``.

    Returns:
        Where the report lies.

    Raises:
        ConfigError: If a file is missing or cannot be read.
    """
    path = run_dir / "report.html"
    path.write_text(page(read_run(run_dir)), encoding="utf-8")
    return path
