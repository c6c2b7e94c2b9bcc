"""Heads that turn hidden states and a vocabulary's weight into the ORPO loss: ours and the ones in use elsewhere."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from orpo_megatron import fused_logps
from orpo_megatron.data.dataset import pack_row
from orpo_megatron.loss import orpo_loss
from orpo_megatron.segments import pair_logps

Layout = Literal["one_pair", "many_pairs"]
BETA = 0.1
IGNORED = -100
#: Tokens of a prompt, of both sequences of a pair: the share of it in preference data of short dialogues.
PROMPT_SHARE = 0.28
#: Mean length of a sequence where there are many pairs.
MANY_LENGTH = 32


@dataclass(frozen=True)
class Shape:
    """A head's size.

    Attributes:
        name: What it is called.
        tokens: Tokens of the packed row, both sides of all pairs.
        hidden: Width of the hidden states.
        vocab: Ids of the vocabulary, or of one tensor-parallel rank's shard of it.
        small: Whether the bars for small heads hold.
    """

    name: str
    tokens: int
    hidden: int
    vocab: int
    small: bool = True


SHAPES = (
    Shape("135M", 512, 576, 49152),
    Shape("350M", 1024, 1024, 32000),
    Shape("1B", 512, 2048, 32064),
    Shape("135M long", 4096, 576, 49152, small=False),
    Shape("8B, shard of 8", 2048, 4096, 16032, small=False),
    Shape("70B, shard of 8", 1024, 8192, 16032, small=False),
)


@dataclass(frozen=True)
class Ids:
    """Token ids of a pair.

    Attributes:
        prompt: int64.
        chosen: int64.
        rejected: int64.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def pair_lengths(layout: Layout, tokens: int) -> list[tuple[int, int, int]]:
    """Returns prompt, chosen and rejected length of each pair; all tokens together are about ``tokens``."""
    prompt = round(PROMPT_SHARE * tokens / 2)
    if layout == "one_pair":
        return [(prompt, tokens // 2 - prompt, tokens - tokens // 2 - prompt)]
    draw, lengths, left = random.Random(0), [], tokens
    while left > 0:
        scale = min(draw.lognormvariate(0.0, 0.5), left / (2 * MANY_LENGTH))
        prompt = max(1, round(PROMPT_SHARE * MANY_LENGTH * scale))
        sides = [max(1, round((1 - PROMPT_SHARE) * MANY_LENGTH * scale * draw.uniform(0.6, 1.4))) for _ in range(2)]
        lengths.append((prompt, sides[0], sides[1]))
        left -= 2 * prompt + sum(sides)
    return lengths


class Case:
    """A batch as it reaches the head: the same hidden states packed, for us and Megatron, and padded, for others.

    Attributes:
        weight: [v, h], requires gradients.
        packed: [t, h], requires gradients; chosen and rejected sequence of each pair, end to end.
        padded: [2 * pairs, s, h], requires gradients; all chosen sequences, then all rejected ones.
        row: Where the packed row's scored tokens are.
        batch: The padded batch as TRL's collator makes it.
    """

    def __init__(self, shape: Shape, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        """Draws the case; logits have a standard deviation of about 2."""
        draw = np.random.default_rng(0)
        lengths = pair_lengths(layout, shape.tokens)
        pairs = [Ids(*(draw.integers(shape.vocab, size=n) for n in each)) for each in lengths]
        self.shape, self.num_pairs, self.device = shape, len(pairs), device
        self.row = pack_row(
            pairs,
            np.arange(len(pairs)),
            nll_scope="prompt_and_response",
            sequence_multiple_of=1,
            pad_token_id=0,
            num_nll_tokens=sum(prompt + chosen - 1 for prompt, chosen, _ in lengths),
            num_pairs=len(pairs),
        ).to(device)
        generator = torch.Generator(device).manual_seed(0)
        drawn = partial(torch.randn, generator=generator, device=device, dtype=torch.float32)
        self.weight = (drawn(shape.vocab, shape.hidden) * 2 / shape.hidden**0.5).to(dtype).requires_grad_()
        packed = drawn(len(self.row.tokens), shape.hidden).to(dtype)
        sequences = packed.split(self.row.cu_seqlens.diff().tolist())
        padded = torch.nn.utils.rnn.pad_sequence([*sequences[0::2], *sequences[1::2]], batch_first=True)
        self.packed, self.padded = packed.requires_grad_(), padded.requires_grad_()
        self.batch = _trl_batch(pairs, device)

    @property
    def num_padded(self) -> int:
        """Tokens of the padded batch."""
        return self.padded.shape[0] * self.padded.shape[1]

    @property
    def num_scored(self) -> int:
        """Tokens that are scored."""
        return len(self.row.score_labels)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that our side gives back."""
        return (self.weight.numel() + self.packed.numel()) * self.weight.element_size()

    def drop_gradients(self) -> None:
        """Forgets the gradients of the last call."""
        self.weight.grad = self.packed.grad = self.padded.grad = None

    def loss_of(self, per_token_logps: torch.Tensor) -> torch.Tensor:
        """Returns the ORPO loss of the scored tokens' log-probs [n]."""
        counts = {"num_nll_tokens": self.row.num_nll_tokens, "num_pairs": self.row.num_pairs}
        return orpo_loss(pair_logps(per_token_logps, self.row), beta=BETA, nll_reduction="tokens", **counts).loss


def _trl_batch(pairs: list[Ids], device: torch.device) -> dict[str, torch.Tensor]:
    """Returns pairs padded to the longest sequence of both sides."""
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = torch.zeros((len(pairs), longest), dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for index, pair in enumerate(pairs):
            sequence = torch.from_numpy(np.concatenate((pair.prompt, getattr(pair, side))))
            ids[index, : len(sequence)], mask[index, : len(sequence)] = sequence, 1
            labels[index, len(pair.prompt) : len(sequence)] = sequence[len(pair.prompt) :]
        for name, tensor in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
            batch[f"{side}_{name}"] = tensor.to(device)
    return batch


Head = Callable[[Case], torch.Tensor]


def ours(case: Case, mode: Literal["cache", "recompute"]) -> torch.Tensor:
    """Scores what is scored, a chunk of logits at a time."""
    row = case.row
    logps = fused_logps(case.packed, case.weight, row.score_labels, positions=row.score_positions, mode=mode)
    return case.loss_of(logps)


def in_fp64(case: Case) -> torch.Tensor:
    """Computes everything in fp64, from the values that the case's dtype holds: the reference for rounding."""
    logits = case.packed.double()[case.row.score_positions] @ case.weight.double().T
    return case.loss_of(logits.log_softmax(dim=-1).gather(1, case.row.score_labels[:, None])[:, 0])


def trl(case: Case, trainer: Any) -> torch.Tensor:
    """Runs TRL's own loss and metrics; the model is nothing but its head."""

    def head(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=F.linear(case.padded, case.weight))

    loss, _ = trainer.get_batch_loss_metrics(head, case.batch)
    return loss


class Liger:
    """Liger's chunked loss over the padded batch, NLL over prompt and response as everywhere here.

    Attributes:
        note: How it runs.
    """

    def __init__(self, compiled: bool) -> None:
        """Compiles it, as it comes, or not."""
        self._compile(compiled, "its default" if compiled else "there is no compiler here")

    def _compile(self, compiled: bool, why: str) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

        self.compiled, self.note = compiled, f"compiled={compiled}: {why}"
        self.loss: Any = LigerFusedLinearORPOLoss(beta=BETA, compiled=compiled)

    def __call__(self, case: Case) -> torch.Tensor:
        """Returns the loss."""
        ids, mask, labels = (
            torch.cat([case.batch[f"chosen_{name}"], case.batch[f"rejected_{name}"]])[:, 1:]
            for name in ("input_ids", "attention_mask", "labels")
        )
        inputs = case.weight, case.padded[:, :-1], labels
        nll_target = ids.where(mask == 1, IGNORED)
        try:
            return self.loss(*inputs, nll_target=nll_target)[0]
        except AssertionError:
            # torch 2.13 sometimes, not in every run of one program, finds no source for a dynamic size of Liger 0.8.5.
            if not self.compiled:
                raise
            torch.compiler.reset()
            self._compile(False, "torch.compile failed on it in this run")
            return self.loss(*inputs, nll_target=nll_target)[0]


def megatron(case: Case, cross_entropy: Callable[..., torch.Tensor], group: dist.ProcessGroup, whole: bool) -> Any:
    """Runs Megatron-Core's cross entropy behind a plain product, over all rows as GPTModel does or the scored ones."""
    row = case.row
    if whole:
        labels = torch.zeros_like(row.tokens)
        labels[row.score_positions] = row.score_labels
        hidden = case.packed
    else:
        labels, hidden = row.score_labels, case.packed.index_select(0, row.score_positions)
    logits = F.linear(hidden, case.weight).unsqueeze(1)
    logps = -cross_entropy(logits, labels.unsqueeze(1), tp_group=group).squeeze(1)
    return case.loss_of(logps[row.score_positions] if whole else logps)


def cut_cross_entropy(case: Case, linear_cross_entropy: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Runs Apple's linear_cross_entropy over the scored rows."""
    hidden = case.packed.index_select(0, case.row.score_positions)
    return case.loss_of(-linear_cross_entropy(hidden, case.weight, case.row.score_labels, reduction="none").float())


def make_heads(device: torch.device) -> tuple[dict[str, Head], dict[str, str]]:
    """Returns the heads that can run here, and notes on those that differ or cannot run.

    A process group of one rank is started for Megatron-Core.
    """
    heads: dict[str, Head] = {
        "ours cache": partial(ours, mode="cache"),
        "ours recompute": partial(ours, mode="recompute"),
        "TRL": partial(trl, trainer=_trl_trainer(device)),
    }
    notes = {}
    compiled = device.type == "cuda" or (
        shutil.which("g++") is not None and os.environ.get("TORCHDYNAMO_DISABLE") != "1"
    )
    heads["Liger"] = Liger(compiled)
    group = _group_of_one(device)
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    for name, function in (
        ("Megatron", vocab_parallel_cross_entropy),
        ("Megatron fused", fused_vocab_parallel_cross_entropy),
    ):
        heads[f"{name}, all rows"] = partial(megatron, cross_entropy=function, group=group, whole=True)
        heads[f"{name}, scored rows"] = partial(megatron, cross_entropy=function, group=group, whole=False)
    notes["Megatron fused"] = "rounds the logits' gradient to bf16, whatever their dtype"
    if importlib.util.find_spec("cut_cross_entropy") is None:
        notes["cut-cross-entropy"] = "not installed"
    elif device.type != "cuda":
        notes["cut-cross-entropy"] = "GPU only"
    else:
        from cut_cross_entropy import linear_cross_entropy

        heads["cut-cross-entropy"] = partial(cut_cross_entropy, linear_cross_entropy=linear_cross_entropy)
    return heads, notes


def _trl_trainer(device: torch.device) -> Any:
    """Returns TRL's trainer with nothing but what its loss reads: no model, no data, no optimizer."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.orpo import ORPOTrainer

    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.accelerator = SimpleNamespace(device=device, gather_for_metrics=lambda tensor: tensor)
    trainer.beta, trainer.padding_value = BETA, 0
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    return trainer


def _group_of_one(device: torch.device) -> dist.ProcessGroup:
    """Returns a process group of this process alone."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.distributed_c10d._get_default_group()


def matmul_floor(case: Case) -> Callable[[], None]:
    """Returns the three matrix products that no exact head does without: logits and both gradients."""
    rows = case.packed.detach()[: case.num_scored].contiguous()
    weight = case.weight.detach()
    logits = rows.new_empty((len(rows), len(weight)))
    d_rows, d_weight = torch.empty_like(rows), torch.empty_like(weight)

    def products() -> None:
        torch.mm(rows, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_rows)
        torch.mm(logits.t(), rows, out=d_weight)

    return products


def gradients(case: Case, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of weight [v, h] and of the packed hidden states [t, h], whatever the head takes."""
    case.drop_gradients()
    head(case).backward()
    assert case.weight.grad is not None
    if case.packed.grad is not None:
        return case.weight.grad, case.packed.grad
    assert case.padded.grad is not None
    half = case.num_pairs
    lengths = case.row.cu_seqlens.diff().tolist()
    order = [side * half + pair for pair in range(half) for side in (0, 1)]
    return case.weight.grad, torch.cat([case.padded.grad[i, :n] for i, n in zip(order, lengths, strict=True)])
