"""The redirects that let Megatron run on a CPU: nothing without need, and each of them doing what it says."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.filterwarnings("ignore")


def run_python(script: str) -> str:
    """Runs a script in a process of its own and returns what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_is_touched_where_there_is_a_gpu() -> None:
    script = """
        import os, sys
        import torch, torch.distributed
        from orpo_megatron import cpu

        def state():
            owners = (torch, torch.Tensor, torch.nn.Module, torch.cuda, torch.distributed, torch.optim.Optimizer)
            found = {(owner.__name__, name): id(value) for owner in owners for name, value in vars(owner).items()}
            return found, set(sys.modules), list(map(id, sys.meta_path)), dict(os.environ)

        torch.cuda.is_available = lambda: True
        before = state()
        assert cpu.activate() is False
        assert not cpu._active
        after = state()
        assert before == after, [key for key in before[0] if before[0][key] != after[0].get(key)]
        assert ("torch", "zeros") in after[0] and ("torch.distributed", "new_group") in after[0]
        print("untouched")
    """
    assert run_python(script) == "untouched"


def test_importing_the_module_touches_nothing() -> None:
    script = """
        import sys
        from orpo_megatron import cpu
        print([name for name in sys.modules if name.split(".")[0] in ("torch", "megatron")])
    """
    assert run_python(script) == "[]"


def test_lightnings_way_to_look_for_a_gpu_finds_none() -> None:
    """It asks PyTorch to go by the number of devices, which is 1 here for Megatron."""
    script = """
        import os
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        from orpo_megatron import cpu
        cpu.activate()
        import torch
        print(torch.cuda.device_count(), torch.cuda.is_available())
    """
    assert run_python(script).splitlines()[-1] == "1 False"


