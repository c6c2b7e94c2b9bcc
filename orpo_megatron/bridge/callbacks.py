"""What a run writes while it trains: metrics, progress, and the exported model at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from orpo_megatron.bridge.rundir import METRICS as METRICS_FILE
from orpo_megatron.console import Progress, rank
from orpo_megatron.data.plan import StepPlan
from orpo_megatron.metrics import METRICS


class RunMonitor(Callback):
    """Writes ``metrics.jsonl``, drives the progress display and calls ``export`` when training is done."""

    def __init__(
        self,
        run_dir: Path,
        plan: StepPlan,
        progress_mode: str,
        export: Callable[[list[torch.nn.Module]], None] | None,
    ) -> None:
        """Keeps what it needs; nothing is written before training starts."""
        self.path = run_dir / METRICS_FILE
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
        self._write({"step": step, **record})
        self.progress.step(step, record)

    def on_eval_end(self, context: CallbackContext) -> None:
        """Writes one object for the evaluation, its names prefixed with ``eval_``."""
        step = context.state.train_state.step
        self.evaluated_at = step
        metrics = on_rank_0(context.total_loss_dict or {})
        if self.file is not None and self.progress is not None:
            self._write({"step": step, **{f"eval_{name}": value for name, value in metrics.items()}})
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
        assert self.file is not None
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def keep_until(path: Path, step: int) -> None:
    """Drops from a metrics file every line beyond ``step``, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    fresh.replace(path)


def on_rank_0(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Brings the metrics, which only the last pipeline stage knows, to rank 0.

    Args:
        metrics: Averages by name; empty on every rank but those of the last pipeline stage.

    Returns:
        The metrics as floats, in the order of ``METRICS``; a metric that counted nothing is NaN.
    """
    values = torch.full((len(METRICS),), float("nan"), dtype=torch.float64, device=torch.cuda.current_device())
    if metrics:
        values = torch.stack([metrics[name].double().reshape(()) for name in METRICS])
    if dist.get_world_size() > 1:
        # The last rank lies on the last stage under every order of Megatron's that ends in pipeline or data ranks.
        dist.broadcast(values, src=dist.get_world_size() - 1)
    return dict(zip(METRICS, values.tolist(), strict=True))
