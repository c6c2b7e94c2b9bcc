"""ORPO for NVIDIA's stack: Megatron-Core, Megatron-Bridge and NeMo."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports ``fused_logps`` when it is asked for: reading a recipe takes no PyTorch."""
    if name == "fused_logps":
        from orpo_megatron.logps import fused_logps

        return fused_logps
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
