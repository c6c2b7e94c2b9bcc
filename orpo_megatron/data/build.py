"""Files -> a cache folder of token ids, tokenised on all cores and written as it comes.

Worker processes get blocks of raw rows and do all the work: parsing, layout, chat template, tokenising.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from orpo_megatron.config import DataConfig
from orpo_megatron.data.files import Block, DataFile
from orpo_megatron.data.report import BAD_ROWS, DataReport, bad_row_line
from orpo_megatron.data.rows import BadRow, PreferenceRow, rows_of_block, usual_layout
from orpo_megatron.data.tokens import BOUNDARY_NOTE, Limits, TokenizedPair, encode_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS, INDEX, REPORT = "tokens.bin", "index.bin", "report.json"
PARTS = ("prompt", "chosen", "rejected")
#: One pair: where its tokens start, how many each part has (they follow one another), and its row's place and line.
INDEX_DTYPE = np.dtype(
    [("offset", "<i8"), *((part, "<i4") for part in PARTS), ("file", "<i4"), ("line", "<i8")], align=False
)
BLOCKS_IN_PROCESS = 16
BLOCKS_AHEAD = 4


class Work(NamedTuple):
    """A block of rows to tokenise: the place and name of its file, and the layout that the file speaks for."""

    place: int
    file: str
    usual: str
    block: Block


@dataclass(frozen=True)
class Encoded:
    """What became of the rows of a block.

    Attributes:
        place: Place of their file.
        index: Of the usable pairs, ``INDEX_DTYPE`` [pairs]; offsets count from the block's first token.
        tokens: Their token ids, int32 [tokens].
        bad_rows: The other rows.
        layouts: Rows by layout, of those that could be read.
        num_truncated: Pairs of which a part was cut.
    """

    place: int
    index: np.ndarray
    tokens: np.ndarray
    bad_rows: list[BadRow]
    layouts: Counter[str]
    num_truncated: int


def build(
    folder: Path,
    files: list[DataFile],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    role: str,
    show_progress: bool,
) -> None:
    """Tokenises every row of the files into ``folder``; memory grows with none of them but with an array in JSON.

    It writes ``tokens.bin`` (int32), ``index.bin`` (:data:`INDEX_DTYPE`, a record a pair), ``bad_rows.jsonl`` and
    ``report.json``, which holds a hash of all token ids and of where they are cut.

    Args:
        folder: An empty folder.
        files: The files, in reading order.
        tokenizer: Its ``eos_token_id`` is set.
        config: The recipe's ``data`` section.
        role: What the data is for, in messages: ``train`` or ``eval``.
        show_progress: Whether to show progress on the standard error stream: a bar in a terminal, else a line.

    Raises:
        ConfigError: If a file cannot be read, or the chat template does not fit.
    """
    totals = _Totals([file.name for file in files])
    with (
        open(folder / TOKENS, "wb") as tokens,
        open(folder / INDEX, "wb") as index,
        open(folder / BAD_ROWS, "w", encoding="utf-8") as bad_rows,
        _progress(f"Tokenising {role} data", show_progress) as bar,
    ):
        for encoded in _encode_all(_work(files, config.layout), tokenizer, config):
            encoded.index["offset"] += totals.num_tokens
            encoded.index.tofile(index)
            encoded.tokens.tofile(tokens)
            bad_rows.writelines(bad_row_line(encoded.place, row) for row in encoded.bad_rows)
            totals.add(encoded)
            bar.update(len(encoded.index) + len(encoded.bad_rows))
    report = _report(totals, role, files, tokenizer).to_dict()
    del report["bad_rows"]  # they have a file of their own
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    values = {**report, "pad_token_id": pad, "content_hash": totals.content_hash()}
    text = json.dumps(values, ensure_ascii=False, indent=1)
    (folder / REPORT).write_text(text, encoding="utf-8")


def _report(totals: _Totals, role: str, files: list[DataFile], tokenizer: PreTrainedTokenizerBase) -> DataReport:
    """Returns the report of a build, without the unusable rows."""
    template = tokenizer.chat_template
    return DataReport(
        role=role,
        files=[file.name for file in files],
        rows_read=totals.num_pairs + sum(totals.bad_rows.values()),
        num_pairs=totals.num_pairs,
        num_truncated=totals.num_truncated,
        layouts={name: dict(counts) for name, counts in totals.layouts.items()},
        bad_rows=(),
        bad_row_counts=dict(totals.bad_rows.most_common()),
        tokens={part: totals.statistics(part) for part in PARTS},
        chat_template=template if template is None or isinstance(template, str) else json.dumps(template),
        boundary_note=BOUNDARY_NOTE,
        eos_token=str(tokenizer.eos_token),
    )


class _Totals:
    """Adds up what became of the blocks."""

    def __init__(self, files: list[str]) -> None:
        self._files = files
        self.num_pairs = self.num_truncated = 0
        self.layouts: dict[str, Counter[str]] = {file: Counter() for file in files}
        self.bad_rows: Counter[str] = Counter()
        self._sums = dict.fromkeys(PARTS, 0)
        self._longest = dict.fromkeys(PARTS, 0)
        self._hashes = hashlib.sha256(), hashlib.sha256()

    @property
    def num_tokens(self) -> int:
        """Tokens of all pairs so far."""
        return sum(self._sums.values())

    def add(self, encoded: Encoded) -> None:
        """Adds a block."""
        self.num_pairs += len(encoded.index)
        self.num_truncated += encoded.num_truncated
        self.layouts[self._files[encoded.place]] += encoded.layouts
        self.bad_rows.update(row.reason for row in encoded.bad_rows)
        tokens, cuts = self._hashes  # two, so that neither depends on how files are cut into blocks
        tokens.update(encoded.tokens)
        cuts.update(np.stack([encoded.index[part] for part in PARTS], axis=1).tobytes())
        for part in PARTS:
            lengths = encoded.index[part]
            self._sums[part] += int(lengths.sum(dtype=np.int64))
            self._longest[part] = max(self._longest[part], int(lengths.max(initial=0)))

    def content_hash(self) -> str:
        """Returns a hash of the pairs: of their token ids, and of where these are cut."""
        return hashlib.sha256(b"".join(part.digest() for part in self._hashes)).hexdigest()

    def statistics(self, part: str) -> dict[str, float]:
        """Returns mean, largest and total of a part's lengths in tokens."""
        mean = round(self._sums[part] / max(self.num_pairs, 1), 1)
        return {"mean": mean, "max": self._longest[part], "total": self._sums[part]}


