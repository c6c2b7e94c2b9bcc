"""Training steps that take turns in Megatron-Bridge's own loop: one model, one optimizer, ORPO and Megatron's SFT.

Import it after ``machine.use_machine()``.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.pretrain import pretrain
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_model_config
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import PeakMemory, Timings, default_device, synchronise
from orpo_megatron.batch import PackedRow
from orpo_megatron.bridge.container import PreferenceData, RowStream, make_container
from orpo_megatron.bridge.guard import StepGuard
from orpo_megatron.bridge.model import make_bridge, make_provider
from orpo_megatron.bridge.prepare import load_hf_config
from orpo_megatron.bridge.recipe import Recipe, build_recipe
from orpo_megatron.bridge.train import finalise
from orpo_megatron.core.ranks import on_rank_0
from orpo_megatron.core.row import row_params
from orpo_megatron.core.step import ForwardStep, make_forward_step
from orpo_megatron.data.dataset import pack_row
from orpo_megatron.data.plan import NllScope
from orpo_megatron.segments import context_shard

#: Entered when a turn's step starts and left when it ends; its argument is the turn's name.
Watch = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Turn:
    """A kind of training step.

    Attributes:
        name: What it is called.
        rows: All rows of its global batch, as many as every other turn has.
        forward_step: Runs one of them.
        callbacks: Are told of this turn's steps and of no others.
        settings: Of the model's configuration, for this turn's steps.
    """

    name: str
    rows: Sequence[PackedRow]
    forward_step: ForwardStep
    callbacks: Sequence[Callback] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def orpo_turn(recipe: Recipe, rows: Sequence[PackedRow], name: str = "orpo", *callbacks: Callback) -> Turn:
    """Returns a step of an ORPO run, with its guard before the optimizer and its metrics on rank 0."""
    guard = StepGuard(recipe.run, recipe.orpo, lambda pair: ("", pair), keep_weights=False)
    forward_step = make_forward_step(recipe.orpo, get_num_microbatches, guard.observe)
    return Turn(name, rows, forward_step, (guard, _Metrics(), *callbacks))


def sft_turn(rows: Sequence[PackedRow], fusion: str | None, name: str = "sft", *callbacks: Callback) -> Turn:
    """Returns a step of Megatron's own supervised fine-tuning on both sides of every pair.

    The model is called with labels, as Bridge's forward step does: logits of all tokens, Megatron-Core's cross
    entropy, Bridge's masked loss. Bridge's check of each loss for NaN, which waits for the device, is left out in
    its favour.

    Args:
        rows: Rows in which no pair shares its prompt: a position has one label.
        fusion: ``cross_entropy_fusion_impl``, or None for the cross entropy that is not fused.
        name: The turn's name.
        *callbacks: Are told of this turn's steps.
    """
    settings: dict[str, Any] = {"cross_entropy_loss_fusion": fusion is not None}
    if fusion is not None:
        settings["cross_entropy_fusion_impl"] = fusion
    return Turn(name, rows, sft_forward_step, callbacks, settings)


def sft_forward_step(data_iterator: Iterator[PackedRow], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Runs one microbatch of supervised fine-tuning; see ``sft_turn``."""
    whole_row = next(data_iterator)
    cp_group = parallel_state.get_context_parallel_group()
    device, cp = torch.cuda.current_device(), (cp_group.size(), cp_group.rank())
    row = context_shard(whole_row, *cp).to(device)
    labels, loss_mask = next_token_labels(row)
    losses = model(
        input_ids=row.tokens.unsqueeze(0),
        position_ids=row.position_ids.unsqueeze(0),
        attention_mask=None,
        packed_seq_params=row_params(whole_row, device, *cp),
        labels=labels,
        loss_mask=loss_mask,
    )
    return losses, partial(masked_next_token_loss, loss_mask, check_for_nan_in_loss=False)


