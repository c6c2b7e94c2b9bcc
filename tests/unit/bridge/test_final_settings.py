"""What has become of a recipe's settings once Bridge has finalised them, and what experts may be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_megatron.bridge.recipe import build_recipe
from orpo_megatron.config import ConfigError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 64}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SIZES
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 48,
    "head_dim": 8,
} | SIZES
EXPERTS = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]} | SIZES
EXPERTS |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


def finalised(folder: Path, config: dict[str, Any], settings: dict[str, Any], share_prefix: bool = False) -> Any:
    """Returns Bridge's configuration, built and finalised as for training."""
    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.session import Session
    from orpo_megatron.bridge.train import finalise

    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"config": config},
        "data": {"train": "random", "tokenizer": "none", "max_length": 64, "max_prompt_length": 32},
        "train": {"train_iters": 1},
    }
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    recipe = build_recipe(values)
    container = Session(recipe, load_hf_config(recipe), rows_per_step=4, share_prefix=share_prefix)._container()
    finalise(container, recipe)
    return container


@pytest.fixture
def two_ranks(bridge_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


PIPELINE = {"model.pipeline_model_parallel_size": 2}
CHUNKS = PIPELINE | {"model.virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            LLAMA,
            PIPELINE | {"model.pipeline_model_parallel_layout": "Et|t|t|tL"},
            "model.virtual_pipeline_model_parallel_size (1) must be the 2 of model.pipeline_model_parallel_layout.",
        ),
        (
            LLAMA,
            CHUNKS | {"model.batch_p2p_comm": True, "model.overlap_p2p_comm": False},
            "model.batch_p2p_comm (True)",
        ),
        (
            LLAMA,
            {"mixed_precision": "bf16_mixed", "model.params_dtype": "float32"},
            "model.params_dtype (float32) would become bfloat16: it follows from other settings, such as mixed_prec",
        ),
        (
            LLAMA,
            {"mixed_precision": "bf16_mixed", "ddp.grad_reduce_in_fp32": False},
            "ddp.grad_reduce_in_fp32 (False) would become True",
        ),
        (
            LLAMA,
            {"checkpoint.async_save": True},
            "checkpoint.async_save (True) must be False on a CPU: what would write",
        ),
        (
            LLAMA,
            {"ddp.use_distributed_optimizer": False, "optimizer.use_distributed_optimizer": True},
            "ddp.use_distributed_optimizer (False) would become True",
        ),
        (
            LLAMA,
            {"mixed_precision": "bf16_mixed", "model.fp8": "hybrid"},
            "model.fp8 (hybrid) would become None: it follows from other settings, such as mixed_precision.",
        ),
        (
            MISTRAL,
            {},
            "data.max_length (64) must be at most the model's attention window (48) where prompts are shared or there",
        ),
        (EXPERTS, {"model.moe_router_enable_expert_bias": True}, "model.moe_router_enable_expert_bias (True) must be"),
        (
            EXPERTS,
            {"model.moe_router_load_balancing_type": "global_aux_loss"},
            "model.moe_router_load_balancing_type (global_aux_loss) must be none, aux_loss or seq_aux_loss",
        ),
        (
            EXPERTS,
            {"model.moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "model.moe_aux_loss_coeff": 0.01},
            "model.moe_aux_loss_coeff (0.01) must be a number for one model.moe_router_load_balancing_type and a list",
        ),
    ],
    ids="layout exchange dtype reduction background optimizer fp8 window expert-bias balancing coefficients".split(),
)
def test_what_would_not_be_so_is_refused(
    two_ranks: None, tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        finalised(tmp_path, config, settings)
    assert str(refused.value).startswith(message)


def test_weights_stay_in_bf16_beneath_fp8(bridge_on_cpu: None) -> None:
    """The optimizer would start from what FP8 weights held before those of Hugging Face were loaded into them."""
    from orpo_megatron.bridge.container import _mixed_precision

    precision = _mixed_precision("bf16_with_fp8_current_scaling_mixed")
    assert (precision.fp8, precision.fp8_recipe, precision.bf16) == ("hybrid", "tensorwise", True)
    assert (precision.fp8_param, precision.fp8_param_gather) == (False, False)
    assert not _mixed_precision("bf16_with_mxfp8_mixed").reuse_grad_buf_for_mxfp8_param_ag
    assert _mixed_precision("bf16_mixed") == "bf16_mixed"
    with pytest.raises(
        ConfigError, match=r"mixed_precision\.fp8_param_gather \(True\) must be False: the optimizer would"
    ):
        build_recipe(
            {
                "run": {"dir": "run"},
                "model": {"hf": "model"},
                "data": {"train": "pairs.jsonl"},
                "train": {"train_iters": 1},
                "mixed_precision": {"fp8": "hybrid", "fp8_param_gather": True},
            }
        )


def test_rotary_embedding_and_gated_silu_are_fused(bridge_on_cpu: None) -> None:
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from torch.nn.functional import gelu, silu

    from orpo_megatron.bridge.model import fuse

    def fused(**settings: Any) -> tuple[bool, bool]:
        sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
        provider = GPTModelProvider(**sizes, **settings)
        fuse(provider)
        return provider.apply_rope_fusion, provider.bias_activation_fusion

    assert fused(position_embedding_type="rope", gated_linear_unit=True, activation_func=silu) == (True, True)
    assert fused(position_embedding_type="yarn", gated_linear_unit=True, activation_func=gelu) == (False, False)
    assert fused(position_embedding_type="rope", activation_func=silu) == (True, False)
    clamped = {"gated_linear_unit": True, "activation_func": silu, "activation_func_clamp_value": 7.0}
    assert fused(position_embedding_type="rope", **clamped) == (True, False)  # the fused kernel would not clamp


@pytest.mark.parametrize("section", ["ddp", "optimizer"])
def test_one_word_on_the_distributed_optimizer_is_enough(two_ranks: None, tmp_path: Path, section: str) -> None:
    container = finalised(tmp_path, LLAMA, {f"{section}.use_distributed_optimizer": False})
    assert not container.ddp.use_distributed_optimizer and not container.optimizer.use_distributed_optimizer


def test_overlapped_communication_by_its_own_section(two_ranks: None, tmp_path: Path) -> None:
    container = finalised(tmp_path, LLAMA, {"comm_overlap": {"overlap_grad_reduce": True}})
    assert container.ddp.overlap_grad_reduce and not container.model.tp_comm_overlap


def test_one_chunk_a_stage_is_no_virtual_pipeline(two_ranks: None, tmp_path: Path) -> None:
    container = finalised(tmp_path, LLAMA, PIPELINE | {"model.virtual_pipeline_model_parallel_size": 1})
    assert container.model.virtual_pipeline_model_parallel_size is None


def test_layers_of_a_models_own_are_not_replaced_by_others(two_ranks: None, tmp_path: Path) -> None:
    """Gemma's attend to a window in some layers and norm their outputs, which no plain layer does."""
    gemma = LLAMA | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 16}
    with pytest.raises(
        ConfigError, match=r"Gemma3ModelProvider builds its model in its own way, which a machine without"
    ):
        finalised(tmp_path, gemma, {})


def test_routers_with_a_loss_of_their_own_take_no_shared_prompts(two_ranks: None, tmp_path: Path) -> None:
    """Found in what Bridge makes of the model, whatever the recipe says."""
    with pytest.raises(ConfigError, match="data.share_prefix must be off for this model: its routers have a loss"):
        finalised(tmp_path, EXPERTS, {"model.moe_aux_loss_coeff": 0.01}, share_prefix=True)
    finalised(tmp_path, EXPERTS, {"model.moe_aux_loss_coeff": 0.0}, share_prefix=True)
