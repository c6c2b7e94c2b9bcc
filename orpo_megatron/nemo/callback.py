"""Logs the metrics of training and evaluation through Lightning, under the names of ``metrics.py``."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.utils import get_model_config
from nemo.lightning.megatron_parallel import MegatronStep

from orpo_megatron.config import ConfigError
from orpo_megatron.core.finite import any_bad, gradient_extremes, on_any_rank
from orpo_megatron.core.ranks import on_rank_0
from orpo_megatron.metrics import METRICS, averages, evaluation_metrics
from orpo_megatron.nemo.loss import OrpoLossReduction


class OrpoMetrics(pl.Callback):
    """Logs every metric of a step, and of an evaluation with the prefix ``eval_``.

    NeMo's own ``val_loss`` is set to the exact loss over all held-out pairs. Megatron's events come on every rank, but
    only ranks of the last pipeline stage know the totals; those of other stages learn the averages.
    """

    def __init__(self, eval_pairs: dict[str, int]) -> None:
        """Keeps the counts of held-out pairs, as ``count_pairs`` returns them; empty without any."""
        self.eval_pairs = eval_pairs
        self.step: dict[str, torch.Tensor] = {}
        self.evaluation: dict[str, torch.Tensor] = {}

    def on_megatron_reduce_microbatches_end(self, loss_reduction: OrpoLossReduction, **kwargs: Any) -> None:
        """Takes the totals of a step, on the last pipeline stage."""
        self.step = loss_reduction.totals

    def on_megatron_step_end(self, step: MegatronStep, **kwargs: Any) -> None:
        """Logs a training step before its weights change, or adds to an evaluation.

        Raises:
            ConfigError: On every rank, if the loss or a gradient of a training step is not finite on any.
        """
        totals, self.step = self.step, {}
        if step.forward_only:
            self.evaluation = {name: total + self.evaluation.get(name, 0) for name, total in totals.items()}
            return
        metrics = on_rank_0(averages(totals), tuple(METRICS))
        # A loss scaler takes gradients that overflow for granted: it skips the step and lowers the scale by itself.
        extremes = [] if get_model_config(step.pipeline[0]).fp16 else gradient_extremes(step.pipeline)
        (bad_gradient,) = on_any_rank(any_bad(extremes))
        if bad_gradient or not math.isfinite(metrics["loss"]):
            what = "a gradient" if math.isfinite(metrics["loss"]) else "the loss"
            raise ConfigError(
                f"In step {step.step_i + 1} {what} is not finite. The weights are still those before that step. Lower "
                "optim.config.lr, or look for a broken pair in the data."
            )
        step.pl_module.log_dict(metrics, batch_size=1)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins an evaluation."""
        self.evaluation = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs an evaluation."""
        if trainer.sanity_checking or not self.eval_pairs:
            return
        metrics = on_rank_0(averages(self.evaluation), evaluation_metrics(self.eval_pairs))
        found = {**metrics, **{name: float(count) for name, count in self.eval_pairs.items()}}
        pl_module.log_dict({f"eval_{name}": value for name, value in found.items()}, batch_size=1)
        pl_module.log("val_loss", metrics["loss"], batch_size=1)
