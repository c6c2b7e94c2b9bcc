"""Puts a recipe's plain values into Bridge's configuration objects."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar

import torch

from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.config import ConfigError, checked_value, nearest

Settings = TypeVar("Settings")
_PLAIN = (bool, int, float, str, type(None))


def apply_settings(target: Settings, values: Mapping[str, Any], section: str) -> Settings:
    """Sets fields of one of Bridge's configuration objects.

    Args:
        target: The object.
        values: Field names and values as YAML gives them; a dtype is named, such as ``bfloat16``.
        section: The recipe's section, for messages.

    Returns:
        ``target``.

    Raises:
        ConfigError: On an unknown name, or a value of another type than the field's.
    """
    hints = _hints(type(target))
    for key, value in values.items():
        if not hasattr(target, key):
            raise ConfigError(f"{section}.{key} is not a setting of {type(target).__name__}.{nearest(key, hints)}")
        setattr(target, key, _typed(value, hints.get(key), f"{section}.{key}"))
    return target


def build_settings(cls: type[Settings], values: Mapping[str, Any], section: str, **defaults: Any) -> Settings:
    """Builds one of Bridge's configuration objects from our defaults and a recipe's values, which win."""
    return apply_settings(cls(**defaults), values, section)


def check_kept(container: Any, recipe: Recipe) -> None:
    """Checks that Bridge has kept the numbers, words and truth values that the recipe gives.

    Args:
        container: Bridge's configuration, finalised.
        recipe: The recipe.

    Raises:
        ConfigError: Naming the first setting that Bridge has changed, because it follows from others.
    """
    for section, values in recipe.sections.items():
        target = getattr(container, section, None)
        for key, given in values.items() if isinstance(values, Mapping) else ():
            final = getattr(target, key, None)
            if given is None or not isinstance(given, (bool, int, float, str)):
                continue
            if isinstance(final, torch.dtype):
                final = str(final).removeprefix("torch.")
                given = str(given).removeprefix("torch.")
            lost = final is None and isinstance(given, str) and hasattr(target, key)
            if lost or (isinstance(final, (bool, int, float, str)) and final != given):
                raise ConfigError(
                    f"{section}.{key} ({given}) would become {final}: it follows from other settings, such as "
                    "mixed_precision. Leave it out, or change what it follows from."
                )


def _hints(cls: type) -> dict[str, Any]:
    """Returns the types of a dataclass's fields; those that cannot be resolved are not checked."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        return dict.fromkeys(names)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Returns ``value`` checked where the field's type is a plain one, as a dtype where it is a dtype."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    if torch.dtype in options and isinstance(value, str):
        dtype = getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{name} ({value!r}) must be a dtype such as float32 or bfloat16.")
        return dtype
    plain = all(option in _PLAIN or typing.get_origin(option) is Literal for option in options)
    return checked_value(value, hint, name) if plain else value
