"""The GPU's kernels on a CPU: run by Triton's interpreter against the same passes in torch, and compiled for a GPU.

Triton reads TRITON_INTERPRET when it is imported, so a process of its own runs all cases: this file as a program.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_megatron import elementwise, logps
from orpo_megatron.logps import fused_logps

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton shall compile in this process")

ROWS, BLOCK = 5, 32  # of the interpreter; 98 ids are then four blocks, the last not full
LOWEST = torch.finfo(torch.float32).min
#: One unit in the last place. The interpreter cuts bf16 where a GPU rounds it, so that is how far off it may be.
LAST_PLACE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
TINY = {torch.float32: 1e-12, torch.bfloat16: 1e-12, torch.float16: 2**-23}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    width: int
    num_ids: int
    scale: float
    block: int = BLOCK

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{self.num_ids}of{self.width}-{self.scale}"

    def inputs(self) -> dict[str, torch.Tensor]:
        """Logits, labels of which one lies elsewhere, what softmax and gradient need; the same in every process."""
        generator = torch.Generator().manual_seed(self.width + self.num_ids)
        z = 4 * torch.randn(ROWS, self.width, generator=generator)
        z[1] += 100
        z[:, self.num_ids :] = 1e4  # would drown all others
        here = torch.tensor([True, False, True, True, True]) & (self.num_ids > 0)
        upstream = torch.randn(ROWS, generator=generator)
        columns = torch.randint(max(self.num_ids, 1), (ROWS,), generator=generator)
        columns[2] = max(self.num_ids - 1, 0)
        return {
            "z": z.to(self.dtype),
            "columns": columns,
            "here": here,
            "factor": -upstream,
            "target_grad": upstream * here,
            "maximum": torch.full((ROWS,), 9.0) + 100 * (torch.arange(ROWS) == 1),
            "log_sum": torch.rand(ROWS, generator=generator),
        }


CASES = [
    Case(dtype, width, num_ids, scale)
    for dtype in LAST_PLACE
    for (width, num_ids), scale in itertools.product([(98, 98), (98, 90), (96, 64), (7, 5), (40, 0)], [1.0, 0.7])
] + [Case(torch.bfloat16, 9000, 8990, 1.0, block=8192)]
HEADS = list(itertools.product(("cache", "recompute"), (None, 90), (1.0, 0.7)))


def passes(module: Any, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Runs a case's passes by one of the two modules that have them, on logits of a dtype."""
    data = case.inputs()
    results = {}
    for keep in (True, False):
        z, statistics = data["z"].to(dtype, copy=True), torch.empty(3, ROWS)
        module.exponentiate(z, data["columns"], data["here"], case.num_ids, statistics, keep)
        results[f"statistics, keep {keep}"] = statistics
        if keep:
            results["exponentials"] = z
    softmax = data["maximum"], data["log_sum"], case.num_ids
    for name, given in (("logits", softmax), ("exponentials", None)):
        u = data["z"].to(dtype, copy=True) if given else (data["z"].float() / 100).to(case.dtype).to(dtype)
        module.to_gradient(u, data["factor"], data["columns"], data["target_grad"], case.scale, given)
        results[f"gradient of {name}"] = u
    return results


