"""The matrix of splits: one global batch under each of them, in as few processes as there can be.

    torchrun --nproc-per-node N tests/distributed/matrix.py FOLDER

One process writes the references to FOLDER: the whole model on all pairs in one row, without padding. More processes
run every layout of their number (``layouts.py``), and append one line for each case to FOLDER/world_N.jsonl.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from layouts import (
    CHOSEN,
    LAYOUTS,
    MODELS,
    PROMPTS,
    REJECTED,
    SIZES,
    Case,
    Layout,
    Reference,
    all_references,
    cases,
    reference_of,
)

BETA = 0.1
ADAPTERS = "adapters"  # the folder of their weights, which are drawn at random


@dataclass(frozen=True)
class Pair:
    """Random tokens of one pair."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def draw_pairs(count: int) -> list[Pair]:
    """Draws pairs of uneven lengths; one is as short as a pair can be."""
    random = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return random.integers(1, SIZES["vocab_size"], length)

    lengths = zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    return [Pair(tokens(prompt), tokens(chosen), tokens(rejected)) for prompt, chosen, rejected in lengths][:count]


def make_rows(num_pairs: int, scope: str, num_rows: int, multiple: int, fill: bool = False) -> list[Any]:
    """Packs pairs as a plan does; a row may be left without any, and holds padding, or a sequence not scored."""
    from orpo_megatron.data.dataset import pack_row
    from orpo_megatron.data.plan import PairLengths, balance

    pairs = draw_pairs(num_pairs)
    columns = ([len(getattr(pair, name)) for pair in pairs] for name in ("prompt", "chosen", "rejected"))
    lengths = PairLengths(*map(np.array, columns))
    rows, _ = balance(lengths.padded_tokens(multiple).tolist(), num_rows)
    return [
        pack_row(
            [pairs[pair] for pair in row],
            np.array(row, dtype=np.int64),
            nll_scope=scope,
            sequence_multiple_of=multiple,
            pad_token_id=0,
            num_nll_tokens=int(lengths.nll_tokens(scope).sum()),
            num_pairs=len(pairs),
            filler=pairs[0] if fill else None,
        )
        for row in rows
    ]


def make_recipe(folder: Path, layout: Layout) -> Any:
    """Returns the recipe of a layout; its data is never read."""
    from orpo_megatron.bridge.parity import parse_sharding, reference_recipe
    from orpo_megatron.bridge.recipe import build_recipe

    model = MODELS[layout.model]
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"config": model.config},
        "orpo": {"beta": BETA},
        "data": {"train": "random", "tokenizer": "none", "max_length": 64, "max_prompt_length": 32},
        "train": {"train_iters": 1},
    }
    split = reference_recipe(build_recipe(with_settings(values, model.settings)), parse_sharding(layout.sizes))
    return build_recipe(with_settings(split.as_dict(), layout.settings))


