"""Breaks the code on purpose, one mistake after another, and sees that a test fails: ``make mutations``.

Each mistake is one that a careful person could make. They are made in a copy of the repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """A mistake and the tests that have to see it.

    Attributes:
        name: What goes wrong.
        file: Where, from the repository's root.
        old: Text that occurs once in the file.
        new: What stands there instead.
        tests: Arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "the odds-ratio term is scaled by the context-parallel size",
        "orpo_megatron/core/step.py",
        "beta=objective.beta,",
        "beta=objective.beta * cp_group.size(),",
        ("tests/unit/core/test_two_ranks.py",),
    ),
    Mutation(
        "the last token of a sequence is not scored",
        "orpo_megatron/data/dataset.py",
        "scored = np.arange(first_scored, len(tokens))",
        "scored = np.arange(first_scored, len(tokens) - 1)",
        ("tests/unit/data/test_dataset.py",),
    ),
    Mutation(
        "the first token of padding counts as one of the sequence",
        "orpo_megatron/data/dataset.py",
        "self._padding.append(places >= len(tokens))",
        "self._padding.append(places > len(tokens))",
        ("tests/unit/data/test_dataset.py",),
    ),
    Mutation(
        "the loss is a mean of the microbatches' means",
        "orpo_megatron/core/step.py",
        "num_nll_tokens=row.num_nll_tokens,",
        "num_nll_tokens=int(logps.nll_lengths.sum()) * num_microbatches,",
        ("tests/unit/core/test_step.py",),
    ),
    Mutation(
        "chosen and rejected are swapped",
        "orpo_megatron/segments.py",
        "chosen_logps=logps[0::2],\n        rejected_logps=logps[1::2],",
        "chosen_logps=logps[1::2],\n        rejected_logps=logps[0::2],",
        ("tests/unit/test_segments.py",),
    ),
    Mutation(
        "sums over context ranks are added up again on the way back",
        "orpo_megatron/segments.py",
        "        return grad, None\n",
        "        dist.all_reduce(grad := grad.clone())\n        return grad, None\n",
        ("tests/unit/test_segments.py",),
    ),
    Mutation(
        "the end of sequence is left out",
        "orpo_megatron/data/tokens.py",
        "return [*ids, eos]",
        "return ids",
        ("tests/unit/data/test_tokens.py",),
    ),
    Mutation(
        "attention reaches across sequences",
        "orpo_megatron/segments.py",
        "spans.append(Span(fork - start, ((begin, begin + fork),)))",
        "spans.append(Span(fork - start, ((0, begin + fork),)))",
        ("tests/unit/core/test_attention.py",),
    ),
    Mutation(
        "a rejected response sees the chosen one",
        "orpo_megatron/segments.py",
        "((begin, begin + prompt_end), (begin + chosen_end, begin + stop))",
        "((begin, begin + stop),)",
        ("tests/unit/core/test_attention.py",),
    ),
    Mutation(
        "the end of a shared prompt is scored once",
        "orpo_megatron/data/dataset.py",
        "np.concatenate(([prompt_end - 1], rejected[:-1]))",
        "np.concatenate(([chosen_end - 1], rejected[:-1]))",
        ("tests/unit/data/test_dataset.py",),
    ),
    Mutation(
        "log-probs are averaged in bf16",
        "orpo_megatron/segments.py",
        "row.num_response_tokens[:sequences]).float()",
        "row.num_response_tokens[:sequences]).bfloat16().float()",
        ("tests/unit/test_segments.py",),
    ),
    Mutation(
        "a recipe's bases win over the recipe",
        "orpo_megatron/bridge/compose.py",
        "OmegaConf.merge(*bases, own)",
        "OmegaConf.merge(own, *bases)",
        ("tests/unit/bridge/test_compose.py",),
    ),
    Mutation(
        "a model's declared architecture is not held against its weights",
        "orpo_megatron/bridge/prepare.py",
        "ours != theirs.get(name)",
        "ours != theirs.get(name, ours) and ours is None",
        ("tests/unit/bridge/test_prepare.py",),
    ),
    Mutation(
        "Mixtral's gates and up-projections are exchanged",
        "orpo_megatron/bridge/mixtral.py",
        'gate=f"{_HF_EXPERT}.w1.weight", up=f"{_HF_EXPERT}.w3.weight"',
        'gate=f"{_HF_EXPERT}.w3.weight", up=f"{_HF_EXPERT}.w1.weight"',
        ("tests/parity/test_mixtral.py",),
    ),
)


def passes(folder: Path, tests: tuple[str, ...]) -> bool:
    """Runs tests in a copy of the repository; pytest itself must not fail."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)} could not run the tests:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    """Returns 0 if every mistake is seen."""
    survived = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / REPO.name
        shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "build"))
        for tests in sorted({mutation.tests for mutation in MUTATIONS}):
            if not passes(folder, tests):
                sys.exit(f"{' '.join(tests)} fails before anything is broken.")
        for mutation in MUTATIONS:
            path, started = folder / mutation.file, time.monotonic()
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                sys.exit(f"{mutation.file} must hold {mutation.old!r} once, to be broken: {mutation.name}.")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            seen = not passes(folder, mutation.tests)
            path.write_text(text, encoding="utf-8")
            survived += [] if seen else [mutation.name]
            seconds = time.monotonic() - started
            print(f"{'seen    ' if seen else 'SURVIVED'}  {seconds:4.0f} s  {mutation.name}", flush=True)
    print(f"{len(MUTATIONS) - len(survived)} of {len(MUTATIONS)} mistakes are seen.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
