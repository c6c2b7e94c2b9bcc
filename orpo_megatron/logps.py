"""Vocabulary-parallel logits -> per-token log-probs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def vocab_parallel_logps(
    logits: torch.Tensor,
    labels: torch.Tensor,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Returns log softmax(logits) at each label, over a vocabulary split over tensor-parallel ranks.

    Statistics are fp32 whatever the dtype of the logits. Forward costs one all-gather of [3, n] fp32, backward no
    communication. The logits are neither changed nor copied for backward, which computes the softmax again.

    Args:
        logits: [n, v/tp], any float dtype; rank r of ``tp_group`` holds ids r * v/tp to (r + 1) * v/tp - 1.
        labels: Ids below ``vocab_size``, int64 [n], the same on every rank of ``tp_group``.
        tp_group: The ranks that share the vocabulary; None means that ``logits`` holds all of it.
        vocab_size: Ids from here on are padding of the embedding and stay out of the softmax, as in Hugging Face,
            which has no such ids; None means no padding.

    Returns:
        Log-probs <= 0 in nats, fp32 [n], replicated over ``tp_group``. Backward expects the gradient replicated too
        and gives each rank (onehot - softmax) * gradient for its shard, in the logits' dtype.
    """
    return _VocabParallelLogps.apply(logits, labels, tp_group, vocab_size)


def _shard_fp32(logits: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Copies a shard to fp32 with padding ids, those from ``num_ids`` on, at -inf."""
    shard = logits.to(torch.float32, copy=True)
    shard[:, num_ids:] = -torch.inf
    return shard


class _VocabParallelLogps(torch.autograd.Function):
    """See `vocab_parallel_logps`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        tp_group: dist.ProcessGroup | None,
        vocab_size: int | None,
    ) -> torch.Tensor:
        width = logits.shape[1]
        tp_size, tp_rank = (1, 0) if tp_group is None else (dist.get_world_size(tp_group), dist.get_rank(tp_group))
        first_id = tp_rank * width
        num_ids = width if vocab_size is None else min(max(vocab_size - first_id, 0), width)

        columns = labels - first_id
        here = (columns >= 0) & (columns < width)
        columns = columns.clamp(0, width - 1)

        shard = _shard_fp32(logits, num_ids)
        # A shard of padding alone has no finite maximum; the clamp lets it take part with a sum of 0.
        maximum = shard.amax(dim=1).clamp(min=torch.finfo(torch.float32).min)
        target = shard.gather(1, columns[:, None])[:, 0].where(here, 0.0)
        sum_exp = shard.sub_(maximum[:, None]).exp_().sum(dim=1)
        statistics = torch.stack([maximum, sum_exp, target])
        if tp_group is not None:
            gathered = [torch.empty_like(statistics) for _ in range(tp_size)]
            dist.all_gather(gathered, statistics, group=tp_group)
            maxima, sums, targets = torch.stack(gathered, dim=1)
            maximum = maxima.amax(dim=0)
            sum_exp = (sums * (maxima - maximum).exp()).sum(dim=0)
            target = targets.sum(dim=0)

        # Maximum and log-sum stay apart to the end: their sum would round away what 1 - p is made of near p = 1.
        log_sum = sum_exp.log()
        ctx.save_for_backward(logits, columns, here, maximum, log_sum)
        ctx.num_ids = num_ids
        return (target - maximum) - log_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, columns, here, maximum, log_sum = ctx.saved_tensors
        shard = _shard_fp32(logits, ctx.num_ids)
        shard.sub_(maximum[:, None]).sub_(log_sum[:, None]).exp_().neg_()
        shard[torch.arange(len(shard), device=shard.device), columns] += here
        return shard.mul_(grad[:, None]).to(logits.dtype), None, None, None