def test_activating_twice_redirects_once(megatron_on_cpu: None) -> None:
    from orpo_megatron import cpu

    before = torch.zeros, torch.Tensor.to, dist.init_process_group, len(sys.meta_path)
    assert cpu.activate() is True
    assert before == (torch.zeros, torch.Tensor.to, dist.init_process_group, len(sys.meta_path))
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert torch.cuda.is_available() is False  # the truth


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 3)])
def test_tensors_asked_onto_a_gpu_are_on_the_cpu(megatron_on_cpu: None, device: str | torch.device) -> None:
    like = torch.tensor([1.0, 2.0])
    made = [
        torch.zeros(2, device=device),
        torch.ones(2, device=device),
        torch.empty(2, device=device, pin_memory=True),
        torch.full((2,), 7.0, device=device),
        torch.arange(2, device=device),
        torch.tensor([1, 2], device=device),
        torch.as_tensor([1, 2], device=device),
        torch.rand(2, device=device),
        torch.randn(2, device=device),
        torch.randint(5, (2,), device=device),
        torch.linspace(0, 1, 2, device=device),
        torch.zeros_like(like, device=device),
        torch.ones_like(like, device=device),
        torch.empty_like(like, device=device),
        like.to(device),
        like.to(device, torch.float64),
        like.to(device=device, non_blocking=True),
        like.cuda(),
        like.cuda(0),
        like.pin_memory(),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert [tensor.tolist() for tensor in made[3:7]] == [[7.0, 7.0], [0, 1], [1, 2], [1, 2]]
    assert made[15].dtype == torch.float64 and torch.equal(made[14], like)
    module = torch.nn.Linear(2, 2)
    for moved in (module.to(device), module.cuda(), module.cuda(1)):
        assert moved is module and module.weight.device.type == "cpu"


def test_what_is_asked_onto_the_cpu_or_nowhere_is_left_alone(megatron_on_cpu: None) -> None:
    assert torch.zeros(2).device.type == torch.zeros(2, device="cpu").device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.zeros(2).to(torch.zeros(1, dtype=torch.int32)).dtype == torch.int32


def test_a_device_context_still_decides_where_tensors_are_made() -> None:
    script = """
        import torch
        from orpo_megatron import cpu

        cpu._redirect_devices()
        with torch.device("meta"):
            made = [torch.zeros(2), torch.arange(3), torch.tensor([1.0]), torch.nn.Linear(2, 2).weight]
            made.append(torch.zeros(2, device="cuda"))
        print(*(tensor.device for tensor in made))
    """
    assert run_python(script) == "meta meta meta meta cpu"


def test_type_strings_are_those_of_a_gpu_and_casts_still_cast(megatron_on_cpu: None) -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    cast = torch.zeros(1).type(torch.float64)
    assert isinstance(cast, torch.Tensor) and cast.dtype == torch.float64


def test_the_cuda_runtime_answers_as_an_idle_device(megatron_on_cpu: None) -> None:
    cuda = torch.cuda
    assert cuda.current_device() == torch.device("cpu") and cuda.device_count() == 1
    assert cuda.get_device_capability() == (cuda.get_device_properties(0).major, cuda.get_device_properties(0).minor)
    assert cuda.memory_allocated() == cuda.max_memory_allocated(0) == 0 and cuda.memory_stats() == {}
    for call in (cuda.synchronize, cuda.empty_cache, cuda.reset_peak_memory_stats):
        assert call() is None
    cuda.set_device(0)
    stream, start, end = cuda.Stream(), cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    with cuda.stream(stream):
        start.record(cuda.current_stream())
        end.record()
        end.synchronize()
        stream.wait_stream(cuda.default_stream())
    assert start.elapsed_time(end) == 0.0 and end.query()
    with pytest.raises(AttributeError):
        stream.no_such_call()
    torch.manual_seed(3)
    state = cuda.get_rng_state()
    first = torch.rand(3)
    cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_an_optimizer_steps(megatron_on_cpu: None) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([0.5])
    torch.optim.SGD([parameter], lr=0.1).step()
    assert float(parameter.detach()) == pytest.approx(0.95)


def test_groups_that_ask_for_nccl_run_over_gloo(one_rank: None) -> None:
    assert dist.get_backend() == "gloo"
    for group in (
        dist.new_group([0], backend="nccl", pg_options=object()),
        dist.new_group([0], None, "nccl"),
        dist.new_group([0], backend="gloo"),
        dist.new_group(),
    ):
        assert dist.get_backend(group) == "gloo"
        tensor = torch.tensor([2.0], device="cuda")
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == 2.0
    dist.barrier(device_ids=[0])


def test_a_process_group_that_asks_for_nccl_runs_over_gloo() -> None:
    script = """
        import tempfile, torch, torch.distributed as dist
        from orpo_megatron import cpu

        cpu._redirect_distributed()
        for number, arguments in enumerate((("nccl",), (), ("gloo",))):
            store = dist.FileStore(tempfile.mktemp(), 1)
            dist.init_process_group(*arguments, store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
            print(dist.get_backend())
            dist.destroy_process_group()
    """
    assert run_python(script).split() == ["gloo"] * 3


def test_the_gradient_norm_is_that_of_fp64(megatron_on_cpu: None) -> None:
    from megatron.core.optimizer.clip_grads import l2_norm_impl

    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in (3_000_000, 1000, 1)]
    exact = float(torch.cat([gradient.double() for gradient in gradients]).norm())
    norm, _ = l2_norm_impl(2048 * 32, None, [gradients], False)
    assert norm.dtype == torch.float32 and norm.shape == (1,)
    assert float(norm) == pytest.approx(exact, rel=6e-8)
    assert float(l2_norm_impl(2048 * 32, None, [[]], False)[0]) == 0.0


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
def test_adam_takes_its_steps_in_one_pass(megatron_on_cpu: None, cls: type[torch.optim.Adam]) -> None:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    gradients = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    weights = [torch.nn.Parameter(torch.ones(50)) for _ in range(2)]
    plain, fused = (cls([weight], lr=0.1, weight_decay=0.01) for weight in weights)
    FP32Optimizer(fused, OptimizerConfig(optimizer="adam", lr=0.1), None)
    assert (fused.param_groups[0]["fused"], plain.param_groups[0]["fused"]) == (True, None)
    for gradient in gradients:
        for weight, optimizer in zip(weights, (plain, fused), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-6)
    assert float((weights[0] - 1).abs().mean()) > 0.1


def test_the_splits_of_an_all_to_all_are_those_of_numpy(megatron_on_cpu: None) -> None:
    """As on the way from a GPU: an array if asked for, else the tensor; and what is no tensor passes."""
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    splits = torch.tensor([[3, 1], [0, 2]])
    moved = token_dispatcher.maybe_move_tensor_to_cpu(splits, as_numpy=True, record_stream=True)
    assert isinstance(moved, np.ndarray) and moved.tolist() == [[3, 1], [0, 2]]
    assert token_dispatcher.maybe_move_tensor_to_cpu(splits) is splits
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_transformer_engine_and_the_resiliency_package_stay_absent(bridge_on_cpu: None) -> None:
    import megatron.bridge.peft.lora_layers as lora_layers
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed here")
    assert HAVE_TE is False and "transformer_engine" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformer_engine")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nvidia_resiliency_ext.checkpointing")
    # What was loaded with the stand-in in sight holds classes that nothing is an instance of.
    assert not isinstance(torch.nn.Linear(1, 1), lora_layers.te.Linear)


def test_the_index_helper_is_not_compiled_anew(megatron_on_cpu: None) -> None:
    import megatron.core.datasets.utils

    assert megatron.core.datasets.utils.compile_helpers() is None


def test_the_generator_tracker_keeps_a_state_under_each_name_and_forks_nothing(megatron_on_cpu: None) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    assert list(tracker.get_states()) == ["a"]
    torch.manual_seed(1)
    first = torch.rand(2)
    torch.manual_seed(1)
    with tracker.fork("a"):
        assert torch.equal(torch.rand(2), first)
