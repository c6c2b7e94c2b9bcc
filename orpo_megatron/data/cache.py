"""Folders that are built once, whatever number of processes asks for them, and hashes that are worked out once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo_megatron.config import ConfigError

#: A file system may count time in steps of up to this many seconds.
COARSEST_CLOCK = 2.0


def build_once(folder: Path, build: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> None:
    """Makes sure that ``folder`` is there and whole, building it in at most one process at a time.

    The folder is built beside its place and renamed, so that another process sees all of it or nothing. Ranks and
    nodes that share the file system wait for one another on a lock file. Where locks do not reach other nodes, as
    with Lustre's ``localflock``, each node builds in a folder of its own and the first to finish wins.

    Args:
        folder: The folder to build.
        build: Fills the empty folder that it is given.
        is_whole: Whether a folder holds all that ``build`` writes; one that does not is built again.

    Raises:
        ConfigError: If the file system has no locks.
    """
    if is_whole(folder):
        return
    with locked(folder):
        if is_whole(folder):
            return
        scratch = _beside(folder, "building")
        for leftover in (scratch, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        scratch.mkdir()
        build(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not is_whole(folder):
                raise
            shutil.rmtree(scratch)  # another node was faster


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of ``path``, which need not be there, for one process of all that share the file system.

    The lock ends with the process, however that ends.

    Raises:
        ConfigError: If the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"The file system of {path.parent} does not lock files ({error.strerror}), so processes cannot share "
                "a cache there. Set run.cache_dir to a folder whose file system does, such as a local disk of each "
                "node, or mount this one with locks."
            ) from error
        yield


def file_hash(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_hash(path: str | Path, cache_dir: str | Path) -> str:
    """Returns :func:`file_hash` of a file, read once as long as its path, size and time of change stay.

    It is wrong only for a file that was changed in place to one of the same size and then given its old time again.
    A file that changed just now is not remembered: it could change once more within a step of the file system's
    clock.

    Args:
        path: The file.
        cache_dir: The hashes lie in ``hashes/`` under it.

    Raises:
        ConfigError: If the file system of ``cache_dir`` has no locks.
    """
    path = Path(path).expanduser().absolute()
    stat = path.stat()
    if time.time() - stat.st_mtime < COARSEST_CLOCK:
        return file_hash(path)
    identity = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    folder = Path(cache_dir).expanduser().absolute() / "hashes"
    known = folder / hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    if not known.exists():
        with locked(known):  # one process reads the file, the others wait
            if not known.exists():
                scratch = _beside(known, "writing")
                with open(scratch, "w", encoding="ascii") as file:
                    file.write(file_hash(path))
                    file.flush()
                    os.fsync(file.fileno())  # no power cut leaves an empty file under the final name
                scratch.replace(known)
    return known.read_text(encoding="ascii")


def _beside(path: Path, purpose: str) -> Path:
    """Returns where this node prepares ``path``; its lock keeps the node's other processes away."""
    return path.parent / f".{path.name}.{socket.gethostname()}.{purpose}"
