"""What a program does before it imports Megatron: take the GPUs, or the CPU where there are none."""

from __future__ import annotations

import importlib.util
import os
import socket

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
    _one_process()


def _check_gpu_packages() -> None:
    """Checks that what Megatron-Bridge needs on a GPU is installed."""
    missing = [name for name in ("transformer_engine", "nvidia_resiliency_ext") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"Training on a GPU needs {' and '.join(missing)}, which NVIDIA's NeMo image ships (see the Dockerfile). "
            "To run on the CPU, set CUDA_VISIBLE_DEVICES= (empty)."
        )


def _one_process() -> None:
    """Gives a run that torchrun did not start a free port, so that two such runs do not collide."""
    if "WORLD_SIZE" not in os.environ and "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
