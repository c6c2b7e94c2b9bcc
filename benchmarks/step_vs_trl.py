"""One training step of SmolLM2-135M, ours against TRL's ORPOTrainer: forward, backward, clipping and AdamW.

    python -m benchmarks.step_vs_trl [--data FILE] [--pairs 1 4 8] [--max-length N]

Every candidate trains in a process of its own, from the same weights, on the same token ids, the same pairs in each
step; they take turns, one step each. Useful tokens are those of prompt and response of both sides without padding, the
same count for every candidate.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import MIB, Bar, Ratio, Timings, table, write_results
from benchmarks.step_sides import Order, StepFigures, Workload, take_our_steps, take_trl_steps

DEMO = "examples/demo/train.jsonl"
REFERENCE, CLAIMED = "trl", "shared"
#: The largest difference of the losses of one step that passes, relative to the loss.
SAME_LOSS = 1e-4


@dataclass(frozen=True)
class Candidate:
    """A side and its settings.

    Attributes:
        about: What it is, in the report.
        steps: Takes the steps, in a process of its own.
        settings: Of ``data`` in our recipe, or of TRL's ORPOConfig.
        same_answer: Whether its loss is the reference's by convention.
    """

    about: str
    steps: Callable[..., None]
    settings: dict[str, Any]
    same_answer: bool = True


def candidates_of(pairs: int, max_length: int) -> dict[str, Candidate]:
    """Returns all candidates for so many pairs a step."""
    plain = {"gradient_checkpointing": False}
    one_pair = {**plain, "per_device_train_batch_size": 1, "gradient_accumulation_steps": pairs}
    padded = {"share_prefix": "on", "pad_to_multiple_of": max_length}
    candidates = {
        "packed": Candidate("packed, a prompt for each side", take_our_steps, {"share_prefix": "off"}),
        "shared": Candidate("packed, one prompt a pair", take_our_steps, {"share_prefix": "on"}),
        "shared_padded": Candidate("one prompt a pair, padded to max_length", take_our_steps, padded),
        "trl": Candidate("TRL without gradient checkpointing", take_trl_steps, plain),
        "trl_one_pair": Candidate("the same, one pair a microbatch", take_trl_steps, one_pair, same_answer=False),
        "trl_defaults": Candidate("TRL's defaults: gradient checkpointing", take_trl_steps, {}),
    }
    if pairs == 1:
        del candidates["trl_one_pair"]  # it is trl
    return candidates


class Side:
    """A candidate's process."""

    def __init__(self, name: str, candidate: Candidate, workload: Workload) -> None:
        """Starts it and waits for its first step."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=candidate.steps, args=(theirs, workload, candidate.settings))
        self.process.start()
        theirs.close()
        self._receive()

    def step(self, order: Order, last: bool) -> StepFigures:
        """Has it take a step; returns when it is ready for the next one, or gone after the last."""
        self.connection.send(order)
        figures: StepFigures = self._receive()
        if last:
            self.process.join()
        else:
            self._receive()
        return figures

    def stop(self) -> None:
        """Ends a process that is still there."""
        if self.process.is_alive():
            self.process.kill()  # ours would take SIGTERM for a wish to save a checkpoint
        self.process.join()

    def _receive(self) -> Any:
        # A pipe may outlive the process that was killed, so the process is looked at as well.
        while not self.connection.poll(1.0) and self.process.is_alive():
            pass
        try:
            if self.connection.poll():
                return self.connection.recv()
        except EOFError:
            pass
        self.process.join()
        raise RuntimeError(
            f"The process of {self.name} ended with status {self.process.exitcode}: what it wrote says why. "
            "-9 means that memory ran out: lower --max-length or --pairs, or name fewer --candidates."
        )


def take_turns(candidates: Mapping[str, Candidate], workload: Workload) -> dict[str, list[StepFigures]]:
    """Has all candidates take every step in turns: one to warm up, some that are timed, and one for memory.

    Returns:
        Name -> what each step took, the step to warm up included.
    """
    figures: dict[str, list[StepFigures]] = {name: [] for name in candidates}
    sides: list[Side] = []
    try:
        for name, candidate in candidates.items():
            sides.append(Side(name, candidate, workload))
        for step in range(workload.num_steps):
            last = step == workload.num_steps - 1
            for side in sides:
                figures[side.name].append(side.step("memory" if last else "time", last))
    finally:
        for side in sides:
            side.stop()
    return figures


def summarise(
    figures: Mapping[str, Sequence[StepFigures]], candidates: Mapping[str, Candidate], tokens: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Reduces the steps of every candidate to what is reported.

    Args:
        figures: From ``take_turns``.
        candidates: The candidates.
        tokens: Useful tokens of every step.

    Returns:
        Name -> figures. Tokens a second are the median of the timed steps, speed and memory are relative to the
        reference where it took part.
    """
    reference = figures.get(REFERENCE)
    summary = {}
    for name, steps in figures.items():
        timed = Timings(tuple(step.seconds for step in steps[1:-1]))
        rates = Ratio.of([count / s for count, s in zip(tokens[1:-1], timed.rounds, strict=True)])
        entry: dict[str, Any] = {
            "about": candidates[name].about,
            "settings": candidates[name].settings,
            **timed.as_dict(),
            "useful_tokens_per_second": rates.median,
            "peak_bytes_above_state": steps[-1].above_state,
            "peak_rss_rise": max(step.rss_bytes for step in steps[1:-1]),
            "losses": [step.loss for step in steps],
        }
        if reference is not None:
            theirs = Timings(tuple(step.seconds for step in reference[1:-1]))
            entry["speed"] = vars(theirs.ratio_to(timed))
            entry["memory"] = steps[-1].above_state / reference[-1].above_state
            entry["loss_difference"] = max(
                abs(mine.loss - step.loss) / abs(step.loss) for mine, step in zip(steps, reference, strict=True)
            )
        summary[name] = entry
    return summary


