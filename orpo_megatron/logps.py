"""Hidden states, or logits, -> per-token log-probs over a vocabulary split over tensor-parallel ranks.

Nothing here knows a loss: any gradient may come in, so DPO or GRPO can use it as ORPO does. `fused_logps` is what
training runs; `vocab_parallel_logps` behind a plain matrix product is its readable twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from orpo_megatron.elementwise import exponentiate, to_gradient

HeadMode = Literal["auto", "cache", "recompute"]

#: Up to so many bytes a microbatch, ``auto`` keeps exponentials for backward.
CACHE_BYTES = 2**30
#: Logits that are computed at once, in bytes of fp32: matrix products want many rows, memory few. What recomputes is
#: short of memory, and a CPU content with few rows.
_CHUNK_BYTES, _SMALL_CHUNK_BYTES = 2**27, 2**24


def fused_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    mode: HeadMode = "auto",
    cache_bytes: int = CACHE_BYTES,
) -> torch.Tensor:
    """Returns log softmax(hidden weight^T) at each label, without holding the logits of all tokens at once.

    Only the positions that are asked for meet the vocabulary, a chunk of them at a time. Statistics are fp32 whatever
    the dtype of the product. Forward costs one all-gather of [3, n] fp32 over ``tp_group``, backward one collective of
    the hidden states' gradient; sequence parallel gathers the hidden states in both.

    Args:
        hidden: [t, h], replicated over ``tp_group``; or [t/tp, h], split over it, with ``sequence_parallel``.
        weight: [v/tp, h]; rank r of ``tp_group`` holds ids r * v/tp to (r + 1) * v/tp - 1. Where it has a
            ``main_grad``, as under Megatron's DistributedDataParallel, its gradient is added to that, in fp32.
        labels: Ids below ``vocab_size``, int64 [n], the same on every rank of ``tp_group``.
        positions: Which of the ``t`` hidden states predicts each label, int64 [n]; one may come several times. None
            means all of them, in order.
        bias: [v/tp], or None.
        logit_scale: Logits are multiplied by it (muP).
        vocab_size: Ids from here on are padding of the embedding and stay out of the softmax; None means no padding.
        tp_group: The ranks that share the vocabulary; None means that ``weight`` holds all of it.
        sequence_parallel: Whether ``hidden`` is split over ``tp_group``.
        mode: ``cache`` keeps exp(logit - maximum) in the weight's dtype for backward, n * v/tp elements, and takes
            three matrix products in all; ``recompute`` keeps nothing and takes four; ``auto`` caches up to
            ``cache_bytes``.
        cache_bytes: Budget of ``auto``.

    Returns:
        Log-probs <= 0 in nats, fp32 [n], replicated over ``tp_group``. Backward expects the gradient replicated too.

    Raises:
        ValueError: If ``mode`` is no mode, ``hidden`` and ``weight`` differ in dtype, there are not as many positions
            as labels, or a label is outside the vocabulary. On a GPU, which nothing here waits for, the last is an
            assertion of the device.
    """
    if mode not in get_args(HeadMode):
        raise ValueError(f"mode ({mode!r}) must be one of {', '.join(get_args(HeadMode))}.")
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must have one dtype: convert one of them."
        )
    tokens = len(hidden) * (dist.get_world_size(tp_group) if sequence_parallel and tp_group is not None else 1)
    scored = tokens if positions is None else len(positions)
    if scored != len(labels):
        raise ValueError(f"There are {scored} positions to score but {len(labels)} labels: give one label for each.")
    _check_labels(labels, vocab_size or len(weight) * (1 if tp_group is None else dist.get_world_size(tp_group)))
    num_bytes = len(labels) * len(weight) * weight.element_size()
    cached = mode == "cache" or (mode == "auto" and num_bytes <= cache_bytes)
    head = _Head(tp_group, sequence_parallel, vocab_size, logit_scale, cached)
    return _FusedLogps.apply(hidden, weight, bias, labels, positions, head)


def _check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Checks that every label is an id below ``vocab_size``; no rank would hold another one, and none would say so."""
    fits = (labels >= 0) & (labels < vocab_size)
    if labels.is_cuda:
        torch._assert_async(fits.all(), "A label is outside the vocabulary.")
    elif not bool(fits.all()):
        raise ValueError(
            f"labels hold {int(labels[~fits][0])}, which must be at least 0 and below the vocabulary's {vocab_size}. "
            "Leave out positions that are not scored, rather than mark them."
        )


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


