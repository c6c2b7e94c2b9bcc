"""Tokenised pairs in a memory-mapped cache, keyed by the content of everything that went into them."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from orpo_megatron.config import ConfigError, DataConfig
from orpo_megatron.data.cache import build_once
from orpo_megatron.data.files import DataFile, find_files
from orpo_megatron.data.plan import PairLengths
from orpo_megatron.data.report import DataReport
from orpo_megatron.data.rows import BadRow, PreferenceRow, rows_of_file
from orpo_megatron.data.sources import load_tokenizer
from orpo_megatron.data.tokens import BOUNDARY_NOTE, TokenizedPair, encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
CACHED_SETTINGS = ("layout", "max_length", "max_prompt_length", "overlong")
INDEX_COLUMNS = ("offset", "prompt", "chosen", "rejected", "file", "line")
ROWS_IN_PROCESS = 2000
ROWS_PER_CHUNK = 256


class PairStore:
    """The usable pairs of a data set, in reading order, memory-mapped; pickled as the name of its folder.

    Attributes:
        folder: The cache folder.
        content_hash: SHA-256 over the data, the tokenizer and the settings; the folder's name.
        lengths: Token counts of every pair.
        report: What became of every row.
        pad_token_id: The id to fill rows with.
    """

    def __init__(self, folder: Path, role: str, files: list[str]) -> None:
        """Opens the cache in ``folder``, which was built from ``files`` (by their present names)."""
        self.folder, self._role, self._files = folder, role, files
        self.content_hash = folder.name
        self._index = np.load(folder / "index.npy")
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r") if len(self._index) else np.zeros(0, np.int32)
        self.lengths = PairLengths(*(self._index[:, INDEX_COLUMNS.index(part)] for part in INDEX_COLUMNS[1:4]))
        values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.pad_token_id: int = values["pad_token_id"]
        self.report = DataReport.from_dict(values, role, files)

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self._index)

    def __getitem__(self, index: int) -> TokenizedPair:
        """Returns pair ``index``; its arrays are read-only views of the file."""
        offset, prompt, chosen, rejected = (int(value) for value in self._index[index, :4])
        tokens = self._tokens[offset : offset + prompt + chosen + rejected]
        return TokenizedPair(tokens[:prompt], tokens[prompt : prompt + chosen], tokens[prompt + chosen :])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the folder's name instead of the tokens."""
        return PairStore, (self.folder, self._role, self._files)

    def source(self, index: int) -> tuple[str, int]:
        """Returns the file of pair ``index`` and its line there."""
        return self._files[self._index[index, 4]], int(self._index[index, 5])


def prepare(
    sources: str | list[str],
    split: str,
    *,
    config: DataConfig,
    tokenizer_name: str,
    cache_dir: str | Path,
    role: str = "train",
    show_progress: bool = False,
) -> PairStore:
    """Returns the tokenised pairs of the sources, from the cache where they are in it already.

    Any number of processes may call this together: one builds, the others wait and read.

    Args:
        sources: File, folder or hub name, or a list of them.
        split: Split to take from a folder or from the hub.
        config: The recipe's ``data`` section.
        tokenizer_name: What :func:`orpo_megatron.data.sources.load_tokenizer` takes.
        cache_dir: The cache lies in ``data/<content hash>/`` under it.
        role: What the data is for, in messages: ``train`` or ``eval``.
        show_progress: Whether to show progress on the standard error stream: a bar in a terminal, else a line.

    Raises:
        ConfigError: If a source, the tokenizer or the chat template does not fit, more rows are unusable than
            ``config.max_bad_rows`` allows, or no pair is left.
    """
    names = [sources] if isinstance(sources, str) else sources
    files = [file for name in names for file in find_files(name, split)]
    tokenizer = load_tokenizer(tokenizer_name, cache_dir, config.chat_template)
    root = Path(cache_dir).expanduser().absolute() / "data"
    folder = root / _content_hash(files, tokenizer, config)

    def build(scratch: Path) -> None:
        _build(scratch, files, tokenizer, config, role, show_progress)

    build_once(folder, build, _is_whole)
    store = PairStore(folder, role, [file.name for file in files])
    _check_bad_rows(store, config)
    return store


