"""A run's preparations as all of its processes do them: alike, or rank 0 says what differs and nothing starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_megatron.agreement import Peers
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.facts import file_facts, model_facts, pair_facts, resume_facts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from orpo_megatron.data.prepare import Prepared


def prepare_alike(
    peers: Peers,
    recipe: Recipe,
    prepare: Callable[[], tuple[PretrainedConfig, Prepared, int]],
    *,
    make_run_dir: bool = True,
) -> tuple[PretrainedConfig, Prepared, int]:
    """Prepares a run in every process, if all have the same files, model, pairs and checkpoints.

    Args:
        peers: The processes.
        recipe: The recipe, on which they agree.
        prepare: Returns the model's configuration, data and plans, and the step that the run goes on from.
        make_run_dir: Whether the run has a folder, which they share.

    Returns:
        What ``prepare`` returned.

    Raises:
        ConfigError: The same in all processes, if one of them cannot, or they differ.
        PeerError: If another process is not heard of in time.
    """
    if make_run_dir:
        peers.settle("making of run.dir", lambda: _make_folder(recipe.run_dir, "run.dir"))
        peers.check_shared(recipe.run_dir, "run.dir")
    peers.settle("reading of the data files", lambda: None, lambda _: file_facts(recipe.data, recipe.cache_dir))
    return peers.settle(
        "tokenising and planning",
        prepare,
        lambda found: {**resume_facts(found[2]), **model_facts(found[0]), **pair_facts(found[1])},
    )


def _make_folder(folder: Path, setting: str) -> None:
    """Makes a folder that the run writes to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{setting} ({folder}) cannot be made: {error.strerror}. Give another folder.") from error
