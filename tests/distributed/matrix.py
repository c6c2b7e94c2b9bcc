"""The matrix of splits: one global batch under each of them, in as few processes as there can be.

    torchrun --nproc-per-node N tests/distributed/matrix.py FOLDER

One process writes the references to FOLDER: the whole model on all pairs in one row, without padding. More processes
run every layout of their number, and append one line for each case to FOLDER/world_N.jsonl.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

SCOPES = ("prompt_and_response", "response")
PADDINGS = ("packed", "padded")
MICROBATCHES = (1, 2, 4)
BETA = 0.1

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # large enough for attention to choose
}
#: Tied embeddings in one model, an output layer of its own in the other.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    | {"intermediate_size": 176},
    "experts": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "intermediate_size": 176}
    | {"head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
}
PROMPTS, CHOSEN, REJECTED = (9, 3, 17, 1, 12, 6, 22), (11, 20, 2, 7, 1, 16, 5), (4, 13, 9, 1, 25, 8, 3)


@dataclass(frozen=True)
class Layout:
    """A split of the model over processes, and what else may not change the answer.

    Attributes:
        processes: How many there are; what is not split over is data parallel.
        sizes: As ``tools/verify_parity.py --against`` names them.
        model: Of ``MODELS``.
        settings: Further settings of the recipe.
        microbatches: Microbatches of a step.
        replicate: Whether every replica runs all rows, as a reference on many processes does.
        mutate: Whether to break things as well, each of which has to be seen.
    """

    processes: int
    sizes: str = ""
    model: str = "dense"
    settings: dict[str, Any] = field(default_factory=dict)
    microbatches: tuple[int, ...] = MICROBATCHES
    replicate: bool = False
    mutate: bool = False


OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "ddp.bucket_size": 20_000}
SHARDED = {"ddp.use_distributed_optimizer": True, "optimizer.use_distributed_optimizer": True}
LAYOUTS = {
    "tp2": Layout(2, "tp=2", mutate=True),
    "tp2 sp": Layout(2, "tp=2,sp=true"),
    "pp2": Layout(2, "pp=2"),
    "pp2 vpp2": Layout(2, "pp=2,vpp=2", microbatches=(2, 4)),
    "cp2": Layout(2, "cp=2"),
    "ep2": Layout(2, "ep=2", model="experts"),
    "tp2 sp ep2": Layout(2, "tp=2,sp=true,ep=2", model="experts"),
    "dp2": Layout(2),
    "dp2 replicated": Layout(2, replicate=True),
    "dp2 distributed optimizer": Layout(2, settings=SHARDED),
    "dp2 overlap": Layout(2, settings=SHARDED | OVERLAP),
    "tp4": Layout(4, "tp=4"),
    "pp4": Layout(4, "pp=4"),
    "tp2 pp2": Layout(4, "tp=2,pp=2"),
    "tp2 sp pp2": Layout(4, "tp=2,sp=true,pp=2"),
    "tp2 cp2": Layout(4, "tp=2,cp=2"),
    "tp2 sp cp2": Layout(4, "tp=2,sp=true,cp=2"),
    "cp2 dp2": Layout(4, "cp=2", settings=SHARDED),
    "cp2 pp2": Layout(4, "cp=2,pp=2"),
    "ep2 cp2 dp2": Layout(4, "ep=2,cp=2", model="experts"),
    "ep2 pp2": Layout(4, "ep=2,pp=2", model="experts"),
}


@dataclass(frozen=True)
class Case:
    """One batch: how it is padded, which tokens the NLL covers, and its number of microbatches."""

    padding: str
    scope: str
    microbatches: int


def cases(layout: Layout) -> list[Case]:
    """Returns the batches that run under a layout."""
    return [Case(*case) for case in itertools.product(PADDINGS, SCOPES, layout.microbatches)]


@dataclass(frozen=True)
class Pair:
    """Random tokens of one pair."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def draw_pairs() -> list[Pair]:
    """Draws pairs of uneven lengths; one is as short as a pair can be."""
    random = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return random.integers(1, SIZES["vocab_size"], length)

    lengths = zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    return [Pair(tokens(prompt), tokens(chosen), tokens(rejected)) for prompt, chosen, rejected in lengths]


def make_rows(pairs: list[Pair], scope: str, num_rows: int, multiple: int) -> list[Any]:
    """Packs pairs as a plan does; a row may be left without any."""
    from orpo_megatron.data.dataset import pack_row
    from orpo_megatron.data.plan import PairLengths, balance

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
        )
        for row in rows
    ]


