"""How the pairs of a step are spread over rows: one step readably, and the longest row of many steps at once."""

from __future__ import annotations

import heapq

import numpy as np

STEPS_AT_ONCE = 1024


def balance(costs: list[int], num_rows: int) -> tuple[list[list[int]], list[int]]:
    """Spreads items over rows: the longest item first, each into the row that is shortest so far.

    Ties go to the earlier item and the lower row. With one row more, the k-th longest row is never longer (by
    induction over the items), so an item list that fits some number of rows fits any larger one.

    Source: R. L. Graham, "Bounds on multiprocessing timing anomalies" (1969), the LPT rule.

    Args:
        costs: What each item takes of a row.
        num_rows: Number of rows.

    Returns:
        The items of every row, longest first, and what they sum up to.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]
    for item in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        load, row = heap[0]
        rows[row].append(item)
        heapq.heapreplace(heap, (load + costs[item], row))
    return rows, [load for load, _ in sorted(heap, key=lambda entry: entry[1])]


def longest_rows(costs: np.ndarray, num_rows: int) -> np.ndarray:
    """Returns what the longest row of every step holds: ``max(balance(costs_of_step, num_rows)[1])``, all at once.

    Ties are of no account here: whichever of two equal rows takes an item, the loads are the same.

    Args:
        costs: What each item takes of a row, int64 [steps, items]; 0 where a step has fewer items.
        num_rows: Number of rows.

    Returns:
        int64 [steps].
    """
    longest = np.empty(len(costs), np.int64)
    for start in range(0, len(costs), STEPS_AT_ONCE):
        items = np.ascontiguousarray(np.sort(costs[start : start + STEPS_AT_ONCE], axis=1)[:, ::-1].T)
        longest[start : start + STEPS_AT_ONCE] = _loads(items, num_rows).max(axis=0)
    return longest


def _loads(items: np.ndarray, num_rows: int) -> np.ndarray:
    """Returns the loads of every step's rows, int64 [rows, steps], for its items, longest first, [items, steps]."""
    num_items, num_steps = items.shape
    steps = np.arange(num_steps)
    # Times the number of rows, plus the row: the minimum of a step then tells both the load and whose it is.
    loads = np.repeat(np.arange(num_rows)[:, None], num_steps, axis=1)
    loads[:num_items] += items[:num_rows] * num_rows  # the first items open the rows
    for item in items[num_rows:]:
        loads[loads.min(axis=0) % num_rows, steps] += item * num_rows
    return loads // num_rows
