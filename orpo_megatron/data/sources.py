"""Names of models and tokenizers: what a recipe says -> what ``from_pretrained`` takes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_megatron.config import ConfigError
from orpo_megatron.console import say
from orpo_megatron.data.cache import build_once, remembered_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers and gguf are imported where they are used: they take seconds, and most names need neither.

MODEL_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".json")
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def resolve(name: str, cache_dir: str | Path, *, tokenizer_only: bool = False) -> str:
    """Returns what ``from_pretrained`` takes for the model or tokenizer that a recipe names.

    Args:
        name: A folder, a hub id, a GGUF file, or ``package:NAME/FILE`` for a file inside an installed Python package
            (which is found, not imported).
        cache_dir: Where a GGUF file's contents are kept as a Hugging Face folder, converted once: the model in fp32,
            its tokenizer and its generation settings.
        tokenizer_only: Whether a GGUF file's tokenizer is enough; saves converting the weights.

    Returns:
        A folder or a hub id.

    Raises:
        ConfigError: If the name looks like a path or a package file and there is no such thing, or the GGUF file
            cannot be converted.
    """
    path = _package_file(name) if name.startswith("package:") else Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _converted(path, Path(cache_dir), tokenizer_only)
    if path.exists():
        return str(path)
    if name.startswith(("/", "./", "../", "~", "package:")) or path.suffix in MODEL_FILE_SUFFIXES:
        raise ConfigError(
            f"Model or tokenizer {name!r}: there is no such file or folder. Give a folder, a GGUF file, a hub id "
            "(org/name) or package:NAME/FILE."
        )
    return name


def load_tokenizer(name: str, cache_dir: str | Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that a recipe names.

    Args:
        name: As for :func:`resolve`.
        cache_dir: As for :func:`resolve`.
        chat_template: Jinja template, or a file that holds one, in place of the tokenizer's own.

    Returns:
        The tokenizer; its ``eos_token_id`` is set.

    Raises:
        ConfigError: If it or the template cannot be loaded, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    folder = resolve(name, cache_dir, tokenizer_only=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"Tokenizer {name!r} cannot be loaded: {first_line(error)} Give a folder, a GGUF file or a hub id as "
            "data.tokenizer."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"Tokenizer {name!r} has no end-of-sequence token, so no response could end. Set eos_token in its "
            "tokenizer_config.json."
        )
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _package_file(name: str) -> Path:
    """Returns the path behind ``package:NAME/FILE``."""
    package, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations or not file:
        raise ConfigError(
            f"{name!r}: no Python package {package!r} is installed here. Install it, or write package:NAME/FILE with "
            "the name that one imports."
        )
    return Path(spec.submodule_search_locations[0], file)


def _converted(path: Path, cache_dir: Path, tokenizer_only: bool) -> str:
    """Returns the Hugging Face folder made from a GGUF file, which is built where it is not there yet."""
    digest = remembered_hash(path, cache_dir)
    models = cache_dir.expanduser().absolute() / "models"
    whole = models / digest
    if tokenizer_only and not whole.exists():
        whole = models / f"{digest}-tokenizer"

    def build(folder: Path) -> None:
        try:
            _convert_gguf(path, folder, tokenizer_only)
        except (OSError, ValueError, KeyError, NotImplementedError, ImportError) as error:
            raise ConfigError(
                f"GGUF file {str(path)!r} cannot be converted: {first_line(error)} Give the model as a Hugging Face "
                "folder or hub id instead."
            ) from error

    build_once(whole, build, Path.exists)
    return str(whole)


def _convert_gguf(path: Path, folder: Path, tokenizer_only: bool) -> None:
    """Writes a GGUF file's tokenizer, and its model unless ``tokenizer_only``, into ``folder``.

    transformers reads some files' special tokens wrongly (SmolLM2's end of sequence comes out as ``<|im_start|>``),
    so they are set from the file's own metadata.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    say(f"Converting {path.name} to a Hugging Face folder, once ...")
    logging.disable_progress_bar()
    fields = GGUFReader(path).fields
    keys = {ours: f"tokenizer.ggml.{theirs}_token_id" for ours, theirs in SPECIAL_TOKENS.items()}
    ids = {ours: int(fields[key].contents()) for ours, key in keys.items() if key in fields}
    source: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **source)
    for token, token_id in ids.items():
        setattr(tokenizer, f"{token}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False  # would join words of decoded text
    tokenizer.save_pretrained(folder)
    if tokenizer_only:
        return
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **source)
    for token, token_id in ids.items():
        for settings in (model.config, model.generation_config):
            if token != "unk":  # neither names an unknown token
                setattr(settings, f"{token}_token_id", token_id)
    model.save_pretrained(folder)


def _read_template(chat_template: str) -> str:
    """Returns a chat template given as text or as a file that holds it."""
    if os.path.isfile(chat_template):
        return Path(chat_template).read_text(encoding="utf-8")
    if "{" not in chat_template:
        raise ConfigError(
            f"data.chat_template ({chat_template!r}) is neither a file nor a Jinja template. Give the path of a file "
            "or the template itself."
        )
    return chat_template


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, ended by a full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."
