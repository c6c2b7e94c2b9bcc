"""The model provider: an architecture and its weights, fitted to what this machine can run."""

from __future__ import annotations

from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from transformers import PretrainedConfig

from orpo_megatron.bridge.apply import apply_settings
from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.core.attention import packed_local_layer_spec, shared_prefix_layer_spec
from orpo_megatron.core.fusions import turn_off_fusions
from orpo_megatron.core.moe import has_auxiliary_loss

# A checkpoint names the layer specification and the data set by their import paths.
register_allowed_target_prefix("orpo_megatron")
#: Parameters with a row for each id.
_VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")


def make_bridge(recipe: Recipe, hf_config: PretrainedConfig) -> AutoBridge[Any]:
    """Returns the converter between Hugging Face and Megatron for the recipe's model.

    Raises:
        ConfigError: If Megatron-Bridge does not know the architecture.
    """
    if not AutoBridge.supports(hf_config):
        name = ", ".join(hf_config.architectures or [hf_config.model_type])
        known = ", ".join(AutoBridge.list_supported_models())
        raise ConfigError(f"Megatron-Bridge has no bridge for {name}. It has these: {known}.")
    return _TrimmingBridge.from_hf_pretrained(model_source(recipe), trust_remote_code=False)


class _TrimmingBridge(AutoBridge[Any]):
    """Bridge 0.6 pads a vocabulary's weights on import and leaves the padding in on export. This one cuts it off.

    Else transformers would not load what was exported.
    """

    @property
    def _model_bridge(self) -> Any:
        bridge = super()._model_bridge  # a new one each time
        modify = bridge.maybe_modify_converted_hf_weight
        vocab_size = getattr(self.hf_pretrained.config, "vocab_size", None)

        def trim(task: Any, weights: dict[str, torch.Tensor], hf_state: Any) -> dict[str, torch.Tensor]:
            weights = modify(task, weights, hf_state)
            if task.global_param_name not in _VOCABULARY_WEIGHTS:
                return weights
            return {name: weight[:vocab_size] for name, weight in weights.items()}

        bridge.maybe_modify_converted_hf_weight = trim
        return bridge


def make_provider(
    recipe: Recipe, bridge: AutoBridge[Any], *, load_weights: bool, here: bool = True, share_prefix: bool = False
) -> GPTModelProvider:
    """Makes the model provider of a run.

    Args:
        recipe: The recipe; its section ``model`` wins over what the architecture implies.
        bridge: From ``make_bridge``.
        load_weights: Whether weights come from Hugging Face; False where a checkpoint brings them.
        here: Whether to fit it to this machine, or leave it as a machine with GPUs takes it.
        share_prefix: Whether it has to take pairs that share their prompt.

    Returns:
        The provider, not yet finalised.

    Raises:
        ConfigError: If a setting is not the provider's, or needs what this machine lacks.
    """
    provider = bridge.to_megatron_provider(load_weights=load_weights)
    # Times the tensor parallel size: no more padding than that split takes, where Bridge's default would pad further.
    provider.make_vocab_size_divisible_by = 1
    provider.expert_tensor_parallel_size = 1
    set_dtype(provider, torch.float32)
    fit_to_rows(provider, recipe, here=here, share_prefix=share_prefix)
    apply_settings(provider, recipe.sections["model"], "model")
    check_provider(provider, recipe, here=here, share_prefix=share_prefix)
    return provider


def fit_to_rows(provider: GPTModelProvider, recipe: Recipe, *, here: bool, share_prefix: bool) -> None:
    """Sets what packed rows and an exact loss ask of a model, and what this machine does.

    Args:
        provider: The provider; changed.
        recipe: The recipe: its row budget and pipeline.
        here: As in ``make_provider``.
        share_prefix: As in ``make_provider``.

    Raises:
        ConfigError: If the model has layers of its own that nothing can stand in for.
    """
    provider.seq_length = recipe.data.row_budget
    provider.hidden_dropout = provider.attention_dropout = 0.0
    provider.calculate_per_token_loss = False
    provider.cross_entropy_loss_fusion = False
    if recipe.parallel_size("virtual_pipeline_model") > 1:
        # Batched exchange of both directions crosses them over gloo: wrong without a word for rows of one length.
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    # Rows differ in length, so pipeline stages must exchange shapes; Megatron-Core ties that to this dispatcher.
    provider.variable_seq_lengths = recipe.parallel_size("pipeline_model") > 1
    provider.moe_token_dispatcher_type = "alltoall"
    if share_prefix:
        _check_plain_layers(provider, "data.share_prefix on", "Set data.share_prefix to off.")
        provider.transformer_layer_spec, provider.apply_rope_fusion = shared_prefix_layer_spec, False
    if here:
        fit_to_machine(provider)
    elif not HAVE_TE:
        # Megatron-Core refuses even to describe these without Transformer Engine.
        provider.apply_rope_fusion = provider.moe_permute_fusion = provider.moe_router_fusion = False