def with_settings(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe's values with settings by their dotted names."""
    values = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    for name, value in settings.items():
        section, key = name.split(".")
        values.setdefault(section, {})[key] = value
    return values


def write_references(folder: Path) -> None:
    """Runs every model whole, on one process."""
    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.session import Session
    from orpo_megatron.config import OrpoConfig

    for model, references in itertools.groupby(all_references(), key=lambda reference: reference.model):
        layout = Layout(1, model=model)
        recipe = make_recipe(folder, layout)
        with Session(recipe, load_hf_config(recipe), 1) as session:
            if recipe.sections.get("peft"):
                session.draw_zero_weights()
                session.save_weights(folder / ADAPTERS)
            for reference in references:
                rows = reference_rows(layout, reference)
                metrics = session.run(rows, OrpoConfig(BETA, reference.scope))
                session.save_gradients(folder / reference.name)
                record = {"metrics": metrics, "names": sorted(session.trainable())}
                (folder / f"{reference.name}.json").write_text(json.dumps(record))


def reference_rows(layout: Layout, reference: Reference) -> list[Any]:
    """Returns the rows of a reference: without padding, or as every split has them."""
    same = MODELS[layout.model].same_rows
    multiple = layout.multiple_of("packed") if same else 1
    return make_rows(reference.pairs, reference.scope, reference.rows, multiple, fill=same)


def run_layout(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Runs all cases of a layout; yields what came out of each, and at last what the session left behind."""
    import torch.distributed as dist

    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.session import Session

    layout = LAYOUTS[name]
    recipe = make_recipe(folder, layout)
    wanted = sorted({reference_of(layout, case) for case in cases(layout)})
    references = {reference: json.loads((folder / f"{reference.name}.json").read_text()) for reference in wanted}
    started = time.monotonic()
    with Session(recipe, load_hf_config(recipe), recipe.data_parallel_size(layout.processes)) as session:
        for reference, expected in references.items():
            expected["gradients"] = session.load_gradients(folder / reference.name, expected["names"])
        if recipe.sections.get("peft"):
            session.load_weights(folder / ADAPTERS, session.trainable())
            yield {"kind": "adapters", "layout": name, **adapter_names(session)}
        yield {"kind": "session", "layout": name, "seconds": time.monotonic() - started}
        for case in cases(layout):
            started = time.monotonic()
            result = run_case(session, layout, case, references[reference_of(layout, case)])
            yield {"kind": "case", "layout": name, **asdict(case), **result, "seconds": time.monotonic() - started}
        for mutation in layout.mutations:
            result = run_mutation(session, layout, mutation, references[reference_of(layout, cases(layout)[0])])
            yield {"kind": "mutation", "layout": name, "mutation": mutation, **result}
        parameters = [weakref.ref(parameter) for chunk in session.model for parameter in chunk.parameters()]
    groups = len(dist.distributed_c10d._world.pg_map)
    left = sum(parameter() is not None for parameter in parameters)
    yield {"kind": "left", "layout": name, "parameters": [left, len(parameters)], "groups": groups}


def adapter_names(session: Any) -> dict[str, list[str]]:
    """Returns the parameters that a session trains, and the weights that Bridge keeps of it for a checkpoint."""
    import torch.distributed as dist
    from megatron.bridge.training.checkpointing import apply_peft_adapter_filter_to_state_dict as kept_by_bridge
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.utils import unwrap_model

    peft = session._setup.state.cfg.peft
    described = [kept_by_bridge({"model": chunk.sharded_state_dict()}, peft) for chunk in unwrap_model(session.model)]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {entry.key for entry in nested_values(described)})
    return {"trained": sorted(session.trainable()), "saved": sorted(set().union(*ranks))}


def case_rows(layout: Layout, case: Case) -> list[Any]:
    """Returns all rows of a batch."""
    num_rows = case.microbatches * layout.replicas
    fill = MODELS[layout.model].same_rows
    return make_rows(case.pairs, case.scope, num_rows, layout.multiple_of(case.padding), fill)


def run_case(session: Any, layout: Layout, case: Case, reference: dict[str, Any]) -> dict[str, Any]:
    """Runs one batch; returns the errors of all metrics and gradients, and data ranks without pairs."""
    rows = case_rows(layout, case)
    idle = sum(not any(len(row.pair_ids) for row in rows[rank :: layout.replicas]) for rank in range(layout.replicas))
    with count_runs(session, layout.recomputed) as runs:
        result = run_rows(session, rows, case.scope, reference, replicate=layout.replicate)
    return {"idle": idle, "runs": runs[0] / case.microbatches, **result}


@contextlib.contextmanager
def count_runs(session: Any, part: str) -> Iterator[list[float]]:
    """Counts how often a part of a layer runs forward, as a mean over this rank's layers."""
    from megatron.core.utils import unwrap_model

    layers = [layer for chunk in unwrap_model(session.model) for layer in chunk.decoder.layers] if part else []
    runs = [0.0]

    def count(*_: Any) -> None:
        runs[0] += 1 / len(layers)

    hooks = [layer.get_submodule(part).register_forward_hook(count) for layer in layers]
    yield runs
    for hook in hooks:
        hook.remove()


def run_rows(
    session: Any,
    rows: list[Any],
    scope: str,
    reference: dict[str, Any],
    spoil: Callable[[], None] = lambda: None,
    replicate: bool = False,
) -> dict[str, Any]:
    """Runs rows, has ``spoil`` change what came out, and compares that with the reference."""
    from orpo_megatron.bridge.parity import metric_errors
    from orpo_megatron.config import OrpoConfig

    metrics = session.run(rows, OrpoConfig(BETA, scope), replicate=replicate)
    spoil()
    return {
        "metrics": metric_errors(reference["metrics"], metrics, BETA),
        "gradients": session.gradient_errors(reference["gradients"]),
        "unmatched": sorted(session.trainable() ^ set(reference["names"])),
    }


def run_mutation(session: Any, layout: Layout, mutation: str, reference: dict[str, Any]) -> dict[str, Any]:
    """Breaks one thing in the first batch of a layout, which has to be seen."""
    import torch.distributed as dist
    from megatron.core.utils import unwrap_model

    case = cases(layout)[0]
    rows = make_rows(case.pairs, case.scope, 2, 1)

    def spoil(value: float) -> None:
        weight = unwrap_model(session.model)[0].decoder.final_layernorm.weight
        if dist.get_rank() == 1:  # a copy, which no checkpoint would save
            weight.main_grad[weight.main_grad.abs().argmax()] *= 1 + value

    if mutation == "loss doubled":
        rows = [replace(row, num_pairs=row.num_pairs / 2, num_nll_tokens=row.num_nll_tokens / 2) for row in rows]
    if mutation == "pairs missing":
        rows = rows[:1]
    off = {"copy off": 1e-3, "copy NaN": float("nan")}.get(mutation, 0.0)
    return run_rows(session, rows, case.scope, reference, lambda: spoil(off) if off else None)


def main() -> None:
    """Runs what there is for this number of processes."""
    from orpo_megatron import cpu

    cpu.activate()
    folder, processes, rank = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if processes == 1:
        write_references(folder)
        return
    with Path(folder / f"world_{processes}.jsonl" if rank == 0 else os.devnull).open("a") as file:
        for name, layout in LAYOUTS.items():
            if layout.processes == processes:
                for record in run_layout(folder, name):
                    file.write(json.dumps(record) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
