"""Folders that are built once, also when several ask at the same time."""

import threading
from pathlib import Path

import pytest

from orpo_megatron.data.cache import build_once


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