def bars_of(pairs: int, summary: Mapping[str, Mapping[str, Any]], candidates: Mapping[str, Candidate]) -> list[Bar]:
    """Returns what the figures for so many pairs a step are held to."""
    if REFERENCE not in summary:
        return []
    bars = [
        Bar(f"{pairs} pairs, {name}, loss against TRL's", entry["loss_difference"], SAME_LOSS)
        for name, entry in summary.items()
        if candidates[name].same_answer and name != REFERENCE
    ]
    if CLAIMED in summary:
        claimed = summary[CLAIMED]
        speed = claimed["speed"]["median"]
        bars.append(
            Bar(f"{pairs} pairs, useful tokens/s over TRL's", speed, 1.2 if pairs == 1 else 2.5, at_most=False)
        )
        if pairs >= 4:
            bars.append(Bar(f"{pairs} pairs, peak memory above state over TRL's", claimed["memory"], 0.4))
    return bars


def report(pairs: int, summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table for so many pairs a step."""
    rows = []
    for name, entry in summary.items():
        speed = Ratio(**entry["speed"]) if "speed" in entry else "-"
        rows.append(
            (
                f"{name}: {entry['about']}",
                f"{entry['median_seconds']:.2f}",
                f"{entry['useful_tokens_per_second']:.0f}",
                speed,
                f"{entry['peak_bytes_above_state'] / MIB:.0f}",
                f"{entry.get('memory', math.nan):.2f}",
                f"{entry['peak_rss_rise'] / MIB:.0f}",
                f"{entry.get('loss_difference', math.nan):.0e}",
            )
        )
    header = ("", "s/step", "tokens/s", "x TRL (spread)", "MiB", "x TRL", "RSS MiB", "loss off")
    return f"{pairs} pairs a step\n{table(header, rows)}"


def useful_tokens(workload: Workload) -> list[int]:
    """Returns the tokens of every step without padding, the prompt counted for each side."""
    from orpo_megatron.bridge import prepare

    recipe = workload.recipe()
    prepared = prepare.prepare_run(recipe, prepare.load_hf_config(recipe), 1, None, show_progress=False)
    return [prepared.plan.num_tokens(step) for step in range(workload.num_steps)]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DEMO, help="preference pairs in any layout that a recipe takes")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 4, 8], help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512, help="longest prompt plus response in tokens")
    parser.add_argument("--rounds", type=int, default=4, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    parser.add_argument("--candidates", nargs="+", help="only these")
    parser.add_argument("--dir", default="runs/benchmarks/step", help="folder for caches and logs")
    parser.add_argument("--name", default="step_vs_trl", help="of the result file")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results: dict[str, Any] = {"data": Path(args.data).name, "max_length": args.max_length, "pairs": {}}
    bars: list[Bar] = []
    for pairs in args.pairs:
        workload = Workload(args.data, args.max_length, pairs, args.rounds + 2, args.threads, args.dir)
        candidates = candidates_of(pairs, args.max_length)
        if args.candidates:
            candidates = {name: c for name, c in candidates.items() if name in args.candidates}
        tokens = useful_tokens(workload)
        summary = summarise(take_turns(candidates, workload), candidates, tokens)
        results["pairs"][pairs] = {"useful_tokens": tokens, "candidates": summary}
        print(f"{report(pairs, summary)}\n", flush=True)
        bars += bars_of(pairs, summary, candidates)
    results["bars"] = [bar.as_dict() for bar in bars]
    print("\n".join(map(str, bars)))
    words = [Path(word).name if word == args.data else word for word in (sys.argv[1:] if argv is None else argv)]
    print(write_results(args.name, " ".join(["python -m benchmarks.step_vs_trl", *words]), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
