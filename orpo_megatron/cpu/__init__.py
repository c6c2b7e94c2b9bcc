"""Megatron on a CPU over gloo: for first runs, tests and debugging. The place that patches.

Megatron-Core and Megatron-Bridge take a CUDA device for granted. ``activate`` makes the calls that stand in the
way land on the CPU instead; each redirect below says why it is there. Where PyTorch sees a GPU nothing is touched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import queue
import sys
import types
from collections.abc import Callable
from typing import Any

_active = False

#: Factories to which Megatron passes ``device="cuda"`` or ``torch.cuda.current_device()``.
_FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "full", "linspace", "ones", "ones_like", "rand", "randint",
              "randn", "tensor", "zeros", "zeros_like")  # fmt: skip


def activate() -> bool:
    """Redirects CUDA calls to the CPU where this machine has no GPU; call it before Megatron-Bridge is imported.

    Returns:
        True if this process now runs on the CPU, False if PyTorch sees a GPU and nothing was changed.
    """
    global _active
    import torch

    if _active:
        return True
    if torch.cuda.is_available():
        return False
    # Megatron decorates functions with torch.compile; compiling them costs a CPU run minutes and wins nothing.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "megatron.core" in sys.modules:  # NeMo has imported it already
        torch.compiler.set_stance("force_eager")
    _redirect_devices()
    _redirect_cuda_runtime()
    _redirect_distributed()
    _stand_in_for_gpu_packages()
    _redirect_megatron()
    _redirect_nemo()
    _active = True
    return True


def _on_cpu(device: Any) -> Any:
    """Returns ``"cpu"`` for any way to name a CUDA device, else what was given."""
    import torch

    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    return torch.device("cpu") if isinstance(device, torch.device) and device.type == "cuda" else device


def _redirect_devices() -> None:
    """Creates and keeps on the CPU every tensor and module that is asked onto a GPU."""
    import torch

    def factory(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)  # page-locked memory needs a CUDA driver
            return function(*args, **kwargs)

        return on_cpu

    def mover(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple(_on_cpu(a) for a in args)
            return function(self, *args, **{k: _on_cpu(v) for k, v in kwargs.items()})

        return on_cpu

    with torch.device("meta"):
        torch.empty(0)  # such a context knows the factories by identity, from its first use on: that has to be now
    for name in _FACTORIES:
        setattr(torch, name, factory(getattr(torch, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        owner.to = mover(owner.to)  # type: ignore[method-assign]
        owner.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    plain_type = torch.Tensor.type

    def cuda_type(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The optimizers group parameters by the strings "torch.cuda.FloatTensor", ...; without this they find none.
        result = plain_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = cuda_type  # type: ignore[method-assign]


class _Stream:
    """Stands in for a CUDA stream or event: on a CPU everything is in order already."""

    device = "cpu"

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, *args: Any) -> float:
        return 0.0

    def is_capturing(self) -> bool:
        return False

    def record_event(self, *args: Any) -> _Stream:
        return _Stream()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in ("record", "synchronize", "wait", "wait_event", "wait_stream"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


class _Properties:
    """What Megatron reads from a device's properties."""

    name = "cpu"
    major, minor = 9, 0
    multi_processor_count = os.cpu_count() or 1
    total_memory = 0


