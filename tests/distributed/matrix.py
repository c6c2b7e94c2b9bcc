"""The matrix of splits: one global batch under each of them, in as few processes as there can be.

    torchrun --nproc-per-node N tests/distributed/matrix.py FOLDER

One process writes the references to FOLDER: each whole model on all pairs in one row, without padding. More processes
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
from unittest import mock

import numpy as np
from layouts import (
    BF16,
    CHOSEN,
    EVAL_PAIRS,
    LAYOUTS,
    MODELS,
    PROMPTS,
    REJECTED,
    SCOPES,
    SIZES,
    Case,
    Layout,
    Reference,
    all_references,
    cases,
    reference_of,
)

from orpo_megatron.data.plan import Padding

BETA = 0.1
UNPADDED = Padding(1, 1)
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


def make_rows(
    num_pairs: int, scope: str, num_rows: int, padding: Padding, fill: bool = False, share: bool = False
) -> list[Any]:
    """Packs pairs as a plan does; a row may be left without any, and holds padding, or a sequence not scored."""
    from orpo_megatron.data.dataset import pack_row
    from orpo_megatron.data.plan import PairLengths, balance

    pairs = draw_pairs(num_pairs)
    columns = ([len(getattr(pair, name)) for pair in pairs] for name in ("prompt", "chosen", "rejected"))
    lengths = PairLengths(*map(np.array, columns))
    rows, _ = balance(lengths.padded_tokens(1).tolist(), num_rows)  # the same pairs in a row, however it is padded
    return [
        pack_row(
            [pairs[pair] for pair in row],
            np.array(row, dtype=np.int64),
            nll_scope=scope,
            sequence_multiple_of=padding.sequence,
            row_length_multiple_of=padding.row,
            pad_token_id=0,
            num_nll_tokens=int(lengths.nll_tokens(scope).sum()),
            num_pairs=len(pairs),
            share_prefix=share,
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
        section, _, key = name.partition(".")
        values[section] = {**values.get(section, {}), key: value} if key else value
    return values


def write_references(folder: Path) -> None:
    """Runs every model whole, on one process."""
    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.session import Session
    from orpo_megatron.config import OrpoConfig

    for model, references in itertools.groupby(all_references(), key=lambda reference: reference.model):
        recipe, batches = make_recipe(folder, Layout(1, model=model)), list(references)
        with Session(recipe, load_hf_config(recipe), 1) as session:
            if recipe.sections.get("peft"):
                session.draw_zero_weights()
                session.save_weights(folder / ADAPTERS)
            if MODELS[model].rounded:
                for parameter in session.model[0].parameters():
                    parameter.data.copy_(parameter.bfloat16())
            for batch in batches:
                metrics = session.run(reference_rows(batch), OrpoConfig(BETA, batch.scope))
                session.save_gradients(folder / batch.name)
                write(folder / batch.name, metrics=metrics, names=sorted(session.trainable()))
            rows, objective = make_rows(EVAL_PAIRS, SCOPES[0], 1, UNPADDED), OrpoConfig(BETA, SCOPES[0])
            # What an evaluation finds is what training finds, and more.
            metrics = session.evaluate(rows, objective) | session.run(rows, objective)
            write(folder / f"{model}-evaluation", metrics=metrics)
        if MODELS[model].rounded:
            add_rounding(folder, model, batches)


def add_rounding(folder: Path, model: str, batches: list[Reference]) -> None:
    """Adds to references how far one process is from them if it rounds as the layouts do."""
    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.session import Session

    recipe = make_recipe(folder, Layout(1, model=model, settings=BF16))
    with Session(recipe, load_hf_config(recipe), 1) as session:
        for batch in batches:
            reference = read(folder / batch.name)
            gradients = session.load_gradients(folder / batch.name, reference["names"])
            result = run_rows(session, reference_rows(batch), batch.scope, reference | {"gradients": gradients})
            write(folder / batch.name, **reference, one_process=result)


def write(path: Path, **record: Any) -> None:
    path.with_suffix(".json").write_text(json.dumps(record))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def reference_rows(reference: Reference) -> list[Any]:
    """Returns the rows of a reference, without padding."""
    filled = MODELS[reference.model].same_rows
    return make_rows(reference.pairs, reference.scope, reference.rows, UNPADDED, filled)


def run_layout(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Runs all cases of a layout; yields what came out of each, and at last what the session left behind."""
    import torch.distributed as dist

    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.session import Session

    layout = LAYOUTS[name]
    recipe = make_recipe(folder, layout)
    wanted = sorted({reference_of(layout, case) for case in cases(layout)})
    references = {reference: read(folder / reference.name) for reference in wanted}
    started = time.monotonic()
    with Session(recipe, load_hf_config(recipe), recipe.data_parallel_size(layout.processes)) as session:
        for batch, expected in references.items():
            expected["gradients"] = session.load_gradients(folder / batch.name, expected["names"])
        if recipe.sections.get("peft"):
            session.load_weights(folder / ADAPTERS, session.trainable())
            yield {"kind": "adapters", "layout": name, **adapter_names(session)}
        seconds, groups = time.monotonic() - started, len(bucket_groups(session)) / len(session.model)
        yield {"kind": "session", "layout": name, "bucket_groups": groups, "seconds": seconds}
        for case in cases(layout):
            started = time.monotonic()
            reference = references[reference_of(layout, case)]
            result = run_case(session, layout, case, reference) | {"one_process": reference.get("one_process")}
            yield {"kind": "case", "layout": name, **asdict(case), **result, "seconds": time.monotonic() - started}
        errors = run_evaluation(session, layout, read(folder / f"{layout.model}-evaluation")["metrics"])
        yield {"kind": "evaluation", "layout": name, "metrics": errors}
        for mutation in layout.mutations:
            result = run_mutation(session, layout, mutation, references)
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

    peft, singly = session._setup.state.cfg.peft, {"singleton_local_shards": True}  # a name for each layer
    chunks = [chunk.sharded_state_dict(metadata=singly) for chunk in unwrap_model(session.model)]
    described = [kept_by_bridge({"model": chunk}, peft) for chunk in chunks]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {entry.key for entry in nested_values(described)})
    return {"trained": sorted(session.trainable()), "saved": sorted(set().union(*ranks))}


