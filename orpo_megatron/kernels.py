"""The head's elementwise passes on a GPU, in Triton: one program a row, a block of the vocabulary in registers.

The same in torch, and what the arguments are, stands in ``elementwise.py``. Nothing here waits for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Logits that a program holds at once; a shorter vocabulary takes the next power of two.
_BLOCK = 8192
_WARPS = 8


def exponentiate(
    z: torch.Tensor, columns: torch.Tensor, here: torch.Tensor, num_ids: int, statistics: torch.Tensor, keep: bool
) -> None:
    """Fills statistics and keeps exponentials as `elementwise.exponentiate` does.

    Real ids are read once by an online maximum and sum, and once more where their exponentials are kept.
    """
    rows, width = z.shape
    with torch.cuda.device_of(z):
        _exponentiate[(rows,)](
            z, columns, here, statistics, statistics.stride(0), width, num_ids,
            KEEP=keep, BLOCK=_block(width), num_warps=_WARPS,
        )  # fmt: skip


def to_gradient(
    u: torch.Tensor,
    factor: torch.Tensor,
    columns: torch.Tensor,
    target_grad: torch.Tensor,
    scale: float,
    softmax: tuple[torch.Tensor, torch.Tensor, int] | None,
) -> None:
    """Turns a chunk into the gradient as `elementwise.to_gradient` does, by one read and one write."""
    rows, width = u.shape
    maximum, log_sum, num_ids = (factor, factor, width) if softmax is None else softmax  # two that are not read
    with torch.cuda.device_of(u):
        _to_gradient[(rows,)](
            u, factor, columns, target_grad, maximum, log_sum, scale, width, num_ids,
            LOGITS=softmax is not None, BLOCK=_block(width), num_warps=_WARPS,
        )  # fmt: skip


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))


@triton.jit
def _real_logits(z: tl.tensor, ids: tl.tensor, width: tl.tensor, num_ids: tl.tensor) -> tl.tensor:
    # The mask of the load is that of the store: where rows are aligned, both then move 16 bytes at a time.
    f = tl.load(z + ids, mask=ids < width, other=-float("inf")).to(tl.float32)
    return tl.where(ids < num_ids, f, -float("inf"))


@triton.jit
def _exponentiate(
    z: tl.tensor,
    columns: tl.tensor,
    here: tl.tensor,
    statistics: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    num_ids: tl.tensor,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # rows * width passes 2^31
    z += row * width
    lanes = tl.arange(0, BLOCK)
    mine = tl.load(here + row).to(tl.int1)
    target = tl.load(z + tl.load(columns + row), mask=mine, other=0.0).to(tl.float32)
    maximum = tl.full((), -3.4028234663852886e38, tl.float32)  # the lowest number: exp(-inf - maximum) is 0, not NaN
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, num_ids, BLOCK):
        ids = start + lanes
        f = _real_logits(z, ids, width, num_ids)
        higher = tl.maximum(maximum, tl.max(f, axis=0))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(f - higher), axis=0)
        maximum = higher
    tl.store(statistics + row, maximum)
    tl.store(statistics + stride + row, total)
    tl.store(statistics + 2 * stride + row, target)
    if KEEP:
        tl.debug_barrier()  # no thread writes before all have read the target
        for start in range(0, width, BLOCK):
            ids = start + lanes
            f = tl.exp(_real_logits(z, ids, width, num_ids) - maximum)
            tl.store(z + ids, f.to(z.dtype.element_ty), mask=ids < width)


@triton.jit
def _to_gradient(
    u: tl.tensor,
    factor: tl.tensor,
    columns: tl.tensor,
    target_grad: tl.tensor,
    maximum: tl.tensor,
    log_sum: tl.tensor,
    scale: tl.tensor,
    width: tl.tensor,
    num_ids: tl.tensor,
    LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    u += row * width
    factor_of_row, target = tl.load(factor + row), tl.load(target_grad + row)
    column = tl.load(columns + row)
    for start in range(0, width, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        if LOGITS:
            f = tl.exp(_real_logits(u, ids, width, num_ids) - tl.load(maximum + row) - tl.load(log_sum + row))
        else:
            f = tl.load(u + ids, mask=ids < width, other=0.0).to(tl.float32)
        f = f * factor_of_row + tl.where(ids == column, target, 0.0)
        tl.store(u + ids, (f * scale).to(u.dtype.element_ty), mask=ids < width)