@dataclass(frozen=True)
class _Head:
    """What `fused_logps` was asked for, but for tensors."""

    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool
    vocab_size: int | None
    logit_scale: float
    cached: bool

    @property
    def tp_size(self) -> int:
        return 1 if self.tp_group is None else dist.get_world_size(self.tp_group)

    def gathered(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states of all tokens, [t, h]."""
        if not self.sequence_parallel or self.tp_size == 1:
            return hidden
        whole = hidden.new_empty((self.tp_size * hidden.shape[0], hidden.shape[1]))
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.tp_group)
        return whole

    def reduced(self, grad: torch.Tensor) -> torch.Tensor:
        """Adds up the gradient of all hidden states, [t, h], over ranks; returns that of this rank's."""
        if self.tp_size == 1:
            return grad
        if not self.sequence_parallel:
            dist.all_reduce(grad, group=self.tp_group)
            return grad
        mine = grad.new_empty((len(grad) // self.tp_size, grad.shape[1]))
        dist.reduce_scatter_tensor(mine, grad, group=self.tp_group)
        return mine

    def logits(
        self, scored: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        """Computes logits into ``out``, [rows, v/tp]."""
        if bias is None:
            torch.mm(scored, weight.t(), out=out)
        else:
            torch.addmm(bias, scored, weight.t(), out=out)
        return out if self.logit_scale == 1 else out.mul_(self.logit_scale)


class _FusedLogps(torch.autograd.Function):
    """See `fused_logps`.

    With z the logits and u = (onehot - softmax(z)) * gradient, dH = u W and dW = u^T H. In cache mode softmax(z) is
    e * exp(m - M) / S: e = exp(z - m) is kept from forward, m is the shard's maximum, M and S are maximum and sum over
    all ranks. e becomes u in place, so a second backward recomputes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        positions: torch.Tensor | None,
        head: _Head,
    ) -> torch.Tensor:
        columns, here, num_ids = _shard_labels(labels, len(weight), head.tp_group, head.vocab_size)
        whole = head.gathered(hidden)
        cached = head.cached and any(ctx.needs_input_grad[:3])
        kept = weight.new_empty((len(labels) if cached else _rows(len(labels), weight, cached), len(weight)))
        statistics = torch.empty((3, len(labels)), dtype=torch.float32, device=hidden.device)
        for chunk in _chunks(len(labels), weight, cached):
            z = kept[chunk] if cached else kept[: chunk.stop - chunk.start]
            head.logits(_scored(whole, positions, chunk), weight, bias, z)
            exponentiate(z, columns[chunk], here[chunk], num_ids, statistics[:, chunk], keep=cached)
        maximum, sum_exp, target = _over_ranks(statistics, head.tp_group)
        # Maximum and log-sum stay apart to the end: their sum would round away what 1 - p is made of near p = 1.
        log_sum = sum_exp.log()
        ctx.save_for_backward(hidden, weight, bias, positions, columns, here, maximum, log_sum)
        ctx.head, ctx.num_ids = head, num_ids
        ctx.kept = (kept, (statistics[0] - maximum).exp() / sum_exp) if cached else None
        return (target - maximum) - log_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, positions, columns, here, maximum, log_sum = ctx.saved_tensors
        head: _Head = ctx.head
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        kept, ctx.kept = ctx.kept, None
        whole = head.gathered(hidden)
        d_whole = torch.zeros_like(whole) if need_hidden else None
        d_weight = _WeightGradient(weight) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        cached = kept is not None
        u_of_all = kept[0] if kept else weight.new_empty((_rows(len(columns), weight, cached), len(weight)))
        for chunk in _chunks(len(columns), weight, cached):
            u = u_of_all[chunk] if kept else u_of_all[: chunk.stop - chunk.start]
            factor, softmax = -grad[chunk], None
            if kept:
                factor = factor * kept[1][chunk]
            else:
                scored = _scored(whole, positions, chunk)
                head.logits(scored, weight, bias, u)
                softmax = (maximum[chunk], log_sum[chunk], ctx.num_ids)
            to_gradient(u, factor, columns[chunk], grad[chunk] * here[chunk], head.logit_scale, softmax)
            if d_weight is not None and not kept:
                d_weight.add(u, scored)
                del scored
            if d_whole is not None and positions is None:
                torch.mm(u, weight, out=d_whole[chunk])
            elif d_whole is not None:
                d_whole.index_add_(0, positions[chunk], torch.mm(u, weight))
            if d_bias is not None:
                d_bias += u.sum(dim=0, dtype=torch.float32)
        if d_weight is not None and kept:  # one product: one a chunk would each pass over all of dW
            d_weight.add(u_of_all, _scored(whole, positions, slice(None)))
        return (
            None if d_whole is None else head.reduced(d_whole),
            None if d_weight is None else d_weight.result(),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


class _WeightGradient:
    """The gradient of the weight, added up in fp32: in the weight's ``main_grad`` if a framework keeps one there."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.direct = getattr(weight, "main_grad", None) is not None and hasattr(weight, "grad_added_to_main_grad")
        self.total: torch.Tensor | None = weight.main_grad if self.direct else None  # type: ignore[attr-defined]

    def add(self, u: torch.Tensor, scored: torch.Tensor) -> None:
        """Adds u^T H, of u [rows, v/tp] and hidden states [rows, h]."""
        if self.total is None:
            if u.dtype == torch.float32:
                self.total = torch.mm(u.t(), scored)
                return
            self.total = torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        if u.dtype == self.total.dtype:
            self.total.addmm_(u.t(), scored)
        elif u.is_cuda and self.total.dtype == torch.float32:
            self.total.add_(torch.mm(u.t(), scored, out_dtype=torch.float32))
        else:
            self.total.addmm_(u.t().to(self.total.dtype), scored.to(self.total.dtype))

    def result(self) -> torch.Tensor | None:
        """Returns what autograd is given: the gradient, or a stand-in where ``main_grad`` has it already."""
        if not self.direct:
            return torch.zeros_like(self.weight) if self.total is None else self.total.to(self.weight.dtype)
        # Megatron's hook then only notes that the gradient is there. What it does add is the gradient of a weight that
        # says zero_out_wgrad: that of the embedding on the same stage, which comes by itself and needs no stand-in.
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return None if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like(self.weight)


def _scored(whole: torch.Tensor, positions: torch.Tensor | None, chunk: slice) -> torch.Tensor:
    """Returns the hidden states that predict a chunk of labels, [rows, h]; only these are copied."""
    return whole[chunk] if positions is None else whole.index_select(0, positions[chunk])


def _rows(num_labels: int, weight: torch.Tensor, cached: bool) -> int:
    """Returns how many rows of logits are computed at once."""
    num_bytes = _CHUNK_BYTES if cached or weight.is_cuda else _SMALL_CHUNK_BYTES
    return min(num_labels, max(1, num_bytes // (4 * len(weight))))


def _chunks(num_labels: int, weight: torch.Tensor, cached: bool) -> Iterator[slice]:
    """Yields the rows in chunks."""
    rows = _rows(num_labels, weight, cached)
    for start in range(0, num_labels, rows or 1):
        yield slice(start, min(start + rows, num_labels))


def _shard_labels(
    labels: torch.Tensor, width: int, tp_group: dist.ProcessGroup | None, vocab_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns the labels' columns in this rank's shard, whether they lie in it, and how many of its ids are real."""
    first_id = 0 if tp_group is None else dist.get_rank(tp_group) * width
    num_ids = width if vocab_size is None else min(max(vocab_size - first_id, 0), width)
    columns = labels - first_id
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width), num_ids


def _over_ranks(statistics: torch.Tensor, tp_group: dist.ProcessGroup | None) -> tuple[torch.Tensor, ...]:
    """Combines maximum, sum of exponentials and target of all ranks' shards, [3, n]."""
    if tp_group is None or dist.get_world_size(tp_group) == 1:
        maximum, sum_exp, target = statistics
        return maximum, sum_exp, target
    gathered = [torch.empty_like(statistics) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(gathered, statistics.contiguous(), group=tp_group)
    maxima, sums, targets = torch.stack(gathered, dim=1)
    maximum = maxima.amax(dim=0)
    return maximum, (sums * (maxima - maximum).exp()).sum(dim=0), targets.sum(dim=0)


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
        columns, here, num_ids = _shard_labels(labels, logits.shape[1], tp_group, vocab_size)
        shard = _shard_fp32(logits, num_ids)
        # A shard of padding alone has no finite maximum; the clamp lets it take part with a sum of 0.
        maximum = shard.amax(dim=1).clamp(min=torch.finfo(torch.float32).min)
        target = shard.gather(1, columns[:, None])[:, 0].where(here, 0.0)
        sum_exp = shard.sub_(maximum[:, None]).exp_().sum(dim=1)
        maximum, sum_exp, target = _over_ranks(torch.stack([maximum, sum_exp, target]), tp_group)
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
