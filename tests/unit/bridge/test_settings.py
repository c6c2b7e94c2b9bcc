"""The settings that are read from Megatron-Bridge's source, against the classes themselves."""

import dataclasses
import typing

import pytest

from orpo_megatron.bridge import settings
from orpo_megatron.bridge.settings import bridge_settings
from orpo_megatron.config import ConfigError


def test_names_from_source_are_the_fields_of_the_imported_classes(bridge_on_cpu: None) -> None:
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

    chosen = {"model": GPTModelProvider, "peft": LoRA, "mixed_precision": MixedPrecisionConfig}
    hints = typing.get_type_hints(ConfigContainer)
    known = bridge_settings()
    containers = {f.name for f in dataclasses.fields(ConfigContainer) if not f.name.startswith("_")}
    assert known.keys() == containers
    compared = 0
    for section, names in known.items():
        if section in ("env_vars", "dataset", "tokenizer", "optimizer_config_override_provider"):
            continue  # not written in a recipe, or (env_vars) without a class
        classes = [cls for cls in typing.get_args(hints[section]) or (hints[section],) if cls is not type(None)]
        cls = chosen.get(section) or classes[0]
        fields = {f.name for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}
        assert names == fields, section
        compared += len(names)
    assert compared > 500


def test_reading_them_imports_no_megatron() -> None:
    import subprocess
    import sys

    script = (
        "import sys; from orpo_megatron.bridge.settings import bridge_settings as b; assert 'lr' in b()['optimizer'];"
        "print([m for m in sys.modules if m.startswith('megatron') or m == 'torch'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_without_bridge_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_source_path", lambda module: None)
    with pytest.raises(ConfigError, match="^Megatron-Bridge is not installed. See 'Install' in the README.$"):
        bridge_settings.__wrapped__()
