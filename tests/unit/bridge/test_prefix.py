"""What `data.share_prefix` decides, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from orpo_megatron.bridge.prefix import prefix_conflict
from orpo_megatron.bridge.recipe import Recipe, build_recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.data.plan import PairLengths
from orpo_megatron.data.prefix import choose_prefix

#: Of 90 tokens, 20 are saved; of 22, 1.
LONG_PROMPTS = PairLengths(np.array([10, 10]), np.array([15, 20]), np.array([5, 10]))
SHORT_PROMPTS = PairLengths(np.array([1]), np.array([15]), np.array([5]))
DENSE, EXPERTS = LlamaConfig(), Qwen3MoeConfig()


def recipe_of(share_prefix: Any = "auto", **settings: Any) -> Recipe:
    values: dict[str, Any] = {
        "run": {"dir": "run"},
        "model": {"hf": "model"},
        "data": {"train": "pairs.jsonl", "share_prefix": share_prefix},
        "train": {"train_iters": 1},
    }
    for name, value in settings.items():
        section, _, key = name.partition("__")
        values[section] = {**values.get(section, {}), key: value}
    return build_recipe(values)


def choice(
    recipe: Recipe, config: PretrainedConfig = DENSE, lengths: PairLengths = LONG_PROMPTS, on_gpu: bool = False
) -> tuple[bool, str]:
    chosen = choose_prefix(recipe.data.share_prefix, prefix_conflict(recipe, config), lengths, on_gpu=on_gpu)
    return chosen.shared, chosen.why


def test_auto_decides_by_what_it_saves_and_says_so() -> None:
    """20 of 90 tokens, and 1 of 22."""
    assert choice(recipe_of()) == (
        True,
        "computed once a pair, which saves 22.2% of all tokens (data.share_prefix auto)",
    )
    assert choice(recipe_of(), lengths=SHORT_PROMPTS) == (
        False,
        "computed for each response (data.share_prefix auto: once would save only 4.5% of all tokens)",
    )


def test_on_and_off_are_done_also_as_yaml_reads_them() -> None:
    for on in ("on", True):
        assert choice(recipe_of(on), lengths=SHORT_PROMPTS) == (
            True,
            "computed once a pair, which saves 4.5% of all tokens",
        )
    for off in ("off", False):
        assert choice(recipe_of(off)) == (
            False,
            "computed for each response; data.share_prefix=on would save 22.2% of all tokens",
        )
    with pytest.raises(ConfigError, match=r"data\.share_prefix \('maybe'\) must be one of auto, on, off\."):
        recipe_of("maybe")


def test_on_a_gpu_auto_waits_until_it_is_measured() -> None:
    shared, why = choice(recipe_of(), on_gpu=True)
    assert not shared and "not measured on a GPU yet; on would save 22.2% of all tokens" in why
    assert choice(recipe_of("on"), on_gpu=True)[0]


CONFLICTS = {
    "a router's auxiliary loss": (EXPERTS, {}),
    "model.moe_z_loss_coeff": (EXPERTS, {"model__moe_aux_loss_coeff": 0, "model__moe_z_loss_coeff": 1e-3}),
    "multi-latent attention": (LlamaConfig(kv_lora_rank=8), {}),
    r"model.apply_rope_fusion \(True\)": (DENSE, {"model__apply_rope_fusion": True}),
    "model.cp_comm_type": (DENSE, {"model__cp_comm_type": "a2a"}),
    "model.attention_backend": (DENSE, {"model__attention_backend": "fused"}),
    "mixed_precision.fp8_dot_product_attention": (DENSE, {"mixed_precision__fp8_dot_product_attention": True}),
}


@pytest.mark.parametrize("what", CONFLICTS)
def test_what_would_not_be_exact_or_without_effect_is_refused_by_name(what: str) -> None:
    config, settings = CONFLICTS[what]
    with pytest.raises(ConfigError, match=rf"data\.share_prefix \(on\) does not go with {what}.*Leave one of them"):
        choice(recipe_of("on", **settings), config)
    shared, why = choice(recipe_of(**settings), config)
    assert not shared and "does not go with" in why


@pytest.mark.parametrize(
    "settings", [{"model__moe_aux_loss_coeff": 0.0}, {"model__moe_router_load_balancing_type": "none"}]
)
def test_experts_without_a_loss_of_their_own_share(settings: dict[str, Any]) -> None:
    assert choice(recipe_of("on", **settings), EXPERTS)[0]
    assert choice(recipe_of(**settings), EXPERTS)[0]
