"""What is said about this machine at the start of a run."""

import importlib
import sys
from pathlib import Path

import pytest

from orpo_megatron.machine import apex_note


def install(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that comes first, and nothing of apex from elsewhere."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    return tmp_path


def test_without_apex_its_absence_is_said(site: Path) -> None:
    assert apex_note() == (
        "NVIDIA apex is not installed: Megatron-Core does without its fused kernels. NVIDIA's image ships it."
    )


def test_another_package_of_that_name_is_said(site: Path) -> None:
    install(site, "apex/__init__.py", "apex/models.py")
    assert apex_note() == (
        f"The package apex at {site}/apex is not NVIDIA's, and Megatron-Core may fail on it. "
        "Uninstall it (pip uninstall apex), or use NVIDIA's image, which ships the right one."
    )


def test_nvidias_apex_needs_no_word(site: Path) -> None:
    install(site, "apex/__init__.py", "apex/optimizers/__init__.py")
    assert apex_note() is None
