"""What became of every row: the data report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from orpo_megatron.data.rows import BadRow

ROWS_IN_SUMMARY = 5


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
    bad_rows: list[BadRow]
    tokens: dict[str, dict[str, float]]
    chat_template: str | None
    boundary_note: str
    eos_token: str

    @property
    def counts(self) -> dict[str, int]:
        """Unusable rows by reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.bad_rows).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for a JSON file."""
        return {**dataclasses.asdict(self), "bad_row_counts": self.counts}

    @classmethod
    def from_dict(cls, values: dict[str, Any], role: str, files: list[str]) -> DataReport:
        """Reads what :meth:`to_dict` wrote, for a ``role`` and for the same ``files`` under their present names."""
        now = dict(zip(values["files"], files, strict=True))
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        bad_rows = [BadRow(**{**row, "file": now[row["file"]]}) for row in values["bad_rows"]]
        layouts = {now[file]: found for file, found in values["layouts"].items()}
        return cls(**{**fields, "role": role, "files": files, "bad_rows": bad_rows, "layouts": layouts})

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
            counts = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
            lines.append(f"  unusable rows: {len(self.bad_rows)} ({counts})")
            lines += [f"    {row}" for row in self.bad_rows[:ROWS_IN_SUMMARY]]
            if len(self.bad_rows) > ROWS_IN_SUMMARY:
                lines.append(f"    and {len(self.bad_rows) - ROWS_IN_SUMMARY} more, all named in the data report")
        return "\n".join(lines)