def case_rows(layout: Layout, case: Case) -> list[Any]:
    """Returns all rows of a batch."""
    num_rows = case.microbatches * layout.replicas
    fill = MODELS[layout.model].same_rows
    padding, share = layout.multiples_of(case.padding), case.padding == "shared"
    return make_rows(case.pairs, case.scope, num_rows, padding, fill, share)


def run_case(session: Any, layout: Layout, case: Case, reference: dict[str, Any]) -> dict[str, Any]:
    """Runs one batch; returns the errors of all metrics and gradients, and data ranks without pairs."""
    rows = case_rows(layout, case)
    idle = sum(not any(len(row.pair_ids) for row in rows[rank :: layout.replicas]) for rank in range(layout.replicas))
    if layout.settings.get("ddp.overlap_param_gather"):
        forget_gathered_weights(session)
    with count_runs(session, layout.recomputed) as runs:
        result = run_rows(session, rows, case.scope, reference, replicate=layout.replicate)
    return {"idle": idle, "runs": runs[0] / case.microbatches, **result}


def run_evaluation(session: Any, layout: Layout, expected: dict[str, float]) -> dict[str, float]:
    """Evaluates in two microbatches on each replica; returns the errors of all metrics."""
    from orpo_megatron.bridge.parity import metric_errors
    from orpo_megatron.config import OrpoConfig

    num_rows = 2 * session.recipe.data_parallel_size(layout.processes)
    rows = make_rows(EVAL_PAIRS, SCOPES[0], num_rows, layout.multiples_of("packed"))
    return metric_errors(expected, session.evaluate(rows, OrpoConfig(BETA, SCOPES[0])), BETA)


def bucket_groups(session: Any) -> list[Any]:
    """Returns the groups of buckets in which gradients and weights travel between data-parallel ranks."""
    return [group for chunk in session.model for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]


def forget_gathered_weights(session: Any) -> None:
    """Spoils what an optimizer's step would leave to be gathered: a rank's copy of the weights that others own."""
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for group in bucket_groups(session):
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            for rank, shard in enumerate(shard_buffer(bucket.param_data, ranks.size())):
                if rank != ranks.rank():
                    shard.fill_(float("nan"))


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
    from orpo_megatron.bridge.parity import gradient_errors, metric_errors, rms_errors
    from orpo_megatron.config import OrpoConfig

    metrics = session.run(rows, OrpoConfig(BETA, scope), replicate=replicate)
    spoil()
    differences = session.differences(reference["gradients"])
    return {
        "metrics": metric_errors(reference["metrics"], metrics, BETA),
        "gradients": gradient_errors(differences),
        "rms": rms_errors(differences),
        "unmatched": sorted(session.trainable() ^ set(reference["names"])),
    }


def run_mutation(session: Any, layout: Layout, mutation: str, references: dict[Reference, Any]) -> dict[str, Any]:
    """Breaks one thing, which has to be seen, in the layout's first batch of most microbatches."""
    from megatron.core.utils import get_model_config

    from orpo_megatron.core import step

    case = max(cases(layout), key=lambda case: (case.pairs, case.microbatches))
    rows, broken = case_rows(layout, case), contextlib.nullcontext()
    if mutation == "loss doubled":
        rows = [replace(row, num_pairs=row.num_pairs / 2, num_nll_tokens=row.num_nll_tokens / 2) for row in rows]
    if mutation == "pairs missing":
        rows = rows[:1]
    if mutation == "mask off":
        broken = mock.patch.object(step, "router_padding_mask", lambda *_: None)
    if mutation == "not finalised":
        broken = mock.patch.object(get_model_config(session.model[0]), "finalize_model_grads_func", None)
    factor = {"copy off": 1 + 1e-3, "copy NaN": float("nan")}.get(mutation, 1.0)
    reference = references[reference_of(layout, case)]
    with broken:
        return run_rows(session, rows, case.scope, reference, lambda: spoil_a_copy(session, factor))


def spoil_a_copy(session: Any, factor: float) -> None:
    """Changes one element of a gradient on rank 1: a copy, which no checkpoint would save."""
    import torch.distributed as dist
    from megatron.core.utils import unwrap_model

    weight = getattr(unwrap_model(session.model)[0].decoder.final_layernorm, "weight", None)
    if weight is not None and dist.get_rank() == 1:
        weight.main_grad[weight.main_grad.abs().argmax()] *= factor


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
