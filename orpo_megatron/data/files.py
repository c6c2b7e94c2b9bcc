"""Files, folders and hub names -> blocks of raw records, each with its line, and a fingerprint of their content."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_megatron.config import ConfigError
from orpo_megatron.data.cache import remembered_hash
from orpo_megatron.data.sources import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SPLIT_NAMES = ("train", "test", "validation", "valid", "dev", "eval")
UTF8_MARK = b"\xef\xbb\xbf"
BYTES_IN_BLOCK = 1 << 18
ROWS_IN_BLOCK = 256


class UnusableError(Exception):
    """A row that cannot be used: a fixed reason, such as ``missing field``, and a detail, such as ``'chosen'``."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """Keeps the reason and the detail apart, so that rows can be counted by reason."""
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


Record = tuple[int, Any]
"""A row as it was read, or the :class:`UnusableError` that stopped it, after its line (from 1)."""


@dataclass(frozen=True)
class Lines:
    """Lines of a JSONL file, not parsed yet; ``first`` is the number of the first one."""

    first: int
    data: bytes

    def records(self) -> Iterator[Record]:
        """Yields the rows; empty lines are no rows, and lines that are no JSON come as :class:`UnusableError`."""
        for number, line in enumerate(io.BytesIO(self.data), start=self.first):
            line = line.removeprefix(UTF8_MARK) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, UnusableError("not UTF-8", f"(byte {error.start + 1} of the line)")
            except json.JSONDecodeError as error:
                yield number, UnusableError("broken JSON", f"({error.msg} at character {error.pos + 1})")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
                yield number, UnusableError("broken JSON", f"({first_line(error)})")


@dataclass(frozen=True)
class Table:
    """Rows of a Parquet file in Arrow's form; ``first`` is the number of the first one."""

    first: int
    batch: RecordBatch

    def records(self) -> Iterator[Record]:
        """Yields the rows; text that is not UTF-8 makes its row a :class:`UnusableError`."""
        try:
            yield from enumerate(self.batch.to_pylist(), start=self.first)
        except UnicodeDecodeError:  # before the first row: find out which it is
            for i in range(self.batch.num_rows):
                try:
                    yield self.first + i, self.batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield self.first + i, UnusableError("not UTF-8", f"({error.reason})")


@dataclass(frozen=True)
class Objects:
    """Rows as Python objects; ``first`` is the number of the first one."""

    first: int
    values: list[Any]

    def records(self) -> Iterator[Record]:
        """Yields the rows."""
        yield from enumerate(self.values, start=self.first)


Block = Lines | Table | Objects
"""Some rows of a file, in the form that is cheapest to hand to another process, which parses them."""


@dataclass(frozen=True)
class JsonFile:
    """A JSON file: an array of rows, or one row a line (JSONL), by its first character; also compressed (.gz)."""

    name: str

    def fingerprint(self, cache_dir: Path) -> str:
        """Returns the SHA-256 of the bytes (``cache.remembered_hash``), and by which of its endings they are read."""
        endings = [ending for ending in Path(self.name).suffixes if ending in (".json", ".gz")]
        return " ".join([remembered_hash(self.name, cache_dir), *endings])

    def blocks(self) -> Iterator[Block]:
        """Yields the rows in blocks, in order.

        Raises:
            ConfigError: If the file cannot be read, or is an array and broken.
        """
        try:
            with gzip.open(self.name, "rb") if self.name.endswith(".gz") else open(self.name, "rb") as file:
                if ".json" in Path(self.name).suffixes and file.read(4096).lstrip(UTF8_MARK + b" \t\r\n")[:1] == b"[":
                    file.seek(0)
                    yield from _objects(json.loads(file.read()))
                else:
                    file.seek(0)
                    yield from _lines(file)
        except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
            raise ConfigError(
                f"Data file {self.name!r} cannot be read: {first_line(error)} Repair or remove it."
            ) from error


def _lines(file: io.BufferedIOBase) -> Iterator[Lines]:
    """Cuts a file that holds one row a line into blocks of whole lines."""
    first = 1
    while data := file.read(BYTES_IN_BLOCK):
        data += file.readline()
        yield Lines(first, data)
        first += data.count(b"\n")


