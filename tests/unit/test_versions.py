"""What tells one installation from another."""

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from orpo_megatron import versions


def test_the_hash_of_the_source_changes_with_any_file_and_with_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = versions.source_hash()
    package = tmp_path / "orpo_megatron"
    shutil.copytree(Path(versions.__file__).parent, package)
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    assert versions.source_hash() == here
    (package / "bridge" / "common.py").touch()
    (package / "notes.txt").write_text("nothing")
    assert versions.source_hash() == here
    with (package / "bridge" / "common.py").open("a") as file:
        file.write("#")
    assert versions.source_hash() != here


def test_versions_are_those_installed() -> None:
    assert versions.versions()["torch"] == importlib.metadata.version("torch")
