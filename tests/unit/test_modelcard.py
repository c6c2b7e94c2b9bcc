from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from orpo_megatron.modelcard import model_card

RECIPE: dict[str, Any] = {
    "orpo": {"beta": 0.25, "nll_scope": "response", "nll_reduction": "tokens"},
    "data": {"train": ["owner/pairs-v1.5", "/home/somebody/secret/pairs.jsonl"], "max_prompt_length": 96,
             "max_length": 128, "pairs_per_step": 16},
    "optimizer": {"lr": 5e-6, "clip_grad": 1.0},
    "mixed_precision": "bf16_mixed",
}  # fmt: skip
REPORT: dict[str, Any] = {
    "num_pairs": 1640,
    "rows_read": 1643,
    "num_truncated": 2,
    "files": ["/home/somebody/secret/pairs.jsonl"],
    "tokens": {part: {"mean": 12.5, "max": 1234, "total": 20500} for part in ("prompt", "chosen", "rejected")},
    "bad_rows": [],
    "bad_row_counts": {"empty | blank": 3},
    "chat_template": "{{ messages }}",
    "boundary_note": "Boundary.",
}
METRICS = {"step": 1200, "loss": 1.23456789, "rewards/accuracies": 0.75, "eval_loss": 1.5, "nll_loss": float("nan")}


def card(base_model: str = "owner/base-0.5B", **changes: Any) -> str:
    values: dict[str, Any] = {
        "recipe": RECIPE,
        "data_report": REPORT,
        "metrics": METRICS,
        "versions": {"torch": "2.13"},
    }
    return model_card(base_model=base_model, **{**values, **changes})


def front_matter(text: str) -> dict[str, Any]:
    empty, values, _ = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(values)


def test_front_matter_names_hub_sources_only() -> None:
    assert front_matter(card()) == {
        "base_model": "owner/base-0.5B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orpo", "preference", "megatron"],
        "datasets": ["owner/pairs-v1.5"],
    }


@pytest.mark.parametrize(
    ("base_model", "title"),
    [
        ("/models/llama/", "# llama aligned with ORPO"),
        ("package:some_package/Tiny.Q4.gguf", "# Tiny.Q4 aligned with ORPO"),
        ("models/Tiny.gguf", "# Tiny aligned with ORPO"),
        ("", "# A model aligned with ORPO"),
    ],
)
def test_local_base_model_is_named_by_its_last_part(base_model: str, title: str) -> None:
    text = card(base_model)
    assert title in text.splitlines()
    assert "base_model" not in front_matter(text)
    assert "/models" not in text and "package:" not in text


def test_no_local_path_appears() -> None:
    assert "somebody" not in card()
    assert "| Files | `pairs.jsonl` |" in card()


def test_settings_that_the_recipe_gives_and_no_other() -> None:
    text = card()
    assert "| β (weight of the odds-ratio term), `orpo.beta` | 0.25 |" in text
    assert "`data.max_prompt_length`, `data.max_length` | 96, 128 |" in text
    assert "| Learning rate, `optimizer.lr` | 5e-06 |" in text
    assert "| Precision, `mixed_precision` | bf16_mixed |" in text
    assert "Seed" not in text


def test_data_counts() -> None:
    text = card()
    assert "| Pairs | 1,640 of 1,643 rows |" in text
    assert "| Tokens of rejected | 12.5 on average, 1,234 at most |" in text
    assert "| Unusable rows: empty \\| blank | 3 |" in text
    assert "Boundary." in text


def test_results_side_by_side() -> None:
    text = card()
    assert "Figures at step 1,200." in text
    assert "| Loss | 1.235 | 1.5 |" in text
    assert "| NLL (nats per token) | not finite |  |" in text
    assert "| Accuracy (chosen above rejected) | 0.75 |  |" in text
    assert "Margin" not in text.split("## Results")[1]
    assert "## Results" not in card(metrics=None)


def test_usage_follows_the_chat_template() -> None:
    assert "apply_chat_template" in card()
    report = copy.deepcopy(REPORT) | {"chat_template": None}
    text = card(data_report=report)
    assert "apply_chat_template" not in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "usage", "exec")


def test_formula_versions_and_citation() -> None:
    text = card()
    assert "(y_c) -\n\\beta \\, \\log \\sigma" in text
    assert "| torch | 2.13 |" in text
    assert "2403.07691" in text.split("## Citation")[1]