def make_recipe(folder: Path, layout: Layout) -> Any:
    """Returns the recipe of a layout; its data is never read."""
    from orpo_megatron.bridge.parity import parse_sharding, reference_recipe
    from orpo_megatron.bridge.recipe import build_recipe

    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"config": SIZES | MODELS[layout.model]},
        "orpo": {"beta": BETA},
        "data": {"train": "random", "tokenizer": "none", "max_length": 64, "max_prompt_length": 32},
        "train": {"train_iters": 1},
    }
    if layout.model == "experts":
        values["model"]["moe_aux_loss_coeff"] = 0.0
    split = reference_recipe(build_recipe(values), parse_sharding(layout.sizes)).as_dict()
    for name, value in layout.settings.items():
        section, key = name.split(".")
        split.setdefault(section, {})[key] = value
    return build_recipe(split)


def multiple_of(layout: Layout, padding: str, pairs: list[Pair]) -> int:
    """Returns what sequences are padded to a multiple of: what the split needs, or at least the longest of them."""
    from orpo_megatron.bridge.parity import parse_sharding
    from orpo_megatron.data.plan import round_up

    sizes = parse_sharding(layout.sizes)
    needed = (2 * sizes["cp"] if sizes["cp"] > 1 else 1) * (sizes["tp"] if sizes["sp"] else 1)
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    return needed if padding == "packed" else round_up(longest, needed)


def write_references(folder: Path) -> None:
    """Runs both models whole, all pairs in one row without padding."""
    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.session import Session
    from orpo_megatron.config import OrpoConfig

    for model in MODELS:
        recipe = make_recipe(folder, Layout(1, model=model))
        with Session(recipe, load_hf_config(recipe), 1) as session:
            for scope in SCOPES:
                metrics = session.run(make_rows(draw_pairs(), scope, 1, 1), OrpoConfig(BETA, scope))
                session.save_gradients(folder / f"{model}-{scope}")
                record = {"metrics": metrics, "names": sorted(session.trainable())}
                (folder / f"{model}-{scope}.json").write_text(json.dumps(record))


def run_layout(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Runs all cases of a layout; yields what came out of each, and at last what the session left behind."""
    import torch.distributed as dist

    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.session import Session

    layout = LAYOUTS[name]
    recipe = make_recipe(folder, layout)
    replicas = recipe.data_parallel_size(layout.processes)
    references = {s: json.loads((folder / f"{layout.model}-{s}.json").read_text()) for s in SCOPES}
    started = time.monotonic()
    with Session(recipe, load_hf_config(recipe), replicas) as session:
        for scope, reference in references.items():
            reference["gradients"] = session.load_gradients(folder / f"{layout.model}-{scope}", reference["names"])
        yield {"kind": "session", "layout": name, "seconds": time.monotonic() - started}
        for case in cases(layout):
            started = time.monotonic()
            errors = run_case(session, layout, case, references[case.scope])
            yield {"kind": "case", "layout": name, **asdict(case), **errors, "seconds": time.monotonic() - started}
        if layout.mutate:
            for what, errors in run_mutations(session, references[SCOPES[0]]):
                yield {"kind": "mutation", "layout": name, "what": what, **errors}
        parameters = [weakref.ref(parameter) for chunk in session.model for parameter in chunk.parameters()]
    groups = len(dist.distributed_c10d._world.pg_map)
    left = sum(parameter() is not None for parameter in parameters)
    yield {"kind": "left", "layout": name, "parameters": [left, len(parameters)], "groups": groups}


def run_case(session: Any, layout: Layout, case: Case, reference: dict[str, Any]) -> dict[str, Any]:
    """Runs one batch; returns the errors of all metrics and gradients."""
    pairs = draw_pairs()
    replicas = 1 if layout.replicate else session.recipe.data_parallel_size(layout.processes)
    rows = make_rows(pairs, case.scope, case.microbatches * replicas, multiple_of(layout, case.padding, pairs))
    return run_rows(session, rows, case.scope, reference, replicate=layout.replicate)


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


def run_mutations(session: Any, reference: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Breaks one thing at a time; each has to be seen."""
    import torch.distributed as dist
    from megatron.core.utils import unwrap_model

    weight = unwrap_model(session.model)[0].decoder.final_layernorm.weight
    scope = SCOPES[0]
    rows = make_rows(draw_pairs(), scope, 2, 1)
    halved = [replace(row, num_pairs=row.num_pairs / 2, num_nll_tokens=row.num_nll_tokens / 2) for row in rows]

    def spoil(value: float) -> None:
        if dist.get_rank() == 1:  # a copy, which no checkpoint would save
            weight.main_grad[weight.main_grad.abs().argmax()] *= 1 + value

    yield "loss doubled", run_rows(session, halved, scope, reference)
    yield "copy off", run_rows(session, rows, scope, reference, lambda: spoil(1e-3))
    yield "copy NaN", run_rows(session, rows, scope, reference, lambda: spoil(float("nan")))
    yield "pairs missing", run_rows(session, rows[:1], scope, reference)


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
