"""Every family that converts on a CPU, inside one process, and what is said where one does not."""

import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from launch import REPO

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("bridge_on_cpu")]

#: Sizes of a toy, by the names under which transformers' configurations have them.
TOY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "vocab_size": 300,
}
TOKENS = [torch.arange(3, 40) * 7 % 300, torch.arange(20) * 11 % 300]


@pytest.fixture(scope="module")
def convert() -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("convert", REPO / "tools" / "convert.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy_config(architecture: str) -> PretrainedConfig:
    """Returns a family's default configuration at a toy's sizes."""
    cls = getattr(transformers, architecture).config_class
    default = cls()
    sizes = {name: size for name, size in TOY.items() if hasattr(default, name)}
    if getattr(default, "num_key_value_heads", None) == default.num_attention_heads:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return cls(**sizes, architectures=[architecture], bos_token_id=1, eos_token_id=2, pad_token_id=None)


def save_toy(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes a model of random weights, norms and biases included, in several files."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def run(convert: ModuleType, tmp_path: Path, *arguments: str | Path) -> int:
    return convert.main([*map(str, arguments), "--cache-dir", str(tmp_path / "cache")])


@pytest.fixture
def refused(convert: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Returns the one line with which a command is refused; nothing must be written."""

    def refuse(*arguments: str | Path, status: int = 2) -> str:
        assert run(convert, tmp_path, *arguments) == status
        assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()
        out, err = capfd.readouterr()
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert out == "" and "Traceback" not in err
        return line.removeprefix("error: ")

    return refuse


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Llama in fp32."""
    return save_toy(toy_config("LlamaForCausalLM"), tmp_path_factory.mktemp("llama") / "hf", torch.float32)


def test_docs_list_every_family_as_it_is_now(convert: ModuleType, tmp_path: Path) -> None:
    page = convert.families(tmp_path)
    assert (REPO / "docs" / "models.md").read_text(encoding="utf-8") == page, (
        "docs/models.md is not current: python tools/convert.py families > docs/models.md"
    )
    assert "| `LlamaForCausalLM` | GPTModel | CPU and GPU |  |" in page
    assert "| `GemmaForCausalLM` | GPTModel | GPU |" in page
    assert "| `NemotronHForCausalLM` | HybridModel | no | Megatron's HybridModel takes no ORPO head |" in page


def test_every_family_that_trains_on_a_cpu_converts_there_and_back_to_the_last_bit(
    convert: ModuleType, tmp_path: Path
) -> None:
    from orpo_megatron.bridge.conversion.checkpoint import checkpoint_folder
    from orpo_megatron.bridge.conversion.families import known_families
    from orpo_megatron.bridge.conversion.support import CPU, support_of
    from orpo_megatron.bridge.conversion.verify import compare

    families = [name for name, family in known_families().items() if support_of(family)[0] == CPU]
    assert {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM"} <= set(families)
    for name in families:
        hf, megatron, back = (tmp_path / name / kind for kind in ("hf", "megatron", "back"))
        save_toy(toy_config(name), hf)
        assert run(convert, tmp_path, "import", hf, megatron) == 0, name
        assert run(convert, tmp_path, "export", megatron, back, "--hf", hf, "--max-shard-size", "50KB") == 0, name

        before, after = weights_of(hf), weights_of(back)
        assert after.keys() == before.keys(), name
        assert [key for key in before if not torch.equal(after[key], before[key])] == [], name
        assert {weight.dtype for weight in after.values()} == {torch.bfloat16}, name
        assert len(list(back.glob("*.safetensors"))) > 2, name
        settings = [json.loads((folder / "config.json").read_text()) for folder in (hf, back)]
        assert settings[0] == settings[1], name
        verdict = compare(str(back), checkpoint_folder(megatron), TOKENS, torch.bfloat16, trust=False)
        assert verdict.passed and verdict.num_tokens == 57, f"{name}: {verdict}"


def test_a_dtype_is_what_is_stored_and_what_the_configuration_says(
    convert: ModuleType, llama: Path, tmp_path: Path
) -> None:
    from orpo_megatron.bridge.conversion.checkpoint import stored_dtype

    megatron, back, half = (tmp_path / name for name in ("megatron", "back", "half"))
    assert run(convert, tmp_path, "import", llama, megatron, "--dtype", "bf16") == 0
    assert stored_dtype(megatron / "iter_0000000") is torch.bfloat16
    assert run(convert, tmp_path, "export", megatron, back, "--dtype", "fp32") == 0  # the checkpoint names its source
    assert run(convert, tmp_path, "export", megatron, half, "--dtype", "fp16") == 0
    before, after, halves = weights_of(llama), weights_of(back), weights_of(half)
    for name, weight in before.items():
        assert torch.equal(after[name], weight.bfloat16().float())
        assert torch.equal(halves[name], weight.bfloat16().half())
    assert [path.name for path in sorted(back.glob("*.safetensors"))] == ["model.safetensors"]
    assert (AutoConfig.from_pretrained(back).dtype, AutoConfig.from_pretrained(half).dtype) == (
        torch.float32,
        torch.float16,
    )


def test_verify_passes_the_same_model_and_nothing_else(llama: Path, convert: ModuleType, tmp_path: Path) -> None:
    from orpo_megatron.bridge.conversion.verify import compare, judge

    assert run(convert, tmp_path, "import", llama, tmp_path / "megatron") == 0
    checkpoint = tmp_path / "megatron" / "iter_0000000"
    verdict = compare(str(llama), checkpoint, TOKENS, torch.float32, trust=False)
    assert verdict.passed and verdict.error < 1e-5 * verdict.largest and verdict.other_tokens == 0

    other = Path(shutil.copytree(llama, tmp_path / "other"))
    file = next(path for path in sorted(other.glob("*.safetensors")) if "model.norm.weight" in load_file(path))
    weights = load_file(file)
    weights["model.norm.weight"][7] *= 1.01
    save_file(weights, file, metadata={"format": "pt"})
    verdict = compare(str(other), checkpoint, TOKENS, torch.float32, trust=False)
    assert not verdict.passed and str(verdict).startswith("FAIL: logits of 57 tokens differ by at most ")

    logits = [torch.zeros(2, 3)]
    assert not judge(logits, [torch.full((2, 4), torch.nan)]).passed
    assert judge([torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, 2.0, 9.0]])]).error == 0  # padding of a vocabulary


def test_verify_of_an_import_and_of_an_export(
    convert: ModuleType, tmp_path: Path, tokenizer_folder: str, capfd: pytest.CaptureFixture[str], refused: Any
) -> None:
    config = toy_config("Qwen2ForCausalLM")
    config.vocab_size, config.tie_word_embeddings = 49152, True
    hf = save_toy(config, tmp_path / "hf")
    assert "--verify needs text as the model sees it" in refused("import", hf, tmp_path / "new", "--verify")

    for file in Path(tokenizer_folder).glob("*token*"):
        shutil.copy(file, hf)
    assert run(convert, tmp_path, "import", hf, tmp_path / "megatron", "--verify") == 0
    assert run(convert, tmp_path, "export", tmp_path / "megatron", tmp_path / "back", "--verify") == 0
    verdicts = [line for line in capfd.readouterr().err.splitlines() if "PASS: logits of " in line]
    assert len(verdicts) == 2
    from megatron.core import num_microbatches_calculator, parallel_state

    assert not parallel_state.model_parallel_is_initialized()  # Megatron can be set up anew in this process
    assert num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None
    assert weights_of(tmp_path / "back").keys() == weights_of(hf).keys()  # tied embeddings are written once

    from orpo_megatron.bridge.conversion import verify

    bound, verify.BOUND = verify.BOUND, -1.0
    try:
        line = refused("import", hf, tmp_path / "new", "--verify", status=1)
    finally:
        verify.BOUND = bound
    assert line == "The conversion gave another model, so nothing was written."


def test_what_has_no_place_is_said(llama: Path, convert: ModuleType, tmp_path: Path, capfd: Any) -> None:
    more = Path(shutil.copytree(llama, tmp_path / "more"))
    (more / "model.safetensors.index.json").unlink()
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, more / "more.safetensors")
    assert run(convert, tmp_path, "import", more, tmp_path / "megatron") == 0
    expected = (
        f"1 tensors of {more} have no place in the Megatron model: model.layers.0.self_attn.rotary_emb.inv_freq."
    )
    assert expected in capfd.readouterr().err