def check_provider(provider: GPTModelProvider, recipe: Recipe, *, here: bool, share_prefix: bool) -> None:
    """Checks a model's settings once all of them are made.

    Args:
        provider: The provider.
        recipe: The recipe.
        here: As in ``make_provider``.
        share_prefix: As in ``make_provider``.

    Raises:
        ConfigError: If one of them would not be exact, or needs what this machine lacks.
    """
    if provider.virtual_pipeline_model_parallel_size == 1:
        provider.virtual_pipeline_model_parallel_size = None  # else the schedule would be the interleaved one
    _check_experts(provider)
    if share_prefix and has_auxiliary_loss(provider):
        raise ConfigError(
            "data.share_prefix must be off for this model: its routers have a loss of their own, which would count a "
            "shared prompt once. Set it to off, or the coefficients (model.moe_aux_loss_coeff, moe_z_loss_coeff) to 0."
        )
    if getattr(provider, "mtp_num_layers", None):
        raise ConfigError(
            f"model.mtp_num_layers ({provider.mtp_num_layers}) must be null: this version does not train multi-token "
            "prediction."
        )
    if here:
        _check_here(provider, recipe)


def _check_here(provider: GPTModelProvider, recipe: Recipe) -> None:
    """Checks that this machine can do what the settings ask for.

    Raises:
        ConfigError: If it cannot.
    """
    on_gpu = torch.cuda.is_available()
    if (provider.expert_tensor_parallel_size or 1) > 1 and not on_gpu:
        raise ConfigError(
            f"model.expert_tensor_parallel_size ({provider.expert_tensor_parallel_size}) must be 1 on a CPU: gloo "
            "lacks the uneven all-gather that a split expert takes. Leave it out."
        )
    if is_local(provider) and "layernorm" in (provider.recompute_modules or ()):
        raise ConfigError(
            f"model.recompute_modules ({provider.recompute_modules}) must not name layernorm without Transformer "
            "Engine, which Megatron-Core asks about FP8 whenever it recomputes a norm. Leave it out."
        )
    if on_gpu and not recipe.sections.get("mixed_precision"):
        raise ConfigError(
            "mixed_precision is missing, but packed attention on a GPU takes bf16 or fp16 only. Set it to bf16_mixed."
        )


def _check_experts(provider: GPTModelProvider) -> None:
    """Checks how a mixture of experts balances its load.

    Raises:
        ConfigError: If a kind of balancing is unknown, or would make the loss depend on how ranks are laid out.
    """
    if not provider.num_moe_experts:
        return
    if provider.moe_router_enable_expert_bias:
        raise ConfigError(
            "model.moe_router_enable_expert_bias (True) must be False: Megatron-Core 0.19 miscounts tokens for it "
            "where there is padding."
        )
    kinds, coefficients = provider.moe_router_load_balancing_type, provider.moe_aux_loss_coeff
    if isinstance(kinds, str) != isinstance(coefficients, (int, float)):
        raise ConfigError(
            f"model.moe_aux_loss_coeff ({coefficients}) must be a number for one model.moe_router_load_balancing_type "
            f"and a list for a list of them ({kinds})."
        )
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in ("none", "aux_loss", "seq_aux_loss"):
            raise ConfigError(
                f"model.moe_router_load_balancing_type ({kind}) must be none, aux_loss or seq_aux_loss: with another "
                "one the loss would depend on how ranks are laid out."
            )


def _check_plain_layers(provider: GPTModelProvider, what: str, remedy: str) -> None:
    """Checks that a model is built of Megatron-Core's plain decoder layers, which others can stand in for.

    Raises:
        ConfigError: If it has layers of its own.
    """
    spec = provider.transformer_layer_spec
    function = getattr(spec, "func", spec)  # of a partial
    ours = (packed_local_layer_spec, shared_prefix_layer_spec)  # of a checkpoint
    if function not in (default_layer_spec, get_gpt_decoder_block_spec, *ours):
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(f"This model has layers of its own ({name}), for which {what} has no stand-in. {remedy}")


def is_local(provider: GPTModelProvider) -> bool:
    """Returns whether the model is built of Megatron-Core's local layers."""
    return provider.transformer_layer_spec is packed_local_layer_spec


def set_dtype(provider: GPTModelProvider, dtype: torch.dtype) -> None:
    """Sets the dtype of weights and of what pipeline stages exchange; ``mixed_precision`` overrides it later."""
    provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = dtype
    provider.bf16, provider.fp16 = dtype is torch.bfloat16, dtype is torch.float16


def fit_to_machine(provider: GPTModelProvider) -> None:
    """Takes Megatron-Core's local layers and no fused kernels where there is no Transformer Engine or no GPU."""
    if HAVE_TE and torch.cuda.is_available():
        return
    _check_plain_layers(provider, "a machine without Transformer Engine", "Train it on a GPU with Transformer Engine.")
    provider.transformer_layer_spec = packed_local_layer_spec
    turn_off_fusions(provider)
    provider.use_cpu_initialization = not torch.cuda.is_available()
