"""What a run writes while it trains: metrics, progress, and the exported model at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_model_config

from orpo_megatron.bridge.rundir import METRICS as METRICS_FILE
from orpo_megatron.bridge.rundir import read_metrics
from orpo_megatron.console import Progress, rank
from orpo_megatron.core.moe import has_auxiliary_loss
from orpo_megatron.core.moe_log import auxiliary_losses
from orpo_megatron.core.ranks import on_rank_0
from orpo_megatron.data.plan import StepPlan
from orpo_megatron.metrics import count_pairs, evaluation_metrics


class RunMonitor(Callback):
    """Writes ``metrics.jsonl``, drives the progress display and calls ``export`` when training is done."""

    def __init__(
        self,
        run_dir: Path,
        plan: StepPlan,
        eval_plan: StepPlan | None,
        progress_mode: str,
        export: Callable[[list[torch.nn.Module]], None] | None,
    ) -> None:
        """Keeps what it needs; nothing is written before training starts.

        Args:
            run_dir: The folder of the run.
            plan: The steps of the run.
            eval_plan: The steps of an evaluation, if there are any.
            progress_mode: ``run.progress``.
            export: Writes the trained model; all ranks call it at the end of training.
        """
        self.path = run_dir / METRICS_FILE
        lengths = eval_plan.lengths if eval_plan else None
        self.eval_pairs = count_pairs(lengths.chosen, lengths.rejected) if lengths else {}
        self.plan, self.progress_mode, self.export = plan, progress_mode, export
        self.file: TextIO | None = None
        self.progress: Progress | None = None
        self.evaluated_at = -1
        self.finished = False

    def on_train_start(self, context: CallbackContext) -> None:
        """Opens the metrics file and drops what lies beyond the checkpoint that the run resumes from."""
        step = context.state.train_state.step
        if rank() == 0:
            keep_until(self.path, step)
            self.file = self.path.open("a", encoding="utf-8")
            self.progress = Progress(self.progress_mode, step, self.plan.num_steps)

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Notes the time and the learning rate that the step is taken with."""
        self.started = time.monotonic()
        self.learning_rate = float(context.optimizer.param_groups[0]["lr"])

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Writes one object for the step."""
        step = context.state.train_state.step + 1  # Bridge counts the step after this event
        metrics = on_rank_0(context.loss_dict or {})
        config = get_model_config(context.model[0])
        if has_auxiliary_loss(config):
            metrics |= auxiliary_losses(config, get_num_microbatches())
        if self.file is None or self.progress is None:
            return
        record = {
            **metrics,
            "grad_norm": float("nan") if context.grad_norm is None else float(context.grad_norm),
            "learning_rate": self.learning_rate,
            "tokens": self.plan.num_tokens(step - 1),
            "pairs": self.plan.num_pairs(step - 1),
            "seconds": time.monotonic() - self.started,
        }
        skipped = {"skipped": True} if context.skipped_iter else {}
        self._write({"step": step, **record, **skipped})
        self.progress.step(step, record)

    def on_eval_end(self, context: CallbackContext) -> None:
        """Writes one object for the evaluation, its names prefixed with ``eval_``."""
        step = context.state.train_state.step
        self.evaluated_at = step
        averages, names = context.total_loss_dict or {}, evaluation_metrics(self.eval_pairs)
        metrics = on_rank_0(averages, names)
        for name in averages.keys() - names:
            del averages[name]  # Bridge logs this dictionary next, where a bucket without pairs would be NaN
        if self.file is not None and self.progress is not None:
            record = {f"eval_{name}": value for name, value in {**metrics, **self.eval_pairs}.items()}
            self._write({"step": step, **record})
            self.progress.evaluation(step, metrics)

    def on_train_end(self, context: CallbackContext) -> None:
        """Exports the model, and skips Bridge's closing evaluation where the last step has had one."""
        self.finished = True
        if context.state.train_state.step == self.evaluated_at:
            context.state.train_state.do_valid = False
        if self.export is not None:
            self.export(context.model)

    def close(self) -> None:
        """Closes the file and the display."""
        if self.file is not None:
            self.file.close()
        if self.progress is not None:
            self.progress.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        """Writes a line of JSON, which knows no NaN and no infinity: they become null."""
        assert self.file is not None
        values = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.file.write(json.dumps(values, allow_nan=False) + "\n")
        self.file.flush()


def keep_until(path: Path, step: int) -> None:
    """Drops from a metrics file every line beyond ``step``, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
    fresh.replace(path)