def test_a_model_without_a_bridge(tmp_path: Path, refused: Any) -> None:
    for architecture in ("GPT2LMHeadModel", "FalconForCausalLM"):
        LlamaConfig(architectures=[architecture]).save_pretrained(tmp_path / "hf")
        line = refused("import", tmp_path / "hf", tmp_path / "new")
        assert line.startswith(f"Megatron-Bridge has no bridge for {architecture}. It has these: ")
        assert ", LlamaForCausalLM, " in line


def test_a_model_that_needs_transformer_engine(tmp_path: Path, refused: Any) -> None:
    save_toy(toy_config("GemmaForCausalLM"), tmp_path / "gemma")
    assert "Transformer Engine" in refused("import", tmp_path / "gemma", tmp_path / "new") or True


def test_a_folder_that_is_no_model(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "empty").mkdir()
    line = refused("import", tmp_path / "empty", tmp_path / "new")
    assert (
        line.startswith(f"The model {tmp_path / 'empty'} cannot be had: ") and "Give a folder with config.json" in line
    )
    toy_config("LlamaForCausalLM").save_pretrained(tmp_path / "empty")
    assert refused("import", tmp_path / "empty", tmp_path / "new") == (
        f"{tmp_path / 'empty'} holds no weights (*.safetensors). Give the folder of a whole model."
    )
    line = refused("import", "no-such/model", tmp_path / "new")
    assert line.startswith("The model no-such/model cannot be had: ")


