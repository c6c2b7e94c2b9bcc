"""What a program does before it imports Megatron: take the GPUs, or the CPU where there are none."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path

from orpo_megatron import cpu
from orpo_megatron.config import ConfigError
from orpo_megatron.console import say


def use_machine() -> None:
    """Prepares this process for Megatron; says so where it is the CPU.

    Raises:
        ConfigError: If there is a GPU, and a package that Megatron-Bridge needs on it is missing.
    """
    if cpu.activate():
        say("No GPU found: running on the CPU over gloo (for first runs, tests and debugging).")
    else:
        _check_gpu_packages()
        _spare_index_builder()
        note = apex_note()
        if note:
            say(note)
    _one_process()


def apex_note() -> str | None:
    """Returns what there is to say about NVIDIA apex, or None where it is installed.

    Megatron-Core uses its kernels where it finds them. The package called apex on PyPI is another one; it is told by
    lacking the subpackage ``optimizers``.
    """
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if any((Path(folder) / "optimizers").is_dir() for folder in folders):
        return None
    if spec is None:
        return "NVIDIA apex is not installed: Megatron-Core does without its fused kernels. NVIDIA's image ships it."
    return (
        f"The package apex at {', '.join(folders) or spec.origin} is not NVIDIA's, and Megatron-Core may fail on it. "
        "Uninstall it (pip uninstall apex), or use NVIDIA's image, which ships the right one."
    )


def _check_gpu_packages() -> None:
    """Checks that what Megatron-Bridge needs on a GPU is installed."""
    missing = [name for name in ("transformer_engine", "nvidia_resiliency_ext") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"Training on a GPU needs {' and '.join(missing)}, which NVIDIA's NeMo image ships (see the Dockerfile). "
            "To run on the CPU, set CUDA_VISIBLE_DEVICES= (empty)."
        )


def _spare_index_builder() -> None:
    """Has Megatron-Bridge not compile Megatron-Core's index of data sets, which packed rows do not use.

    It would run make in Megatron-Core's folder, where a wheel has no Makefile and not every user may write.
    """
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def _one_process() -> None:
    """Gives a run that torchrun did not start a free port, so that two such runs do not collide."""
    if "WORLD_SIZE" not in os.environ and "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