def _objects(values: Sequence[Any]) -> Iterator[Objects]:
    """Cuts rows that are Python objects already into blocks."""
    for start in range(0, len(values), ROWS_IN_BLOCK):
        yield Objects(start + 1, list(values[start : start + ROWS_IN_BLOCK]))


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file."""

    name: str

    def fingerprint(self, cache_dir: Path) -> str:
        """Returns the SHA-256 of the bytes; see :func:`orpo_megatron.data.cache.remembered_hash`."""
        return remembered_hash(self.name, cache_dir)

    def blocks(self) -> Iterator[Block]:
        """Yields the rows in blocks, in order.

        Raises:
            ConfigError: If the file is no Parquet file.
        """
        import pyarrow
        from pyarrow import parquet

        first = 1
        try:
            with parquet.ParquetFile(self.name) as file:
                for batch in file.iter_batches(batch_size=ROWS_IN_BLOCK):
                    yield Table(first, batch)
                    first += len(batch)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"Data file {self.name!r} cannot be read as Parquet: {first_line(error)}") from error


@dataclass(frozen=True)
class LoadedDataset:
    """A split of a data set that the ``datasets`` library loads from the hub or from a folder that it saved."""

    name: str
    dataset: Dataset

    def fingerprint(self, cache_dir: Path) -> str:
        """Returns the library's own fingerprint, which needs nothing of ``cache_dir``."""
        return str(self.dataset._fingerprint)

    def blocks(self) -> Iterator[Block]:
        """Yields the rows in blocks, in order."""
        for start in range(0, len(self.dataset), ROWS_IN_BLOCK):
            columns = self.dataset[start : start + ROWS_IN_BLOCK]
            rows = zip(*columns.values(), strict=True)
            yield Objects(start + 1, [dict(zip(columns, row, strict=True)) for row in rows])


DataFile = JsonFile | ParquetFile | LoadedDataset


def find_files(source: str, split: str) -> list[DataFile]:
    """Returns what holds the rows of a source, in reading order.

    In a folder of files, those named after the split (``train.jsonl``, ``train-00000-of-00002.parquet``) are taken
    where there are any, else those with its name in theirs (``pairs_train.jsonl``), else all of them, sorted by name;
    a folder of other splits only is refused.

    Args:
        source: A JSONL, JSON or Parquet file, a folder of them, a folder saved by ``datasets``, or a hub name.
        split: Split to take from a folder or from the hub; a single file has none.

    Raises:
        ConfigError: If there is no such thing, or it holds no rows of that split.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [_data_file(path)]
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        return [_load_saved(path, split)] if saved else _in_folder(path, split)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(SUFFIXES) and source[0] != ".":
        return [_load_from_hub(source, split)]
    raise ConfigError(
        f"Data source {source!r}: there is no such file or folder. Give a .jsonl, .json or .parquet file, a folder or "
        "a hub name (org/name)."
    )


def _data_file(path: Path) -> DataFile:
    if path.name.endswith(".parquet"):
        return ParquetFile(str(path))
    if path.name.endswith(SUFFIXES):
        return JsonFile(str(path))
    raise ConfigError(f"Data file {str(path)!r} is of no known kind. Its name must end in {', '.join(SUFFIXES)}.")


def _in_folder(folder: Path, split: str) -> list[DataFile]:
    """Returns the data files of a folder that belong to ``split``."""
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    if not paths:
        raise ConfigError(f"Data folder {str(folder)!r} holds no file that ends in {', '.join(SUFFIXES)}.")
    stems = [re.sub(r"[-_]\d+([-_]of[-_]\d+)?$", "", path.name.split(".")[0]) for path in paths]
    chosen = [path for path, stem in zip(paths, stems, strict=True) if stem == split]
    chosen = chosen or [path for path, stem in zip(paths, stems, strict=True) if _names(stem, split)]
    if not chosen and any(_names(stem, name) for stem in stems for name in SPLIT_NAMES):
        raise ConfigError(
            f"Data folder {str(folder)!r} holds no split {split!r} but {', '.join(sorted(set(stems)))}. Set "
            "data.train_split or data.eval_split, or name the files."
        )
    return [_data_file(path) for path in chosen or paths]


def _names(stem: str, split: str) -> bool:
    """Tells whether a file's name holds that of a split, as a word of its own: not in ``constraint``."""
    return re.search(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])", stem) is not None


def _load_saved(folder: Path, split: str) -> LoadedDataset:
    """Loads a folder written by ``save_to_disk``."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Data folder {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    if not isinstance(dataset, DatasetDict):
        return LoadedDataset(str(folder), dataset)
    if split not in dataset:
        raise ConfigError(
            f"Data folder {str(folder)!r} holds no split {split!r} but {', '.join(dataset)}. Set data.train_split or "
            "data.eval_split."
        )
    return LoadedDataset(f"{folder}[{split}]", dataset[split])


def _load_from_hub(name: str, split: str) -> LoadedDataset:
    """Loads a split from the hub or from its local cache."""
    from datasets import load_dataset

    try:
        return LoadedDataset(f"{name}[{split}]", load_dataset(name, split=split))
    except (OSError, ValueError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
            f"Data source {name!r}, split {split!r}, is no file or folder here and cannot be loaded from the "
            f"hub{offline}: {first_line(error)}"
        ) from error
