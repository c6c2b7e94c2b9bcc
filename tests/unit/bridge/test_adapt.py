"""What ``orpo()`` makes of a configuration of Bridge's before it reads any data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_final_settings import LLAMA, finalised

from orpo_megatron.config import ConfigError

Configure = Callable[..., Any]


@pytest.fixture
def configure(bridge_on_cpu: None, tmp_path: Path) -> Configure:
    """Makes a configuration with some settings, such as ``train__rampup_batch_size``."""

    def make(**settings: Any) -> Any:
        config = finalised(tmp_path, LLAMA, {})
        config.train.global_batch_size, config.checkpoint.save = 8, str(tmp_path / "run" / "checkpoints")
        for name, value in settings.items():
            section, _, key = name.partition("__")
            setattr(getattr(config, section), key, value)
        return config

    return make


def read(config: Any, **arguments: Any) -> Any:
    from orpo_megatron.bridge.adapt import _read

    return _read(config, "pairs.jsonl", "model", arguments.pop("run", None), None, arguments)


@pytest.mark.parametrize(
    ("save", "run_dir"),
    [("/results/a/checkpoints", "/results/a"), ("/results/a", "/results/a"), ("/results/checkpoints/", "/results")],
)
def test_a_run_lies_where_its_checkpoints_are(configure: Configure, save: str, run_dir: str) -> None:
    assert str(read(configure(checkpoint__save=save)).run_dir) == run_dir
    assert str(read(configure(checkpoint__save=save), run={"dir": "/elsewhere"}).run_dir) == "/elsewhere"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train__rampup_batch_size": [2, 2, 8]},
            r"train\.rampup_batch_size is not set in a recipe\. A step has data",
        ),
        (
            {"checkpoint__finetune": True},
            r"checkpoint\.finetune is not set in a recipe\. A run goes on from its latest",
        ),
        (
            {"checkpoint__ckpt_step": 5},
            r"checkpoint\.ckpt_step is not set in a recipe\. A run goes on from its latest",
        ),
        ({"checkpoint__non_persistent_ckpt_type": "global"}, r"checkpoint\.non_persistent_ckpt_type is not set"),
    ],
)
def test_what_a_recipe_may_not_say_is_refused(configure: Configure, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(configure(**settings))


def test_nothing_is_exported_without_a_word(configure: Configure) -> None:
    assert not read(configure()).run.export
    with pytest.raises(ConfigError, match=r"run\.export \(True\) must be False: .* tools/convert\.py export"):
        read(configure(), run={"export": True})


def test_a_run_goes_on_where_it_saves(configure: Configure, tmp_path: Path) -> None:
    from orpo_megatron.bridge.adapt import _checkpoints

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()

    def folder(save: Path, load: Path | None) -> Path:
        return _checkpoints(configure(checkpoint__save=str(save), checkpoint__load=load and str(load)))

    for load in (None, there, here):
        assert folder(here, load) == here  # nothing is there yet
    (here / "latest_checkpointed_iteration.txt").write_text("7")
    assert folder(here, here) == here
    for load in (None, there):
        with pytest.raises(
            ConfigError, match=rf"config\.checkpoint\.save \({here}\) holds a run at step 7, so .*one folder"
        ):
            folder(here, load)
    with pytest.raises(
        ConfigError, match=rf"config\.checkpoint\.load \({here}\) holds a run at step 7, so .*one folder"
    ):
        folder(there, here)


def test_what_would_not_be_exact_is_put_right_and_said(configure: Configure) -> None:
    from orpo_megatron.bridge.adapt import _set_right

    config = configure(model__cuda_graph_impl="local", model__enable_cuda_graph=False)
    config.mixed_precision = "bf16_with_fp8_current_scaling_mixed"
    changes = _set_right(config)
    assert config.model.cuda_graph_impl == "none" and not config.mixed_precision.fp8_param_gather
    assert (
        "orpo() set model.cuda_graph_impl from local to none: a graph has one size, and rows differ in length."
        in changes
    )
    assert any(
        c.startswith("orpo() set mixed_precision.fp8_param_gather from True to False: the opt") for c in changes
    )
    config.model.hybrid_context_parallel = True
    with pytest.raises(ConfigError, match=r"config\.model\.hybrid_context_parallel \(True\) must be False"):
        _set_right(config)
