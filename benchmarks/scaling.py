"""How the cost of a training step grows: with sequence length, pairs a step, vocabulary and microbatches.

    python -m benchmarks.scaling [--axes length pairs ...] [--passes 3] [--rounds 2]

One of them grows at a time, on a small Llama in Megatron-Bridge's loop. The slope of seconds and of peak memory over
size, both as logarithms, is at most 1 where cost is at most linear. Attention itself grows with the square of the
sequence length; the lengths here are those at which its share, which is shown, is small.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import MIB, Bar, table, write_results
from orpo_megatron.bridge.recipe import Recipe, build_recipe
from orpo_megatron.console import logged_to
from orpo_megatron.machine import use_machine

if TYPE_CHECKING:
    from benchmarks.bridge_loop import Meter

#: A slope up to here counts as linear.
LINEAR = 1.05


@dataclass(frozen=True)
class Size:
    """What a step trains.

    Attributes:
        length: Tokens of each sequence, a quarter of them prompt.
        pairs: Pairs in each packed row.
        vocab_size: Ids of the vocabulary.
        microbatches: Packed rows.
    """

    length: int = 128
    pairs: int = 4
    vocab_size: int = 8192
    microbatches: int = 1


#: What grows on each axis, and the sizes it takes.
AXES = {
    "length": (64, 128, 256, 512),
    "pairs": (4, 8, 16, 32),
    "vocab_size": (8192, 16384, 32768, 65536),
    "microbatches": (1, 2, 4, 8),
}


def main(argv: list[str] | None = None) -> int:
    """Measures, prints tables and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what grows")
    parser.add_argument("--passes", type=int, default=3, help="passes over all sizes of an axis")
    parser.add_argument("--rounds", type=int, default=2, help="timed steps of each size in a pass")
    parser.add_argument("--dir", default="runs/benchmarks/scaling", help="where logs and models go")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    log = Path(args.dir) / "log.txt"
    with logged_to(log):
        use_machine()
    axes = {}
    for axis in args.axes:
        with logged_to(log):
            meter = measure(axis, args)
        axes[axis] = summarise(meter, axis)
        print(report(axis, axes[axis]), flush=True)
    found = bars(axes)
    print("\n".join(map(str, found)))
    results = {"axes": axes, "bars": [bar.as_dict() for bar in found]}
    print(write_results("scaling", shlex.join(["python", "-m", "benchmarks.scaling", *arguments]), results))
    return 0


def measure(axis: str, args: argparse.Namespace) -> Meter:
    """Measures the steps of all sizes of an axis in turns, as far as one model and one number of rows go."""
    from benchmarks.bridge_loop import Meter, draw_rows, orpo_turn, take_turns

    sizes = [replace(Size(), **{axis: value}) for value in AXES[axis]]
    runs: dict[tuple[int, int], list[Size]] = {}
    for size in sizes:
        runs.setdefault((size.vocab_size, size.microbatches), []).append(size)
    meter = Meter()
    for number in range(args.passes):
        for run in runs.values():
            recipe = make_recipe(args.dir, run[0])
            turns = []
            for size in run:
                prompt = size.length // 4
                rows = draw_rows(size.microbatches, size.pairs, prompt, size.length - prompt, size.vocab_size)
                turns.append(orpo_turn(recipe, rows, str(getattr(size, axis))))
            take_turns(recipe, turns, meter.watches(args.rounds, timed_only=number > 0))
    return meter


def make_recipe(folder: str, size: Size) -> Recipe:
    """Returns the recipe of a small model; its data is never read."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    # The distributed optimizer would keep each model alive, and one replica has no use for it.
    whole = {"use_distributed_optimizer": False}
    return build_recipe(
        {
            "run": {"dir": folder},
            "model": {"config": config},
            "data": {
                "train": "none",
                "tokenizer": "none",
                "max_length": 2048,
                "max_prompt_length": 1024,
                "max_tokens_per_row": 2**16,
            },
            "train": {"train_iters": 1},
            "ddp": whole,
            "optimizer": whole,
            "mixed_precision": "bf16_mixed" if torch.cuda.is_available() else None,
        }
    )


def summarise(meter: Meter, axis: str) -> dict[str, Any]:
    """Returns the figures of every size of an axis, and their slopes."""
    steps = {}
    for value in AXES[axis]:
        name = str(value)
        flops = meter.flops.get(name, {})
        steps[name] = {
            **meter.timings(name).as_dict(),
            "peak_bytes": meter.peak_bytes[name],
            "attention_flops": sum(count for operation, count in flops.items() if "attention" in operation),
            "other_flops": sum(count for operation, count in flops.items() if "attention" not in operation),
        }
    figures = ("median_seconds", "peak_bytes", "other_flops")
    slopes = {figure: slope([(int(name), step[figure]) for name, step in steps.items()]) for figure in figures}
    return {"steps": steps, "slopes": slopes}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Returns the slope of the line of least squares through the logarithms; None where something was not measured."""
    if not all(y for _, y in points):
        return None
    x, y = zip(*((math.log(size), math.log(cost)) for size, cost in points), strict=True)
    return statistics.linear_regression(x, y).slope


def bars(axes: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """Holds every slope to that of a straight line."""
    return [
        Bar(f"{axis}: slope of {what}", summary["slopes"][figure], LINEAR)
        for axis, summary in axes.items()
        for what, figure in (("time", "median_seconds"), ("peak memory", "peak_bytes"))
    ]


def report(axis: str, summary: Mapping[str, Any]) -> str:
    """Returns the table of an axis."""
    rows: list[tuple[object, ...]] = []
    for name, step in summary["steps"].items():
        flops = step["attention_flops"] + step["other_flops"]
        rows.append(
            (
                name,
                f"{step['median_seconds']:.3f}",
                f"{step['peak_bytes'] / MIB:,.0f}",
                f"{step['other_flops'] / 1e9:,.1f}",
                f"{step['attention_flops'] / flops:.1%}" if flops else "-",
            )
        )
    slopes = ("-" if value is None else f"{value:.2f}" for value in summary["slopes"].values())
    rows.append(("slope", *slopes, ""))
    return table((axis, "seconds", "peak MiB", "GFLOP but attention", "attention"), rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
