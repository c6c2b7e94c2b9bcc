"""Every recipe for GPUs, dry: as its header says to start it, on as many simulated processes, without a hub or a GPU.

Overrides give it data that is here and a small tokenizer; all else is what would be trained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from launch import REPO, TinyRecipe
from orpo_megatron.bridge.prepare import declared_config
from orpo_megatron.bridge.recipe import Recipe, load_recipe
from orpo_megatron.train import main

pytestmark = pytest.mark.slow

RECIPES = REPO / "recipes"
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """What a recipe is about.

    Attributes:
        parameters: The model's, as its card on the hub counts them.
        state: GiB of weights, gradients and optimizer on a GPU for each number of nodes.
        split: Sizes that the header names, tensor first.
    """

    parameters: int
    state: dict[int, int]
    split: dict[str, int]


TENSOR, PIPELINE, CHUNKS, EXPERTS = (
    f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "expert_model")
)
LLAMA_70B = 70_553_706_496
CASES = {
    "mistral_7b_ultrafeedback": Case(7_241_732_096, {1: 30}, {TENSOR: 2}),
    "llama2_7b": Case(6_738_415_616, {1: 28}, {TENSOR: 2}),
    "llama31_8b": Case(8_030_261_248, {1: 34}, {TENSOR: 2}),
    "qwen3_8b": Case(8_190_735_360, {1: 23}, {TENSOR: 4}),
    "qwen3_32b": Case(32_762_123_264, {2: 34}, {TENSOR: 8, PIPELINE: 2}),
    "llama31_70b": Case(LLAMA_70B, {4: 37, 8: 25, 16: 18}, {TENSOR: 8, PIPELINE: 4, CHUNKS: 5}),
    "llama31_70b_fp8": Case(LLAMA_70B, {4: 49, 8: 37, 16: 31}, {TENSOR: 4, PIPELINE: 4, CHUNKS: 5}),
    "llama31_70b_lora": Case(LLAMA_70B, {1: 16}, {TENSOR: 8}),
    "zephyr_orpo_141b": Case(140_620_634_112, {8: 50}, {TENSOR: 4, PIPELINE: 4, CHUNKS: 7, EXPERTS: 8}),
}
RUNS = [(name, nodes) for name, case in CASES.items() for nodes in case.state]


def header(name: str) -> str:
    """Returns the comment at the head of a recipe as one line."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("\nbase:")[0]
    return " ".join(line.removeprefix("#").strip() for line in text.splitlines()).replace(" \\ ", " ")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "CUDA_DEVICE_MAX_CONNECTIONS"):  # Bridge sets the latter for good
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def test_every_recipe_for_gpus_is_here_and_says_how_it_is_started() -> None:
    assert set(CASES) == {path.stem for path in RECIPES.glob("*.yaml")} - {"smollm2_135m_cpu", "tiny_cpu"}
    for name, case in CASES.items():
        first, *several = case.state
        text, command = header(name), f"-m orpo_megatron.train recipes/{name}.yaml"
        if case.state.keys() == {1}:
            assert "one node of 8 H100 (80 GB)" in text and f"torchrun --nproc-per-node 8 {command}" in text
        else:
            nodes = "NODES" if several else first
            assert f"torchrun --nnodes {nodes} --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST" in text
            assert command in text and "of 8 H100 (80 GB)" in text
        assert "Layout: " in text and re.search(r"[Nn]ot (been )?measured yet", text)
        assert f" {case.state[first]} GiB a GPU" in text


@pytest.mark.parametrize("name", CASES)
def test_the_architecture_is_the_models(name: str) -> None:
    config = declared_config(load_recipe(str(RECIPES / f"{name}.yaml")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == CASES[name].parameters


@pytest.mark.parametrize(("name", "nodes"), RUNS, ids=[f"{name} on {nodes}" for name, nodes in RUNS])
def test_dry_run(
    tiny: TinyRecipe,
    small_tokenizer: Path,
    bridge_on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    nodes: int,
) -> None:
    case, world_size = CASES[name], 8 * nodes
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    overrides = [
        f"run.cache_dir={tiny.cache_dir}",
        f"data.train={tiny.train_file}",
        *([f"data.eval={tiny.eval_file}"] if name == "llama2_7b" else []),
        f"data.tokenizer={small_tokenizer}",
        "data.num_workers=1",
    ]
    path, before = str(RECIPES / f"{name}.yaml"), psutil.Process().memory_info().rss
    assert main([path, *overrides, "--dry-run"]) == 0
    assert psutil.Process().memory_info().rss - before < GIB  # of 13 GB and more

    printed = yaml.safe_load(capsys.readouterr().out)
    recipe, model = load_recipe(path, overrides), printed["bridge"]["model"]
    assert printed["model"]["hf"] == recipe.hf and "base" not in printed
    assert {size: model[size] for size in case.split} == case.split
    config = recipe.hf_config or {}
    assert (model["num_layers"], model["hidden_size"]) == (config["num_hidden_layers"], config["hidden_size"])
    assert model["bf16"] is True and printed["bridge"]["scheduler"]["lr_decay_style"] == "inverse-square-root"
    assert (model["fp8"], model["fp8_recipe"]) == ("hybrid" if "fp8" in name else None, "tensorwise")
    replicas = recipe.data_parallel_size(world_size)
    assert printed["record"]["rows_per_step"] % (replicas * (case.split[PIPELINE] if CHUNKS in case.split else 1)) == 0
    assert state(recipe, case, world_size) / GIB == pytest.approx(case.state[nodes], abs=0.5)


def state(recipe: Recipe, case: Case, world_size: int) -> float:
    """Returns bytes of weights, gradients and optimizer on a GPU: bf16, fp32, and three numbers in fp32 over replicas.

    Layers are taken to be all there is to split, so it is a mean over pipeline stages.
    """
    tensor, pipeline = recipe.parallel_size("tensor_model"), recipe.parallel_size("pipeline_model")
    if recipe.sections.get("peft"):
        return 2 * case.parameters / (tensor * pipeline)
    config, groups = recipe.hf_config or {}, recipe.parallel_size("expert_model")
    experts = config.get("num_local_experts", 0) * config["num_hidden_layers"]
    in_experts = experts * 3 * config["hidden_size"] * config["intermediate_size"]

    def of(parameters: int, model_parallel: int) -> float:
        return parameters / model_parallel * (2 + 4 + 12 / (world_size // model_parallel))

    return of(case.parameters - in_experts, tensor * pipeline) + of(in_experts, groups * pipeline)
