"""Is a sharding exact? What the two sides of a comparison are, how far apart they may be, and what is shown of it.

The two models themselves are run by ``bridge/session.py``; nothing here imports Megatron.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from orpo_megatron.batch import PackedRow
from orpo_megatron.bridge.recipe import UNEVEN_STAGES, Recipe, build_recipe
from orpo_megatron.config import ConfigError, nearest
from orpo_megatron.data.dataset import pack_row
from orpo_megatron.data.plan import Padding, StepPlan
from orpo_megatron.data.store import PairStore

#: Largest error that is still rounding: in fp32, and where ``mixed_precision`` keeps 8 bits of a product. The four
#: layers of recipes/tiny_cpu.yaml reach 8e-3 in bf16 at tensor 2. What one of n replicas loses or doubles shows as
#: 1/n, so beyond 20 of them only fp32 sees it. Metrics round to 2e-4 there and have a tenth of the bound.
EXACT, ROUNDED = 1e-5, 5e-2
#: Gradients smaller than this share of the norm of all of them are measured against it, not against themselves.
GRADIENT_FLOOR = 1e-6
WORST = 10

#: Metrics that are counts or follow from the plan: equal, not merely close.
COUNTED = frozenset({"step", "tokens", "pairs", "learning_rate", "rewards/accuracies", "capped_pairs"})
#: Differences of log-probs, which may be near 0 themselves: measured against the larger log-prob.
DIFFERENCES = frozenset({"logps/margins", "log_odds_chosen", "rewards/margins"})
#: A metric's name in a run's file: an evaluation's has a prefix and, over pairs of some length, a bucket.
_METRIC = re.compile(r"(eval_)?(.+?)(/\d+-(?:\d+|up))?")

#: The names of a sharding's sizes on the command line.
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "sp": "sequence_parallel",
}
_UNSPLIT: dict[str, Any] = {name: 1 for name in SIZES} | {"vpp": None, "sp": False}
#: Settings of the model that only say how a split is laid out: kept where these sizes are the recipe's own.
_LAYOUTS = {
    ("pp", "vpp"): (*UNEVEN_STAGES, "microbatch_group_size_per_vp_stage", "batch_p2p_comm"),
    ("cp",): ("cp_comm_type", "hierarchical_context_parallel_sizes"),
}
#: Settings that save memory or time and should change nothing; the reference has none of them.
_SHORTCUTS = (
    "recompute_",
    "overlap_",
    "cuda_graph_",
    "delay_wgrad_compute",
    "cpu_offloading",
    "moe_shared_expert_overlap",
)
#: Settings that only the distributed optimizer takes, which the reference does without.
_OF_DISTRIBUTED_OPTIMIZER = (
    "num_distributed_optimizer_instances",
    "use_precision_aware_optimizer",
    "main_grads_dtype",
    "main_params_dtype",
    "exp_avg_dtype",
    "exp_avg_sq_dtype",
    "fp8_param_gather",
    "reuse_grad_buf_for_mxfp8_param_ag",
)
#: Sections that watch or save a run; neither side has them.
_OBSERVERS = ("logger", "profiling", "ft", "straggler", "nvrx_straggler", "tensor_inspect", "inprocess_restart")


def parse_sharding(text: str) -> dict[str, Any]:
    """Reads a sharding as the command line names it.

    Args:
        text: Such as ``tp=2,pp=4``; an empty text is no sharding at all.

    Returns:
        All of ``SIZES``; what is not named is not split.

    Raises:
        ConfigError: On an unknown name, or a value that is no size.
    """
    sizes = dict(_UNSPLIT)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in SIZES:
            raise ConfigError(f"--against {part} is not a size of a sharding, such as tp=2.{nearest(name, SIZES)}")
        if name == "sp":
            if value not in ("true", "false"):
                raise ConfigError(f"--against sp ({value}) must be true or false.")
            sizes[name] = value == "true"
        elif value.isdecimal() and int(value) >= 1:
            sizes[name] = int(value)
        else:
            raise ConfigError(f"--against {name} ({value}) must be a whole number of at least 1.")
    return sizes


def unobserved(recipe: Recipe) -> Recipe:
    """Returns the recipe without held-out pairs and without what watches or saves a run."""
    values = recipe.as_dict()
    for name in (*_OBSERVERS, "validation"):
        values.pop(name, None)
    pretrained = recipe.setting("checkpoint.pretrained_checkpoint")
    values["checkpoint"] = {"pretrained_checkpoint": pretrained} if pretrained else None
    values["data"] = {**values["data"], "eval": None}
    return build_recipe(values)


def reference_recipe(recipe: Recipe, sizes: Mapping[str, Any]) -> Recipe:
    """Returns the recipe under the sharding that is taken to be right, without any shortcut.

    Args:
        recipe: The recipe in question.
        sizes: From ``parse_sharding``.

    Returns:
        The same run, but for the split: no recomputation, no overlapped communication, no distributed optimizer.

    Raises:
        ConfigError: If the recipe does not allow the sharding.
    """
    values = recipe.as_dict()
    values.pop("comm_overlap", None)
    given = values["model"]
    model = {key: value for key, value in given.items() if not key.startswith(_SHORTCUTS)}
    for names, settings in _LAYOUTS.items():
        if any((given.get(SIZES[name]) or _UNSPLIT[name]) != sizes[name] for name in names):
            model = {key: value for key, value in model.items() if key not in settings}
    values["model"] = model | {SIZES[name]: size for name, size in sizes.items()}
    for section in ("ddp", "optimizer"):
        given = values.get(section, {}).items()
        kept = {k: v for k, v in given if not k.startswith("overlap_") and k not in _OF_DISTRIBUTED_OPTIMIZER}
        values[section] = kept | {"use_distributed_optimizer": False}
    return build_recipe(values)


def first_batch(
    store: PairStore, plan: StepPlan, padding: Padding | None = None, share_prefix: bool | None = None
) -> list[PackedRow]:
    """Packs the pairs of a plan's first step.

    Args:
        store: The pairs.
        plan: Their plan, which says which of them share a row. Routers see a row at a time, so that both sides of a
            comparison must have the same ones.
        padding: What lengths are padded to a multiple of; by default what the plan says.
        share_prefix: Whether a row holds the prompt of a pair once; by default what the plan says.

    Returns:
        All rows of the step.
    """
    padding = padding or Padding(plan.sequence_multiple_of, plan.row_length_multiple_of)
    return [
        pack_row(
            [store[pair] for pair in pair_ids.tolist()],
            pair_ids,
            nll_scope=plan.nll_scope,
            sequence_multiple_of=padding.sequence,
            row_length_multiple_of=padding.row,
            pad_token_id=store.pad_token_id,
            num_nll_tokens=plan.num_nll_tokens(0),
            num_pairs=plan.num_pairs(0),
            share_prefix=plan.share_prefix if share_prefix is None else share_prefix,
            filler=store[int(plan.pairs(0)[0])],
        )
        for pair_ids in plan.rows(0)
    ]


def describe_sharding(recipe: Recipe, world_size: int) -> str:
    """Returns how a recipe splits the model, in words, such as ``tensor 2, data 2``."""
    kinds = {
        "tensor": recipe.parallel_size("tensor_model"),
        "pipeline": recipe.parallel_size("pipeline_model"),
        "chunks a stage": recipe.parallel_size("virtual_pipeline_model"),
        "context": recipe.parallel_size("context"),
        "expert": recipe.parallel_size("expert_model"),
        "data": recipe.data_parallel_size(world_size),
    }
    parts = [f"{name} {size}" for name, size in kinds.items() if size > 1]
    if recipe.setting("model.sequence_parallel"):
        parts.append("sequence")
    return ", ".join(parts) or "not split"


def metric_errors(reference: Mapping[str, float], other: Mapping[str, float], beta: float) -> dict[str, float]:
    """Compares the metrics of two runs of the same pairs.

    Args:
        reference: Name -> value of the run that is right, as in ``metrics.jsonl``.
        other: The same of the run in question.
        beta: Weight of the odds-ratio loss, which scales rewards.

    Returns:
        Name -> error: 0 or infinity for counts, relative to the larger log-prob for differences of log-probs, else
        relative to the value itself. Infinity where either is no number, or is missing.
    """
    errors = {}
    for key in {**reference, **other}:
        right, value = reference.get(key, math.nan), other.get(key, math.nan)
        if right == value:
            errors[key] = 0.0
            continue
        match = _METRIC.fullmatch(key)
        assert match is not None
        prefix, name, bucket = match.groups(default="")
        scale = 0.0 if name in COUNTED else abs(right)
        if name in DIFFERENCES:
            scale = max(abs(reference[f"{prefix}logps/{side}{bucket}"]) for side in ("chosen", "rejected"))
            scale *= beta if name == "rewards/margins" else 1.0
        error = abs(value - right) / scale if scale else math.inf
        # A NaN is no number to be close to, and max() would lose it.
        errors[key] = math.inf if math.isnan(error) else error
    return errors


class GradientError(NamedTuple):
    """How far the gradient of a parameter, or of one shard of it, is from the reference.

    Attributes:
        difference: Largest absolute difference of an element; infinity where one is no number.
        largest: Largest absolute element of the reference.
        square_sum: Sum of squares of the reference, counted on one replica of each shard only.
        difference_square_sum: Sum of squares of the differences, counted likewise.
    """

    difference: float
    largest: float
    square_sum: float
    difference_square_sum: float = 0.0

    def merge(self, other: GradientError) -> GradientError:
        """Returns the error of two shards or replicas taken together."""
        return GradientError(
            max(self.difference, other.difference),
            max(self.largest, other.largest),
            self.square_sum + other.square_sum,
            self.difference_square_sum + other.difference_square_sum,
        )


def merge_shards(shards: Iterable[Mapping[str, GradientError]]) -> dict[str, GradientError]:
    """Merges what every rank found, parameter by parameter."""
    merged: dict[str, GradientError] = {}
    for shard in shards:
        for name, error in shard.items():
            merged[name] = merged[name].merge(error) if name in merged else error
    return merged


def gradient_errors(parameters: Mapping[str, GradientError]) -> dict[str, float]:
    """Returns each parameter's error relative to its largest reference gradient.

    Args:
        parameters: Name -> error over all shards and replicas.

    Returns:
        Name -> largest difference over the largest element of the reference, which is floored at ``GRADIENT_FLOOR``
        of the norm of all gradients.
    """
    floor = GRADIENT_FLOOR * math.sqrt(sum(error.square_sum for error in parameters.values()))
    relative = {}
    for name, error in parameters.items():
        scale = max(error.largest, floor)
        relative[name] = error.difference / scale if scale else (0.0 if error.difference == 0 else math.inf)
    return relative


def rms_errors(parameters: Mapping[str, GradientError]) -> dict[str, float]:
    """Returns each parameter's root-mean-square error relative to the reference's root mean square.

    Where precision is low the largest error of an element is chance; this one is a mean over all of them.

    Args:
        parameters: Name -> error over all shards and replicas.
    """
    return {
        name: math.sqrt(error.difference_square_sum / error.square_sum) if error.square_sum else math.inf
        for name, error in parameters.items()
    }


@dataclass(frozen=True)
class Comparison:
    """One global batch under two shardings.

    Attributes:
        reference: Metrics of the reference, by name.
        metrics: Metrics of the recipe's own sharding.
        metric_errors: From ``metric_errors``.
        gradient_errors: From ``gradient_errors``; trainable parameters that both sides have.
        unmatched: Trainable parameters that only one side has.
        bound: Largest error that passes; where the two sides round, metrics have a tenth of it.
        exact: Whether both sides compute in fp32. Where they round, a near tie may turn, so that counts may differ.
    """

    reference: Mapping[str, float]
    metrics: Mapping[str, float]
    metric_errors: Mapping[str, float]
    gradient_errors: Mapping[str, float]
    unmatched: tuple[str, ...]
    bound: float
    exact: bool = True

    @property
    def judged(self) -> dict[str, float]:
        """Errors of the metrics and parameters that decide."""
        metrics = {name: error for name, error in self.metric_errors.items() if self.exact or name not in COUNTED}
        return {**metrics, **self.gradient_errors}

    @property
    def failures(self) -> dict[str, float]:
        """Metrics and parameters whose error is beyond the bound, with their errors."""
        tight = self.bound if self.exact else self.bound / 10
        bounds = {name: tight if name in self.metric_errors else self.bound for name in self.judged}
        return {name: error for name, error in self.judged.items() if not error <= bounds[name]}

    @property
    def passed(self) -> bool:
        """Whether the two shardings are one model."""
        return bool(self.gradient_errors) and not self.failures and not self.unmatched

    def table(self) -> str:
        """Returns what was compared, in aligned columns, the verdict last."""
        width = max(len(name) for name in (*self.metric_errors, *self.gradient_errors, *self.unmatched))
        lines = [f"{'metric':<{width}}  {'reference':>13}  {'recipe':>13}  {'error':>8}"]
        for name, error in self.metric_errors.items():
            values = (self.reference.get(name, math.nan), self.metrics.get(name, math.nan))
            lines.append(f"{name:<{width}}  {values[0]:>13.7g}  {values[1]:>13.7g}  {error:>8.1e}{self._mark(name)}")
        worst = sorted(self.gradient_errors.items(), key=lambda item: item[1], reverse=True)
        lines += ["", f"{f'gradient, worst {min(WORST, len(worst))} of {len(worst)}':<{width}}  {'error':>8}"]
        lines += [f"{name:<{width}}  {error:>8.1e}{self._mark(name)}" for name, error in worst[:WORST]]
        lines += [f"{name:<{width}}  trained on one side only" for name in self.unmatched]
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        """Returns the outcome in one line."""
        worst = f"the worst error is {max(self.judged.values(), default=math.inf):.1e}, the bound {self.bound:g}"
        if self.passed:
            return f"PASS: {worst}."
        if not self.gradient_errors and not self.unmatched:
            return "FAIL: no parameter is trained, so there is no gradient to compare."
        wrong = len(self.failures) + len(self.unmatched)
        return f"FAIL: {wrong} of {len(self.judged) + len(self.unmatched)} figures are wrong; {worst}."

    def _mark(self, name: str) -> str:
        return "  <" if name in self.failures else ""


def bound_of(recipe: Recipe, given: float | None) -> tuple[float, bool]:
    """Returns the largest error that passes for a recipe, and whether it computes in fp32 throughout."""
    model = recipe.sections["model"]
    exact = not (recipe.sections.get("mixed_precision") or model.get("bf16") or model.get("fp16"))
    return (given if given is not None else EXACT if exact else ROUNDED), exact
