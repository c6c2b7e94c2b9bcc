"""A conversion is there whole or not at all, and takes nobody else's folder."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from orpo_megatron.bridge.conversion.place import MARK, check_disk, check_new, written_beside
from orpo_megatron.config import ConfigError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_it_takes_its_place_once_it_is_whole(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "deep" / "model"
    if there:
        folder.mkdir(parents=True)
    with written_beside(folder, 10) as partial:
        assert partial == tmp_path / "deep" / "model.partial"
        (partial / "weights").write_text("w")
        assert not folder.exists() or names(folder) == []
    assert names(tmp_path / "deep") == ["model"] and names(folder) == ["weights"]


def test_it_goes_if_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_beside(tmp_path / "model", 10) as partial:
        (partial / "weights").write_text("w")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "model", tmp_path / "file"):
        with pytest.raises(ConfigError) as error:
            check_new(folder)
        assert str(error.value) == f"{folder} is not empty. Give another folder, or empty it."

    (tmp_path / "other.partial").mkdir()
    with pytest.raises(ConfigError) as error, written_beside(tmp_path / "other", 10):
        pass
    assert str(error.value) == (
        f"{tmp_path / 'other.partial'}, where other is written until it is whole, is there already and was not left "
        "by a conversion. Move it away, or give another folder."
    )
    assert names(tmp_path / "model") == ["notes"] and names(tmp_path / "other.partial") == []


WRITER = """
import sys, time
from pathlib import Path
from orpo_megatron.bridge.conversion.place import written_beside
with written_beside(Path(sys.argv[1]), 10) as partial:
    (partial / "shards").mkdir()
    (partial / "shards" / "half").write_text("h")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_one_that_was_killed_starts_over_and_one_that_runs_is_left_alone(tmp_path: Path) -> None:
    folder, partial = tmp_path / "model", tmp_path / "model.partial"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"writing\n"
        with pytest.raises(ConfigError) as error, written_beside(folder, 10):
            pass
        assert str(error.value) == f"Another conversion writes to {partial}. Wait for it, or give another folder."
        other.kill()
    assert names(partial) == [MARK, "shards"]
    with written_beside(folder, 10):
        assert names(partial) == [MARK]
        (partial / "weights").write_text("w")
    assert names(tmp_path) == ["model"] and names(folder) == ["weights"]


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(2 * 10**12, 10**12, 3_250_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = tmp_path / "not" / "there" / "yet"
    check_disk(folder, 3_250_000_000)
    with pytest.raises(ConfigError) as error, written_beside(folder, 141_107_412_992):
        pass
    assert str(error.value) == (
        f"{folder} would take 141.11 GB, but its disk has 3.25 GB free. Make room, or give a folder on another disk."
    )
    assert not folder.parent.exists() or names(folder.parent) == []
