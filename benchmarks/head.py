"""Time, peak memory and rounding of the head, forward and backward, against the heads in use elsewhere.

    python -m benchmarks.head [--shapes small] [--layouts one_pair many_pairs] [--rounds 7]

Every head gets the same hidden states and ends in the same ORPO loss: packed rows for ours and Megatron's, a batch
padded to its longest sequence for TRL's and Liger's. The floor is the three matrix products of the scored rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.common import (
    MIB,
    Bar,
    Ratio,
    Timings,
    default_device,
    interleaved,
    peak_bytes,
    table,
    timed,
    write_results,
)
from benchmarks.head_candidates import (
    SHAPES,
    Case,
    Head,
    Layout,
    Liger,
    Shape,
    gradients,
    in_fp64,
    make_heads,
    matmul_floor,
)

CACHE, RECOMPUTE, TRL, FLOOR = "ours cache", "ours recompute", "TRL", "three products"
#: Square matrices of this width show what the device does at best.
_RATE_WIDTH = {"cpu": 2048, "cuda": 8192}


def measure(case: Case, heads: Mapping[str, Head], rounds: int) -> dict[str, dict[str, Any]]:
    """Runs every head on a case: loss and peak memory once, then timed in turns.

    Args:
        case: The case.
        heads: What is compared.
        rounds: Rounds that are timed; 0 measures memory only.

    Returns:
        Name -> figures, with the floor's among them. Peaks are above inputs and the gradients that come out.
    """
    figures: dict[str, dict[str, Any]] = {}
    calls = {name: partial(_forward_backward, case, head) for name, head in heads.items()}
    for name, call in calls.items():
        loss = call()  # compiles what is compiled
        case.drop_gradients()
        peak = peak_bytes(call, case.device) - case.gradient_bytes
        case.drop_gradients()
        figures[name] = {"loss": loss.item(), "peak_bytes": max(peak, 0)}
    if rounds:
        candidates: dict[str, Callable[[], object]] = {**calls, FLOOR: matmul_floor(case)}
        timings = interleaved(candidates, rounds, device=case.device, before=case.drop_gradients)
        for name, taken in timings.items():
            figures.setdefault(name, {}).update(_compared(name, taken, timings))
    for name in heads:
        figures[name]["memory_over_trl"] = figures[name]["peak_bytes"] / max(figures[TRL]["peak_bytes"], 1)
    return figures


def _forward_backward(case: Case, head: Head) -> torch.Tensor:
    """Runs the head forward and backward; returns the loss."""
    loss = head(case)
    loss.backward()
    return loss.detach()


def _compared(name: str, taken: Timings, timings: Mapping[str, Timings]) -> dict[str, Any]:
    """Returns a head's seconds, also over TRL's and the floor's, and our cache's over them, round by round."""
    return {
        **taken.as_dict(),
        "over_trl": vars(taken.ratio_to(timings[TRL])),
        "cache_over_it": vars(timings[CACHE].ratio_to(taken)),
        "over_floor": vars(taken.ratio_to(timings[FLOOR])),
    }


def bars_of(name: str, shape: Shape, figures: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """Returns what a case's figures are held to."""
    bars = [Bar(f"{name}: recompute's memory over TRL's", figures[RECOMPUTE]["memory_over_trl"], 0.15)]
    if "over_trl" not in figures[CACHE]:
        return bars
    peers = {
        peer: f["cache_over_it"]["median"] for peer, f in figures.items() if peer not in (CACHE, RECOMPUTE, FLOOR)
    }
    fastest = max(peers, key=peers.__getitem__)
    if shape.small:
        bars.append(Bar(f"{name}: cache's time over TRL's", figures[CACHE]["over_trl"]["median"], 0.75))
    bound = 0.85 if shape.small else 1.0
    bars.append(Bar(f"{name}: cache's time over the best peer's ({fastest})", peers[fastest], bound))
    return bars


def rounding(shape: Shape, layout: Layout, heads: Mapping[str, Head], device: torch.device) -> dict[str, Any]:
    """Returns how far the gradients of a bf16 head are from fp64's of the same values.

    Returns:
        Name -> gradient -> root mean square error over root mean square, and largest error over the largest.
    """
    case = Case(shape, layout, torch.bfloat16, device)
    reference = [gradient.double() for gradient in gradients(case, in_fp64)]
    errors: dict[str, Any] = {}
    for name in (CACHE, RECOMPUTE, TRL):
        found = gradients(case, heads[name])
        errors[name] = {}
        for which, mine, right in zip(("weight", "hidden"), found, reference, strict=True):
            off = mine.double() - right
            errors[name][which] = {
                "rms": (off.norm() / right.norm()).item(),
                "largest": (off.abs().max() / right.abs().max()).item(),
            }
    return errors


