"""What of a recipe a prompt that is computed once for both responses does not go with."""

from __future__ import annotations

from transformers import PretrainedConfig

from orpo_megatron.bridge.recipe import Recipe, num_routed_experts

#: Settings of Transformer Engine's attention, which rows with shared prompts do without.
_OF_ITS_ATTENTION = ("attention_backend", "cp_comm_type", "fp8_dot_product_attention")


def prefix_conflict(recipe: Recipe, hf_config: PretrainedConfig) -> str | None:
    """Returns what of the recipe or the model a shared prompt does not go with, in words, if there is anything."""
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
