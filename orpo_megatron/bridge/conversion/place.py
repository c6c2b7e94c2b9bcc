"""Where a conversion is written: beside its place until it is whole, by one process, with room on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from orpo_megatron.config import ConfigError

#: Marks a folder as one that a conversion may empty, and is locked while one writes to it.
MARK = ".orpo_megatron_conversion"


def check_new(folder: Path) -> None:
    """Checks that nothing would be overwritten.

    Raises:
        ConfigError: If there is something at the folder's place but an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty. Give another folder, or empty it.")


def check_disk(folder: Path, num_bytes: int) -> None:
    """Checks that a disk has room for what is about to be written.

    Args:
        folder: Where it will be; need not be there.
        num_bytes: Its size.

    Raises:
        ConfigError: If it has not.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise ConfigError(
            f"{folder} would take {in_gb(num_bytes)}, but its disk has {in_gb(free)} free. Make room, or give a "
            "folder on another disk."
        )


def in_gb(num_bytes: float) -> str:
    """Writes a size in gigabytes (10^9 bytes)."""
    return f"{num_bytes / 1e9:,.2f} GB"


@contextlib.contextmanager
def written_beside(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Gives a folder to write into, which takes its place in the end, or goes if that is not reached.

    What a conversion that was killed has left there is removed, so that the same command can be run again.

    Args:
        folder: The place: not there, or empty.
        num_bytes: Size of what will be written.

    Yields:
        ``folder.partial``, without anything of a former conversion.

    Raises:
        ConfigError: If there is no room, another process writes there, or the folder beside is somebody else's.
    """
    check_new(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    mark = partial / MARK
    if partial.exists() and not mark.exists():
        raise ConfigError(
            f"{partial}, where {folder.name} is written until it is whole, is there already and was not left by a "
            "conversion. Move it away, or give another folder."
        )
    partial.mkdir(parents=True, exist_ok=True)
    with open(mark, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"Another conversion writes to {partial}. Wait for it, or give another folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        try:
            _empty(partial)
            check_disk(folder, num_bytes)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    partial.rename(folder)  # over an empty folder, if there is one
    (folder / MARK).unlink()


def _empty(partial: Path) -> None:
    """Removes what a conversion that was killed has left."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
