"""The step plan: which pairs an optimizer step trains, and how they are spread over packed rows.

The pairs of a step follow from the seed and the data alone. Rows only spread them, so that a run keeps its
trajectory when the cluster, the token budget or the row count changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from orpo_megatron.config import ConfigError
from orpo_megatron.data.packing import balance, longest_rows
from orpo_megatron.data.summary import PlanSummary

NllScope = Literal["prompt_and_response", "response"]
Integers = TypeVar("Integers", int, np.ndarray)


def round_up(value: Integers, multiple: int) -> Integers:
    """Returns ``value``, an integer or an array of them, rounded up to a multiple of ``multiple``."""
    return -(-value // multiple) * multiple


class Padding(NamedTuple):
    """What lengths are padded to a multiple of.

    Attributes:
        sequence: The length of every packed sequence.
        row: That of every row, by padding of its last sequence; a multiple of ``sequence``.
    """

    sequence: int
    row: int


@dataclass(frozen=True)
class PairLengths:
    """Token counts of every pair of a data set; each is at least 1.

    Attributes:
        prompt: Prompt tokens, int [pairs].
        chosen: Tokens of the chosen response alone, int [pairs].
        rejected: Tokens of the rejected response alone, int [pairs].
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def __post_init__(self) -> None:
        """Checks that no part of a pair is empty."""
        for name in ("prompt", "chosen", "rejected"):
            empty = np.flatnonzero(getattr(self, name) < 1)
            if empty.size:
                raise ValueError(f"The {name} of pair {empty[0]} has no tokens; every part needs at least 1.")

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.prompt)

    def padded_tokens(self, multiple: int, share_prefix: bool = False) -> np.ndarray:
        """Returns what each pair takes of a row, int64 [pairs].

        That is two sequences, each padded to ``multiple``, or with ``share_prefix`` one that holds the prompt once.
        """
        chosen_side: np.ndarray = self.prompt + self.chosen.astype(np.int64)
        if share_prefix:
            return round_up(chosen_side + self.rejected, multiple)
        rejected_side: np.ndarray = self.prompt + self.rejected.astype(np.int64)
        return round_up(chosen_side, multiple) + round_up(rejected_side, multiple)

    def nll_tokens(self, nll_scope: NllScope) -> np.ndarray:
        """Returns the tokens of each pair that the NLL covers, int64 [pairs].

        A sequence's first token has nothing that predicts it, so a prompt of p tokens counts p - 1.
        """
        num_tokens = self.chosen.astype(np.int64)
        if nll_scope == "prompt_and_response":
            num_tokens += self.prompt - 1
        return num_tokens