def _redirect_cuda_runtime() -> None:
    """Answers questions to the CUDA runtime as an idle device would; ``is_available`` keeps telling the truth."""
    import torch

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # with 1, which Lightning sets, it goes by device_count

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    cuda = torch.cuda
    answers: dict[str, Any] = {
        "current_device": constant(torch.device("cpu")),
        "device_count": constant(1),
        "get_device_capability": constant((9, 0)),
        "get_device_name": constant("cpu"),
        "get_device_properties": constant(_Properties()),
        "is_current_stream_capturing": constant(False),
        "memory_stats": constant({}),
        "mem_get_info": constant((0, 0)),
        "current_stream": constant(_Stream()),
        "default_stream": constant(_Stream()),
        "stream": lambda *args: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
        # Megatron forks the CUDA generator; there is one generator here, and dropout is refused, so it draws nothing
        # after initialisation, which uses the CPU generator in any case (use_cpu_initialization).
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    nothing = "empty_cache manual_seed manual_seed_all reset_peak_memory_stats set_device set_stream synchronize"
    for name in nothing.split():
        answers[name] = constant(None)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        answers[name] = constant(0)
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(cuda.random, name, answers[name])  # activation recomputation asks here
    # torch.optim asks the accelerator whether a CUDA graph is being captured.
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None  # type: ignore[method-assign]


def _redirect_distributed() -> None:
    """Runs over gloo what asks for NCCL, without NCCL's options."""
    import torch.distributed as dist

    def over_gloo(function: Callable[..., Any], forced: bool) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            if forced or given.get("backend") == "nccl":
                given["backend"] = "gloo"
            return function(**{k: v for k, v in given.items() if k not in ("pg_options", "device_id")})

        return on_cpu

    dist.init_process_group = over_gloo(dist.init_process_group, forced=True)
    dist.new_group = over_gloo(dist.new_group, forced=False)
    plain_barrier = dist.barrier
    dist.barrier = lambda *args, **kwargs: plain_barrier(
        *args, **{k: v for k, v in kwargs.items() if k != "device_ids"}
    )


class _StandIn(types.ModuleType):
    """A module whose every attribute is a class that nothing is an instance of."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


class _NothingMeta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Nothing(metaclass=_NothingMeta):
    """Stands in for any class of an absent package: may be named and subclassed, never used."""


def _stand_in_for_gpu_packages() -> None:
    """Lets ``import megatron.bridge`` pass without the two GPU packages that it imports unconditionally.

    Everything else in Megatron checks for them, finds them absent and takes its own local layers, so each stand-in
    is as small as it can be: Transformer Engine exists only while Bridge's one LoRA module is being loaded, and of
    ``nvidia_resiliency_ext`` only ``inprocess``, for a type annotation.
    """
    package = types.ModuleType("nvidia_resiliency_ext")
    package.__path__ = []  # every other submodule is not found, as it should be
    sys.modules["nvidia_resiliency_ext"] = package
    sys.modules["nvidia_resiliency_ext.inprocess"] = _StandIn("nvidia_resiliency_ext.inprocess")
    sys.meta_path.insert(0, _BridgeImports())


class _BridgeImports(importlib.abc.MetaPathFinder):
    """Loads the few modules of Bridge that take a GPU or Transformer Engine to be there."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Finds these modules alone."""
        load = {
            "megatron.bridge.peft.lora_layers": _load_beside_stand_in,
            "megatron.bridge.peft.module_matcher": _load_and_correct,
            "megatron.bridge.peft.utils": _load_and_correct,
            "megatron.bridge.training.setup": _load_and_allow_cpu,
        }.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if load else None
        if load and spec and spec.loader:
            spec.loader.exec_module = functools.partial(load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _load_beside_stand_in(load: Callable[[types.ModuleType], None], module: types.ModuleType) -> None:
    """Loads a module that imports Transformer Engine whether it is there or not."""
    import megatron.core.transformer.moe.moe_utils  # noqa: F401  (the module imports it and must not spread the stand-in)

    names = ("transformer_engine", "transformer_engine.pytorch")
    sys.modules.update({name: _StandIn(name) for name in names})
    sys.modules[names[0]].pytorch = sys.modules[names[1]]  # type: ignore[attr-defined]
    try:
        load(module)
    finally:
        for name in names:
            del sys.modules[name]


def _load_and_correct(load: Callable[[types.ModuleType], None], module: types.ModuleType) -> None:
    """Loads a module that mistakes Megatron-Core's placeholders for Transformer Engine's classes."""
    load(module)
    for name in [name for name in vars(module) if name.startswith("HAVE_TE")]:
        setattr(module, name, False)


def _load_and_allow_cpu(load: Callable[[types.ModuleType], None], module: types.ModuleType) -> None:
    """Lets Bridge's set-up pass its one assertion that CUDA is there."""
    load(module)
    module.initialize_megatron = functools.partial(  # type: ignore[attr-defined]
        module.initialize_megatron, allow_no_cuda=True
    )


def _redirect_megatron() -> None:
    """What in Megatron-Core itself needs a GPU."""
    import megatron.core.datasets.utils
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    import megatron.core.distributed.param_and_grad_buffer as param_and_grad_buffer
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    from orpo_megatron.cpu.optimizer import fuse_adam, l2_norm, mend_adam_checkpoints

    # The wheel ships the compiled index helper; do not run make in site-packages.
    megatron.core.datasets.utils.compile_helpers = lambda: None
    # The tracker forks CUDA generators for dropout and for GPU initialisation; neither happens here. But it keeps a
    # state under each name, since Bridge does not resume from a checkpoint without any.
    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    random.CudaRNGStatesTracker.add = lambda self, name, seed: self.states_.setdefault(name, torch.get_rng_state())
    # Megatron's fallback takes torch.norm of each gradient, which adds up in fp32 on a CPU: 2e-4 off for an embedding,
    # and differently off for each shard of it.
    clip_grads.l2_norm_impl = l2_norm
    # The splits of an all-to-all have to be NumPy's; Megatron makes them so only on the way from a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    # Checkpoints are written by threads of this process here, so they need no process to hold the queue that they
    # report to, which would spend four seconds on importing PyTorch.
    filesystem_async._results_queue = queue.Queue()
    mend_adam_checkpoints(DistributedOptimizer)
    fuse_adam(MegatronOptimizer)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, _unless_alone(getattr(param_and_grad_buffer, name)))


def _redirect_nemo() -> None:
    """What in NeMo needs a GPU, where NeMo is imported."""
    if "nemo.lightning" not in sys.modules:
        return
    from nemo.lightning import nemo_logger
    from nemo.lightning.io import pl

    # It asks whether a checkpoint callback is one of nvidia_resiliency_ext's, whether that is there or not.
    nemo_logger.lcp = _StandIn("nvidia_resiliency_ext.ptl_resiliency.local_checkpoint_callback")
    # It asserts that CUDA is there to move what it loaded from one GPU to another.
    pl._fix_tensors_device = lambda checkpoint: checkpoint


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Returns what the call of Megatron-Core's returns for a tensor on a GPU."""
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Spares a rank without replicas a copy of all gradients, which gloo makes though nothing has to be sent."""

    @functools.wraps(collective)
    def alone_or_not(output: Any, source: Any, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is None or group.size() > 1:
            return collective(output, source, *args, group=group, **kwargs)
        if output.data_ptr() != source.data_ptr():
            output.copy_(source)
        return None

    return alone_or_not
