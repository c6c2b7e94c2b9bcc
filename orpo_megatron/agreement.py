"""Do all processes start the same run? They compare notes before Megatron is imported; rank 0 says what differs."""

from __future__ import annotations

import functools
import itertools
import json
import os
import secrets
import socket
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from orpo_megatron.config import ConfigError, PeerError

#: How long a process waits for the others to come as far; torchrun starts them together.
START_SECONDS = 120.0
#: How long rank 0 stays for the others to hear that all end.
LEAVE_SECONDS = 3.0
#: How long a shared file system may take to show a new file to other nodes.
VISIBLE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_VALUES_SHOWN = 3
_TORCHRUN = "torchrun sets it: have each node start torchrun."
_meetings = itertools.count()

Fact = tuple[Any, str]
"""A value that must be the same in all processes, and what to do where it is not."""
Result = TypeVar("Result")


class Peers:
    """The processes of a run, which compare notes in a key-value store before they have a process group."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float) -> None:
        """Meets the others in PyTorch's ``store``; None for a single process.

        Args:
            store: The store.
            rank: This process's rank.
            world_size: Number of processes.
            timeout: Bounds each wait for other processes, in seconds.

        Raises:
            PeerError: If the processes do not count themselves alike.
        """
        self.timeout = timeout
        self._store, self._rank, self._world_size, self._token = store, rank, world_size, ""
        if store is None:
            return
        with _store_errors():
            self._token = store.compare_set("token", "", secrets.token_hex(8)).decode()
            number, agreed = store.add(f"rank {rank}", 1), store.compare_set("world", "", str(world_size)).decode()
        if number > 1:
            raise PeerError(f"RANK is {rank} in two processes. {_TORCHRUN}")
        if agreed != str(world_size):
            raise PeerError(f"WORLD_SIZE is {world_size} in rank {rank} and {agreed} in another process. {_TORCHRUN}")

    @classmethod
    def join(cls, timeout: float = START_SECONDS) -> Peers:
        """Meets the other processes at MASTER_ADDR and MASTER_PORT, if the environment speaks of any.

        A process may run one after another; its n-th meeting is with the n-th of the others.

        Args:
            timeout: Bounds each wait for other processes, in seconds.

        Raises:
            PeerError: If the environment is not one that torchrun makes, or nobody answers there.
        """
        variables = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        if not variables["RANK"] or variables["WORLD_SIZE"] in ("", "1"):
            return cls(None, 0, 1, timeout)
        for name, value in variables.items():
            if not (value if name == "MASTER_ADDR" else value.isdecimal()):
                kind = "a host" if name == "MASTER_ADDR" else "a number"
                raise PeerError(f"{name} ({value!r}) must be {kind}. {_TORCHRUN}")
        rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        if rank >= world_size:
            raise PeerError(f"RANK ({rank}) must be below WORLD_SIZE ({world_size}). {_TORCHRUN}")
        from torch.distributed import PrefixStore

        store = _store(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), rank == 0, timeout)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"orpo_megatron/{attempt}/{next(_meetings)}", store), rank, world_size, timeout)

    def settle(
        self, part: str, work: Callable[[], Result], facts: Callable[[Result], Mapping[str, Fact]] = lambda _: {}
    ) -> Result:
        """Does a part of the preparations in every process, and goes on only if all of them did it alike.

        Args:
            part: What is done, for messages; once in a run.
            work: Does it.
            facts: Of what ``work`` returns, what must be the same in all processes, by name.

        Returns:
            What ``work`` returned.

        Raises:
            ConfigError: The same in all processes, if ``work`` raised one in any of them or a fact differs.
            PeerError: If another process is not heard of in time.
        """
        if self._store is None:
            return work()
        record: dict[str, Any] = {"host": socket.gethostname()}
        try:
            result = work()
            record["facts"] = facts(result)
        except ConfigError as error:
            record["error"] = str(error)
        except Exception as error:  # a defect: the others shall end too, and this process show where it was
            self._tell(part, {**record, "error": f"{type(error).__name__}: {error}"})
            raise
        self._tell(part, record)
        verdict = self._verdict(part)
        if verdict is not None:
            raise ConfigError(verdict)
        return result

    def check_shared(self, folder: Path, setting: str) -> None:
        """Checks that all processes see the same folder, which is there.

        Raises:
            ConfigError: If another process does not see what rank 0 put there.
        """
        mark = folder / f".shared-{self._token}"

        def leave() -> None:
            if self._rank == 0:
                mark.touch()

        def look() -> None:
            end = time.monotonic() + VISIBLE_SECONDS
            while not mark.exists():
                if time.monotonic() > end:
                    raise ConfigError(
                        f"{setting} ({folder.absolute()}) is another folder than that of rank 0, which left a file "
                        "there. Give one on a file system that all nodes share."
                    )
                time.sleep(0.1)

        if self._store is None:
            return
        try:
            self.settle(f"making of {setting}", leave)
            self.settle(f"sharing of {setting}", look)
        finally:
            if self._rank == 0:
                mark.unlink(missing_ok=True)

    def _tell(self, part: str, record: Mapping[str, Any]) -> None:
        """Gives this process's record to rank 0."""
        with _store_errors():
            self._store.set(f"{part}/{self._rank}", json.dumps(record, default=str))

    def _verdict(self, part: str) -> str | None:
        """Returns what rank 0 found wrong with all records."""
        with _store_errors():
            if self._rank == 0:
                self._store.set(f"{part}/verdict", json.dumps(self._judge(part)))
            # Rank 0 may itself wait for a rank that comes as late as it may.
            elif not self._appear([f"{part}/verdict"], 2 * self.timeout):
                raise PeerError(_late("Rank 0", part, 2 * self.timeout, f"rank {self._rank}"))
            verdict: str | None = json.loads(self._store.get(f"{part}/verdict"))
            if verdict is not None:  # this process is about to end, and the store may be rank 0's
                self._store.set(f"{part}/heard {self._rank}", "")
                if self._rank == 0:
                    self._appear([f"{part}/heard {rank}" for rank in range(self._world_size)], LEAVE_SECONDS)
            return verdict

    def _judge(self, part: str) -> str | None:
        """Returns what is wrong with the records of all processes; rank 0 calls it."""
        ranks = range(self._world_size)
        if not self._appear([f"{part}/{rank}" for rank in ranks], self.timeout):
            missing = [rank for rank in ranks if not self._store.check([f"{part}/{rank}"])]
            return _late(f"{_ranks(missing).capitalize()} of {self._world_size}", part, self.timeout, "rank 0")
        return find_error([json.loads(self._store.get(f"{part}/{rank}")) for rank in ranks])

    def _appear(self, keys: list[str], seconds: float) -> bool:
        """Waits for keys; returns whether they came."""
        end = time.monotonic() + seconds
        while not self._store.check(keys):
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        return True


