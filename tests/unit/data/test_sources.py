"""Names of models and tokenizers, and what GGUF files are turned into."""

from pathlib import Path

import pytest

from orpo_megatron.config import ConfigError
from orpo_megatron.data.sources import load_tokenizer, resolve


def test_hub_names_and_folders_pass_unchanged(tmp_path: Path) -> None:
    assert resolve("mistralai/Mistral-7B-v0.1", tmp_path) == "mistralai/Mistral-7B-v0.1"  # .1 is no file suffix
    assert resolve(str(tmp_path), tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["./none", "/none/model", "../none", "~/none", "none/model.gguf", "model.safetensors"]
)
def test_missing_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file or folder") as raised:
        resolve(name, tmp_path)
    assert name in str(raised.value)


@pytest.mark.parametrize("name", ["package:no_such_package/x.gguf", "package:json.tool/x", "package:json", "package:"])
def test_missing_package(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Python package"):
        resolve(name, tmp_path)


def test_missing_file_in_a_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        resolve("package:json/none.gguf", tmp_path)
    assert resolve("package:json/decoder.py", tmp_path).endswith("json/decoder.py")


def test_gguf_tokenizer_has_the_special_tokens_of_the_file(tokenizer) -> None:
    # tokenizer.ggml.{bos,eos,unknown,padding}_token_id of the file are 1, 2, 0, 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 2)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("I don ' t , he said .")["input_ids"]) == "I don ' t , he said ."


def test_gguf_tokenizer_is_converted_once(tokenizer_folder: str, smollm2: str) -> None:
    folder = Path(tokenizer_folder)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert resolve(smollm2, folder.parents[1], tokenizer_only=True) == tokenizer_folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_gguf_model_answers_and_ends(smollm2: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = resolve(smollm2, tmp_path)
    assert resolve(smollm2, tmp_path, tokenizer_only=True) == folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(smollm2, tmp_path)
    assert str(model.dtype) == "torch.float32"
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (2, 2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_broken_gguf_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(ConfigError, match="bad.gguf.*cannot be converted"):
        resolve(str(tmp_path / "bad.gguf"), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if not path.name.startswith(".")] == []


def test_chat_template_from_text_and_file(tokenizer_folder: str, tmp_path: Path) -> None:
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, str(tmp_path / "chat.jinja")):
        assert load_tokenizer(tokenizer_folder, tmp_path, given).chat_template == template
    with pytest.raises(ConfigError, match="neither a file nor a Jinja template"):
        load_tokenizer(tokenizer_folder, tmp_path, "no_such_file.jinja")


def test_tokenizer_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded") as raised:
        load_tokenizer("no-such-org/no-such-model", tmp_path)
    assert "\n" not in str(raised.value)