def _work(files: Iterable[DataFile], layout: str) -> Iterator[Work]:
    """Yields all blocks of all files, in order."""
    for place, file in enumerate(files):
        usual, blocks = usual_layout(file)
        yield from (Work(place, file.name, usual, block) for block in blocks)


def _encode_all(work: Iterator[Work], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Iterator[Encoded]:
    """Yields what became of every block, in order; many blocks are tokenised in worker processes."""
    settings = config.layout, Limits(config.max_length, config.max_prompt_length, config.overlong)
    first = list(itertools.islice(work, BLOCKS_IN_PROCESS))
    workers = config.num_workers or len(os.sched_getaffinity(0))
    every = itertools.chain(first, work)
    if workers == 1 or len(first) < BLOCKS_IN_PROCESS:
        yield from (encode_block(block, tokenizer, *settings) for block in every)
        return
    # Spawned, not forked: the caller may hold threads of tokenizers, CUDA or a process group.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, *settings)) as pool:
        waiting: collections.deque[Future[Encoded]] = collections.deque()
        for block in every:
            waiting.append(pool.submit(_encode_in_worker, block))
            if len(waiting) > BLOCKS_AHEAD * workers:  # never more of the data in memory than keeps the workers busy
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encode_block(work: Work, tokenizer: PreTrainedTokenizerBase, layout: str, limits: Limits) -> Encoded:
    """Parses and tokenises the rows of a block.

    Args:
        work: The block.
        tokenizer: Its ``eos_token_id`` is set.
        layout: The recipe's ``data.layout``.
        limits: How long a pair may be.

    Returns:
        What became of its rows.

    Raises:
        ConfigError: If the chat template does not fit.
    """
    rows = list(rows_of_block(work.block, work.file, layout, work.usual))
    index, tokens, bad_rows = [], list[np.ndarray](), []
    offset = num_truncated = 0
    for row, result in zip(rows, encode_pairs(rows, tokenizer, limits), strict=True):
        if isinstance(result, TokenizedPair):
            parts = (result.prompt, result.chosen, result.rejected)
            index.append((offset, *map(len, parts), work.place, row.line))
            tokens += parts
            offset += sum(map(len, parts))
            num_truncated += result.truncated
        else:
            bad_rows.append(result)
    return Encoded(
        work.place,
        np.array(index, INDEX_DTYPE),
        np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        bad_rows,
        Counter(row.layout for row in rows if isinstance(row, PreferenceRow)),
        num_truncated,
    )


_encode: Callable[[Work], Encoded]  # of a worker process only


def _start_worker(tokenizer: PreTrainedTokenizerBase, layout: str, limits: Limits) -> None:
    """Keeps what every block needs; the processes are the parallelism, so the tokenizer starts no threads."""
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def encode(work: Work) -> Encoded:
        return encode_block(work, tokenizer, layout, limits)

    _encode = encode


def _encode_in_worker(work: Work) -> Encoded:
    return _encode(work)


def _progress(title: str, show: bool) -> tqdm:
    """Shows progress on the standard error stream: a bar in a terminal, one line elsewhere."""
    if show and not sys.stderr.isatty():
        print(f"{title} ...", file=sys.stderr, flush=True)
    return tqdm(desc=title, unit=" rows", file=sys.stderr, disable=not (show and sys.stderr.isatty()))
