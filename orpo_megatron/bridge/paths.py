"""What a recipe names on file systems, and whether a job that starts elsewhere finds it there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.config import ConfigError


def check_paths(recipe: Recipe, mounts: Sequence[str] | None) -> None:
    """Checks that a job, which starts in another folder, finds what the recipe names.

    Args:
        recipe: The recipe.
        mounts: What its container sees of shared file systems; None without a container.

    Raises:
        ConfigError: If a path is relative to this folder or does not lie there.
    """
    data = recipe.data
    read = {
        "data.train": data.train,
        "data.eval": data.eval,
        "data.tokenizer": data.tokenizer,
        "data.chat_template": data.chat_template,
        "model.hf": recipe.hf,
        "checkpoint.pretrained_checkpoint": recipe.setting("checkpoint.pretrained_checkpoint"),
    }
    for setting, value in read.items():
        for name in [value] if isinstance(value, str) else value or []:
            if _is_path(name):
                _check_path(setting, Path(name), mounts)
    for setting, folder in {"run.dir": recipe.run_dir, "run.cache_dir": recipe.cache_dir}.items():
        _check_path(setting, folder, mounts)


def _check_path(setting: str, path: Path, mounts: Sequence[str] | None) -> None:
    """Checks one path; see ``check_paths``."""
    if not path.is_absolute():
        raise ConfigError(
            f"{setting} ({path}) is relative, and the job does not start in this folder. Give an absolute path on a "
            "file system that all nodes share."
        )
    if mounts is not None and not any(path.is_relative_to(mount) for mount in mounts):
        raise ConfigError(
            f"{setting} ({path}) must lie in a folder that the container shares with the nodes "
            f"({', '.join(mounts) or 'none is mounted'})."
        )


def _is_path(name: str) -> bool:
    """Returns whether a setting names something on this machine, rather than on a hub, or is a template's text."""
    try:
        return Path(name).exists()
    except OSError:  # too long for a name
        return False
