"""What tests through the command line share: a small recipe, and one whole run of it on one process."""

import importlib.util
import os
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import settings

from launch import EVAL_PAIRS, REPO, TRAIN_PAIRS, VOCABULARY, TinyRecipe

DEMO = REPO / "examples" / "demo"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
settings.register_profile("tests", deadline=None)  # the machine may be busy
settings.load_profile("tests")


def _nemo_is_here() -> bool:
    """Tells whether this is the environment of `make test-nemo`; tests/nemo is a folder called nemo as well."""
    try:
        return importlib.util.find_spec("nemo.lightning") is not None
    except ImportError:
        return False


collect_ignore = [] if _nemo_is_here() else ["nemo"]


@pytest.fixture(scope="session")
def megatron_on_cpu() -> None:
    """Makes Megatron importable; takes some seconds, and PyTorch stays redirected for the tests that follow."""
    pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")
    from orpo_megatron import cpu

    with warnings.catch_warnings(action="ignore"):
        if not cpu.activate():
            pytest.skip("PyTorch sees a GPU here, so Megatron cannot be moved to the CPU")


@pytest.fixture(scope="session")
def bridge_on_cpu(megatron_on_cpu: None) -> None:
    """Imports Megatron-Bridge as well, which takes some seconds more."""
    pytest.importorskip("megatron.bridge", reason="Megatron-Bridge is not installed")
    with warnings.catch_warnings(action="ignore"):
        import megatron.bridge.training.pretrain  # noqa: F401


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a small vocabulary with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer, end = Tokenizer(models.BPE()), "</s>"
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train([str(DEMO / "train.jsonl")], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[end]))
    folder = tmp_path_factory.mktemp("tokenizer")
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, chat_template=template
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("the package megatron is not installed")
    folder = tmp_path_factory.mktemp("tiny")

    def head(name: str, count: int) -> Path:
        lines = (DEMO / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
        return folder / name

    (folder / "logs").mkdir()
    return TinyRecipe(
        cache_dir=folder / "cache",
        train_file=head("train.jsonl", TRAIN_PAIRS),
        eval_file=head("eval.jsonl", EVAL_PAIRS),
        logs=folder / "logs",
        tokenizer=small_tokenizer,
    )


@pytest.fixture(scope="session")
def reference_run(tiny: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole recipe on one process, straight through and exported; not to be changed."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    tiny.train(run_dir, processes=1)
    return run_dir


@pytest.fixture
def finished_run(reference_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which a test may change."""
    return Path(shutil.copytree(reference_run, tmp_path / "run"))