def _content_hash(files: list[DataFile], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Hashes everything that the cache depends on; the files by content and order, not by name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {
        "version": FORMAT_VERSION,
        "files": [(type(file).__name__, file.fingerprint()) for file in files],
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "chat_template": tokenizer.chat_template,
        "settings": {name: getattr(config, name) for name in CACHED_SETTINGS},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Tells whether a cache folder holds all that :func:`_build` writes, and as many tokens as its index says."""
    tokens, index = folder / "tokens.bin", folder / "index.npy"
    if not (tokens.exists() and index.exists() and (folder / "report.json").exists()):
        return False
    try:
        return tokens.stat().st_size == 4 * int(np.load(index)[:, 1:4].sum())
    except (ValueError, EOFError):  # cut off, or no array at all
        return False


def _build(
    folder: Path,
    files: list[DataFile],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    role: str,
    show_progress: bool,
) -> None:
    """Tokenises every row into ``folder``: ``tokens.bin``, ``index.npy`` and ``report.json``."""
    places = {file.name: place for place, file in enumerate(files)}
    rows = (row for file in files for row in rows_of_file(file, config.layout))
    layouts: dict[str, Counter[str]] = {file.name: Counter() for file in files}
    index, bad_rows = [], []
    offset = rows_read = num_truncated = 0
    encoded = _encode_all(rows, tokenizer, config)
    with open(folder / "tokens.bin", "wb") as tokens:
        for row, result in _with_progress(encoded, f"Tokenising {role} data", show_progress):
            rows_read += 1
            if isinstance(row, PreferenceRow):
                layouts[row.file][row.layout] += 1
            if isinstance(result, BadRow):
                bad_rows.append(result)
                continue
            parts = (result.prompt, result.chosen, result.rejected)
            index.append((offset, *map(len, parts), places[row.file], row.line))
            tokens.write(np.concatenate(parts).tobytes())
            offset += sum(map(len, parts))
            num_truncated += result.truncated
    table = np.array(index, np.int64).reshape(-1, len(INDEX_COLUMNS))
    np.save(folder / "index.npy", table)
    template = tokenizer.chat_template
    report = DataReport(
        role=role,
        files=[file.name for file in files],
        rows_read=rows_read,
        num_pairs=len(table),
        num_truncated=num_truncated,
        layouts={name: dict(counts) for name, counts in layouts.items()},
        bad_rows=bad_rows,
        tokens={part: _statistics(table[:, column]) for column, part in enumerate(INDEX_COLUMNS[1:4], start=1)},
        chat_template=template if template is None or isinstance(template, str) else json.dumps(template),
        boundary_note=BOUNDARY_NOTE,
        eos_token=str(tokenizer.eos_token),
    )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    text = json.dumps({**report.to_dict(), "pad_token_id": pad}, ensure_ascii=False, indent=1)
    (folder / "report.json").write_text(text, encoding="utf-8")


def _statistics(lengths: np.ndarray) -> dict[str, float]:
    """Returns mean, largest and total of some lengths in tokens."""
    if not len(lengths):
        return {"mean": 0.0, "max": 0, "total": 0}
    return {"mean": round(float(lengths.mean()), 1), "max": int(lengths.max()), "total": int(lengths.sum())}


Row = PreferenceRow | BadRow
Encoded = tuple[Row, TokenizedPair | BadRow]


def _encode_all(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Iterator[Encoded]:
    """Yields every row with what became of it, in order; many rows are tokenised in worker processes."""
    limits = {
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "overlong": config.overlong,
    }
    first = list(itertools.islice(rows, ROWS_IN_PROCESS))
    workers = config.num_workers or len(os.sched_getaffinity(0))
    if workers == 1 or len(first) < ROWS_IN_PROCESS:
        for row in itertools.chain(first, rows):
            yield row, _encode(row, tokenizer, limits)
        return
    every = itertools.chain(first, rows)
    chunks = iter(lambda: tuple(itertools.islice(every, ROWS_PER_CHUNK)), ())
    # Spawned, not forked: the caller may hold threads of tokenizers, CUDA or a process group.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, limits)) as pool:
        waiting: collections.deque[tuple[tuple[Row, ...], Future[list[TokenizedPair | BadRow]]]] = collections.deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode_chunk, chunk)))
            if len(waiting) > 4 * workers:  # never holds more of the data in memory than keeps the workers busy
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase, limits: dict[str, Any]) -> TokenizedPair | BadRow:
    return row if isinstance(row, BadRow) else encode_pair(row, tokenizer, **limits)


_worker: tuple[PreTrainedTokenizerBase, dict[str, Any]]  # of a worker process only


def _start_worker(tokenizer: PreTrainedTokenizerBase, limits: dict[str, Any]) -> None:
    """Keeps what every chunk needs; the processes are the parallelism, so the tokenizer starts no threads."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = tokenizer, limits


def _encode_chunk(chunk: tuple[Row, ...]) -> list[TokenizedPair | BadRow]:
    tokenizer, limits = _worker
    return [_encode(row, tokenizer, limits) for row in chunk]


def _with_progress(rows: Iterable[Encoded], title: str, show: bool) -> Iterable[Encoded]:
    """Shows progress on the standard error stream: a bar in a terminal, one line elsewhere."""
    if show and not sys.stderr.isatty():
        print(f"{title} ...", file=sys.stderr, flush=True)
    return tqdm(rows, title, unit=" rows", file=sys.stderr, disable=not (show and sys.stderr.isatty()))


def _check_bad_rows(store: PairStore, config: DataConfig) -> None:
    """Raises if too many rows are unusable or no pair is left."""
    report = store.report
    named = f"Every unusable row is named in {store.folder / 'report.json'}; the first: " + "; ".join(
        str(row) for row in report.bad_rows[:3]
    )
    remedy = (
        "Repair or remove these rows, set data.layout if they were taken for another one, or raise data.max_length "
        "and data.max_prompt_length (or set data.overlong to truncate) for those that are too long"
    )
    counts = ", ".join(f"{count} {reason}" for reason, count in report.counts.items())
    allowed = config.max_bad_rows if config.max_bad_rows >= 1 else config.max_bad_rows * report.rows_read
    if not report.rows_read:
        raise ConfigError(f"Empty data set: {', '.join(report.files)} holds no rows.")
    if not report.num_pairs:
        raise ConfigError(
            f"Empty data set: none of the {report.rows_read} rows of the {report.role} data can be used ({counts}). "
            f"{named}. {remedy}."
        )
    if len(report.bad_rows) > allowed:
        raise ConfigError(
            f"{len(report.bad_rows)} of {report.rows_read} rows of the {report.role} data cannot be used ({counts}), "
            f"more than data.max_bad_rows ({config.max_bad_rows}) allows. {named}. {remedy}, or raise "
            "data.max_bad_rows."
        )
