"""Makes our settings readable for NeMo-Run, which parses a command line by the annotations in signatures."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def readable(cls: type[Settings]) -> type[Settings]:
    """Gives a dataclass a signature with types in place of their names, and ``Union`` in place of bars.

    Lists come first in a union: NeMo-Run takes the first type that a value can be read as, and all can be as text.

    Args:
        cls: The dataclass; returned.
    """
    hints, signature = typing.get_type_hints(cls), inspect.signature(cls)
    parameters = [p.replace(annotation=_plain(hints[p.name])) for p in signature.parameters.values()]
    cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return cls


def _plain(hint: Any) -> Any:
    """Returns a type without bars."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    options: list[Any] = list(typing.get_args(hint))
    options.sort(key=lambda option: str(typing.get_origin(option)) != str(list))
    return typing.Union[tuple(options)]  # noqa: UP007  (made of a tuple)
