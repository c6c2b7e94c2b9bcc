"""What of a recipe a job that starts in another folder, or in a container, would not find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_megatron.bridge.paths import check_paths
from orpo_megatron.bridge.recipe import build_recipe
from orpo_megatron.config import ConfigError


def check(mounts: list[str] | None, **settings: Any) -> None:
    values: dict[str, Any] = {
        "run": {"dir": "/lustre/run"},
        "model": {"hf": "org/model"},
        "data": {"train": "org/pairs"},
        "train": {"train_iters": 1},
    }
    for name, value in settings.items():
        section, _, key = name.partition("__")
        values[section] = {**values.get(section, {}), key: value}
    check_paths(build_recipe(values), mounts)


def test_what_every_node_finds_passes(tmp_path: Path) -> None:
    check(None)
    check(["/lustre"], data__chat_template="{{ messages }}" * 500)  # a text, longer than a name can be
    (tmp_path / "pairs.jsonl").touch()
    check(None, data__train=str(tmp_path / "pairs.jsonl"))
    check(["/lustre", str(tmp_path)], data__eval=str(tmp_path / "pairs.jsonl"))


@pytest.mark.parametrize(
    "setting",
    ["data__train", "data__eval", "data__tokenizer", "data__chat_template", "model__hf"]
    + ["checkpoint__pretrained_checkpoint"],
)
def test_what_a_job_would_not_find_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    name = setting.replace("__", ".")
    monkeypatch.chdir(tmp_path)
    Path("here").touch()
    with pytest.raises(ConfigError, match=rf"^{name} \(here\) is relative, and the job does not start in this folder"):
        check(None, **{setting: "here"})
    with pytest.raises(
        ConfigError, match=rf"^{name} \({tmp_path}/here\) must lie in a folder .* nodes \(/lustre\)\.$"
    ):
        check(["/lustre"], **{setting: str(tmp_path / "here")})


def test_the_run_lies_where_nodes_share_it() -> None:
    with pytest.raises(ConfigError, match=r"^run\.dir \(runs/a\) is relative"):
        check(None, run__dir="runs/a")
    with pytest.raises(ConfigError, match=r"^run\.cache_dir \(/tmp/cache\) must lie in a folder"):
        check(["/lustre"], run__cache_dir="/tmp/cache")
