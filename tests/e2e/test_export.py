"""The exported folder: transformers finds the same model in it that Megatron evaluated."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launch import BETA, EVAL_PAIRS, STEPS, TRAIN_PAIRS, VOCABULARY, TinyRecipe, read_metrics
from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import load_recipe
from orpo_megatron.data.sources import load_tokenizer
from orpo_megatron.data.store import PairStore, prepare
from plain import Figures, score

pytestmark = pytest.mark.slow

BOUND = 1e-4  # absolute; the two differ in attention kernels and in the order of sums


def scores(model: torch.nn.Module, store: PairStore) -> list[Figures]:
    """Scores every pair; 0-dimensional tensors have become numbers."""
    with torch.no_grad():
        return [score(model, store[index]).as_numbers() for index in range(len(store))]


@pytest.fixture(scope="module")
def held_out(tiny: TinyRecipe, reference_run: Path) -> PairStore:
    recipe = load_recipe(str(reference_run / "recipe.yaml"))
    assert isinstance(recipe.data.eval, str)
    return prepare(
        recipe.data.eval, "test", config=recipe.data, tokenizer_name=recipe.tokenizer, cache_dir=tiny.cache_dir
    )


def test_transformers_scores_held_out_pairs_as_megatron_did(reference_run: Path, held_out: PairStore) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference_run / "hf", dtype=torch.float32).eval()
    assert len(held_out) == EVAL_PAIRS

    pairs = scores(model, held_out)

    inside = read_metrics(reference_run)[-1]
    assert (inside["step"], "eval_loss" in inside) == (STEPS, True)
    expected = {
        "eval_logps/chosen": sum(pair.chosen for pair in pairs) / EVAL_PAIRS,
        "eval_logps/rejected": sum(pair.rejected for pair in pairs) / EVAL_PAIRS,
        "eval_log_odds_chosen": sum(pair.log_odds_ratio for pair in pairs) / EVAL_PAIRS,
        "eval_nll_loss": sum(pair.nll for pair in pairs) / sum(pair.nll_tokens for pair in pairs),
        "eval_rewards/accuracies": sum(pair.chosen > pair.rejected for pair in pairs) / EVAL_PAIRS,
    }
    assert {name: inside[name] for name in expected} == pytest.approx(expected, rel=0, abs=BOUND)
    # The bound means something: the chosen and rejected responses are further apart than that.
    assert abs(expected["eval_logps/chosen"] - expected["eval_logps/rejected"]) > 100 * BOUND


def test_each_held_out_pair_has_the_same_log_odds_ratio(
    tiny: TinyRecipe, reference_run: Path, held_out: PairStore, tmp_path: Path
) -> None:
    """The checkpoint in Megatron, on packed rows, against the exported folder in transformers."""
    tiny.command("tests/score_inside.py", str(reference_run), str(tmp_path / "scores.json")).succeed()
    inside = json.loads((tmp_path / "scores.json").read_text())

    model = AutoModelForCausalLM.from_pretrained(reference_run / "hf", dtype=torch.float32).eval()
    outside = [pair.log_odds_ratio for pair in scores(model, held_out)]

    assert inside == pytest.approx(outside, rel=0, abs=BOUND)
    assert max(outside) - min(outside) > 100 * BOUND  # the pairs differ, so the right one was met


def test_folder_is_whole(reference_run: Path) -> None:
    folder, recipe = reference_run / "hf", load_recipe(str(reference_run / "recipe.yaml"))
    ours = load_tokenizer(recipe.tokenizer, recipe.cache_dir)
    theirs = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": "What is ORPO?"}]

    assert theirs.chat_template == ours.chat_template
    assert theirs.apply_chat_template(message, add_generation_prompt=True, tokenize=False) == ours.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    )
    # Not the model's own: it has been trained with another tokenizer.
    assert GenerationConfig.from_pretrained(model_source(recipe)).eos_token_id != ours.eos_token_id
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ours.eos_token_id
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| β (weight of the odds-ratio term), `orpo.beta` | {BETA} |" in card
    assert f"| Pairs | {TRAIN_PAIRS} of {TRAIN_PAIRS} rows |" in card
    assert "`train.jsonl`" in card
    assert not (reference_run / "hf.partial").exists()


def test_padding_of_the_vocabulary_is_not_exported(tiny: TinyRecipe, held_out: PairStore, tmp_path: Path) -> None:
    """An odd number of ids on two tensor ranks: Megatron holds one more, which transformers does not see."""
    run_dir, odd = tmp_path / "odd", VOCABULARY + 1
    split = ("model.tensor_model_parallel_size=2", f"model.config.vocab_size={odd}")
    tiny.train(run_dir, *split, "train.train_iters=1", "validation.eval_interval=1", processes=2)

    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32).eval()
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == odd
    pairs = scores(model, held_out)
    inside = read_metrics(run_dir)[-1]
    expected = {
        "eval_logps/chosen": sum(pair.chosen for pair in pairs) / EVAL_PAIRS,
        "eval_log_odds_chosen": sum(pair.log_odds_ratio for pair in pairs) / EVAL_PAIRS,
    }
    assert {name: inside[name] for name in expected} == pytest.approx(expected, rel=0, abs=BOUND)


def test_adapters_are_merged_into_the_export(tiny: TinyRecipe, tmp_path: Path) -> None:
    """LoRA: only adapters are trained, and the exported folder holds the base model with them in it."""
    run_dir, folder = tmp_path / "lora", tmp_path / "converted"
    tiny.train(run_dir, "peft.dim=4", "optimizer.lr=1e-2", "train.train_iters=3", "validation.eval_interval=3")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32).eval()
    start = model_source(load_recipe(str(run_dir / "recipe.yaml")))
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)  # the linear layers and nothing else

    recipe = load_recipe(str(run_dir / "recipe.yaml"))
    store = prepare(
        str(tiny.eval_file), "test", config=recipe.data, tokenizer_name=recipe.tokenizer, cache_dir=tiny.cache_dir
    )
    pairs = scores(model, store)
    inside = read_metrics(run_dir)[-1]
    assert inside["eval_logps/chosen"] == pytest.approx(sum(pair.chosen for pair in pairs) / len(pairs), abs=BOUND)
    assert inside["eval_logps/rejected"] == pytest.approx(sum(pair.rejected for pair in pairs) / len(pairs), abs=BOUND)

    # The same from the checkpoint, which holds the adapters alone.
    tiny.command("tools/convert.py", "export", str(run_dir), str(folder), "--cache-dir", str(tiny.cache_dir)).succeed()
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert [name for name, weight in model.state_dict().items() if not torch.equal(weight, converted[name])] == []
