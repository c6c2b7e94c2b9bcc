"""A small recipe's values, fresh for each test."""

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