def find_error(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Compares what the processes say.

    Args:
        records: By rank: ``host``, and ``error`` (a message) or ``facts`` (a :data:`Fact` by name).

    Returns:
        The one message that tells the user, or None if all is well.
    """
    hosts = [record["host"] for record in records]
    errors = {rank: record["error"] for rank, record in enumerate(records) if "error" in record}
    if errors:
        first = next(iter(errors.values()))
        ranks = [rank for rank, error in errors.items() if error == first]
        return first if len(ranks) == len(records) else f"On {_places(ranks, hosts)}: {first}"
    missing = object()
    for name in dict.fromkeys(name for record in records for name in record["facts"]):
        said = [record["facts"].get(name, missing) for record in records]
        groups: dict[str, list[int]] = {}
        for rank, fact in enumerate(said):
            value = "not there" if fact is missing else json.dumps(fact[0], sort_keys=True, default=str)
            groups.setdefault(value, []).append(rank)
        if len(groups) > 1:
            remedy = next(fact[1] for fact in said if fact is not missing)
            return f"{name} differs between processes: {_values(groups, hosts)}. {remedy}"
    return None


def _values(groups: Mapping[str, list[int]], hosts: Sequence[str]) -> str:
    """Returns which ranks say what, in words; the most common value first."""
    by_size = sorted(groups.items(), key=lambda group: -len(group[1]))
    shown = [
        f"{textwrap.shorten(value, 80, placeholder='...')} on {_places(ranks, hosts)}"
        for value, ranks in by_size[:_VALUES_SHOWN]
    ]
    more = len(by_size) - len(shown)
    return ", ".join(shown) + (f", and {more} more values" if more else "")


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Returns ranks and their hosts in words: ``ranks 8-15 (node-2)``."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    more = [f"{len(names) - _VALUES_SHOWN} more"] if len(names) > _VALUES_SHOWN else []
    return f"{_ranks(ranks)} ({', '.join(names[:_VALUES_SHOWN] + more)})"


def _ranks(ranks: Sequence[int]) -> str:
    """Returns ranks in words: ``rank 3``, or ``ranks 0-7, 12``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join("-".join(map(str, span)) for span in spans)


def is_lost_peer(error: Exception) -> bool:
    """Returns whether an error of PyTorch's means that another process is gone, or did not answer in time."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "/gloo/" in str(error)  # gloo's name the line of its source


@functools.cache  # while this process lives: others may still be reading in it
def _store(host: str, port: int, is_rank_0: bool, timeout: float) -> Any:
    """Returns the store that all processes of the run meet in."""
    from torch.distributed import TCPStore

    with _store_errors():
        return TCPStore(
            host,
            port,
            # torchrun's agent keeps the store; without it rank 0 does, and the process group will meet there too
            is_master=is_rank_0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )


def _late(who: str, part: str, seconds: float, whom: str) -> str:
    return (
        f"{who} did not finish the {part} within {seconds:.0f} s of {whom}. See what these processes say themselves. "
        "Where they were only slow, start again; a recipe may raise dist.distributed_timeout_minutes."
    )


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turns what the store raises into one message."""
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise PeerError(
            f"{socket.gethostname()} does not reach rank 0's node at {os.environ.get('MASTER_ADDR')}, port "
            f"{os.environ.get('MASTER_PORT')}: {textwrap.shorten(str(error), 200)} Is it up, and can this node reach "
            "that address? Where it cannot, give torchrun on that node a better one as --local-addr."
        ) from error
