"""What ranks send one another in a step of ORPO and of Megatron's own SFT, counted on splits of up to four ranks.

    python -m benchmarks.comm [--layouts tp2 cp2 ...]

Each split runs four workloads: a first one, and others with more tokens, more pairs or a larger vocabulary, so that
the difference between ORPO and SFT comes apart into bytes a token, bytes a pair and what is sent once a step. Counted
is every operation that reaches torch.distributed's process groups; on gloo the profiler's record must agree. Bytes are
those that a ring algorithm sends, added up over ranks. How fast anything is plays no part.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import Bar, table, write_results
from orpo_megatron.bridge.parity import SIZES, parse_sharding
from orpo_megatron.bridge.recipe import Recipe, build_recipe
from orpo_megatron.console import logged_to, rank
from orpo_megatron.machine import use_machine

#: Processes and sizes of each split; what is left over is data parallel.
LAYOUTS = {
    "tp2": (2, "tp=2"),
    "tp2 sp": (2, "tp=2,sp=true"),
    "cp2": (2, "cp=2"),
    "pp2": (2, "pp=2"),
    "dp2": (2, ""),
    "tp4": (4, "tp=4"),
    "tp2 pp2": (4, "tp=2,pp=2"),
    "cp2 dp2": (4, "cp=2"),
}
ORPO, SFT, SFT_FUSED = "ORPO", "SFT", "SFT fused"
MICROBATCHES = 2
#: Most bytes a pair that ORPO sends more than SFT.
BYTES_A_PAIR = 1024


@dataclass(frozen=True)
class Workload:
    """What a step trains.

    Attributes:
        vocab_size: Ids of the vocabulary.
        pairs: Pairs in each packed row.
        tokens: Tokens of each packed row: half of each sequence is prompt.
    """

    vocab_size: int = 512
    pairs: int = 4
    tokens: int = 512


BASE = Workload()
WORKLOADS = {
    "base": BASE,
    "more tokens": replace(BASE, tokens=4 * BASE.tokens),
    "more pairs": replace(BASE, pairs=4 * BASE.pairs),
    "larger vocabulary": replace(BASE, vocab_size=4 * BASE.vocab_size),
}


def main(argv: list[str] | None = None) -> int:
    """Counts, prints tables and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="which splits")
    parser.add_argument("--dir", default="runs/benchmarks/comm", help="where logs and models go")
    parser.add_argument("--rank-of", metavar="LAYOUT", help=argparse.SUPPRESS)  # the ranks' side of it
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    folder = Path(args.dir)
    if args.rank_of:
        count_on_this_rank(args.rank_of, folder)
        return 0
    layouts = {}
    for name in args.layouts:
        launch(name, folder)
        counted = json.loads(result_file(folder, name).read_text(encoding="utf-8"))
        layouts[name] = {**counted, "orpo_less_sft": compare(**counted)}
        print(report(name, layouts[name]), flush=True)
    found = bars({name: layout["orpo_less_sft"] for name, layout in layouts.items()})
    print("\n".join(map(str, found)))
    results = {
        "workloads": {name: vars(workload) for name, workload in WORKLOADS.items()},
        "microbatches_a_replica": MICROBATCHES,
        "layouts": layouts,
        "bars": [bar.as_dict() for bar in found],
    }
    print(write_results("comm", shlex.join(["python", "-m", "benchmarks.comm", *arguments]), results))
    return 0


