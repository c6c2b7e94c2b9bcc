"""The exported folder: transformers finds the same model in it that Megatron evaluated."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launch import BETA, EVAL_PAIRS, STEPS, TRAIN_PAIRS, TinyRecipe, read_metrics
from orpo_megatron.bridge.prepare import model_source
from orpo_megatron.bridge.recipe import load_recipe
from orpo_megatron.data.sources import load_tokenizer
from orpo_megatron.data.store import PairStore, prepare
from orpo_megatron.data.tokens import TokenizedPair

pytestmark = pytest.mark.slow

BOUND = 1e-4  # absolute; the two differ in attention kernels and in the order of sums


@dataclass
class Figures:
    """One pair's log-probs, fp64, in nats; ``nll`` is summed over the chosen sequence's predicted tokens."""

    chosen: float
    rejected: float
    nll: float
    nll_tokens: int

    @property
    def log_odds_ratio(self) -> float:
        """Log odds of chosen over rejected, as defined: log p / (1 - p) of each length-averaged probability."""
        chosen, rejected = torch.tensor([self.chosen, self.rejected], dtype=torch.float64).exp()
        return float(torch.log(chosen / (1 - chosen)) - torch.log(rejected / (1 - rejected)))


@torch.no_grad()
def score(model: torch.nn.Module, pair: TokenizedPair) -> Figures:
    """Scores a pair one sequence at a time, with no packing and no padding."""

    def logps(response: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*pair.prompt.tolist(), *response]])
        log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        return log_probs.gather(1, ids[0, 1:, None])[:, 0]  # one for each token but the first

    chosen, rejected = logps(pair.chosen.tolist()), logps(pair.rejected.tolist())
    return Figures(
        chosen=float(chosen[-len(pair.chosen) :].mean()),
        rejected=float(rejected[-len(pair.rejected) :].mean()),
        nll=-float(chosen.sum()),
        nll_tokens=len(chosen),
    )


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

    pairs = [score(model, held_out[index]) for index in range(len(held_out))]

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
    outside = [score(model, held_out[index]).log_odds_ratio for index in range(len(held_out))]

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
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ours.eos_token_id
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| β (weight of the odds-ratio term), `orpo.beta` | {BETA} |" in card
    assert f"| Pairs | {TRAIN_PAIRS} of {TRAIN_PAIRS} rows |" in card
    assert "`train.jsonl`" in card
    assert not (reference_run / "hf.partial").exists()


def test_padding_of_the_vocabulary_is_not_exported(tiny: TinyRecipe, held_out: PairStore, tmp_path: Path) -> None:
    """49,153 ids on two tensor ranks: Megatron holds one more, which transformers does not see."""
    run_dir, odd = tmp_path / "odd", 49153
    split = ("model.tensor_model_parallel_size=2", f"model.config.vocab_size={odd}")
    tiny.train(run_dir, *split, "train.train_iters=1", "validation.eval_interval=1", processes=2)

    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32).eval()
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == odd
    pairs = [score(model, held_out[index]) for index in range(EVAL_PAIRS)]
    inside = read_metrics(run_dir)[-1]
    expected = {
        "eval_logps/chosen": sum(pair.chosen for pair in pairs) / EVAL_PAIRS,
        "eval_log_odds_chosen": sum(pair.log_odds_ratio for pair in pairs) / EVAL_PAIRS,
    }
    assert {name: inside[name] for name in expected} == pytest.approx(expected, rel=0, abs=BOUND)


def test_adapters_are_merged_into_the_export(tiny: TinyRecipe, tmp_path: Path) -> None:
    """LoRA: only adapters are trained, and the exported folder holds the base model with them in it."""
    run_dir = tmp_path / "lora"
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
    pairs = [score(model, store[index]) for index in range(len(store))]
    inside = read_metrics(run_dir)[-1]
    assert inside["eval_logps/chosen"] == pytest.approx(sum(pair.chosen for pair in pairs) / len(pairs), abs=BOUND)
    assert inside["eval_logps/rejected"] == pytest.approx(sum(pair.rejected for pair in pairs) / len(pairs), abs=BOUND)
