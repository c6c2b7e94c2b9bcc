"""The demo: aligns SmolLM2-135M-Instruct on two CPU processes and shows what it said before and what it says now.

    python tools/demo.py [section.key=value ...]

It runs recipes/smollm2_135m_cpu.yaml as anyone would, then loads both models with transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import Recipe, load_recipe
from orpo_megatron.data.rows import PreferenceRow, read_rows
from orpo_megatron.data.store import PairStore, prepare
from orpo_megatron.logps import vocab_parallel_logps
from orpo_megatron.loss import log_odds_ratio
from orpo_megatron.report import write_report

RECIPE = "recipes/smollm2_135m_cpu.yaml"
NUM_PROCESSES = 2
NUM_SAMPLES = 6
MAX_NEW_TOKENS = 80


def main(overrides: list[str]) -> int:
    """Trains, then compares; returns the exit status."""
    recipe = load_recipe(RECIPE, overrides)
    print(f"Training {RECIPE} on {NUM_PROCESSES} processes; everything will lie in {recipe.run.dir}.\n", flush=True)
    status = train(overrides)
    if status != 0:
        return status
    samples, figures = recipe.run_dir / "samples.json", recipe.run_dir / "held_out.json"
    if not figures.is_file():
        print("\nAsking both models the same held-out questions (on the CPU, with transformers) ...", flush=True)
        for path, content in zip((samples, figures), compare(recipe), strict=True):
            path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    show(json.loads(samples.read_text(encoding="utf-8")), json.loads(figures.read_text(encoding="utf-8")))
    print(f"\nReport: {write_report(recipe.run_dir)}")
    return 0


def train(overrides: list[str]) -> int:
    """Runs the recipe under torchrun; returns its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
    command += ["-m", "orpo_megatron.train", RECIPE, *overrides]
    threads = str(max(1, (os.cpu_count() or NUM_PROCESSES) // NUM_PROCESSES))
    return subprocess.run(
        command, env={"OMP_NUM_THREADS": threads, **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ).returncode


def compare(recipe: Recipe) -> tuple[list[dict[str, str]], dict[str, dict[str, float]]]:
    """Returns what both models say on held-out prompts, and how each ranks the held-out pairs."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = recipe.run_dir / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = str(recipe.data.eval)
    store = prepare(
        source,
        recipe.data.eval_split,
        config=recipe.data,
        tokenizer_name=recipe.tokenizer,
        cache_dir=recipe.cache_dir,
        role="eval",
        show_progress=False,
    )
    samples = [{"prompt": question} for question in questions(source, recipe.data.eval_split, store)]
    figures = {}
    for name, model_folder in (("before", model_source(recipe)), ("after", str(folder))):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        figures[name] = held_out(model, store)
        for sample, text in zip(samples, answers(model, tokenizer, store), strict=True):
            sample[name] = text
    return samples, figures


def questions(source: str, split: str, store: PairStore) -> list[str]:
    """Returns what the user asks in the first held-out pairs."""
    rows = {row.line: row for row in read_rows(source, split) if isinstance(row, PreferenceRow)}
    prompts = [rows[store.source(index)[1]].prompt for index in range(min(NUM_SAMPLES, len(store)))]
    return [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in prompts]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, store: PairStore) -> Iterator[str]:
    """Yields the model's most probable answer to each of the first held-out prompts."""
    for index in range(min(NUM_SAMPLES, len(store))):
        prompt = torch.tensor(store[index].prompt).long().unsqueeze(0)
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        new = output[0, prompt.shape[1] :]
        ended = tokenizer.eos_token_id in new
        yield tokenizer.decode(new, skip_special_tokens=True).strip() + ("" if ended else " ...")


@torch.no_grad()
def held_out(model: Any, store: PairStore) -> dict[str, float]:
    """Returns accuracy, margin and log odds ratio over the held-out pairs, and the length of the answers."""
    chosen: list[torch.Tensor] = []
    rejected: list[torch.Tensor] = []
    for pair in (store[i] for i in range(len(store))):
        for response, into in ((pair.chosen, chosen), (pair.rejected, rejected)):
            tokens = torch.tensor([*pair.prompt, *response]).long()
            logits = model(tokens.unsqueeze(0)).logits[0, len(pair.prompt) - 1 : -1]
            into.append(vocab_parallel_logps(logits, tokens[len(pair.prompt) :]).mean())
    chosen_logps, rejected_logps = torch.stack(chosen), torch.stack(rejected)
    return {
        "accuracy": float((chosen_logps > rejected_logps).float().mean()),
        "margin": float((chosen_logps - rejected_logps).mean()),
        "log_odds_ratio": float(log_odds_ratio(chosen_logps, rejected_logps).mean()),
    }


def show(samples: list[dict[str, str]], figures: dict[str, dict[str, float]]) -> None:
    """Prints the comparison."""
    for sample in samples:
        print(f"\n> {sample['prompt']}")
        for name in ("before", "after"):
            label = f"  {name + ':':<8}"
            print(textwrap.fill(" ".join(sample[name].split()), 100, initial_indent=label, subsequent_indent=" " * 10))
    print(f"\n{'Held-out pairs':<28}{'before':>8}{'after':>8}")
    labels = {"accuracy": "reward accuracy", "margin": "margin, nats a token", "log_odds_ratio": "log odds ratio"}
    for name, label in labels.items():
        print(f"  {label:<26}{figures['before'][name]:>8.3f}{figures['after'][name]:>8.3f}")
    words = [sum(len(sample[name].split()) for sample in samples) / len(samples) for name in ("before", "after")]
    print(f"  {'words in an answer above':<26}{words[0]:>8.1f}{words[1]:>8.1f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
