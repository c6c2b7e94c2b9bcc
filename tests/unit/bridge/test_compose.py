"""Recipes of several files: what wins, and the message for what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_megatron.bridge.recipe import load_recipe
from orpo_megatron.config import ConfigError

Values = dict[str, Any]


def write(folder: Path, **files: Values | str) -> Path:
    """Writes files named ``a__b`` as ``a/b.yaml``; returns the path of the last."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path), overrides)
    return str(error.value)


def test_later_files_win_and_overrides_win_over_all(values: Values, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        parts__model={"model": values["model"]},
        parts__first={"orpo": {"beta": 0.1, "head": "cache"}, "optimizer": {"lr": 1e-3, "clip_grad": 2.0}},
        parts__deep__second={"base": "../first.yaml", "orpo": {"beta": 0.2}, "optimizer": {"weight_decay": 0.1}},
        recipe={
            **{name: values[name] for name in ("run", "data", "train")},
            "base": ["parts/model.yaml", "parts/first.yaml", "parts/deep/second.yaml"],  # first.yaml twice
            "optimizer": {"lr": 1e-4},
        },
    )
    recipe = load_recipe(str(path), ["optimizer.clip_grad=1.0"])
    assert (recipe.orpo.beta, recipe.orpo.head) == (0.2, "cache")
    assert recipe.sections["optimizer"] == {"lr": 1e-4, "clip_grad": 1.0, "weight_decay": 0.1}
    assert recipe.hf_config == values["model"]["config"]

    resolved = write(tmp_path, other__resolved=recipe.as_dict())  # as a run records it
    assert "base" not in recipe.as_dict() and load_recipe(str(resolved)) == recipe


def test_values_are_replaced_as_a_whole(values: Values, tmp_path: Path) -> None:
    base = {
        **values,
        "data": {**values["data"], "train": ["a", "b"]},
        "mixed_precision": {"bf16": True},
        "peft": {"dim": 4},
        "run": {"dir": "runs/${rng.seed}"},
        "rng": {"seed": 1},
    }
    changes = {"base": "base.yaml", "mixed_precision": "bf16_mixed", "peft": None, "rng": {"seed": 2}}
    recipe = load_recipe(str(write(tmp_path, base=base, recipe={**changes, "data": {"train": ["c"]}})))
    assert recipe.data.train == ["c"] and recipe.data.tokenizer == "some/tokenizer"
    assert recipe.sections["mixed_precision"] == "bf16_mixed" and "peft" not in recipe.sections
    assert recipe.run.dir == "runs/2"  # resolved last


@pytest.mark.parametrize("base", [3, None, {"a": "b.yaml"}, ["a.yaml", 3], [""], [["a.yaml"]]])
def test_a_base_of_another_type_is_refused(tmp_path: Path, base: Any) -> None:
    path = write(tmp_path, a={}, recipe={"base": base})
    assert refusal(path) == f"base ({base!r}) in {path} must be a path, or a list of paths, relative to that file."


def test_what_is_not_there_is_named_with_who_names_it(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert refusal(missing) == f"There is no recipe at {missing}."
    path = write(tmp_path, part={"base": "missing.yaml"}, recipe={"base": "part.yaml"})
    assert refusal(path) == f"There is no recipe at {missing}, the base of {tmp_path / 'part.yaml'}."


def test_a_circle_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path, a={"base": "b.yaml"}, b={"base": ["sub/../a.yaml"]}, sub__x={})
    a, b, again = tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "sub" / ".." / "a.yaml"
    assert refusal(a) == f"A recipe must not build on itself: {a} -> {b} -> {again}. Remove one base."
    assert path.is_file()


def test_a_base_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, a="- 1\n", b="x: [\n", recipe={"base": "a.yaml"}, other={"base": "b.yaml"})
    assert refusal(tmp_path / "recipe.yaml") == (
        f"The recipe {tmp_path / 'a.yaml'} must be a mapping of sections, not a list. See recipes/."
    )
    assert f'in "{tmp_path / "b.yaml"}"' in refusal(path)


def test_a_base_is_no_override(values: Values, tmp_path: Path) -> None:
    path = write(tmp_path, a={}, recipe=values)
    assert refusal(path, "base=a.yaml").startswith("base is not a section of a recipe. Known: ")