def head_inputs(device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Hidden states, weight and bias (leaves), and labels."""
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(shape, generator=generator).to(device) for shape in ((11, 12), (98, 12), (98,))]
    return *(leaf.requires_grad_() for leaf in leaves), torch.randint(90, (11,), generator=generator).to(device)


def head(mode: Any, vocab_size: int | None, scale: float, device: str = "cpu") -> list[torch.Tensor]:
    """Values and gradients of the whole head."""
    hidden, weight, bias, labels = head_inputs(device)
    values = fused_logps(hidden, weight, labels, bias=bias, mode=mode, vocab_size=vocab_size, logit_scale=scale)
    return [values.detach(), *torch.autograd.grad(values.square().sum(), [hidden, weight, bias])]


def exact_head(vocab_size: int | None, scale: float) -> list[torch.Tensor]:
    """The same in fp64, all logits at once."""
    leaves, labels = [x.detach().double().requires_grad_() for x in head_inputs()[:3]], head_inputs()[3]
    logits = scale * torch.nn.functional.linear(*leaves)[:, :vocab_size]
    values = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return [values.detach(), *torch.autograd.grad(values.square().sum(), leaves)]


def far_row(folder: Path) -> torch.Tensor:
    """Statistics of a row that begins 2^31 elements into its tensor, in a file that is almost all holes."""
    from orpo_megatron import kernels

    width = 2**30
    z = torch.from_file(f"{folder}/logits", shared=True, size=3 * width, dtype=torch.float16).view(3, width)
    z[2, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    statistics, here = torch.empty(3, 3), torch.ones(3, dtype=torch.bool)
    kernels.exponentiate(z, torch.full((3,), 1), here, 4, statistics, keep=False)
    return statistics[:, 2]


def main(folder: Path) -> None:
    """Runs everything in the interpreter and leaves it in ``folder``."""
    from orpo_megatron import kernels

    results: dict[str, Any] = {"kernel": type(kernels._exponentiate).__name__}
    for case in CASES:
        kernels._BLOCK = case.block
        results[case.name] = passes(kernels, case, case.dtype)
    kernels._BLOCK = BLOCK
    z = torch.tensor([[1.0, float("nan")] + 38 * [0.0]])
    statistics = torch.empty(3, 1)
    kernels.exponentiate(z, torch.tensor([0]), torch.tensor([True]), 40, statistics, keep=False)
    results["nan"] = statistics
    results["far row"] = far_row(folder)
    logps.exponentiate, logps.to_gradient = kernels.exponentiate, kernels.to_gradient  # as for tensors on a GPU
    results["heads"] = [head(*arguments) for arguments in HEADS]
    torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the interpreter makes of all cases."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("interpreter")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (folder / "logits").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def test_the_interpreter_ran(interpreted: dict[str, Any]) -> None:
    assert interpreted["kernel"] == "InterpretedFunction"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_passes_are_those_in_torch(interpreted: dict[str, Any], case: Case) -> None:
    """Torch computes in fp32 from the same logits; the kernel's fp32 figures agree, and what it stores in a dtype."""
    right, found = passes(elementwise, case, torch.float32), interpreted[case.name]
    for keep in (True, False):
        ours, theirs = found[f"statistics, keep {keep}"], right[f"statistics, keep {keep}"]
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
        torch.testing.assert_close(ours[1], theirs[1], rtol=2e-6, atol=0)
    for part in ("exponentials", "gradient of logits", "gradient of exponentials"):
        assert found[part].dtype == case.dtype
        torch.testing.assert_close(
            found[part].float(), right[part], rtol=LAST_PLACE[case.dtype], atol=TINY[case.dtype]
        )
    assert not found["exponentials"][:, case.num_ids :].any()
    assert not found["gradient of logits"][:, max(case.num_ids, 1) :].any()


def test_a_shard_of_padding_alone_takes_part_with_nothing(interpreted: dict[str, Any]) -> None:
    for case in (case for case in CASES if case.num_ids == 0):
        assert interpreted[case.name]["statistics, keep True"].tolist() == [
            [LOWEST] * ROWS,
            [0.0] * ROWS,
            [0.0] * ROWS,
        ]


def test_a_nan_is_not_lost(interpreted: dict[str, Any]) -> None:
    """The maximum may pass it by; the sum may not."""
    assert interpreted["nan"][1].isnan().all()


def test_offsets_beyond_32_bits(interpreted: dict[str, Any]) -> None:
    sum_exp = sum(torch.tensor(float(-n)).exp().item() for n in range(4))
    assert interpreted["far row"].tolist() == pytest.approx([4.0, sum_exp, 2.0], rel=1e-6)


@pytest.mark.parametrize("arguments", HEADS, ids=lambda a: f"{a[0]}-{a[1]}-{a[2]}")
def test_the_head_on_kernels_is_exact(interpreted: dict[str, Any], arguments: tuple[Any, ...]) -> None:
    found = interpreted["heads"][HEADS.index(arguments)]
    for ours, right in zip(found, exact_head(*arguments[1:]), strict=True):
        assert (ours.double() - right).abs().max() < 1e-6 * right.abs().max()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_a_gpu_and_move_16_bytes_at_a_time(dtype: str, flag: bool, capability: int) -> None:
    """What an interpreter accepts, a compiler may not. Rows are aligned here, the number of real ids is odd."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from orpo_megatron import kernels

    long, single, pointer = "i32", "fp32", "*fp32"
    signatures: list[tuple[Any, str, list[str], dict[str, bool]]] = [
        (kernels._exponentiate, "KEEP", [f"*{dtype}", "*i64", "*i1", pointer, long, long, long], {"store": flag}),
        (
            kernels._to_gradient,
            "LOGITS",
            [f"*{dtype}", pointer, "*i64", pointer, pointer, pointer, single, long, long],
            {"store": True},
        ),
    ]
    for kernel, name, types, moves in signatures:
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            dict(zip(names, [*types, "constexpr", "constexpr"], strict=True)),
            {name: flag, "BLOCK": 8192},
            {(names.index(aligned),): [["tt.divisibility", 16]] for aligned in (names[0], "width")},
        )
        target = GPUTarget("cuda", capability, 32)
        text = triton.compile(source, target=target, options={"num_warps": kernels._WARPS}).asm["ptx"]
        assert "ld.global.v4.b32" in text
        assert ("st.global.v4.b32" in text) == moves["store"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arguments", HEADS, ids=lambda a: f"{a[0]}-{a[1]}-{a[2]}")
def test_the_head_on_a_gpu_is_exact_and_waits_for_nothing(arguments: tuple[Any, ...]) -> None:
    head(*arguments, device="cuda")  # compiles
    torch.cuda.synchronize()
    hidden, weight, bias, labels = head_inputs("cuda")
    mode, vocab_size, scale = arguments
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = fused_logps(hidden, weight, labels, bias=bias, mode=mode, vocab_size=vocab_size, logit_scale=scale)
        gradients = torch.autograd.grad(values.square().sum(), [hidden, weight, bias])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, right in zip([values, *gradients], exact_head(vocab_size, scale), strict=True):
        assert (ours.detach().cpu().double() - right).abs().max() < 1e-5 * right.abs().max()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
