"""The model provider: an architecture and its weights, fitted to what this machine can run."""

from __future__ import annotations

import copy
import importlib.util
import re
from typing import Any

import torch
import torch.nn.functional as F
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.extensions.transformer_engine import HAVE_TE
from transformers import PretrainedConfig

import orpo_megatron.bridge.mixtral  # noqa: F401  registers it with AutoBridge
from orpo_megatron.bridge.apply import apply_settings
from orpo_megatron.bridge.conversion.families import find_family
from orpo_megatron.bridge.conversion.mapping import check_covered
from orpo_megatron.bridge.layers import is_local, use_local_layers, use_shared_prefix_layers
from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.core.attention import attention_window
from orpo_megatron.core.local import takes_local_layers, turn_off_fusions
from orpo_megatron.core.moe import has_auxiliary_loss

# A checkpoint names the layer specification and the data set by their import paths.
register_allowed_target_prefix("orpo_megatron")
#: Parameters with a row for each id.
_VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")


def make_bridge(recipe: Recipe, hf_config: PretrainedConfig, *, weights: bool = True) -> AutoBridge[Any]:
    """Returns the converter between Hugging Face and Megatron for the recipe's model.

    Args:
        recipe: The recipe.
        hf_config: The model's Hugging Face configuration.
        weights: Whether it has to convert weights; without, nothing is asked of the hub.

    Raises:
        ConfigError: If Megatron-Bridge does not know the architecture, or it becomes a model that takes no ORPO head.
    """
    family = find_family(hf_config)
    if not family.takes_head:
        raise ConfigError(
            f"{family.architecture} becomes Megatron's {family.target.__name__}, whose forward takes no ORPO head. "
            "docs/models.md lists what can be trained."
        )
    if not weights:
        return CompletedBridge.from_hf_config(hf_config)
    return CompletedBridge.from_hf_pretrained(model_source(recipe), trust_remote_code=False)


class CompletedBridge(AutoBridge[Any]):
    """Bridge 0.6's converter with what it leaves out.

    It pads a vocabulary's weights on import and leaves the padding in on export, so that transformers would not load
    what was exported: this one cuts it off. Of some mixtures of experts it knows the grouped experts of Transformer
    Engine only: this one knows local ones as well. Of a parameter that it cannot convert it only logs that: this one
    raises a ConfigError.
    """

    def knows(self, parameter: str) -> bool:
        """Returns whether a parameter of the Megatron model has a Hugging Face tensor to come from."""
        return self._model_bridge.mapping_registry().megatron_to_hf_lookup(parameter) is not None

    @property
    def _model_bridge(self) -> Any:
        bridge = super()._model_bridge  # a new one each time
        modify, registry = bridge.maybe_modify_converted_hf_weight, bridge.mapping_registry
        list_tasks = bridge.build_conversion_tasks
        vocab_size = getattr(getattr(self.hf_pretrained, "config", self.hf_pretrained), "vocab_size", None)

        def trim(task: Any, weights: dict[str, torch.Tensor], hf_state: Any) -> dict[str, torch.Tensor]:
            weights = modify(task, weights, hf_state)
            if task.global_param_name not in _VOCABULARY_WEIGHTS:
                return weights
            return {name: weight[:vocab_size] for name, weight in weights.items()}

        def tasks_of_all(hf_pretrained: Any, chunks: list[torch.nn.Module], *args: Any, **kwargs: Any) -> list[Any]:
            tasks = list_tasks(hf_pretrained, chunks, *args, **kwargs)
            check_covered(tasks, chunks)
            return tasks

        bridge.maybe_modify_converted_hf_weight = trim
        bridge.build_conversion_tasks = tasks_of_all
        bridge.mapping_registry = lambda: _with_local_experts(registry())
        return bridge


