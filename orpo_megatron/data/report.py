"""What became of every row: the data report."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_megatron.data.rows import BadRow

BAD_ROWS = "bad_rows.jsonl"
ROWS_IN_SUMMARY = 5


def bad_row_line(place: int, row: BadRow) -> str:
    """Returns a row's line in ``bad_rows.jsonl``; ``place`` is that of its file in the report's ``files``."""
    return json.dumps([place, row.line, row.reason, row.detail], ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class BadRows:
    """The unusable rows that a cache folder names, in reading order; read from there each time, never held.

    Attributes:
        path: The folder's ``bad_rows.jsonl``.
        files: The files that were read, by their present names.
        num_rows: How many rows it names.
    """

    path: Path
    files: list[str]
    num_rows: int

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self.num_rows

    def __iter__(self) -> Iterator[BadRow]:
        """Yields the rows."""
        with open(self.path, encoding="utf-8") as lines:
            for text in lines:
                place, line, reason, detail = json.loads(text)
                yield BadRow(self.files[place], line, reason, detail)


@dataclass(frozen=True)
class DataReport:
    """Every row of a data set is either a pair or named here.

    Attributes:
        role: What the data is for, such as ``train``.
        files: The files that were read.
        rows_read: Rows in them.
        num_pairs: Usable pairs.
        num_truncated: Pairs among them of which a part was cut.
        layouts: Rows by layout, of each file.
        bad_rows: Every unusable row, in reading order.
        bad_row_counts: Unusable rows by reason, the most frequent first.
        tokens: Of ``prompt``, ``chosen`` and ``rejected``, in tokens: ``mean``, ``max`` and ``total``.
        chat_template: The template that wrote the messages; None where there is none.
        boundary_note: How prompt and response meet.
        eos_token: The token that every response ends with, and is trained to end with.
    """

    role: str
    files: list[str]
    rows_read: int
    num_pairs: int
    num_truncated: int
    layouts: dict[str, dict[str, int]]
    bad_rows: BadRows | tuple[BadRow, ...]
    bad_row_counts: dict[str, int]
    tokens: dict[str, dict[str, float]]
    chat_template: str | None
    boundary_note: str
    eos_token: str

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a JSON file."""
        return {**vars(self), "bad_rows": [vars(row) for row in self.bad_rows]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], role: str, files: list[str], folder: Path) -> DataReport:
        """Reads what :meth:`to_dict` wrote, for a ``role`` and for the same ``files`` under their present names.

        Args:
            values: What it wrote; without the unusable rows, but with their counts.
            role: What the data is for now.
            files: The present names.
            folder: The cache folder, which names the unusable rows.
        """
        now = dict(zip(values["files"], files, strict=True))
        layouts = {now[file]: found for file, found in values["layouts"].items()}
        bad_rows = BadRows(folder / BAD_ROWS, files, sum(values["bad_row_counts"].values()))
        present = {**values, "role": role, "files": files, "bad_rows": bad_rows, "layouts": layouts}
        return cls(**{field.name: present[field.name] for field in dataclasses.fields(cls)})

    def summary(self) -> str:
        """Returns a few lines for a person: what was read, how long it is, and the first unusable rows."""
        truncated = f", {self.num_truncated} of them truncated" if self.num_truncated else ""
        lines = [f"{self.role} data: {self.num_pairs} pairs of {self.rows_read} rows{truncated}"]
        for file in dict.fromkeys(self.files):
            lines.append(f"  {file}: {', '.join(self.layouts.get(file, {})) or 'no row that could be read'}")
        if self.num_pairs:
            lengths = (f"{part} {self.tokens[part]['mean']:.0f}" for part in ("prompt", "chosen", "rejected"))
            total = sum(part["total"] for part in self.tokens.values())
            lines.append(f"  tokens on average: {', '.join(lengths)}; in all {total:,}")
        lines.append(f"  {self.boundary_note}")
        if self.bad_rows:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.bad_row_counts.items())
            lines.append(f"  unusable rows: {len(self.bad_rows)} ({counts})")
            lines += [f"    {row}" for row in itertools.islice(self.bad_rows, ROWS_IN_SUMMARY)]
            if len(self.bad_rows) > ROWS_IN_SUMMARY:
                lines.append(f"    and {len(self.bad_rows) - ROWS_IN_SUMMARY} more, all named in the data report")
        return "\n".join(lines)
