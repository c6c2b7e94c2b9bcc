"""The head's two elementwise passes over a chunk of logits: statistics forward, the gradient backward.

A CPU runs them in torch, in blocks of rows that fit a core's cache; a GPU runs the kernels of ``kernels.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: What a pass takes at once on a CPU, in bytes of fp32.
_BLOCK_BYTES = 2**20


def exponentiate(
    z: torch.Tensor, columns: torch.Tensor, here: torch.Tensor, num_ids: int, statistics: torch.Tensor, keep: bool
) -> None:
    """Takes the statistics of logits, fp32 whatever their dtype, and turns the logits into exponentials in place.

    Args:
        z: Logits, contiguous [rows, v/tp]; exp(z - maximum) afterwards, 0 for padding, or nothing that counts.
        columns: Column of each row's label, int64 [rows], in range also where the label lies on another rank.
        here: Whether the label lies in this shard, bool [rows].
        num_ids: Ids of this shard that are no padding; may be 0.
        statistics: fp32 [3, rows], each row of it contiguous; filled with maximum (the lowest fp32 number for a shard
            of padding alone), sum of exponentials, and target logit (0 where the label lies on another rank).
        keep: Whether the exponentials are kept.
    """
    if z.is_cuda:
        from orpo_megatron import kernels  # Triton comes with PyTorch where there is a GPU

        kernels.exponentiate(z, columns, here, num_ids, statistics, keep)
        return
    for block in _blocks(z):
        f = z[block].float()  # the block itself where it is fp32
        f[:, num_ids:] = -torch.inf
        # A shard of padding alone has no finite maximum; the clamp lets it take part with a sum of 0.
        maximum = f.amax(dim=1).clamp_(min=torch.finfo(torch.float32).min)
        statistics[0, block] = maximum
        statistics[2, block] = f.gather(1, columns[block, None])[:, 0].where(here[block], 0.0)
        statistics[1, block] = f.sub_(maximum[:, None]).exp_().sum(dim=1)
        if keep and f.dtype != z.dtype:
            z[block] = f


def to_gradient(
    u: torch.Tensor,
    factor: torch.Tensor,
    columns: torch.Tensor,
    target_grad: torch.Tensor,
    scale: float,
    softmax: tuple[torch.Tensor, torch.Tensor, int] | None,
) -> None:
    """Turns a chunk in place into the gradient of the product: scale * (factor * softmax + target's gradient).

    Args:
        u: Kept exponentials; or logits, of which the softmax is taken first. Contiguous [rows, v/tp].
        factor: What each row is multiplied by, fp32 [rows].
        columns: Column of each row's label, int64 [rows].
        target_grad: What is added there, 0 where the label lies on another rank, fp32 [rows].
        scale: The logits' scale.
        softmax: Maximum and log-sum over all ranks, fp32 [rows] each, and the number of this shard's ids that are no
            padding; None for exponentials.
    """
    if u.is_cuda:
        from orpo_megatron import kernels

        kernels.to_gradient(u, factor, columns, target_grad, scale, softmax)
        return
    for block in _blocks(u):
        f = u[block].float()
        if softmax is not None:
            maximum, log_sum, num_ids = softmax
            f[:, num_ids:] = -torch.inf
            f.sub_(maximum[block, None]).sub_(log_sum[block, None]).exp_()
        f.mul_(factor[block, None]).scatter_add_(1, columns[block, None], target_grad[block, None])
        if scale != 1:
            f.mul_(scale)
        if f.dtype != u.dtype:
            u[block] = f


def _blocks(z: torch.Tensor) -> Iterator[slice]:
    """Yields the rows of a chunk in blocks that fit the cache of a core."""
    rows = max(1, _BLOCK_BYTES // (4 * z.shape[1]))
    for start in range(0, len(z), rows):
        yield slice(start, start + rows)
