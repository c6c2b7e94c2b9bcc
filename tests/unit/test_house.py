"""The walls of the house: imports point one way, and everything public says what it is."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "orpo_megatron"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((REPO / "tools").glob("*.py"))


def name_of(path: Path) -> str:
    """Returns a file's name as a module: ``orpo_megatron.data.rows``, ``tools.convert``."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path, at_import: bool = False) -> set[str]:
    """Returns the modules that a file imports, with the names it takes from each as if they were modules too.

    Args:
        path: The file.
        at_import: Whether only what importing the file imports counts: not what stands in a function, and not
            what only a type checker sees.
    """
    tree = tree_of(path)
    nodes: Iterator[ast.AST] = _run_at_import(tree.body) if at_import else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _run_at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for name in ("body", "orelse", "finalbody"):
            yield from _run_at_import(getattr(node, name, []))


def crossings(path: Path, walls: tuple[str, ...], at_import: bool = False) -> list[str]:
    """Returns the imports of a file that lie behind one of the walls."""
    found = imports_of(path, at_import)
    return sorted(name for name in found if any(name == wall or name.startswith(f"{wall}.") for wall in walls))


def ours(*names: str) -> tuple[str, ...]:
    return tuple(f"orpo_megatron.{name}" for name in names)


ABOVE_MATHS = ours("data", "core", "bridge", "nemo", "cpu", "train", "config", "console", "report", "modelcard")
RULES = {
    **{
        f"orpo_megatron.{name}": ("megatron", "transformers", *ABOVE_MATHS)
        for name in ("loss", "logps", "elementwise", "kernels", "segments", "batch", "metrics")
    },
    "orpo_megatron.config": ("megatron", "torch", "transformers", *ours("data", "core", "bridge", "nemo", "cpu")),
    "orpo_megatron.exact": ("megatron", "torch", "transformers", *ours("data", "core", "bridge", "nemo", "cpu")),
    "orpo_megatron.console": ("megatron", "torch", "transformers", *ours("data", "core", "bridge", "nemo", "cpu")),
    "orpo_megatron.agreement": ("megatron", "transformers", *ours("data", "core", "bridge", "nemo", "cpu")),
    "orpo_megatron.facts": ("megatron", *ours("core", "bridge", "nemo", "cpu", "train")),
    "orpo_megatron.data": ("megatron", "nemo", *ours("core", "bridge", "nemo", "cpu", "train")),
    "orpo_megatron.core": ("megatron.bridge", "nemo", *ours("bridge", "nemo", "cpu", "train")),
    "orpo_megatron.bridge": ("nemo", *ours("nemo", "cpu", "train")),
    "orpo_megatron.nemo": ("megatron.bridge", *ours("bridge", "train")),
    "orpo_megatron.cpu": ours("data", "core", "bridge", "nemo", "train"),
    "orpo_megatron.report": ("megatron", "torch", *ours("core", "bridge", "nemo", "cpu", "train")),
    "orpo_megatron.modelcard": ("megatron", "torch", *ours("core", "bridge", "nemo", "cpu", "train")),
}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    name = name_of(path)
    for module, walls in RULES.items():
        if name == module or name.startswith(f"{module}."):
            assert crossings(path, walls) == []


def test_every_rule_is_of_a_module_that_is_there() -> None:
    assert set(RULES) <= {name_of(path) for path in MODULES}


@pytest.mark.parametrize(
    "name",
    [
        "settings",
        "recipe",
        "prepare",
        "prefix",
        "rundir",
        "kept",
        "parity",
        "common",
        "conversion.weights",
        "conversion.place",
        "paths",
        "conversion.checkpoint",
    ],
)
def test_what_checks_a_recipe_imports_no_megatron(name: str) -> None:
    walls = ("megatron", *ours("core", "cpu", *(f"bridge.{n}" for n in ("container", "model", "train", "callbacks"))))
    assert crossings(PACKAGE / "bridge" / f"{name.replace('.', '/')}.py", walls) == []


def test_the_entry_point_imports_neither_megatron_nor_torch_nor_transformers_itself() -> None:
    walls = ("megatron", "torch", "transformers", *ours("core", "cpu", "data", "bridge.prepare", "bridge.train"))
    assert crossings(PACKAGE / "train.py", walls, at_import=True) == []


@pytest.mark.parametrize("name", ["agreement", "bridge.common", "facts", "versions"])
def test_what_runs_before_the_recipe_is_read_imports_nothing_heavy_itself(name: str) -> None:
    walls = ("megatron", "torch", "transformers", *ours("core", "cpu", "data", "bridge.prepare", "bridge.train"))
    path = PACKAGE / f"{name.replace('.', '/')}.py"
    assert crossings(path, walls, at_import=True) == []


def test_only_entry_points_import_the_cpu_redirects() -> None:
    walls = ("orpo_megatron.cpu", "orpo_megatron.machine")
    users = {name_of(path) for path in [*MODULES, *TOOLS] if crossings(path, walls)} - {
        "orpo_megatron.machine",
        "orpo_megatron.cpu",
    }
    programs = {"orpo_megatron.train", "orpo_megatron.nemo.finetune"}
    assert programs <= users and all(name.startswith("tools.") for name in users - programs)


def test_every_module_has_its_place_in_the_readme() -> None:
    house = (REPO / "README.md").read_text(encoding="utf-8").split("## The house")[1].split("## ")[0]
    named = Counter(re.findall(r"\w+\.py", house))
    there = Counter(path.name for path in [*MODULES, *TOOLS] if path.name != "__init__.py")
    assert there - named == Counter()
    assert set(named) - set(there) == {"bridge_recipe.py", "megatron_core.py", "mutations.py"}  # of other folders


@pytest.mark.parametrize("path", [*MODULES, *TOOLS], ids=name_of)
def test_everything_public_is_documented(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), "no module docstring"
    bare = []
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for item in (node, *members):
            if isinstance(item, (ast.ClassDef, ast.FunctionDef)) and not item.name.startswith("_"):
                if not ast.get_docstring(item):
                    bare.append(item.name)
    assert bare == []


@pytest.mark.parametrize("path", [*MODULES, *TOOLS], ids=name_of)
def test_files_keep_to_about_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def test_a_crossing_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import megatron.seen\n"
        "def f():\n    from orpo_megatron import cpu\n"
        "class C:\n    import megatron.core\n"
        "try:\n    import megatronics\nexcept ImportError:\n    pass\n"
    )
    walls = ("megatron", "orpo_megatron.cpu")
    assert crossings(path, walls) == ["megatron.core", "megatron.seen", "orpo_megatron.cpu"]
    assert crossings(path, walls, at_import=True) == ["megatron.core"]