@dataclass(frozen=True)
class PairOrder:
    """Which pairs each step takes: whole epochs, each visiting every pair once, cut into steps.

    The last step of an epoch may have fewer pairs.

    Attributes:
        num_pairs: Pairs in the data set.
        pairs_per_step: Pairs in a step.
        seed: Seed of the epochs' permutations, or None for file order.
    """

    num_pairs: int
    pairs_per_step: int
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that visit every pair once."""
        return -(-self.num_pairs // self.pairs_per_step)

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the pairs in the order that ``epoch`` visits them, int64 [num_pairs], read-only."""
        return _permutation(self.num_pairs, self.seed, epoch)

    def pairs(self, step: int) -> np.ndarray:
        """Returns the pairs of ``step``, counted from the start of the run, int64 [pairs of the step]."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.pairs_per_step
        return self.epoch(epoch)[start : start + self.pairs_per_step]

    def epochs(self, num_steps: int) -> Iterator[np.ndarray]:
        """Yields the pairs of the first ``num_steps`` steps, an epoch at a time.

        Each array is int64 [steps, pairs_per_step]; -1 stands where a step has fewer pairs.
        """
        for epoch, first_step in enumerate(range(0, num_steps, self.steps_per_epoch)):
            missing = self.steps_per_epoch * self.pairs_per_step - self.num_pairs
            pairs = np.append(self.epoch(epoch), np.full(missing, -1))
            yield pairs.reshape(-1, self.pairs_per_step)[: num_steps - first_step]


@lru_cache(maxsize=2)
def _permutation(num_pairs: int, seed: int | None, epoch: int) -> np.ndarray:
    """Returns the order of one epoch; raw random words, whose stream NumPy never changes, are ranked."""
    if seed is None:
        order = np.arange(num_pairs, dtype=np.int64)
    else:
        words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_pairs)
        order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The pairs and rows of every step of a run; steps are numbered from 0.

    Built by ``make_plan`` or ``make_eval_plan``. Steps are worked out on demand, so memory grows with the data
    set and not with the number of steps.

    Attributes:
        lengths: Token counts of every pair.
        order: Which pairs each step takes.
        nll_scope: Which tokens of the chosen sequence the NLL covers.
        num_steps: Optimizer steps.
        rows_per_step: Packed rows in every step.
        max_tokens_per_row: Token budget of a row.
        sequence_multiple_of: What every sequence's length is padded to a multiple of.
        row_length_multiple_of: What every row's length is, by padding of its last sequence; a multiple of the former.
        whole_set_denominators: Whether the denominators are those of the data set and not of the step.
        share_prefix: Whether a row holds the prompt of a pair once.
    """

    lengths: PairLengths
    order: PairOrder
    nll_scope: NllScope
    num_steps: int
    rows_per_step: int
    max_tokens_per_row: int
    sequence_multiple_of: int
    row_length_multiple_of: int
    whole_set_denominators: bool = False
    share_prefix: bool = False

    @cached_property
    def _costs(self) -> np.ndarray:
        """What each pair takes of a row, int64 [pairs]."""
        return self.lengths.padded_tokens(self.sequence_multiple_of, self.share_prefix)

    @cached_property
    def _tokens(self) -> np.ndarray:
        """Tokens of each pair without padding, int64 [pairs]."""
        return self.lengths.padded_tokens(1)

    @cached_property
    def _nll_tokens(self) -> np.ndarray:
        """Tokens of each pair that the NLL covers, int64 [pairs]."""
        return self.lengths.nll_tokens(self.nll_scope)

    @cached_property
    def _denominators_of_set(self) -> tuple[int, int]:
        """NLL tokens and pairs of the whole data set."""
        return int(self._nll_tokens.sum()), len(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that visit every pair once."""
        return self.order.steps_per_epoch

    def pairs(self, step: int) -> np.ndarray:
        """Returns the pairs of ``step``, int64 [pairs of the step]."""
        return self.order.pairs(step)

    def rows(self, step: int) -> list[np.ndarray]:
        """Returns the pairs of every row of ``step``: ``rows_per_step`` arrays, int64, read-only, some maybe empty."""
        return list(_pack(self, step))

    def num_tokens(self, step: int) -> int:
        """Returns the tokens of ``step`` without padding, the prompt counted once for each side."""
        return int(self._tokens[self.pairs(step)].sum())

    def num_pairs(self, step: int) -> int:
        """Returns the denominator of the odds-ratio term at ``step``."""
        return self._denominators_of_set[1] if self.whole_set_denominators else len(self.pairs(step))

    def num_nll_tokens(self, step: int) -> int:
        """Returns the denominator of the token-averaged NLL at ``step``."""
        if self.whole_set_denominators:
            return self._denominators_of_set[0]
        return int(self._nll_tokens[self.pairs(step)].sum())

    def summary(self) -> PlanSummary:
        """Returns the plan's figures, of all of its steps."""
        num_tokens, longest_row, fill = 0, 0, 0.0
        positions = self.lengths.padded_tokens(1, self.share_prefix)
        of_pairs = [np.append(values, 0) for values in (self._costs, positions, self._tokens)]
        for pairs in self.order.epochs(self.num_steps):
            costs, positions, tokens = (values[pairs] for values in of_pairs)
            longest = round_up(longest_rows(costs, self.rows_per_step), self.row_length_multiple_of)
            fill += float((positions.sum(axis=1) / (self.rows_per_step * longest)).sum())
            num_tokens += int(tokens.sum())
            longest_row = max(longest_row, int(longest.max()))
        return PlanSummary(
            num_pairs=len(self.lengths),
            pairs_per_step=self.order.pairs_per_step,
            num_steps=self.num_steps,
            epochs=self.num_steps / self.steps_per_epoch,
            rows_per_step=self.rows_per_step,
            num_tokens=num_tokens,
            tokens_per_step=num_tokens / self.num_steps,
            fill=fill / self.num_steps,
            longest_row=longest_row,
            max_tokens_per_row=self.max_tokens_per_row,
        )


@lru_cache(maxsize=4)
def _pack(plan: StepPlan, step: int) -> list[np.ndarray]:
    """Packs a step; a step is asked for once for each of its rows, and only its neighbours soon after."""
    pairs = plan.pairs(step)
    rows, _ = balance(plan._costs[pairs].tolist(), plan.rows_per_step)
    packed = [pairs[np.array(row, dtype=np.int64)] for row in rows]
    for row in packed:
        row.flags.writeable = False
    return packed


def make_plan(
    lengths: PairLengths,
    *,
    nll_scope: NllScope,
    pairs_per_step: int,
    num_steps: int,
    seed: int,
    shuffle: bool,
    max_tokens_per_row: int,
    rows_multiple_of: int = 1,
    rows_per_step: int | None = None,
    sequence_multiple_of: int = 1,
    row_length_multiple_of: int = 1,
    share_prefix: bool = False,
) -> StepPlan:
    """Plans a training run.

    Args:
        lengths: Token counts of every pair.
        nll_scope: Which tokens of the chosen sequence the NLL covers.
        pairs_per_step: Pairs in a step; the last step of an epoch may have fewer.
        num_steps: Optimizer steps.
        seed: Seed of the epochs' orders, from 0.
        shuffle: Whether each epoch has an order of its own; file order otherwise.
        max_tokens_per_row: Token budget of a row.
        rows_multiple_of: What the row count must be a multiple of: the data-parallel size, times what a virtual
            pipeline demands of the number of microbatches.
        rows_per_step: Rows in every step, as a user or a checkpoint gives it; the fewest where it is None.
        sequence_multiple_of: What every sequence's length is padded to a multiple of.
        row_length_multiple_of: What every row's length is, by padding of its last sequence; a multiple of the former.
        share_prefix: Whether a row holds the prompt of a pair once.

    Returns:
        The plan.

    Raises:
        ConfigError: If a pair does not fit the budget, or ``rows_per_step`` fits neither the budget nor
            ``rows_multiple_of``.
    """
    order = PairOrder(len(lengths), pairs_per_step, seed if shuffle else None)
    plan = StepPlan(
        lengths,
        order,
        nll_scope,
        num_steps,
        rows_multiple_of,
        max_tokens_per_row,
        sequence_multiple_of,
        row_length_multiple_of,
        share_prefix=share_prefix,
    )
    return _settle_rows(plan, rows_multiple_of, rows_per_step)


def make_eval_plan(
    lengths: PairLengths,
    *,
    nll_scope: NllScope,
    pairs_per_step: int,
    max_tokens_per_row: int,
    rows_multiple_of: int = 1,
    rows_per_step: int | None = None,
    sequence_multiple_of: int = 1,
    row_length_multiple_of: int = 1,
    share_prefix: bool = False,
) -> StepPlan:
    """Plans one pass in file order, whose steps' loss shares add up to the exact loss over the whole set.

    Every step's denominators are those of the set. Arguments and errors are those of ``make_plan``.
    """
    order = PairOrder(len(lengths), pairs_per_step, seed=None)
    num_steps = order.steps_per_epoch
    plan = StepPlan(
        lengths,
        order,
        nll_scope,
        num_steps,
        rows_multiple_of,
        max_tokens_per_row,
        sequence_multiple_of,
        row_length_multiple_of,
        whole_set_denominators=True,
        share_prefix=share_prefix,
    )
    return _settle_rows(plan, rows_multiple_of, rows_per_step)


def _settle_rows(plan: StepPlan, multiple: int, given: int | None) -> StepPlan:
    """Returns the plan with its row count: the given one if it fits, else the fewest rows that do.

    Raises:
        ConfigError: If a pair alone passes the budget, or the given count does not fit the ranks or the budget.
    """
    costs, multiple_of = plan._costs, plan.row_length_multiple_of
    budget = plan.max_tokens_per_row // multiple_of * multiple_of  # what a row may have before its last padding
    pair = int(costs.argmax())
    if costs[pair] > budget:
        least = round_up(int(costs[pair]), multiple_of)
        raise ConfigError(
            f"data.max_tokens_per_row ({plan.max_tokens_per_row}) must hold the longest pair: pair {pair} takes "
            f"{least} tokens with padding. Use at least {least}, or lower data.max_length."
        )
    fewest = _fewest_rows(plan.order, costs, plan.num_steps, budget, multiple)
    if given is None:
        return replace(plan, rows_per_step=fewest)
    if given % multiple:
        raise ConfigError(
            f"data.rows_per_step ({given}) must be a multiple of {multiple}, the rows that all ranks take at once. "
            f"Use {max(given // multiple * multiple, fewest)} or, where a checkpoint fixes it, a data-parallel size "
            f"that divides it."
        )
    if given < fewest:
        raise ConfigError(
            f"data.rows_per_step ({given}) is too few for data.max_tokens_per_row ({plan.max_tokens_per_row}): it "
            f"takes {fewest} rows to keep every step within the budget. Use {fewest}, or raise "
            "data.max_tokens_per_row. Where a checkpoint fixes the rows, raise that, or set data.share_prefix and "
            "data.pad_to_multiple_of as they were."
        )
    return replace(plan, rows_per_step=given)


def _fewest_rows(order: PairOrder, costs: np.ndarray, num_steps: int, budget: int, multiple: int) -> int:
    """Returns the smallest multiple of ``multiple`` rows that hold every step within the budget.

    One pass over the steps is enough, because more rows never make the longest row longer (``balance``).
    """
    rows = multiple
    # In file order every epoch is the first one again.
    distinct_steps = num_steps if order.seed is not None else min(num_steps, order.steps_per_epoch)
    costs = np.append(costs, 0)
    for pairs in order.epochs(distinct_steps):
        costs_of_steps = costs[pairs]
        totals, longest = costs_of_steps.sum(axis=1), costs_of_steps.max(axis=1)
        rows = max(rows, round_up(-(-int(totals.max()) // budget), multiple))
        # Graham's bound passes many steps: no row is longer than totals / rows + longest * (1 - 1 / rows).
        left = costs_of_steps[totals + (rows - 1) * longest > rows * budget]
        while len(left := left[longest_rows(left, rows) > budget]):
            rows += multiple
    return rows
