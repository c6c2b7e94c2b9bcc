"""The typed batch that flows from the data set to the loss: one packed row of whole preference pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class PackedRow:
    """Whole preference pairs laid end to end in one row of ``t`` tokens, ready for packed attention.

    Sequence ``2 * i`` is the chosen and ``2 * i + 1`` the rejected side of pair ``i``. A row is made of segments,
    between which no attention passes: each sequence is one, or, where a pair shares its prompt, both of its sequences
    are, as [prompt, chosen, rejected]. A row without pairs holds one dummy sequence and scores nothing. The row is the
    same on every tensor- and pipeline-parallel rank and differs between data-parallel ranks. Context-parallel ranks
    each hold a share of it (``segments.context_shard``), whose ``t`` and ``n`` are smaller; what says "whole" stays.

    Attributes:
        tokens: Token ids, int64 [t].
        position_ids: Position of each token in its own sequence, int64 [t].
        padding_mask: True where a token is padding, bool [t].
        cu_seqlens: Where each padded segment starts in the whole row, closed by its length, int32 [segments + 1].
        prompt_ends: Where the shared prompt of each whole segment ends, from its own start, int64 [segments].
        chosen_ends: Where its chosen side ends, int64 [segments]; what follows, the rejected side and padding, attends
            to the prompt and to itself. Both are the segment's length where nothing is shared.
        score_positions: Positions whose hidden state predicts a scored token, sorted by sequence, int64 [n]. The end
            of a shared prompt predicts the first token of both responses.
        score_labels: The token that each of them predicts, int64 [n].
        score_is_response: True where that token belongs to a response (else to a prompt), bool [n].
        score_lengths: How many of the ``n`` belong to each sequence, int64 [sequences].
        num_scored_tokens: Scored tokens of each whole sequence, int64 [sequences].
        num_response_tokens: Those of them that belong to the response, int64 [sequences].
        pair_ids: Index of each pair in the data set, int64 [pairs].
        num_nll_tokens: NLL tokens in the *whole global batch*, over all rows and ranks.
        num_pairs: Pairs in the whole global batch.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    padding_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    prompt_ends: torch.Tensor
    chosen_ends: torch.Tensor
    score_positions: torch.Tensor
    score_labels: torch.Tensor
    score_is_response: torch.Tensor
    score_lengths: torch.Tensor
    num_scored_tokens: torch.Tensor
    num_response_tokens: torch.Tensor
    pair_ids: torch.Tensor
    num_nll_tokens: int
    num_pairs: int

    @property
    def max_seqlen(self) -> int:
        """Length of the longest segment in tokens, with its padding."""
        return int(self.cu_seqlens.diff().max())

    @property
    def longest_sequence(self) -> int:
        """Length of the longest sequence of a whole row in tokens, without padding; 0 if all is padding."""
        positions = self.position_ids[~self.padding_mask]
        return int(positions.max()) + 1 if len(positions) else 0

    @property
    def shares_prefix(self) -> bool:
        """Whether any two sequences of the row share their prompt."""
        return bool((self.chosen_ends < self.cu_seqlens.diff()).any())

    def to(self, device: torch.device | str | int) -> PackedRow:
        """Returns the row with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedRow:
        """Returns the row in page-locked memory; PyTorch's data loader calls this."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedRow:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: function(v) for name, v in values.items() if torch.is_tensor(v)}
        return replace(self, **moved)
