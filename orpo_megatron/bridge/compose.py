"""A recipe's file merged with the files that it builds on."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from orpo_megatron.config import ConfigError

#: The key under which a file names those that it builds on, relative to its own folder.
BASE = "base"


def read_composed(path: Path, built_on_it: tuple[Path, ...] = ()) -> DictConfig:
    """Reads a file of a recipe with all that it builds on.

    Settings are merged one by one: a later base wins over an earlier one, and the file itself over its bases. A list
    or a plain value replaces what was there, and null takes it away.

    Args:
        path: YAML file.
        built_on_it: The files that led here, outermost first.

    Returns:
        The merged settings, without ``base``; interpolations are not resolved yet.

    Raises:
        ConfigError: If a file is not there or no mapping, ``base`` is neither a path nor a list of paths, or a file
            builds on itself.
        OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError: If a file cannot be read.
    """
    chain = (*built_on_it, path)
    if not path.is_file():
        named_by = f", the {BASE} of {built_on_it[-1]}" if built_on_it else ""
        raise ConfigError(f"There is no recipe at {path}{named_by}.")
    if path.resolve() in [above.resolve() for above in built_on_it]:
        raise ConfigError(f"A recipe must not build on itself: {' -> '.join(map(str, chain))}. Remove one {BASE}.")
    own = OmegaConf.load(path)
    if not OmegaConf.is_dict(own):
        raise ConfigError(f"The recipe {path} must be a mapping of sections, not a list. See recipes/.")
    bases = [read_composed(path.parent / name, chain) for name in _names(own, path)]
    merged = OmegaConf.merge(*bases, own)
    assert isinstance(merged, DictConfig)
    return merged


def _names(own: DictConfig, path: Path) -> list[str]:
    """Takes ``base`` out of a file's settings; returns the paths in it."""
    base = own.pop(BASE, [])
    base = OmegaConf.to_object(base) if OmegaConf.is_config(base) else base
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{BASE} ({base!r}) in {path} must be a path, or a list of paths, relative to that file.")
    return names
