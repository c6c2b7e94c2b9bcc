"""Ranks that are forks of this process: they need not import NeMo again, which takes half a minute."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 300.0


def run_forked(size: int, function: Callable[[], Any]) -> list[Any]:
    """Runs a function on every rank of a world, as torchrun would start it; returns what each rank returned.

    Raises:
        AssertionError: If a rank raises, with what all of them printed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        logs = [Path(scratch) / f"{rank}.txt" for rank in range(size)]
        ranks = [
            context.Process(target=_rank, args=(function, rank, size, port, pipes[rank][1], logs[rank]))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            results = [receiver.recv() if receiver.poll(TIMEOUT) else None for receiver, _ in pipes]
        except EOFError:
            results = [None] * size
        for process in ranks:
            process.join(10)
            process.kill()
        printed = "\n".join(log.read_text(errors="replace") for log in logs if log.is_file())
        assert all(result is not None and result[0] for result in results), f"{results}\n{printed}"
        return [result[1] for result in results]


def _rank(function: Callable[[], Any], rank: int, size: int, port: int, sender: Any, log: Path) -> None:
    """Runs one rank and sends whether it succeeded and what it returned."""
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # What was imported beforehand still holds pytest's replacements.
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = file
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="test",
            OMP_NUM_THREADS="1",
        )
        try:
            sender.send((True, function()))
        except BaseException as error:
            traceback.print_exc()
            sender.send((False, f"{type(error).__name__}: {error}"))
        sender.close()