def next_token_labels(row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what a row, or a rank's share of one, scores in the form that supervised fine-tuning takes.

    Returns:
        Labels, int64 [1, t], and the mask of those that count, fp32 [1, t].
    """
    labels, loss_mask = torch.zeros_like(row.tokens), torch.zeros(row.tokens.shape, device=row.tokens.device)
    labels[row.score_positions] = row.score_labels
    loss_mask[row.score_positions] = 1.0
    return labels.unsqueeze(0), loss_mask.unsqueeze(0)


@dataclass(frozen=True)
class DrawnPair:
    """A pair of random tokens.

    Attributes:
        prompt: Token ids, int64.
        chosen: Those of the chosen response.
        rejected: Those of the rejected response.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def draw_rows(
    num_rows: int,
    pairs_per_row: int,
    prompt_length: int,
    response_length: int,
    vocab_size: int,
    nll_scope: NllScope = "prompt_and_response",
) -> list[PackedRow]:
    """Returns the rows of a global batch of random tokens, the same on every rank."""
    draw = np.random.default_rng(0)
    lengths = (prompt_length, response_length, response_length)
    scored = response_length + (prompt_length - 1 if nll_scope == "prompt_and_response" else 0)
    return [
        pack_row(
            [DrawnPair(*(draw.integers(vocab_size, size=n) for n in lengths)) for _ in range(pairs_per_row)],
            np.arange(row * pairs_per_row, (row + 1) * pairs_per_row),
            nll_scope=nll_scope,
            sequence_multiple_of=1,
            pad_token_id=0,
            num_nll_tokens=num_rows * pairs_per_row * scored,
            num_pairs=num_rows * pairs_per_row,
        )
        for row in range(num_rows)
    ]


def take_turns(recipe: Recipe, turns: Sequence[Turn], watches: Sequence[Watch]) -> None:
    """Runs a training run of Bridge's in which every turn has one step in each round.

    Nothing is saved, evaluated or exported. The process group, if there is one, stays.

    Args:
        recipe: Says what the model, the optimizer and the split are.
        turns: The kinds of step.
        watches: One for each round.

    Raises:
        ConfigError: If a setting does not fit.
    """
    num_steps = len(watches) * len(turns)
    values = recipe.as_dict()
    recipe = build_recipe({**values, "train": {**values.get("train", {}), "train_iters": num_steps}})
    rows = [row for _ in watches for turn in turns for row in turn.rows]
    dataset = PreferenceData(
        seq_length=recipe.data.row_budget, rows_per_step=len(turns[0].rows), content_hash="", pin_memory=False
    ).attach(_RowsInOrder(rows), None)
    bridge = make_bridge(recipe, load_hf_config(recipe))
    container = make_container(
        recipe,
        make_provider(recipe, bridge, load_weights=True),
        dataset,
        num_steps=num_steps,
        eval_plan=None,
    )
    container.checkpoint.save = container.checkpoint.load = container.logger.tensorboard_dir = None
    finalise(container, recipe)
    steps = _Turns(turns, watches)
    pretrain(container, steps.forward_step, callbacks=[steps])
    gc.collect()  # the model's parts refer to one another


class Meter:
    """What each turn's step costs: seconds, floating point operations and peak memory, each in rounds of their own.

    Attributes:
        seconds: Name of a turn -> its seconds, one entry a timed round.
        flops: Name of a turn -> operation -> floating point operations of a step; empty on a GPU, where Transformer
            Engine's kernels cannot be counted.
        peak_bytes: Name of a turn -> the most that its step allocates above what was there.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.device = default_device()
        self.seconds: dict[str, list[float]] = {}
        self.flops: dict[str, dict[str, int]] = {}
        self.peak_bytes: dict[str, int] = {}

    def watches(self, rounds: int, timed_only: bool = False) -> list[Watch]:
        """Returns a round to warm up, one that counts operations and one for memory, and ``rounds`` that are timed."""
        others = [] if timed_only else [self._count, self._measure_memory]
        return [contextlib.nullcontext, *others, *[self._time] * rounds]

    def timings(self, name: str) -> Timings:
        """Returns the seconds of a turn."""
        return Timings(tuple(self.seconds[name]))

    @contextlib.contextmanager
    def _time(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        started = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    @contextlib.contextmanager
    def _count(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            yield
            return
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            yield
        flops = self.flops[name] = dict.fromkeys(_FLOPS, 0)
        for event in profiled.key_averages(group_by_input_shape=True):
            if event.key in _FLOPS:
                flops[event.key] += event.count * _FLOPS[event.key](event.input_shapes)

    @contextlib.contextmanager
    def _measure_memory(self, name: str) -> Iterator[None]:
        with PeakMemory(self.device) as memory:
            yield
        self.peak_bytes[name] = memory.bytes


def _product_flops(left: Sequence[int], right: Sequence[int]) -> int:
    """Counts a product of [..., rows, inner] and [inner, columns]."""
    return 2 * math.prod(left) * right[-1]


def _attention_flops(query: Sequence[int], key: Sequence[int], products: int) -> int:
    """Counts attention of [batch, heads, queries, dim] to keys, as if there were no causal mask."""
    return products * _product_flops(query, (query[-1], key[2]))


#: Floating point operations by the shapes of an operator's arguments. PyTorch's own counter does not know all of them,
#: and as a dispatch mode it does not get along with the mask of a shared prompt.
_FLOPS: dict[str, Callable[[Sequence[Sequence[int]]], int]] = {
    "aten::mm": lambda shapes: _product_flops(shapes[0], shapes[1]),
    "aten::bmm": lambda shapes: _product_flops(shapes[0], shapes[1]),
    "aten::addmm": lambda shapes: _product_flops(shapes[1], shapes[2]),
    "aten::addmm_": lambda shapes: _product_flops(shapes[1], shapes[2]),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda shapes: _attention_flops(shapes[0], shapes[1], 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda shapes: _attention_flops(
        shapes[1], shapes[2], 5
    ),
}


class _RowsInOrder(RowStream):
    """Rows that are there already, in the order in which steps take them."""

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        self.in_order = rows

    def __len__(self) -> int:
        return len(self.in_order)

    def __getitem__(self, index: int) -> PackedRow:
        return self.in_order[index]


class _Metrics(Callback):
    """Brings a step's metrics to rank 0, as ``RunMonitor`` does."""

    def on_train_step_end(self, context: CallbackContext) -> None:
        on_rank_0(context.loss_dict or {})


class _Turns(Callback):
    """Hands each step of Bridge's loop to the turn that it belongs to."""

    def __init__(self, turns: Sequence[Turn], watches: Sequence[Watch]) -> None:
        self.turns, self.watches, self.step = turns, watches, 0
        self.optimizer_steps: list[Callable[[], Any]] = []
        self.watching = contextlib.ExitStack()

    @property
    def turn(self) -> Turn:
        """The turn whose step it is."""
        return self.turns[self.step % len(self.turns)]

    def forward_step(self, data_iterator: Iterator[PackedRow], model: torch.nn.Module) -> Any:
        return self.turn.forward_step(data_iterator, model)

    def on_train_start(self, context: CallbackContext) -> None:
        """Lets each turn's callbacks put themselves before an optimizer that no other turn's stand before."""
        optimizer: Any = context.optimizer
        plain_step = optimizer.step
        for turn in self.turns:
            optimizer.step = plain_step
            for callback in turn.callbacks:
                callback.on_train_start(context)
            self.optimizer_steps.append(optimizer.step)

    def on_train_step_start(self, context: CallbackContext) -> None:
        optimizer: Any = context.optimizer
        optimizer.step = self.optimizer_steps[self.step % len(self.turns)]
        config = get_model_config(context.model[0])
        for name, value in self.turn.settings.items():
            setattr(config, name, value)
        gc.collect()
        self.watching.enter_context(self.watches[self.step // len(self.turns)](self.turn.name))
        for callback in self.turn.callbacks:
            callback.on_train_step_start(context)

    def on_train_step_end(self, context: CallbackContext) -> None:
        for callback in self.turn.callbacks:
            callback.on_train_step_end(context)
        self.watching.close()
        self.step += 1
