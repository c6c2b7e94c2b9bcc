"""Counts what a rank sends, where every call of torch.distributed ends: at the methods of its process groups.

Import it after ``machine.use_machine()``.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from orpo_megatron.core.ranks import from_all_ranks

#: Phases of a step: Megatron-Core's schedule, which ends with the reduction of gradients; and what comes after it.
SCHEDULE, AFTER = "schedule", "after it"


class Kind(NamedTuple):
    """A kind of operation.

    Attributes:
        name: What it is called here.
        profiled: What the profiler calls it on gloo, which makes a reduce-scatter of an all-reduce.
        input_at: Which argument is what a rank puts in.
        sent: Bytes that each of ``n`` ranks sends, on average, for each byte that it puts in, by a ring algorithm.
    """

    name: str
    profiled: str
    input_at: int
    sent: Callable[[int], float]


def _share(n: int) -> float:
    """Every part but a rank's own travels once."""
    return (n - 1) / n


_ALL_REDUCE = Kind("all-reduce", "gloo:all_reduce", 0, lambda n: 2 * _share(n))
_ALL_GATHER = Kind("all-gather", "gloo:all_gather", 1, lambda n: n - 1)
_REDUCE_SCATTER = Kind("reduce-scatter", "gloo:all_reduce", 1, _share)
_ALL_TO_ALL = Kind("all-to-all", "gloo:all_to_all", 1, _share)
_RECEIVE = Kind("receive", "gloo:recv", 0, lambda n: 0)
#: The methods of a process group that send or receive, old names and new ones.
_METHODS = {
    "allreduce": _ALL_REDUCE,
    "allreduce_coalesced": _ALL_REDUCE,
    "allgather": _ALL_GATHER,
    "allgather_coalesced": _ALL_GATHER,
    "allgather_into_tensor_coalesced": _ALL_GATHER,
    "_allgather_base": _ALL_GATHER,
    "all_gather_single": _ALL_GATHER,
    "all_gather_single_coalesced": _ALL_GATHER,
    "reduce_scatter": _REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced": _REDUCE_SCATTER,
    "_reduce_scatter_base": _REDUCE_SCATTER,
    "reduce_scatter_single": _REDUCE_SCATTER,
    "reduce_scatter_single_coalesced": _REDUCE_SCATTER,
    "alltoall": _ALL_TO_ALL,
    "alltoall_base": _ALL_TO_ALL,
    "all_to_all_single": _ALL_TO_ALL,
    "broadcast": Kind("broadcast", "gloo:broadcast", 0, _share),
    "reduce": Kind("reduce", "gloo:reduce", 0, _share),
    "gather": Kind("gather", "gloo:gather", 1, _share),
    "scatter": Kind("scatter", "gloo:scatter", 1, _share),
    "send": Kind("send", "gloo:send", 0, lambda n: 1),
    "recv": _RECEIVE,
    "recv_anysource": _RECEIVE,
    "barrier": Kind("barrier", "gloo:barrier", 0, lambda n: 0),
}


class Entry(NamedTuple):
    """What was sent for one purpose.

    Attributes:
        phase: ``SCHEDULE`` or ``AFTER``.
        group: Megatron-Core's name of the group, in words.
        operation: Name of the kind of operation.
    """

    phase: str
    group: str
    operation: str


class CollectiveCounter:
    """Counts what this rank sends in the steps of ``bridge_loop.take_turns``.

    Attributes:
        calls: Name of a turn -> purpose -> calls, in groups of more than one rank.
        sent_bytes: Name of a turn -> purpose -> bytes that this rank sends.
        phases: Has to be the last callback of each turn, so that what others put before the optimizer is counted as
            coming after the schedule.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.calls: dict[str, Counter[Entry]] = {}
        self.sent_bytes: dict[str, Counter[Entry]] = {}
        self.phase = SCHEDULE
        self.phases = _Phases(self)

    @contextlib.contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Counts one step of a turn.

        Raises:
            RuntimeError: If the profiler saw other operations than were counted, on gloo.
        """
        self.phase = SCHEDULE
        calls, sent_bytes, counted = Counter[Entry](), Counter[Entry](), Counter[str]()
        self.calls[name], self.sent_bytes[name] = calls, sent_bytes

        def count(kind: Kind, group: dist.ProcessGroup, put_in: Any) -> None:
            counted[kind.profiled] += 1
            if group.size() > 1:
                words = group.group_desc.lower().replace("_", " ").removesuffix(" group")
                entry = Entry(self.phase, "all ranks" if words == "default pg" else words, kind.name)
                num_bytes = sum(tensor.nbytes for tensor in tree_leaves(put_in) if torch.is_tensor(tensor))
                calls[entry] += 1
                sent_bytes[entry] += round(kind.sent(group.size()) * num_bytes)

        with profile(activities=[ProfilerActivity.CPU]) as profiled, _observed(count):
            yield
        if dist.get_backend() == "gloo":
            seen = Counter(event.name for event in profiled.events() or () if event.name.startswith("gloo:"))
            if seen != counted:
                raise RuntimeError(f"The profiler saw {dict(seen)}, but counted were {dict(counted)}.")


@contextlib.contextmanager
def _observed(count: Callable[[Kind, dist.ProcessGroup, Any], None]) -> Iterator[None]:
    """Has every call of a process group's methods told to ``count``, with what the rank puts in."""
    # From the class's own dictionary, where they still are what binds to an instance.
    plain = {name: vars(dist.ProcessGroup)[name] for name in _METHODS}

    def observed(name: str) -> Callable[..., Any]:
        kind, method = _METHODS[name], getattr(dist.ProcessGroup, name)

        @functools.wraps(method)
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            count(kind, group, args[kind.input_at : kind.input_at + 1])
            return method(group, *args, **kwargs)

        return call

    for name in _METHODS:
        setattr(dist.ProcessGroup, name, observed(name))
    try:
        yield
    finally:
        for name, method in plain.items():
            setattr(dist.ProcessGroup, name, method)


class _Phases(Callback):
    """Tells a counter when the schedule is done."""

    def __init__(self, counter: CollectiveCounter) -> None:
        self.counter = counter

    def on_train_start(self, context: CallbackContext) -> None:
        optimizer: Any = context.optimizer
        take_step = optimizer.step

        def step() -> Any:
            self.counter.phase = AFTER
            return take_step()

        optimizer.step = step


def over_ranks(counter: CollectiveCounter) -> dict[str, list[dict[str, Any]]]:
    """Adds up what all ranks counted; all of them call it.

    Returns:
        Name of a turn -> a record for each purpose: phase, group, operation, calls and bytes.
    """
    ranks = from_all_ranks((counter.calls, counter.sent_bytes))
    totals = {}
    for turn in counter.calls:
        calls = sum((theirs[turn] for theirs, _ in ranks), Counter[Entry]())
        sent_bytes = sum((theirs[turn] for _, theirs in ranks), Counter[Entry]())
        totals[turn] = [
            {**entry._asdict(), "calls": calls[entry], "bytes": sent_bytes[entry]} for entry in sorted(calls)
        ]
    return totals
