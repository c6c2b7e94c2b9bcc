"""What knows Megatron-Bridge. What checks a recipe is imported without it (tests/unit/test_house.py lists that).

``from orpo_megatron.bridge import orpo`` turns one of Bridge's own configurations into an ORPO run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_megatron.bridge.adapt import orpo

__all__ = ["orpo"]


def __getattr__(name: str) -> Any:
    """Imports ``orpo``, and Megatron-Bridge with it, only where it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orpo_megatron.bridge.adapt import orpo

    return orpo
