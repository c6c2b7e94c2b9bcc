"""What the benchmarks share: interleaved timing, peak memory, facts about the machine, result files and tables.

Only ratios of things measured side by side are claims. So candidates take turns (A B C A B C ...), and a ratio is the
median of the ratios of single rounds: what slows the machine down for a while slows down both sides of it.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

# What the profiler says about itself belongs into no table. Both are read when torch is first imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "megatron-core", "megatron-bridge", "transformers", "trl", "liger-kernel", "triton", "numpy")
MIB = 2**20


@dataclass(frozen=True)
class Ratio:
    """How one candidate's seconds, or another figure, compare with another's over the rounds.

    Attributes:
        median: Median of the rounds' ratios.
        low: The smallest of them.
        high: The largest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        """Summarises the ratios of single rounds, at least one."""
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        """Returns median and spread: ``0.71 (0.69-0.74)``."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Timings:
    """Seconds of one candidate, one entry a round, in the order of the rounds.

    Attributes:
        rounds: Seconds, at least one.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds in seconds."""
        return statistics.median(self.rounds)

    def ratio_to(self, other: Timings) -> Ratio:
        """Returns these seconds over another candidate's of the same run, round by round."""
        return Ratio.of([mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True)])

    def as_dict(self) -> dict[str, Any]:
        """Returns what a result file keeps."""
        return {"median_seconds": self.median, "seconds": list(self.rounds)}


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    before: Callable[[], object] | None = None,
) -> dict[str, Timings]:
    """Times candidates in turns.

    Args:
        candidates: Name -> what is timed; its result is dropped before the next one starts.
        rounds: Rounds that count.
        warmup: Rounds before them that do not.
        device: Where the work happens; the clock waits for it.
        before: Runs before each call, untimed (to drop gradients, say).

    Returns:
        Name -> seconds of the rounds that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(-warmup, rounds):
        for name, function in candidates.items():
            if before is not None:
                before()
            gc.collect()
            taken = timed(function, device)
            if round_number >= 0:
                seconds[name].append(taken)
    return {name: Timings(tuple(taken)) for name, taken in seconds.items()}


def timed(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Returns the seconds of one call, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device | str) -> None:
    """Waits for a GPU; a CPU is never behind."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def default_device() -> torch.device:
    """Returns the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PeakMemory:
    """Measures the peak of what PyTorch allocates above what is allocated at the start, in bytes.

    A context manager; ``bytes`` is there after it. On a CPU the profiler reports every allocation and release of
    PyTorch's allocator, temporaries inside an operator included, so the figure is exact and repeats. On a GPU it is
    the caching allocator's own peak. Do not time what is measured.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Measures memory of this device."""
        self.device = torch.device(device)
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        """Starts to measure."""
        gc.collect()
        if self.device.type == "cuda":
            synchronise(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Sets ``bytes``."""
        if self.device.type == "cuda":
            synchronise(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*exception)
        recorded: Any = self._profile.profiler
        events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        self.bytes = peak([event.nbytes() for event in events])


def peak(changes: Sequence[int]) -> int:
    """Returns the largest running sum of allocations (positive) and releases (negative), at least 0."""
    return max(accumulate(changes, initial=0))


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Returns the peak of what a call allocates above what is there before, its result included."""
    with PeakMemory(device) as memory:
        function()
    return memory.bytes


def rss_bytes(field: str = "VmRSS") -> int:
    """Returns what this process holds of the machine's memory (Linux).

    Args:
        field: ``VmRSS`` for now, ``VmHWM`` for the highest since ``reset_peak_rss``.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this needs Linux.")


def reset_peak_rss() -> None:
    """Sets the process's highest resident size back to what it is now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def machine_facts() -> dict[str, Any]:
    """Returns processor, cores that this process may use, threads, memory, GPU and operating system."""
    cpu = platform.processor() or platform.machine()
    memory = 0
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that are compared; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def write_results(name: str, command: str, results: dict[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json``.

    Args:
        name: The benchmark.
        command: What was run, from the repository's root.
        results: Its figures.

    Returns:
        The file.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine_facts(),
        "versions": versions(),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in plain text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


@dataclass(frozen=True)
class Bar:
    """What a figure is held to.

    Attributes:
        name: What the figure is.
        value: The figure.
        bound: Its bound.
        at_most: Whether the bound is an upper one.
    """

    name: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def passed(self) -> bool:
        """Whether the figure keeps to its bound; a NaN does not."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Returns what a result file keeps."""
        return {"name": self.name, "value": self.value, "bound": self.bound, "passed": self.passed}

    def __str__(self) -> str:
        """Returns one line of a report."""
        sign = "<=" if self.at_most else ">="
        return f"{'PASS' if self.passed else 'MISSED'}  {self.name}: {self.value:.3g} (bar {sign} {self.bound:g})"
