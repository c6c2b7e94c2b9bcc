"""Our own Mixtral bridge: weights and configuration there and back to the last bit, and transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 257,  # odd, so that Megatron pads it
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # large enough for routers and attention to choose
    "router_aux_loss_coef": 0.01,
}
LENGTHS = (23, 9)


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    torch.manual_seed(3)
    return MixtralForCausalLM(MixtralConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def folder(model: MixtralForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder)
    return folder


def recipe_of(folder: Path, **model: Any) -> Any:
    from orpo_megatron.bridge.recipe import build_recipe

    return build_recipe(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"hf": str(folder), **model},
            "data": {"train": "none", "max_length": 64, "max_prompt_length": 32},
            "train": {"train_iters": 1},
        }
    )


def test_weights_and_logits(bridge_on_cpu: None, model: MixtralForCausalLM, folder: Path, tmp_path: Path) -> None:
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    from orpo_megatron.bridge.model import make_bridge, make_provider
    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.core.row import row_params
    from orpo_megatron.data.dataset import pack_row
    from orpo_megatron.data.tokens import TokenizedPair

    recipe = recipe_of(folder)
    bridge = make_bridge(recipe, load_hf_config(recipe))
    provider = make_provider(recipe, bridge, load_weights=True)
    provider.finalize()
    random = torch.Generator().manual_seed(5)
    prompt, chosen, rejected = (torch.randint(1, 257, (n,), generator=random).int().numpy() for n in (7, 16, 2))
    row = pack_row(
        [TokenizedPair(prompt, chosen, rejected)],
        torch.arange(1).numpy(),
        nll_scope="response",
        sequence_multiple_of=1,
        pad_token_id=0,
        num_nll_tokens=16,
        num_pairs=1,
    )
    with temporary_distributed_context("gloo"), torch.no_grad():
        (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        tokens = row.tokens[None]
        ours = chunk.eval()(
            input_ids=tokens,
            position_ids=row.position_ids[None],
            attention_mask=None,
            packed_seq_params=row_params(row, "cpu"),
        )[0]
        bridge.save_hf_weights([chunk], tmp_path, show_progress=False)
    theirs = torch.cat([model(input_ids=part[None]).logits[0] for part in tokens[0].split(LENGTHS)])
    torch.testing.assert_close(ours[:, :257], theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.5  # the bound means something

    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in before
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_configuration_there_and_back(bridge_on_cpu: None, folder: Path) -> None:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    from orpo_megatron.bridge.mixtral import MixtralBridge
    from orpo_megatron.bridge.model import make_bridge

    recipe = recipe_of(folder)
    for window in (None, 16):
        config = AutoConfig.from_pretrained(folder, sliding_window=window)
        provider = make_bridge(recipe, config, weights=False).to_megatron_provider(load_weights=False)
        assert isinstance(provider, GPTModelProvider)
        assert provider.window_size == (window and (window - 1, 0))
        assert (provider.num_moe_experts, provider.moe_router_topk, provider.moe_ffn_hidden_size) == (4, 2, 96)
        assert (provider.moe_aux_loss_coeff, provider.moe_router_pre_softmax) == (0.01, False)
        back = MixtralBridge.megatron_to_hf_config(provider)
        assert {name: back[name] for name in SIZES} == SIZES
        assert (back["sliding_window"], back["architectures"]) == (window, ["MixtralForCausalLM"])