def launch(name: str, folder: Path) -> None:
    """Runs a split in processes of its own.

    Raises:
        CalledProcessError: If one of them fails; what it said is on the terminal.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={LAYOUTS[name][0]}"]
    command += ["-m", "benchmarks.comm", "--dir", str(folder), "--rank-of", name]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def result_file(folder: Path, layout: str) -> Path:
    """Returns where the ranks of a split leave what they counted."""
    return folder / f"{layout.replace(' ', '_')}.json"


def count_on_this_rank(layout: str, folder: Path) -> None:
    """Runs all workloads on one rank of a split; rank 0 writes what all ranks sent."""
    with logged_to(folder / "logs" / f"rank_{rank()}.txt"):
        use_machine()
        import torch
        import torch.distributed as dist

        from benchmarks.bridge_loop import draw_rows, orpo_turn, sft_turn, take_turns
        from benchmarks.collectives import CollectiveCounter, over_ranks

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        traffic = {}
        for name, workload in WORKLOADS.items():
            recipe = make_recipe(layout, workload, folder)
            num_rows = MICROBATCHES * recipe.data_parallel_size(dist.get_world_size())
            half = workload.tokens // (4 * workload.pairs)  # of a sequence
            # Responses alone are scored: as many tokens, whatever the number of pairs.
            rows = draw_rows(num_rows, workload.pairs, half, half, workload.vocab_size, nll_scope="response")
            counter = CollectiveCounter()
            turns = [
                orpo_turn(recipe, rows, ORPO, counter.phases),
                sft_turn(rows, None, SFT, counter.phases),
                sft_turn(rows, "native", SFT_FUSED, counter.phases),
            ]
            take_turns(recipe, turns, [nullcontext, counter.watch])
            traffic[name] = over_ranks(counter)
    if rank() == 0:
        result_file(folder, layout).write_text(json.dumps({"rows": num_rows, "traffic": traffic}), encoding="utf-8")


def make_recipe(layout: str, workload: Workload, folder: Path) -> Recipe:
    """Returns the recipe of a small model under a split; its data is never read."""
    sizes = {SIZES[name]: size for name, size in parse_sharding(LAYOUTS[layout][1]).items()}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": workload.vocab_size,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    return build_recipe(
        {
            "run": {"dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
            "model": {"config": config, **sizes},
            "data": {"train": "none", "tokenizer": "none", "max_length": 2048, "max_prompt_length": 1024},
            "train": {"train_iters": 1},
        }
    )


def compare(rows: int, traffic: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, float]:
    """Takes the difference between ORPO and SFT apart.

    Args:
        rows: Rows of a step over all replicas.
        traffic: Workload -> kind of step -> records, from the ranks.

    Returns:
        Bytes of all ranks together that ORPO sends and SFT does not: for each token and each pair of the global batch,
        for a larger vocabulary, and for a step whatever it holds.
    """
    less = {
        workload: sum(record["bytes"] for record in steps[ORPO]) - sum(record["bytes"] for record in steps[SFT_FUSED])
        for workload, steps in traffic.items()
    }
    a_token = (less["more tokens"] - less["base"]) / (rows * (WORKLOADS["more tokens"].tokens - BASE.tokens))
    a_pair = (less["more pairs"] - less["base"]) / (rows * (WORKLOADS["more pairs"].pairs - BASE.pairs))
    return {
        "bytes_a_token": a_token,
        "bytes_a_pair": a_pair,
        "bytes_of_a_larger_vocabulary": less["larger vocabulary"] - less["base"],
        "bytes_a_step": less["base"] - rows * (a_token * BASE.tokens + a_pair * BASE.pairs),
    }


def bars(differences: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    """Holds the worst split of each kind to the claims."""
    return [
        Bar(
            "bytes that ORPO sends more than SFT for 4 times the vocabulary, worst split",
            max(difference["bytes_of_a_larger_vocabulary"] for difference in differences.values()),
            0,
        ),
        Bar(
            "bytes a pair that ORPO sends more than SFT, worst split",
            max(difference["bytes_a_pair"] for difference in differences.values()),
            BYTES_A_PAIR,
        ),
    ]


def report(name: str, layout: Mapping[str, Any]) -> str:
    """Returns the table of a split: the first workload, and what comes to more or less for ORPO."""
    steps = layout["traffic"]["base"]
    counts = {turn: {purpose_of(r): (r["calls"], r["bytes"]) for r in records} for turn, records in steps.items()}
    purposes = sorted(set().union(*counts.values()))
    rows = [
        (", ".join(purpose), *(f"{calls:,} / {num_bytes:,}" for calls, num_bytes in found))
        for purpose in purposes
        if len(set(found := [counts[turn].get(purpose, (0, 0)) for turn in counts])) > 1
    ]
    same = len(purposes) - len(rows)
    difference = ", ".join(f"{key.replace('_', ' ')} {value:,.1f}" for key, value in layout["orpo_less_sft"].items())
    title = f"{name}: calls / bytes, all ranks together"
    return "\n".join(
        [
            table((title, *counts), rows),
            f"{same} other kinds are the same for all.",
            f"ORPO less SFT: {difference}",
            "",
        ]
    )


def purpose_of(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns what a record counts."""
    return record["phase"], record["group"], record["operation"]


if __name__ == "__main__":
    sys.exit(main())
