"""What the processes of a run must have in common, as the facts that ``agreement.Peers`` compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_megatron.agreement import Fact
from orpo_megatron.versions import source_hash, versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from orpo_megatron.config import DataConfig
    from orpo_megatron.data.prepare import Prepared

_SAME_SOFTWARE = "Install the same on every node, or start the same container image."
_SAME_COMMAND = "Start the same recipe with the same overrides on every node."
_SAME_FILES = "Give every node the same files, or give files on a file system that all nodes share."
_SAME_MODEL = "Give every node the same model (model.hf)."
_SAME_TOKENIZER = "Give every node the same tokenizer (data.tokenizer, or the model's)."
_SAME_RUN = "Give a run.dir on a file system that all nodes share."


def start_facts(settings: Mapping[str, Any]) -> dict[str, Fact]:
    """Returns software and settings, nested ones under their dotted names."""
    software = {f"the version of {name}": version for name, version in versions().items()}
    software["the source of orpo_megatron (its hash)"] = source_hash()
    return {
        **{name: (value, _SAME_SOFTWARE) for name, value in software.items()},
        **{name: (value, _SAME_COMMAND) for name, value in _dotted(settings)},
    }


def file_facts(data: DataConfig, cache_dir: Path) -> dict[str, Fact]:
    """Returns the content of the data files, by hash.

    Args:
        data: Names them.
        cache_dir: Keeps hashes of files that do not change.

    Raises:
        ConfigError: If one is not there or not one that can be read.
    """
    from orpo_megatron.data.files import find_files

    facts = {}
    for sources, split in ((data.train, data.train_split), (data.eval, data.eval_split)):
        for name in [sources] if isinstance(sources, str) else sources or []:
            for file in find_files(name, split):
                facts[f"{file.name} (its hash)"] = (file.fingerprint(cache_dir), _SAME_FILES)
    return facts


def model_facts(hf_config: PretrainedConfig) -> dict[str, Fact]:
    """Returns the architecture of the model that the weights come from."""
    values = hf_config.to_diff_dict().items()
    return {f"{name} of the model": (value, _SAME_MODEL) for name, value in values if not name.startswith("_")}


def pair_facts(prepared: Prepared) -> dict[str, Fact]:
    """Returns the pairs as token ids, by hash."""
    stores = {"training": prepared.store, "held-out": prepared.eval_store}
    return {
        f"the {role} pairs as token ids (their hash)": (store.content_hash, _SAME_TOKENIZER)
        for role, store in stores.items()
        if store is not None
    }


def resume_facts(step: int) -> dict[str, Fact]:
    """Returns the step that the run goes on from."""
    return {"the step of the latest checkpoint": (step, _SAME_RUN)}


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields nested settings under their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
