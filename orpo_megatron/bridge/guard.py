"""A step whose loss or gradient is not finite: all ranks stop or skip it alike, and its rows are kept in a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.model_load_save import save_megatron_model
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from orpo_megatron.batch import PackedRow
from orpo_megatron.bridge.kept import FOLDER, plain, save_step
from orpo_megatron.config import ConfigError, OrpoConfig, RunConfig
from orpo_megatron.console import say
from orpo_megatron.core.finite import any_bad, gradient_extremes, on_any_rank
from orpo_megatron.core.ranks import from_all_ranks
from orpo_megatron.core.step import make_forward_step

#: How many rows, and how many parameters, a message names.
_NAMED = 3
#: After so many skipped steps one after another a run stops.
_SKIPS_IN_A_ROW = 10
_KEPT = "Its rows are kept in {path}; replay them with tools/verify_parity.py RECIPE --batch {path}{weights}."
_REMEDY = (
    "No rank has taken the step. Look at these pairs, or lower optimizer.lr; the same command with "
    "run.on_nonfinite=skip goes on from the latest checkpoint without such steps."
)
#: Where microbatches were not finite: (data-parallel rank, microbatch) -> the pairs of its row.
Found = dict[tuple[int, int], list[int]]


class StepGuard(Callback):
    """Looks at every loss and gradient before the optimizer does, on all ranks together.

    A step that is fine costs one pass over the gradient buffers, without a copy, one all-reduce of 8 bytes over all
    ranks, and one wait for the device, as the gradient norm takes one. Rows stay on the host until the next step.
    """

    def __init__(
        self,
        run: RunConfig,
        objective: OrpoConfig,
        source: Callable[[int], tuple[str, int]],
        keep_weights: bool = True,
    ) -> None:
        """Prepares a guard; it stands from ``on_train_start`` on.

        Args:
            run: Says what to do, and where the files go.
            objective: The loss, to find out which rows a gradient comes from.
            source: Tells the file and line of a pair, for messages.
            keep_weights: Whether a run that stops keeps the weights that the step met. Adapters alone are no model
                that the step could be run on again.
        """
        self.folder, self.policy = Path(run.dir) / FOLDER, run.on_nonfinite
        self.objective, self.source = objective, source
        self.keep_weights, self.skipped = keep_weights and run.on_nonfinite == "stop", 0
        self.seen: list[tuple[PackedRow, torch.Tensor]] = []

    def observe(self, row: PackedRow, loss: torch.Tensor) -> None:
        """Keeps a microbatch of the running step, as ``make_forward_step`` hands it over.

        Args:
            row: The whole row, on the host.
            loss: Its share of the global batch's loss, detached, on the device: nothing waits for it here.
        """
        self.seen.append((row, loss))

    def on_train_start(self, context: CallbackContext) -> None:
        """Stands before the optimizer."""
        optimizer: Any = context.optimizer
        take_step = optimizer.step
        self.model: list[Any] = context.model
        # A loss scaler takes gradients that overflow for granted: it skips the step and lowers the scale by itself.
        self.check_gradients = not get_model_config(self.model[0]).fp16

        def step() -> Any:
            bad_loss, bad_gradient = self.check()
            if not (bad_loss or bad_gradient):
                self.skipped = 0
                return take_step()
            message = self.report(bad_loss)
            self.skipped += 1
            if self.policy == "stop":
                raise ConfigError(message)
            if self.skipped == _SKIPS_IN_A_ROW:
                raise ConfigError(f"{message} So were the {_SKIPS_IN_A_ROW - 1} before it: the model has diverged.")
            say(message)
            return False, None, None  # as Megatron's optimizers say that they skipped a step

        optimizer.step = step

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Forgets the step before."""
        self.seen.clear()
        self.step = context.state.train_state.step + 1

    def check(self) -> tuple[bool, bool]:
        """Returns whether a loss, and whether a gradient, is not finite on any rank; all ranks call it."""
        losses = [loss for _, loss in self.seen]
        extremes = gradient_extremes(self.model) if self.check_gradients else []
        bad_loss, bad_gradient = on_any_rank(any_bad(losses), any_bad(extremes))
        return bad_loss, bad_gradient

    def report(self, bad_loss: bool) -> str:
        """Keeps the step's rows and says what is wrong; all ranks call it.

        Args:
            bad_loss: Whether a loss is not finite on any rank.

        Returns:
            The message, the same on all ranks. The files are complete by then.
        """
        parameters = self._bad_parameters()  # first: the search below leaves other gradients
        rows = [row for row, _ in self.seen]
        if bad_loss:
            bad = [not bool(loss.isfinite()) for _, loss in self.seen]
        else:
            rows = _rows_of_last_stage(rows)
            bad = bad_rows(self.model, rows, self.objective)
        rank = parallel_state.get_data_parallel_rank()
        mine = {(rank, i): row.pair_ids.tolist() for i, row in enumerate(rows) if bad[i]}
        what = self._what(bad_loss, from_all_ranks((mine, parameters)))
        path = self.folder / f"step_{self.step:06d}.pt"
        trouble = next(filter(None, from_all_ranks(self._keep(path, what))), None)
        weights = "" if trouble or not self.keep_weights else self._keep_weights(path.with_suffix(""))
        kept = f"Its rows could not be kept: {trouble}." if trouble else _KEPT.format(path=path, weights=weights)
        return f"{what} {kept} {'The step is skipped on all ranks.' if self.policy == 'skip' else _REMEDY}"

    def _keep_weights(self, folder: Path) -> str:
        """Writes the weights, which no rank has changed yet; returns how to start from them, nothing if that fails."""
        done = True
        try:
            save_megatron_model(self.model, folder)
        except Exception:  # whatever it is, what the step was must still be said
            done = False
        return f" checkpoint.pretrained_checkpoint={folder}" if all(from_all_ranks(done)) else ""

    def _what(self, bad_loss: bool, ranks: Sequence[tuple[Found, list[str]]]) -> str:
        """Says what is not finite, and where, from what each rank found."""
        found = {place: pairs for theirs, _ in ranks for place, pairs in theirs.items()}
        names = list(dict.fromkeys(name for _, theirs in ranks for name in theirs))
        places = [
            f"data rank {rank}, microbatch {number}: {', '.join(map(self._pair, pairs)) or 'no pairs'}"
            for (rank, number), pairs in sorted(found.items())
        ]
        where = f"on {_some(places, '; ')}" if places else "though it is for each row alone"
        what = f"Step {self.step}: the {'loss' if bad_loss else 'gradient'} is not finite {where}."
        return f"{what} Gradients that are not finite: {_some(names, ', ')}." if names else what

    def _pair(self, pair: int) -> str:
        file, line = self.source(pair)
        return f"pair {pair} ({file}:{line})"

    def _bad_parameters(self) -> list[str]:
        """Returns the first parameters of this rank whose gradient is not finite; one more than a message names."""
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        stage = f" (pipeline rank {parallel_state.get_pipeline_model_parallel_rank()})" if stages > 1 else ""
        names = []
        for name, parameter in _trainable(self.model) if self.check_gradients else ():
            if any_bad(list(torch.aminmax(parameter.main_grad))):
                names.append(f"{name}{stage}")
                if len(names) > _NAMED:
                    break
        return names

    def _keep(self, path: Path, what: str) -> str | None:
        """Writes the step's rows to a file; all ranks call it.

        Returns:
            Why it could not be written, or None.
        """
        # Tensor- and context-parallel ranks hold the same rows; one of them on each replica's last stage shows them.
        if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank():
            return None
        if not parallel_state.is_pipeline_last_stage():
            return None
        group = parallel_state.get_data_parallel_group()
        mine = [(float(loss), plain(row)) for row, loss in self.seen]
        replicas: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object(mine, replicas, group=group, group_dst=0)
        if replicas is None:
            return None
        try:
            save_step(path, self.step, what, replicas)
        except (OSError, RuntimeError) as error:  # the other ranks must not wait for this one
            return " ".join(str(error).split())
        return None


