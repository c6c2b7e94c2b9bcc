"""Mixtral between Hugging Face and Megatron: the bridge that Megatron-Bridge 0.6 does not have.

Importing this module registers it with ``AutoBridge``. It names grouped experts; ``CompletedBridge`` adds local ones.
"""

from __future__ import annotations

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.bridge.models.conversion.utils import mcore_to_hf_window_size
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MixtralForCausalLM

_LAYER, _HF_LAYER = "decoder.layers.*", "model.layers.*"
_EXPERTS, _HF_EXPERT = f"{_LAYER}.mlp.experts", f"{_HF_LAYER}.block_sparse_moe.experts.*"
#: Weights that have one counterpart each. Bridge knows by itself where a norm lies without Transformer Engine.
_SAME = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight": f"{_HF_LAYER}.input_layernorm.weight",
    f"{_LAYER}.self_attention.linear_proj.weight": f"{_HF_LAYER}.self_attn.o_proj.weight",
    f"{_LAYER}.pre_mlp_layernorm.weight": f"{_HF_LAYER}.post_attention_layernorm.weight",
    f"{_LAYER}.mlp.router.weight": f"{_HF_LAYER}.block_sparse_moe.gate.weight",
}


@MegatronModelBridge.register_bridge(source=MixtralForCausalLM, target=GPTModel, model_type="mixtral")
class MixtralBridge(MegatronModelBridge):
    """Converts Mixtral's configuration and weights.

    Source: ``MixtralForCausalLM`` of transformers 5.12; its checkpoints keep one matrix an expert (``w1`` the gate,
    ``w3`` up, ``w2`` down), though its module holds them fused.
    """

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """Returns Megatron's model provider for a Mixtral.

        Args:
            hf_pretrained: What holds the Hugging Face configuration as ``config``.
        """
        provider = super().provider_bridge(hf_pretrained)
        config = hf_pretrained.config
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = provider.add_qkv_bias = False
        provider.hidden_dropout = 0.0
        if config.sliding_window is not None:
            provider.window_size = (config.sliding_window - 1, 0)
        provider.moe_ffn_hidden_size = config.intermediate_size
        # Mixtral rescales the chosen experts' probabilities to a sum of 1, which is a softmax over their logits.
        provider.moe_router_pre_softmax = False
        provider.moe_router_load_balancing_type = "aux_loss"
        provider.moe_token_dispatcher_type = "alltoall"
        provider.moe_grouped_gemm = provider.moe_permute_fusion = True
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: GPTModelProvider) -> dict[str, Any]:
        """Returns the Hugging Face configuration of a model provider, as a ``config.json`` has it."""
        values: dict[str, Any] = super().megatron_to_hf_config(provider)
        return {
            **values,
            "intermediate_size": provider.moe_ffn_hidden_size,
            "sliding_window": mcore_to_hf_window_size(provider.window_size),
        }

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Returns which weight of Megatron's is which of Hugging Face's."""
        mappings: list[Any] = [AutoMapping(megatron_param=ours, hf_param=theirs) for ours, theirs in _SAME.items()]
        mappings.append(
            QKVMapping(
                f"{_LAYER}.self_attention.linear_qkv.weight",
                **{name: f"{_HF_LAYER}.self_attn.{name}_proj.weight" for name in "qkv"},
            )
        )
        mappings += [
            GatedMLPMapping(
                f"{_EXPERTS}.linear_fc1.weight*", gate=f"{_HF_EXPERT}.w1.weight", up=f"{_HF_EXPERT}.w3.weight"
            ),
            AutoMapping(megatron_param=f"{_EXPERTS}.linear_fc2.weight*", hf_param=f"{_HF_EXPERT}.w2.weight"),
        ]
        return MegatronMappingRegistry(*mappings)
