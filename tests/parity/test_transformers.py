"""One process of Megatron against transformers and plain autograd: the anchor that every split is compared with.

The loss is written out in ``tests/plain.py`` as the paper has it, over one unpadded sequence at a time. Its gradients
become the weights of a second model, so that Megatron-Bridge brings both to the same layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plain import batch_loss

BETA, BOUND = 0.2, 1e-5
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "initializer_range": 0.1,  # large enough for attention to choose
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama, tied": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama, untied": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
    "qwen3_moe": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False}
    | EXPERTS
    | {"norm_topk_prob": True},
    "olmoe": {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "eos_token_id": 2,
        "num_key_value_heads": 4,
    }
    | {"pad_token_id": None, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
}
LENGTHS = ((5, 9, 4), (1, 1, 12), (17, 3, 8))  # prompt, chosen, rejected


class Pair:
    """Random tokens of one pair."""

    def __init__(self, random: np.random.Generator, lengths: tuple[int, int, int]) -> None:
        self.prompt, self.chosen, self.rejected = (random.integers(1, SIZES["vocab_size"], n) for n in lengths)


def draw_pairs() -> list[Pair]:
    random = np.random.default_rng(7)
    return [Pair(random, lengths) for lengths in LENGTHS]


@pytest.fixture(scope="module")
def process_group(bridge_on_cpu: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def session(folder: Path, model: Path) -> Any:
    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.recipe import build_recipe
    from orpo_megatron.bridge.session import Session

    recipe = build_recipe(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"hf": str(model), "moe_aux_loss_coeff": 0.0},
            "orpo": {"beta": BETA},
            "data": {"train": "random", "max_length": 64, "max_prompt_length": 32},
            "train": {"train_iters": 1},
            "ddp": {"use_distributed_optimizer": False},
            "optimizer": {"use_distributed_optimizer": False},
        }
    )
    return Session(recipe, load_hf_config(recipe), rows_per_step=1)


@pytest.mark.parametrize("scope", ["prompt_and_response", "response"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient(process_group: None, tmp_path: Path, name: str, scope: Any) -> None:
    from megatron.core.utils import unwrap_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from orpo_megatron.config import OrpoConfig
    from orpo_megatron.data.dataset import pack_row

    torch.manual_seed(1)
    values = dict(MODELS[name])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **SIZES | values))
    model.save_pretrained(tmp_path / "weights")
    pairs = draw_pairs()
    loss = batch_loss(model, pairs, BETA, scope)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")

    nll_tokens = sum((p - 1 if scope == "prompt_and_response" else 0) + chosen for p, chosen, _ in LENGTHS)
    row = pack_row(
        pairs,
        np.arange(len(pairs)),
        nll_scope=scope,
        sequence_multiple_of=1,
        pad_token_id=0,
        num_nll_tokens=nll_tokens,
        num_pairs=len(pairs),
    )
    with session(tmp_path, tmp_path / "weights") as ours:
        metrics = ours.run([row], OrpoConfig(BETA, scope))
        (chunk,) = unwrap_model(ours.model)
        found = {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}
    with session(tmp_path, tmp_path / "gradients") as theirs:
        (chunk,) = unwrap_model(theirs.model)
        expected = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}

    assert metrics["loss"] == pytest.approx(loss.item(), rel=BOUND)
    assert found.keys() == expected.keys()
    floor = 1e-6 * torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    errors = {
        name: ((found[name] - gradient).abs().max() / max(gradient.abs().max().item(), floor)).item()
        for name, gradient in expected.items()
    }
    assert {name: error for name, error in errors.items() if not error <= BOUND} == {}