def bad_rows(model: Sequence[Any], rows: Sequence[PackedRow], objective: OrpoConfig) -> list[bool]:
    """Finds out which rows have a gradient that is not finite, each row by itself; all ranks call it.

    It runs every row forward and backward once more. Gradients are left as the last row made them.

    Args:
        model: The model's chunks, wrapped for data parallel.
        rows: The rows of this data-parallel rank, the same on all ranks that share them.
        objective: The loss.

    Returns:
        For each row whether a gradient on this rank is not finite.
    """
    config = get_model_config(model[0])
    # An interleaved schedule takes no single microbatch; its rows are then told apart by groups.
    vpp = len(model) > 1
    size = (config.microbatch_group_size_per_vp_stage or config.pipeline_model_parallel_size) if vpp else 1
    schedule, bad = get_forward_backward_func(), list[bool]()
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        longest = max(len(row.tokens) for row in group)
        with _own_gradients(model):
            schedule(
                forward_step_func=make_forward_step(objective, lambda: len(rows)),
                data_iterator=[iter(group) for _ in model] if vpp else iter(group),
                model=list(model) if vpp else model[0],
                num_microbatches=len(group),
                seq_length=longest,
                decoder_seq_length=longest,
                micro_batch_size=1,
                forward_only=False,
            )
        extremes = [extreme for _, parameter in _trainable(model) for extreme in torch.aminmax(parameter.main_grad)]
        bad += [bool(any_bad(extremes))] * len(group)
    return bad


@contextlib.contextmanager
def _own_gradients(model: Sequence[Any]) -> Iterator[None]:
    """Starts from gradients of 0, and leaves those of what runs inside as this rank computed them, not reduced."""
    config = get_model_config(model[0])
    hooks = ("finalize_model_grads_func", "grad_sync_func", "param_sync_func", "no_sync_func")
    kept = {name: getattr(config, name) for name in hooks}
    with contextlib.ExitStack() as stack:
        for chunk in model:
            chunk.zero_grad_buffer()
            stack.enter_context(chunk.no_sync())
        for name in hooks:
            setattr(config, name, None)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(config, name, value)


def _trainable(model: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yields the names and parameters that the model's chunks train on this rank."""
    for chunk in model:
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter


def _rows_of_last_stage(rows: list[PackedRow]) -> list[PackedRow]:
    """Hands the rows, which only the last pipeline stage has seen, to the other stages."""
    shared = [rows]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(shared, last, parallel_state.get_pipeline_model_parallel_group())
    return shared[0]


def _some(things: Sequence[str], separator: str) -> str:
    """Joins the first things of a list."""
    shown = separator.join(things[:_NAMED])
    return f"{shown}{separator}and more" if len(things) > _NAMED else shown
