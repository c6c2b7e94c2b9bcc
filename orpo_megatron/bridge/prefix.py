"""Whether the prompt of a pair is computed once for both responses: ``data.share_prefix``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from orpo_megatron.bridge.recipe import Recipe, num_routed_experts
from orpo_megatron.config import ConfigError
from orpo_megatron.data.plan import PairLengths

#: What ``auto`` wants saved, as a share of all tokens.
WORTH_IT = 0.05
#: Settings of Transformer Engine's attention, which rows with shared prompts do without.
_OF_ITS_ATTENTION = ("attention_backend", "cp_comm_type", "fp8_dot_product_attention")


@dataclass(frozen=True)
class PrefixChoice:
    """What was decided.

    Attributes:
        shared: Whether the prompt of a pair is computed once.
        why: What that does, in words, for the user.
    """

    shared: bool
    why: str


def choose_prefix(recipe: Recipe, hf_config: PretrainedConfig, lengths: PairLengths) -> PrefixChoice:
    """Decides whether the two sides of a pair share one prompt.

    With p prompt tokens a pair and c and r tokens of responses, sharing saves p of 2p + c + r.

    Args:
        recipe: The recipe; ``data.share_prefix`` is auto, on or off.
        hf_config: The model's Hugging Face configuration.
        lengths: Token counts of the training pairs.

    Raises:
        ConfigError: If it is on and would not be exact, or another setting would be without effect.
    """
    setting, conflict = recipe.data.share_prefix, _conflict(recipe, hf_config)
    saved = 1 - lengths.padded_tokens(1, share_prefix=True).sum() / lengths.padded_tokens(1).sum()
    if setting == "on" and conflict:
        raise ConfigError(f"data.share_prefix (on) does not go with {conflict}. Leave one of them out.")
    if setting == "on":
        return PrefixChoice(True, f"computed once a pair, which saves {saved:.1%} of all tokens")
    twice = "computed for each response"
    if setting == "off":
        return PrefixChoice(False, f"{twice}; data.share_prefix=on would save {saved:.1%} of all tokens")
    if conflict:
        return PrefixChoice(False, f"{twice} (data.share_prefix auto: it does not go with {conflict})")
    if saved < WORTH_IT:
        return PrefixChoice(False, f"{twice} (data.share_prefix auto: once would save only {saved:.1%} of all tokens)")
    if torch.cuda.is_available():
        return PrefixChoice(
            False,
            f"{twice} (data.share_prefix auto: not measured on a GPU yet; on would save {saved:.1%} of all tokens)",
        )
    return PrefixChoice(True, f"computed once a pair, which saves {saved:.1%} of all tokens (data.share_prefix auto)")


def _conflict(recipe: Recipe, hf_config: PretrainedConfig) -> str | None:
    """Returns what of the recipe or the model a shared prompt does not go with."""
    if num_routed_experts(hf_config):
        if recipe.setting("model.moe_router_load_balancing_type") != "none" and (
            recipe.setting("model.moe_aux_loss_coeff") != 0
        ):
            return "a router's auxiliary loss, which would count the prompt once (set model.moe_aux_loss_coeff to 0)"
        if recipe.setting("model.moe_z_loss_coeff"):
            return "model.moe_z_loss_coeff, a router's loss, which would count the prompt once"
    if getattr(hf_config, "kv_lora_rank", None):
        return "multi-latent attention"
    if recipe.setting("model.apply_rope_fusion"):
        return "model.apply_rope_fusion (True), whose kernel counts positions itself"
    for section in ("model", "mixed_precision"):
        values = recipe.sections.get(section)
        for name in _OF_ITS_ATTENTION:
            if isinstance(values, dict) and values.get(name):
                return f"{section}.{name}, a setting of another attention"
    return None