def rounding_bars(name: str, errors: Mapping[str, Any]) -> list[Bar]:
    """Returns whether our gradients are no further from fp64 than a plain bf16 head's."""
    return [
        Bar(
            f"{name}: bf16, {ours}, error of the {which} gradient over TRL's",
            errors[ours][which]["rms"] / errors[TRL][which]["rms"],
            1.0,
        )
        for ours in (CACHE, RECOMPUTE)
        for which in ("weight", "hidden")
    ]


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns what large matrix products reach on the device, in floating point operations a second."""
    width = _RATE_WIDTH[device.type]
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    seconds = sorted(timed(lambda: left @ right, device) for _ in range(7))
    return 2 * width**3 / seconds[3]


def report(case: Case, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of a case."""
    rows = []
    for name, f in figures.items():
        time = [f"{1e3 * f['median_seconds']:.1f}", Ratio(**f["over_trl"])] if "over_trl" in f else ["-", "-"]
        floor = f"{f['over_floor']['median']:.2f}" if "over_floor" in f else "-"
        memory = [f"{f['peak_bytes'] / MIB:.0f}", f"{f['memory_over_trl']:.2f}"] if "peak_bytes" in f else ["-", "-"]
        rows.append((name, *time, floor, *memory, f"{f['loss']:.6f}" if "loss" in f else "-"))
    header = ("", "ms", "x TRL (spread)", "x floor", "MiB", "x TRL", "loss")
    return table(header, rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="small", help="small, large, all, or a name: 135M, '135M long', ...")
    parser.add_argument("--layouts", nargs="+", default=["one_pair", "many_pairs"], choices=["one_pair", "many_pairs"])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are timed; 0 measures memory only")
    parser.add_argument("--name", default="head", help="of the result file")
    args = parser.parse_args(argv)
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, notes = make_heads(device)
    rate = product_rate(device, dtype)
    results: dict[str, Any] = {"dtype": str(dtype), "notes": notes, "product_flops_per_second": rate, "cases": {}}
    bars: list[Bar] = []
    for shape in chosen_shapes(args.shapes):
        for layout in args.layouts:
            case = Case(shape, layout, dtype, device)
            figures = measure(case, heads, args.rounds)
            name = f"{shape.name}, {layout}"
            print(
                f"{name}: {len(case.row.tokens)} tokens x {shape.hidden} x {shape.vocab}, {case.num_pairs} pairs, "
                f"{case.num_scored} scored, {case.num_padded} with padding\n{report(case, figures)}\n",
                flush=True,
            )
            bars += bars_of(name, shape, figures)
            results["cases"][name] = {"shape": vars(shape), **_sizes(case), "heads": figures}
            if args.rounds:
                used = 6 * case.num_scored * shape.hidden * shape.vocab / figures[CACHE]["median_seconds"]
                results["cases"][name]["share_of_product_rate"] = used / rate
            if shape.small and layout == "one_pair":
                results["cases"][name]["bf16_errors"] = errors = rounding(shape, layout, heads, device)
                bars += rounding_bars(name, errors)
    liger = heads["Liger"]
    assert isinstance(liger, Liger)
    notes["Liger"] = liger.note  # known once it ran
    results["bars"] = [bar.as_dict() for bar in bars]
    print("\n".join(map(str, bars)))
    print("\n".join(f"{name}: {note}" for name, note in notes.items()))
    words = [f"'{word}'" if " " in word else word for word in (sys.argv[1:] if argv is None else argv)]
    print(write_results(args.name, " ".join(["python -m benchmarks.head", *words]), results))
    return 0


def chosen_shapes(which: str) -> list[Shape]:
    """Returns the shapes that the command line asks for.

    Raises:
        SystemExit: If there is no such shape.
    """
    shapes = [s for s in SHAPES if which in ("all", s.name) or which == ("small" if s.small else "large")]
    if not shapes:
        known = ", ".join(shape.name for shape in SHAPES)
        raise SystemExit(f"--shapes ({which}) must be small, large, all or one of {known}.")
    return shapes


def _sizes(case: Case) -> dict[str, int]:
    """Returns what a result file says about a case."""
    return {
        "tokens": len(case.row.tokens),
        "pairs": case.num_pairs,
        "scored_tokens": case.num_scored,
        "padded_tokens": case.num_padded,
    }


if __name__ == "__main__":
    sys.exit(main())
