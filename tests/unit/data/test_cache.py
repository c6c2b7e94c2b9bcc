"""Folders that are built once, also when several ask at the same time."""

import errno
import hashlib
import os
import socket
import threading
from pathlib import Path

import pytest

from orpo_megatron.config import ConfigError
from orpo_megatron.data import cache
from orpo_megatron.data.cache import build_once, file_hash, locked, remembered_hash


def is_whole(folder: Path) -> bool:
    return (folder / "done").exists()


def test_what_is_not_whole_is_built_anew_and_what_is_stays(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "a"
    folder.mkdir(parents=True)
    (folder / "leftover").touch()
    built = []

    def build(scratch: Path) -> None:
        assert scratch != folder
        built.append(scratch)
        (scratch / "done").touch()

    for _ in range(2):
        build_once(folder, build, is_whole)
    assert len(built) == 1
    assert [path.name for path in folder.iterdir()] == ["done"]


def test_a_build_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    def fail(scratch: Path) -> None:
        (scratch / "half").touch()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        build_once(tmp_path / "a", fail, is_whole)
    assert not (tmp_path / "a").exists()
    build_once(tmp_path / "a", lambda scratch: (scratch / "done").touch(), is_whole)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["done"]


def test_the_second_who_asks_waits_for_the_first(tmp_path: Path) -> None:
    started, finish = threading.Event(), threading.Event()
    built = []

    def build(scratch: Path) -> None:
        built.append(scratch)
        started.set()
        assert finish.wait(20)
        (scratch / "done").touch()

    threads = [threading.Thread(target=build_once, args=(tmp_path / "a", build, is_whole)) for _ in range(2)]
    threads[0].start()
    assert started.wait(20)
    threads[1].start()
    threads[1].join(0.5)
    assert threads[1].is_alive()  # waits, although it found nothing whole
    assert len(built) == 1
    finish.set()
    for thread in threads:
        thread.join(20)
    assert len(built) == 1
    assert is_whole(tmp_path / "a")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ConfigError, match=rf"{tmp_path} does not lock files \({os.strerror(code)}\).*run.cache_dir"):
        build_once(tmp_path / "a", Path.mkdir, is_whole)
    assert not (tmp_path / "a").exists()


def test_the_lock_of_a_process_that_ended_is_free(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "a"):
            os._exit(0)
    os.waitpid(child, 0)
    with locked(tmp_path / "a"):
        assert (tmp_path / ".a.lock").exists()


def test_two_nodes_whose_locks_do_not_reach_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second node builds while the first one does, and finishes first: its folder stays, whole."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    scratches = []

    def build(name: str) -> None:
        def fill(scratch: Path) -> None:
            scratches.append(scratch)
            if name == "one":
                monkeypatch.setattr(socket, "gethostname", lambda: "two")
                build("two")
            (scratch / "done").write_text(name)

        build_once(tmp_path / "a", fill, is_whole)

    monkeypatch.setattr(socket, "gethostname", lambda: "one")
    build("one")
    assert (tmp_path / "a" / "done").read_text() == "two"
    assert len(set(scratches)) == 2 and not any(scratch.exists() for scratch in scratches)


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    """Returns a file that was changed an hour ago."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"rows")
    an_hour_ago = path.stat().st_mtime_ns - 3600 * 10**9
    os.utime(path, ns=(an_hour_ago, an_hour_ago))
    return path


def test_a_file_is_read_once_until_it_changes(old_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(cache, "file_hash", lambda path: read.append(path) or file_hash(path))
    hashes = [remembered_hash(old_file, tmp_path / "cache") for _ in range(2)]
    assert hashes == [hashlib.sha256(b"rows").hexdigest()] * 2
    assert read == [old_file]
    time_before = old_file.stat().st_mtime_ns
    for content, later in ((b"ROWS", 1), (b"longer", 0)):  # another time, another size
        old_file.write_bytes(content)
        os.utime(old_file, ns=(time_before + later, time_before + later))
        assert remembered_hash(old_file, tmp_path / "cache") == hashlib.sha256(content).hexdigest()
    assert len(read) == 3
    assert remembered_hash(old_file, tmp_path / "other") == hashlib.sha256(b"longer").hexdigest()
    assert len(read) == 4


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for content in (b"rows", b"ROWS"):
        path.write_bytes(content)
        assert remembered_hash(path, tmp_path / "cache") == hashlib.sha256(content).hexdigest()
    assert not (tmp_path / "cache").exists()
