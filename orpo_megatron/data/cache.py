"""Folders that are built once, whatever number of processes asks for them, and never seen half built."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path


def build_once(folder: Path, build: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> None:
    """Makes sure that ``folder`` is there and whole, building it in at most one process at a time.

    The folder is built beside its place and renamed, so that another process sees all of it or nothing. Ranks and
    nodes that share the file system wait for one another on a lock file.

    Args:
        folder: The folder to build.
        build: Fills the empty folder that it is given.
        is_whole: Whether a folder holds all that ``build`` writes; one that does not is built again.
    """
    if is_whole(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_whole(folder):
            return
        scratch = folder.parent / f".{folder.name}.building"
        for leftover in (scratch, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        scratch.mkdir()
        build(scratch)
        scratch.rename(folder)


def file_hash(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