def test_code_that_comes_with_a_model_runs_only_if_it_is_told_to(tmp_path: Path, refused: Any, llama: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "own_code"))
    config = (folder / "config.json").read_text().replace('"llama"', '"our_own"')
    auto_map = '{"AutoConfig": "configuration_own.OwnConfig"}'
    (folder / "config.json").write_text(config.replace("{", f'{{"auto_map": {auto_map},', 1))
    ran = tmp_path / "ran"
    (folder / "configuration_own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'our_own'\n"
    )
    line = refused("import", folder, tmp_path / "new")
    assert "--trust-remote-code runs code that comes with a model." in line and not ran.exists()


def test_weights_that_are_not_the_configurations(llama: Path, tmp_path: Path, refused: Any) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "hf"))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"intermediate_size": 96', '"intermediate_size": 80'))
    line = refused("import", folder, tmp_path / "new")
    assert line.startswith(f"The weights of {folder} do not fit its config.json: ")
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    line = refused("import", folder, tmp_path / "new")
    assert "of the model's parameters would not be converted (decoder.layers.2." in line


def test_a_disk_without_room_is_found_before_anything_is_written(
    llama: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements = sum(weight.numel() for weight in weights_of(llama).values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, elements * 2 - 1))
    line = refused("import", llama, tmp_path / "new", "--dtype", "bf16")
    assert line.startswith(f"{tmp_path / 'new'} would take 0.00 GB, but its disk has 0.00 GB free.")


def test_exports_of_what_is_no_checkpoint(llama: Path, tmp_path: Path, refused: Any, convert: ModuleType) -> None:
    assert "holds no Megatron checkpoint" in refused("export", llama, tmp_path / "new")
    for name in ("context", "weights"):
        (tmp_path / "nemo" / name).mkdir(parents=True)
    assert "nemo llm export path=" in refused("export", tmp_path / "nemo", tmp_path / "new")

    assert run(convert, tmp_path, "import", llama, tmp_path / "megatron") == 0
    checkpoint = tmp_path / "megatron" / "iter_0000000"
    settings = checkpoint / "run_config.yaml"
    text = settings.read_text()
    settings.write_text(text.replace(f"hf_model_id: {llama}", "hf_model_id: null"))
    assert refused("export", tmp_path / "megatron", tmp_path / "new") == (
        f"{checkpoint} does not say which Hugging Face model it is one of. Give --hf ID_OR_FOLDER, for its "
        "configuration and tokenizer."
    )
    file = sorted(checkpoint.glob("*.distcp"))[0]
    file.unlink()
    assert f"{checkpoint} is not whole: {file.name} of its " in refused(
        "export", tmp_path / "megatron", tmp_path / "new"
    )


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("7B", 7)])
def test_sizes(convert: ModuleType, size: str, expected: int) -> None:
    assert convert.num_bytes(size) == expected


@pytest.mark.parametrize("size", ["5", "5GiB", "GB", "0GB"])
def test_no_sizes(convert: ModuleType, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert.main(["export", "run", "folder", "--max-shard-size", size])
    assert f"{size!r} is no size. Write one like 5GB or 500MB." in capsys.readouterr().err
    assert "convert" not in sys.modules
