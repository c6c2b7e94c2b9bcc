"""What a run shows: one progress bar (or plain lines) on rank 0, everything else in a log file per rank."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO, cast

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
#: How long other ranks of its node let the rank that speaks be heard, and how long those of other nodes do.
GRACE_SECONDS, OTHER_NODE_SECONDS = 10.0, 2.0


def rank() -> int:
    """Returns this process's rank, from the environment that torchrun sets."""
    return int(os.environ.get("RANK", "0"))


def say(message: str) -> None:
    """Prints a message on rank 0, above the progress bar if there is one."""
    if rank() == 0:
        _write(message)


def _write(message: str) -> None:
    """Prints a message on the terminal, wherever output goes now."""
    tqdm.write(message, file=sys.__stderr__)
    sys.__stderr__.flush()  # type: ignore[union-attr]


def report_error(message: str, each_node: bool = False) -> None:
    """Says an error that every rank may have found: rank 0 to the user, each rank to torchrun.

    torchrun ends all processes of a node as soon as one of them ends, so the other ranks wait for the one that speaks,
    which may have found the same, to be heard. The first node, where torchruns usually meet, leaves last: a torchrun
    that finds that place gone shows a page about it.

    Args:
        message: The error.
        each_node: Whether the first rank of each node says it, because rank 0 may be gone.
    """
    speaks = rank() == 0 or (each_node and os.environ.get("LOCAL_RANK", "0") == "0")
    several_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    on_first_node = os.environ.get("GROUP_RANK", "0") == "0"
    if speaks:
        _write(f"error: {message}")
    _tell_torchrun(message)
    if several_nodes and not on_first_node:
        time.sleep(OTHER_NODE_SECONDS)
    elif several_nodes or not speaks:
        time.sleep(GRACE_SECONDS)


def _tell_torchrun(message: str) -> None:
    """Leaves an error's message where torchrun looks for it, so that its closing summary shows it.

    Source: ``TORCHELASTIC_ERROR_FILE`` of torch.distributed.elastic.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Sends what Megatron prints, logs and warns of to a file, so that the terminal shows the run and nothing else.

    Uncaught errors still reach the terminal, since they are shown after this context is left. The file is not closed
    then: log handlers that were made meanwhile hold it for as long as the process lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    terminal = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    moved = [
        (handler, handler.stream)
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler) and handler.stream in terminal
    ]
    file = path.open("a", encoding="utf-8", buffering=1)
    for handler, _ in moved:
        handler.setStream(file)
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


def _is_terminal(stream: TextIO) -> bool:
    """Returns whether a progress bar can be seen; a terminal without a width, as some containers give, shows none."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


class ByteProgress:
    """How much of a conversion is done: a bar in a terminal, a line every ten seconds elsewhere, on rank 0."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        """Starts at none of ``total`` bytes; ``what`` is a word such as ``Writing``."""
        self.what, self.total, self.done = what, total, 0
        self.stream = stream or cast(TextIO, sys.__stderr__)
        self.last_line = time.monotonic()
        self.bar = tqdm(
            total=total,
            disable=rank() != 0 or not _is_terminal(self.stream),
            file=self.stream,
            desc=what,
            unit_scale=True,
            bar_format="{desc} {n_fmt}B of {total_fmt}B |{bar}| {remaining} left",
        )

    def __enter__(self) -> ByteProgress:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the bar as it stands."""
        self.bar.close()

    def add(self, num_bytes: int) -> None:
        """Shows that so many more bytes are done."""
        self.done += num_bytes
        self.bar.update(num_bytes)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line >= PLAIN_LINE_SECONDS and rank() == 0:
            self.last_line = now
            tqdm.write(f"{self.what} {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB", file=self.stream)


class Progress:
    """Loss, margin, accuracy, speed and time left: a bar in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, mode: str, first_step: int, num_steps: int, stream: TextIO | None = None) -> None:
        """Starts at ``first_step`` of ``num_steps``; ``mode`` is ``run.progress``."""
        self.stream = stream or cast(TextIO, sys.__stderr__)
        is_terminal = _is_terminal(self.stream)
        self.quiet = mode == "none"
        self.plain = mode == "plain" or (mode == "auto" and not is_terminal)
        self.first_step, self.num_steps = first_step, num_steps
        self.started = self.last_line = time.monotonic()
        show_bar = mode == "bar" or (mode == "auto" and is_terminal)
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            disable=not show_bar,
            file=self.stream,
            unit="step",
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",  # fits 80 columns
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step."""
        figures = (
            f"loss {metrics['loss']:.3f}  margin {metrics['logps/margins']:+.3f}  "
            f"accuracy {metrics['rewards/accuracies']:.2f}  {metrics['tokens'] / metrics['seconds']:,.0f} tok/s"
        )
        if not self.bar.disable:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        first, last = step == self.first_step + 1, step == self.num_steps
        if self.plain and (first or last or now - self.last_line >= PLAIN_LINE_SECONDS):
            self.last_line = now
            left = (now - self.started) / (step - self.first_step) * (self.num_steps - step)
            self._say(f"step {step}/{self.num_steps}  {figures}  {tqdm.format_interval(left)} left")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the result of an evaluation."""
        self._say(
            f"evaluation at step {step}: loss {metrics['loss']:.4f}  margin {metrics['logps/margins']:+.3f}  "
            f"accuracy {metrics['rewards/accuracies']:.3f}"
        )

    def _say(self, line: str) -> None:
        if not self.quiet:
            tqdm.write(line, file=self.stream)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self.bar.close()
