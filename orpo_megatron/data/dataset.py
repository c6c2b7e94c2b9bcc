"""The data set that training reads: every packed row of every step, in plan order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from orpo_megatron.batch import PackedRow
from orpo_megatron.config import ConfigError
from orpo_megatron.data.plan import NllScope, StepPlan, round_up


class PairTokens(Protocol):
    """Token ids of one pair; a response starts where the prompt ends."""

    @property
    def prompt(self) -> np.ndarray:
        """Token ids of the prompt, int [at least 1]."""

    @property
    def chosen(self) -> np.ndarray:
        """Token ids of the chosen response alone, int [at least 1]."""

    @property
    def rejected(self) -> np.ndarray:
        """Token ids of the rejected response alone, int [at least 1]."""


class TokenStore(Protocol):
    """Random access to the token ids of a data set's pairs."""

    def __getitem__(self, index: int) -> PairTokens:
        """Returns pair ``index``."""


class PackedRows(Dataset[PackedRow]):
    """Row ``i % rows_per_step`` of step ``i // rows_per_step`` at index ``i``.

    Read it in order, one row per microbatch, and every step gets its pairs and no others, also after a resume.
    """

    def __init__(self, store: TokenStore, plan: StepPlan, pad_token_id: int, fill_empty_rows: bool = False) -> None:
        """Joins a plan with the token ids.

        Args:
            store: Token ids of the pairs that the plan was made for.
            plan: The step plan.
            pad_token_id: Token id that fills padding.
            fill_empty_rows: Whether a row without pairs holds a sequence of the step's first pair, not scored, rather
                than padding. The auxiliary losses of a mixture of experts are means over a row's tokens, NaN without
                any.
        """
        self.store = store
        self.plan = plan
        self.pad_token_id = pad_token_id
        self.fill_empty_rows = fill_empty_rows

    def __len__(self) -> int:
        """Returns the rows of all steps."""
        return self.plan.num_steps * self.plan.rows_per_step

    def __getitem__(self, index: int) -> PackedRow:
        """Returns one row.

        Raises:
            IndexError: If the run has no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} is outside the plan's {len(self)} rows.")
        step, row = divmod(index, self.plan.rows_per_step)
        pair_ids = self.plan.rows(step)[row]
        return pack_row(
            [self.store[pair] for pair in pair_ids.tolist()],
            pair_ids,
            nll_scope=self.plan.nll_scope,
            sequence_multiple_of=self.plan.sequence_multiple_of,
            row_length_multiple_of=self.plan.row_length_multiple_of,
            pad_token_id=self.pad_token_id,
            num_nll_tokens=self.plan.num_nll_tokens(step),
            num_pairs=self.plan.num_pairs(step),
            share_prefix=self.plan.share_prefix,
            filler=self.store[int(self.plan.pairs(step)[0])] if self.fill_empty_rows else None,
        )


def pack_row(
    pairs: Sequence[PairTokens],
    pair_ids: np.ndarray,
    *,
    nll_scope: NllScope,
    sequence_multiple_of: int,
    row_length_multiple_of: int = 1,
    pad_token_id: int,
    num_nll_tokens: int,
    num_pairs: int,
    share_prefix: bool = False,
    filler: PairTokens | None = None,
) -> PackedRow:
    """Lays pairs end to end in one row: chosen, rejected, chosen, rejected and so on.

    Each side has its own copy of the prompt, or the two share one: prompt, chosen response, rejected response.

    Responses are scored on both sides; ``prompt_and_response`` also scores the prompt of the chosen side, but for
    its first token, which nothing predicts. A position predicts the token after it. No row is empty: without
    pairs it holds one dummy sequence that scores nothing.

    Args:
        pairs: Token ids of the row's pairs.
        pair_ids: Their indices in the data set, int64 [pairs].
        nll_scope: Which tokens of the chosen sequence the NLL covers.
        sequence_multiple_of: What the length of every sequence, or of a pair that shares its prompt, is padded to a
            multiple of, at its end.
        row_length_multiple_of: What the row's length is padded to a multiple of, at the end of its last sequence; a
            multiple of the former.
        pad_token_id: Token id that fills padding.
        num_nll_tokens: NLL tokens in the whole global batch.
        num_pairs: Pairs in the whole global batch.
        share_prefix: Whether the two sides of a pair share one prompt.
        filler: A pair whose chosen side is the dummy sequence of a row without pairs; all padding where it is None.

    Returns:
        The row, on the CPU.
    """
    builder = _RowBuilder(sequence_multiple_of, row_length_multiple_of, pad_token_id)
    for number, pair in enumerate(pairs, start=1):
        first, last = 1 if nll_scope == "prompt_and_response" else len(pair.prompt), number == len(pairs)
        if share_prefix:
            builder.add_shared(pair, first, last)
        else:
            builder.add(np.concatenate((pair.prompt, pair.chosen)), first, len(pair.prompt), last=False)
            builder.add(np.concatenate((pair.prompt, pair.rejected)), len(pair.prompt), len(pair.prompt), last)
    if not pairs:
        dummy = np.empty(0, dtype=np.int64) if filler is None else np.concatenate((filler.prompt, filler.chosen))
        builder.add(dummy, first_scored=len(dummy), prompt_length=len(dummy), last=True)
    return builder.row(pair_ids, num_nll_tokens, num_pairs)


class _RowBuilder:
    """Collects the segments and the sequences of one row."""

    def __init__(self, sequence_multiple_of: int, row_length_multiple_of: int, pad_token_id: int) -> None:
        self._multiple = sequence_multiple_of
        self._row_multiple = row_length_multiple_of
        self._pad_token_id = pad_token_id
        self._starts = [0]
        self._prompt_ends: list[int] = []
        self._chosen_ends: list[int] = []
        self._tokens: list[np.ndarray] = []
        self._position_ids: list[np.ndarray] = []
        self._padding: list[np.ndarray] = []
        self._score_positions: list[np.ndarray] = []
        self._score_labels: list[np.ndarray] = []
        self._score_is_response: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, first_scored: int, prompt_length: int, last: bool) -> None:
        """Appends a sequence whose tokens from ``first_scored`` on are scored."""
        scored = np.arange(first_scored, len(tokens))
        self._score(scored - 1, tokens[scored], scored >= prompt_length)
        length = self._append(tokens, last)
        self._prompt_ends.append(length)
        self._chosen_ends.append(length)

    def add_shared(self, pair: PairTokens, first_scored: int, last: bool) -> None:
        """Appends both sequences of a pair with one prompt; the chosen one is scored from ``first_scored`` on."""
        prompt_end, chosen_end = len(pair.prompt), len(pair.prompt) + len(pair.chosen)
        tokens = np.concatenate((pair.prompt, pair.chosen, pair.rejected))
        scored = np.arange(first_scored, chosen_end)
        self._score(scored - 1, tokens[scored], scored >= prompt_end)
        rejected = np.arange(chosen_end, len(tokens))
        before = np.concatenate(([prompt_end - 1], rejected[:-1]))  # the prompt's end predicts both first tokens
        self._score(before, pair.rejected, np.ones(len(rejected), dtype=bool))
        self._append(tokens, last, rejected_start=chosen_end, skipped=len(pair.chosen))
        self._prompt_ends.append(prompt_end)
        self._chosen_ends.append(chosen_end)

    def _score(self, positions: np.ndarray, labels: np.ndarray, is_response: np.ndarray) -> None:
        """Notes what is scored of a sequence of the segment that comes next."""
        self._score_positions.append(self._starts[-1] + positions)
        self._score_labels.append(labels.astype(np.int64))
        self._score_is_response.append(is_response)

    def _append(self, tokens: np.ndarray, last: bool, rejected_start: int | None = None, skipped: int = 0) -> int:
        """Appends a segment, positions from ``rejected_start`` on less ``skipped``; returns its padded length.

        The last one fills the row up to what its length is to be a multiple of.
        """
        # Two tokens at least, so that a dummy sequence has a shape that attention kernels take.
        start, length = self._starts[-1], round_up(max(len(tokens), 2), self._multiple)
        if last:
            length = round_up(start + length, self._row_multiple) - start
        padded = np.full(length, self._pad_token_id, dtype=np.int64)
        padded[: len(tokens)] = tokens
        places = np.arange(length)
        self._tokens.append(padded)
        self._padding.append(places >= len(tokens))
        self._position_ids.append(places if rejected_start is None else places - skipped * (places >= rejected_start))
        self._starts.append(start + length)
        return length

    def row(self, pair_ids: np.ndarray, num_nll_tokens: int, num_pairs: int) -> PackedRow:
        """Returns the finished row."""
        num_scored = torch.tensor([len(labels) for labels in self._score_labels], dtype=torch.int64)
        num_response = torch.tensor([int(part.sum()) for part in self._score_is_response], dtype=torch.int64)
        return PackedRow(
            tokens=_join(self._tokens),
            position_ids=_join(self._position_ids),
            padding_mask=_join(self._padding),
            cu_seqlens=torch.tensor(self._starts, dtype=torch.int32),
            prompt_ends=torch.tensor(self._prompt_ends, dtype=torch.int64),
            chosen_ends=torch.tensor(self._chosen_ends, dtype=torch.int64),
            score_positions=_join(self._score_positions),
            score_labels=_join(self._score_labels),
            score_is_response=_join(self._score_is_response),
            score_lengths=num_scored,
            num_scored_tokens=num_scored,
            num_response_tokens=num_response,
            pair_ids=torch.from_numpy(pair_ids.astype(np.int64)),
            num_nll_tokens=num_nll_tokens,
            num_pairs=num_pairs,
        )


def _join(parts: list[np.ndarray]) -> torch.Tensor:
    """Returns the arrays of a row's sequences as one tensor."""
    return torch.from_numpy(np.concatenate(parts))


def collate_fn(rows: Sequence[PackedRow]) -> PackedRow:
    """Returns the only row of a microbatch.

    Raises:
        ConfigError: If a microbatch has more than one row.
    """
    if len(rows) != 1:
        raise ConfigError(
            f"train.micro_batch_size ({len(rows)}) must be 1: a packed row is a microbatch. Raise "
            f"data.max_tokens_per_row to put more pairs in one."
        )
    return rows[0]
