"""Tokenised pairs in a memory-mapped cache, keyed by the content of everything that went into them."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo_megatron.config import ConfigError, DataConfig
from orpo_megatron.data.build import INDEX, INDEX_DTYPE, PARTS, REPORT, TOKENS, build
from orpo_megatron.data.cache import build_once
from orpo_megatron.data.files import DataFile, find_files
from orpo_megatron.data.plan import PairLengths
from orpo_megatron.data.report import BAD_ROWS, DataReport
from orpo_megatron.data.sources import load_tokenizer
from orpo_megatron.data.tokens import TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 3
CACHED_SETTINGS = ("layout", "max_length", "max_prompt_length", "overlong")
CACHE_FILES = (TOKENS, INDEX, BAD_ROWS, REPORT)


class PairStore:
    """The usable pairs of a data set, in reading order, memory-mapped; pickled as the name of its folder.

    Attributes:
        folder: The cache folder.
        content_hash: SHA-256 over the pairs as token ids.
        lengths: Token counts of every pair.
        report: What became of every row.
        pad_token_id: The id to fill rows with.
    """

    def __init__(self, folder: Path, role: str, files: list[str]) -> None:
        """Opens the cache in ``folder``, which was built from ``files`` (by their present names)."""
        self.folder, self._role, self._files = folder, role, files
        self._index, self._tokens = _mapped(folder / INDEX, INDEX_DTYPE), _mapped(folder / TOKENS, np.dtype(np.int32))
        self.lengths = PairLengths(*(self._index[part] for part in PARTS))
        values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        self.pad_token_id: int = values["pad_token_id"]
        self.content_hash: str = values["content_hash"]
        self.report = DataReport.from_dict(values, role, files, folder)

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self._index)

    def __getitem__(self, index: int) -> TokenizedPair:
        """Returns pair ``index``; its arrays are read-only views of the file."""
        offset, prompt, chosen, rejected, _, _ = self._index[index].item()
        tokens = self._tokens[offset : offset + prompt + chosen + rejected]
        return TokenizedPair(tokens[:prompt], tokens[prompt : prompt + chosen], tokens[prompt + chosen :])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the folder's name instead of the tokens."""
        return PairStore, (self.folder, self._role, self._files)

    def source(self, index: int) -> tuple[str, int]:
        """Returns the file of pair ``index`` and its line there."""
        *_, file, line = self._index[index].item()
        return self._files[file], line


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
        cache_dir: The cache lies in ``data/<hash of all that goes into it>/`` under it.
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
    folder = root / _cache_key(files, tokenizer, config, Path(cache_dir))

    def build_in(scratch: Path) -> None:
        build(scratch, files, tokenizer, config, role, show_progress)

    build_once(folder, build_in, _is_whole)
    store = PairStore(folder, role, [file.name for file in files])
    _check_bad_rows(store, config)
    return store


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Maps a file into memory, read-only; an empty file, which cannot be mapped, is an empty array."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _cache_key(files: list[DataFile], tokenizer: PreTrainedTokenizerBase, config: DataConfig, cache_dir: Path) -> str:
    """Hashes everything that the cache depends on; the files by content and order, not by name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {
        "version": FORMAT_VERSION,
        "files": [(type(file).__name__, file.fingerprint(cache_dir)) for file in files],
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "chat_template": tokenizer.chat_template,
        "settings": {name: getattr(config, name) for name in CACHED_SETTINGS},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Tells whether a cache folder holds all that ``build`` writes: as many tokens as its last record says."""
    sizes = {name: path.stat().st_size for name in CACHE_FILES if (path := folder / name).exists()}
    if len(sizes) < len(CACHE_FILES) or sizes[INDEX] % INDEX_DTYPE.itemsize:
        return False
    index = _mapped(folder / INDEX, INDEX_DTYPE)
    num_tokens = sum(index[-1].item()[:4]) if len(index) else 0  # its offset and the lengths of its parts
    return sizes[TOKENS] == 4 * num_tokens


def _check_bad_rows(store: PairStore, config: DataConfig) -> None:
    """Raises if too many rows are unusable or no pair is left."""
    report = store.report
    named = f"Every unusable row is named in {store.folder / BAD_ROWS}; the first: " + "; ".join(
        str(row) for row in itertools.islice(report.bad_rows, 3)
    )
    remedy = (
        "Repair or remove these rows, set data.layout if they were taken for another one, or raise data.max_length "
        "and data.max_prompt_length (or set data.overlong to truncate) for those that are too long"
    )
    counts = ", ".join(f"{count} {reason}" for reason, count in report.bad_row_counts.items())
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