def _with_local_experts(registry: MegatronMappingRegistry) -> MegatronMappingRegistry:
    """Adds to a model's parameter names those of local experts, where only grouped ones are there."""
    mappings = registry.get_all_mappings()
    names, missing = {mapping.megatron_param for mapping in mappings}, []
    for mapping in mappings:
        # Grouped experts are one module, weight0, weight1, ...; local ones a module each.
        local = re.sub(
            r"\.experts\.(linear_fc[12])\.weight\*$", r".experts.local_experts.*.\1.weight", mapping.megatron_param
        )
        if local not in names:
            twin = copy.copy(mapping)
            twin.megatron_param = local
            missing.append(twin)
    return MegatronMappingRegistry(*mappings, *missing)


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
    if HAVE_TE:
        fuse(provider)
    fit_to_rows(provider, recipe, here=here, share_prefix=share_prefix)
    apply_settings(provider, recipe.sections["model"], "model")
    check_provider(provider, recipe, here=here, share_prefix=share_prefix)
    return provider


def fuse(provider: GPTModelProvider) -> None:
    """Turns on fused kernels that Megatron-Bridge has off for all families but Llama.

    Without them the rotary embedding of packed rows asks the GPU for every sequence's length, in each layer, and a
    gated MLP keeps two tensors more for backward.
    """
    if provider.position_embedding_type == "rope" and not provider.multi_latent_attention:
        provider.apply_rope_fusion = True
    plain = provider.activation_func_clamp_value is None and not provider.glu_linear_offset
    if (
        provider.gated_linear_unit
        and provider.activation_func is F.silu
        and plain
        and not provider.use_te_activation_func
    ):
        provider.bias_activation_fusion = True


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
    provider.cuda_graph_scope = None  # by which Megatron-Core would turn graphs on that EXACT_SETTINGS has off
    if recipe.parallel_size("virtual_pipeline_model") > 1:
        # Batched exchange of both directions crosses them over gloo: wrong without a word for rows of one length.
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    # Rows differ in length, so pipeline stages must exchange shapes; Megatron-Core ties that to this dispatcher.
    provider.variable_seq_lengths = recipe.parallel_size("pipeline_model") > 1
    provider.moe_token_dispatcher_type = "alltoall"
    if share_prefix and not (here and takes_local_layers()):  # which take such pairs as they are
        use_shared_prefix_layers(provider)
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
    check_exact(provider)
    if share_prefix and has_auxiliary_loss(provider):
        raise ConfigError(
            "data.share_prefix must be off for this model: its routers have a loss of their own, which would count a "
            "shared prompt once. Set it to off, or the coefficients (model.moe_aux_loss_coeff, moe_z_loss_coeff) to 0."
        )
    window = attention_window(provider)
    if window is not None and recipe.data.max_length > window and (share_prefix or (here and takes_local_layers())):
        raise ConfigError(
            f"data.max_length ({recipe.data.max_length}) must be at most the model's attention window ({window}) "
            "where prompts are shared or there is no Transformer Engine. Lower it, or train on a GPU with "
            "data.share_prefix off."
        )
    if here:
        _check_here(provider, recipe)


def check_exact(provider: GPTModelProvider) -> None:
    """Checks that a model, however it is split, has a loss that does not depend on the split.

    Raises:
        ConfigError: If it predicts several tokens, or balances experts in a way that depends on it.
    """
    _check_experts(provider)
    if getattr(provider, "mtp_num_layers", None):
        raise ConfigError(
            f"model.mtp_num_layers ({provider.mtp_num_layers}) must be null: this version does not train multi-token "
            "prediction."
        )


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
    if recipe.setting("checkpoint.async_save") and not on_gpu:
        raise ConfigError(
            "checkpoint.async_save (True) must be False on a CPU: what would write in the background waits for a GPU "
            "for ever. Leave it out."
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


def set_dtype(provider: GPTModelProvider, dtype: torch.dtype) -> None:
    """Sets the dtype of weights and of what pipeline stages exchange; ``mixed_precision`` overrides it later."""
    provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = dtype
    provider.bf16, provider.fp16 = dtype is torch.bfloat16, dtype is torch.float16


def fit_to_machine(provider: GPTModelProvider) -> None:
    """Takes Megatron-Core's local layers and no fused kernels where there is no Transformer Engine or no GPU."""
    if not takes_local_layers():
        if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
            # Transformer Engine needs no such kernel of apex, but Megatron-Core refuses to build its output layer.
            provider.gradient_accumulation_fusion = False
        return
    use_local_layers(provider)
    turn_off_fusions(provider)
    provider.use_cpu_initialization = not torch.cuda.is_available()
