"""The table that the matrix runs: models, how they are split over processes, and the batches of each split."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from orpo_megatron.bridge.parity import parse_sharding
from orpo_megatron.data.plan import Padding, round_up
from orpo_megatron.data.prepare import padding_of

SCOPES = ("prompt_and_response", "response")
PADDINGS = ("packed", "padded", "shared")  # the last packs pairs that share their prompt
MICROBATCHES = (1, 2, 4)

#: Tokens of the pairs. The last one is for evaluations, whose metrics come by length as well.
PROMPTS, CHOSEN, REJECTED = (9, 3, 17, 1, 12, 6, 22, 10), (11, 20, 2, 7, 1, 16, 5, 70), (4, 13, 9, 1, 25, 8, 3, 40)
PAIRS, EVAL_PAIRS = 7, 8
#: A batch of which most rows hold no pair, and one data-parallel rank of four none at all.
RAGGED_PAIRS, RAGGED_ROWS = 3, 8

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # large enough for attention to choose
}
LLAMA = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 176}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
QWEN3_MOE = SIZES | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "intermediate_size": 176,
    "head_dim": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
MIXTRAL = SIZES | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "intermediate_size": 48,
}


@dataclass(frozen=True)
class Model:
    """A model and how it is trained.

    Attributes:
        config: The architecture in Hugging Face's terms.
        parameters: How many parameters are trained.
        settings: Further settings of the recipe, on one process as on many.
        same_rows: Whether the answer depends on which pairs share a row: the reference then has the same rows.
        rounded: Whether the layouts round to bf16. The reference does not, but starts from the same, rounded weights.
    """

    config: dict[str, Any]
    parameters: int
    settings: dict[str, Any] = field(default_factory=dict)
    same_rows: bool = False
    rounded: bool = False


#: A dense layer has 6 parameters; one of 4 experts 7, or 5 without norms of queries and keys, and two for each expert;
#: adapters two beside each of 4 matrices.
MODELS = {
    "dense": Model(LLAMA | TIED, 2 + 4 * 6),
    "untied": Model(LLAMA | UNTIED, 3 + 4 * 6),
    "odd vocabulary": Model(LLAMA | TIED | {"vocab_size": 513}, 2 + 4 * 6),
    "one key-value head": Model(LLAMA | TIED | {"num_key_value_heads": 1}, 2 + 4 * 6),
    "adapters": Model(LLAMA | TIED, 4 * 4 * 2, {"peft.dim": 4}),
    "experts": Model(QWEN3_MOE | UNTIED, 3 + 4 * (7 + 2 * 4), {"model.moe_aux_loss_coeff": 0.0}),
    "mixtral": Model(MIXTRAL | UNTIED, 3 + 4 * (5 + 2 * 4), {"model.moe_aux_loss_coeff": 0.0}),
    "balanced": Model(QWEN3_MOE | UNTIED, 3 + 4 * (7 + 2 * 4), {"model.moe_aux_loss_coeff": 0.01}, same_rows=True),
    "rounded": Model(LLAMA | TIED, 2 + 4 * 6, rounded=True),
}


@dataclass(frozen=True)
class Layout:
    """A split of the model over processes, and what else may not change the answer.

    Attributes:
        processes: How many there are; what is not split over is data parallel.
        sizes: As ``tools/verify_parity.py --against`` names them.
        model: Of ``MODELS``.
        settings: Further settings of the recipe, which the reference does not have.
        microbatches: Microbatches of a step.
        paddings: Of ``PADDINGS``.
        scopes: Of ``SCOPES``.
        ragged: Whether to run a batch with fewer pairs than rows as well.
        replicate: Whether every replica runs all rows, as a reference on many processes does.
        recomputed: The part of a layer that has to run twice, in some layers at least.
        mutations: What to break as well, each of which has to be seen.
    """

    processes: int
    sizes: str = ""
    model: str = "dense"
    settings: dict[str, Any] = field(default_factory=dict)
    microbatches: tuple[int, ...] = MICROBATCHES
    paddings: tuple[str, ...] = PADDINGS
    scopes: tuple[str, ...] = SCOPES
    ragged: bool = True
    replicate: bool = False
    recomputed: str = ""
    mutations: tuple[str, ...] = ()

    @property
    def replicas(self) -> int:
        """Data-parallel replicas that share the rows."""
        sizes = parse_sharding(self.sizes)
        return 1 if self.replicate else self.processes // (sizes["tp"] * sizes["pp"] * sizes["cp"])

    def multiples_of(self, padding: str) -> Padding:
        """Returns what lengths are padded to a multiple of: what the split needs, or at least the longest segment."""
        sizes = parse_sharding(self.sizes)
        longest = max(p + max(c, r) for p, c, r in list(zip(PROMPTS, CHOSEN, REJECTED, strict=True))[:PAIRS])
        ranks = sizes["cp"] * (sizes["tp"] if sizes["sp"] else 1)
        least = round_up(longest, 2 * ranks) if padding == "padded" else 1
        return padding_of(ranks, sizes["cp"], fp8=False, mxfp8=False, pad_to_multiple_of=least)


SHARDED = {"ddp.use_distributed_optimizer": True, "optimizer.use_distributed_optimizer": True}
OVERLAP = SHARDED | {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "ddp.bucket_size": 20_000}
#: Whether all pipeline stages communicate at once; Bridge's default is that they do for gradients and not for weights.
ALIGNED, APART = {"dist.align_grad_reduce": True, "ddp.align_param_gather": True}, {"dist.align_grad_reduce": False}
WRONG = ("loss doubled", "copy off", "copy NaN", "pairs missing")
LAYOUTS = {
    "tp2": Layout(2, "tp=2", mutations=WRONG),
    "tp2 sp": Layout(2, "tp=2,sp=true"),
    "pp2": Layout(2, "pp=2"),
    "pp2 vpp2": Layout(2, "pp=2,vpp=2", microbatches=(2, 4)),
    "cp2": Layout(2, "cp=2"),
    "ep2": Layout(2, "ep=2", "experts"),
    "tp2 sp ep2": Layout(2, "tp=2,sp=true,ep=2", "experts"),
    "dp2": Layout(2),
    "dp2 replicated": Layout(2, replicate=True),
    "dp2 distributed optimizer": Layout(2, settings=SHARDED),
    "dp2 overlap": Layout(2, settings=OVERLAP),
    "tp4": Layout(4, "tp=4"),
    "pp4": Layout(4, "pp=4"),
    "tp2 pp2": Layout(4, "tp=2,pp=2"),
    "tp2 sp pp2": Layout(4, "tp=2,sp=true,pp=2", mutations=("not finalised",)),
    "tp2 cp2": Layout(4, "tp=2,cp=2"),
    "tp2 sp cp2": Layout(4, "tp=2,sp=true,cp=2"),
    "cp2 dp2": Layout(4, "cp=2", settings=SHARDED, mutations=("not finalised",)),
    "cp2 pp2": Layout(4, "cp=2,pp=2"),
    "ep2 cp2 dp2": Layout(4, "ep=2,cp=2", "experts"),
    "ep2 pp2": Layout(4, "ep=2,pp=2", "experts"),
}


def brief(processes: int, sizes: str, model: str = "dense", **more: Any) -> Layout:
    """Returns a layout with one batch, for what has nothing to do with padding or scope."""
    batch: dict[str, Any] = {
        "microbatches": (2,),
        "paddings": ("packed", "shared"),
        "scopes": SCOPES[:1],
        "ragged": False,
    }
    return Layout(processes, sizes, model, **batch | more)


def recompute(part: str, *modules: str, method: str | None = None) -> dict[str, Any]:
    """Returns what recomputes named modules, or whole layers, one at a time; ``part`` of a layer shows it."""
    if method:
        settings = {"granularity": "full", "method": method, "num_layers": 1}
    else:
        settings = {"granularity": "selective", "modules": list(modules)}
    return {"settings": {f"model.recompute_{key}": value for key, value in settings.items()}, "recomputed": part}


# Not here are layernorm, whose recomputation asks Transformer Engine whether it runs in FP8; moe_act, which takes
# grouped expert matrices; mla_up_proj (latent attention) and gdn_norm_out (a gated delta net): all of them are
# Transformer Engine's. shared_experts takes a model that has some.
ATTENTION = "self_attention.core_attention"
VARIATIONS: dict[str, dict[str, Any]] = {
    "untied": {"model": "untied", "ragged": True},
    "adapters": {"model": "adapters", "ragged": True},
    "recompute uniform": recompute(ATTENTION, method="uniform"),
    "recompute block": recompute(ATTENTION, method="block"),
    "recompute core_attn": recompute(ATTENTION, "core_attn"),
    "recompute mlp": recompute("mlp", "mlp"),
}
EXPERT_VARIATIONS = {
    "recompute moe": recompute("mlp.router", "moe"),
    "recompute uniform": recompute("mlp.router", method="uniform"),
}


def on_splits(model: str, splits: dict[str, str], variations: dict[str, dict[str, Any]]) -> dict[str, Layout]:
    """Returns every variation of a model on every one of these splits of 4 processes."""
    return {
        f"{split} {name}": brief(4, sizes, **{"model": model} | variation)
        for name, variation in variations.items()
        for split, sizes in splits.items()
    }


LAYOUTS |= on_splits("dense", {"tp2 pp2": "tp=2,pp=2", "cp2 dp2": "cp=2"}, VARIATIONS)
LAYOUTS |= on_splits(
    "experts", {"tp2 sp ep2 pp2": "tp=2,sp=true,ep=2,pp=2", "ep2 cp2": "ep=2,cp=2"}, EXPERT_VARIATIONS
)
LAYOUTS |= on_splits(
    "dense",
    {"cp2 dp2": "cp=2", "pp2 dp2": "pp=2", "pp2 vpp2 dp2": "pp=2,vpp=2"},
    {
        "overlap": {"settings": OVERLAP, "microbatches": (2, 4)},
        "overlap aligned": {"settings": OVERLAP | ALIGNED, "microbatches": (2, 4)},
        "overlap apart": {"settings": OVERLAP | APART, "microbatches": (2, 4)},
    },
)
LAYOUTS |= {
    "tp2 sp ep2 mixtral": brief(2, "tp=2,sp=true,ep=2", "mixtral"),
    "tp2 sp padded vocabulary": brief(2, "tp=2,sp=true", "odd vocabulary"),
    "tp2 sp one key-value head": brief(2, "tp=2,sp=true", "one key-value head"),
    "tp2 cp2 one key-value head": brief(4, "tp=2,cp=2", "one key-value head"),
    "dp4": brief(4, "", settings=SHARDED, ragged=True),
    "ep2 dp4": brief(4, "ep=2", "experts", ragged=True),
    "tp2 pp2 overlap": brief(4, "tp=2,pp=2", settings=OVERLAP),
    "ep2 overlap": brief(4, "ep=2", "experts", settings=OVERLAP),
    "tp2 sp pp2 adapters": brief(4, "tp=2,sp=true,pp=2", "adapters"),
}


#: With the auxiliary loss, always 4 rows: each is the mean over its own tokens, of which padding is none.
BALANCED: dict[str, Any] = {"paddings": ("padded", "packed"), "ragged": True, "mutations": ("mask off",)}
UNIFORM = recompute("mlp.router", method="uniform")
LAYOUTS |= {
    "ep2 balanced": brief(2, "ep=2", "balanced", **BALANCED),
    "tp2 sp ep2 balanced": brief(2, "tp=2,sp=true,ep=2", "balanced", microbatches=(4,), **BALANCED),
    "tp2 sp pp2 balanced": brief(4, "tp=2,sp=true,pp=2", "balanced", microbatches=(4,), **BALANCED),
    "cp2 dp2 balanced": brief(4, "cp=2", "balanced", **BALANCED),
    "tp2 sp ep2 pp2 balanced": brief(4, "tp=2,sp=true,ep=2,pp=2", "balanced", microbatches=(4,), **BALANCED),
    "tp2 sp pp2 balanced uniform": brief(4, "tp=2,sp=true,pp=2", "balanced", microbatches=(4,), **UNIFORM, **BALANCED),
}
BF16 = {"mixed_precision": "bf16_mixed"}
LAYOUTS |= on_splits(
    "rounded",
    {"tp2 pp2": "tp=2,pp=2", "tp2 sp pp2": "tp=2,sp=true,pp=2", "cp2 dp2": "cp=2"},
    {"bf16": {"settings": BF16}},
)


@dataclass(frozen=True)
class Case:
    """One batch: how it is padded, which tokens the NLL covers, its microbatches on a rank, and all its pairs."""

    padding: str
    scope: str
    microbatches: int
    pairs: int = PAIRS


def cases(layout: Layout) -> list[Case]:
    """Returns the batches that run under a layout."""
    found = [Case(*case) for case in itertools.product(layout.paddings, layout.scopes, layout.microbatches)]
    if layout.ragged:
        found.append(Case("packed", SCOPES[0], RAGGED_ROWS // layout.replicas, RAGGED_PAIRS))
    return found


@dataclass(frozen=True, order=True)
class Reference:
    """A batch on one process, which gradients and metrics are held against."""

    model: str
    scope: str
    pairs: int
    rows: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.model}-{self.scope}-{self.pairs}-{self.rows}"


def reference_of(layout: Layout, case: Case) -> Reference:
    """Returns what a batch is held against: all pairs in one row, unless the rows themselves matter."""
    rows = case.microbatches * layout.replicas if MODELS[layout.model].same_rows else 1
    return Reference(layout.model, case.scope, case.pairs, rows)


def all_references() -> list[Reference]:
    """Returns every reference that some layout asks for, those of a model together."""
    return sorted({reference_of(layout, case) for layout in LAYOUTS.values() for case in cases(layout)})
