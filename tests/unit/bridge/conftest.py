"""A small recipe's values, fresh for each test."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(tmp_path / "runs" / "tiny")},
        "model": {
            "config": {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "vocab_size": 96,
            }
        },
        "data": {"train": "pairs.jsonl", "tokenizer": "some/tokenizer", "pairs_per_step": 8},
        "train": {"train_iters": 5},
        "optimizer": {"lr": 1e-3},
    }


@pytest.fixture
def runnable(values: dict[str, Any], tokenizer_folder: str, tmp_path: Path) -> dict[str, Any]:
    """Returns the values with real data (20 pairs, 6 held out) and a real tokenizer."""
    for name, count in (("train", 20), ("eval", 6)):
        rows = (
            {"prompt": f"{n} + 1 is", "chosen": f" {n + 1}.", "rejected": " not that easy to say" + " ..." * n}
            for n in range(count)
        )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values["data"][name] = str(tmp_path / f"{name}.jsonl")
    values["data"].update(tokenizer=tokenizer_folder, max_length=64, max_prompt_length=32)
    values["model"]["config"]["vocab_size"] = 49152
    return values
