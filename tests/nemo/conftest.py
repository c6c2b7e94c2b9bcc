"""What tests of the NeMo way share: the recipe's own run of the same pairs, and its weights as a NeMo checkpoint."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
from forks import run_forked
from weights import save_nemo_checkpoint

from launch import TinyRecipe


@pytest.fixture(scope="session")
def small_tokenizer() -> None:
    """None: runs keep the recipe's tokenizer, which NeMo's factory has. Training one here would hang the forks."""


@pytest.fixture(scope="session")
def recipe_run(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe on one process through Megatron-Bridge, in the environment that has it."""
    assert "RECIPE_PYTHON" in os.environ, "RECIPE_PYTHON must name the interpreter of .venv, as make test-nemo does."
    run_dir = tmp_path_factory.mktemp("recipe") / "run"
    recipe = dataclasses.replace(tiny, python=os.environ["RECIPE_PYTHON"])
    recipe.train(run_dir, "run.export=false", processes=1)
    return run_dir


@pytest.fixture(scope="session")
def weights(tiny: TinyRecipe, recipe_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NeMo checkpoint of the weights that the recipe's run started from."""
    (source,) = (tiny.cache_dir / "models").glob("random-*")
    output = tmp_path_factory.mktemp("weights") / "nemo"
    run_forked(1, lambda: save_nemo_checkpoint(source, output))
    return output


@pytest.fixture(scope="session", autouse=True)
def _nemo_is_imported() -> None:
    """Imports NeMo once, for all forks."""
    import nemo.collections.llm  # noqa: F401

    assert sys.version_info[:2] == (3, 11)
