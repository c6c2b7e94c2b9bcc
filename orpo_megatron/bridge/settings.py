"""Which settings Megatron-Bridge knows, read from its source without importing it.

Importing Bridge takes seconds on every rank; a misspelt key should not have to wait for that.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

from orpo_megatron.config import ConfigError

_CONFIG = "megatron.bridge.training.config"
_CONTAINER = "ConfigContainer"
#: Sections whose class the container's annotations leave open.
_CHOSEN = {
    "model": ("megatron.bridge.models.gpt_provider", "GPTModelProvider"),
    "peft": ("megatron.bridge.peft.lora", "LoRA"),
    "mixed_precision": ("megatron.bridge.training.mixed_precision", "MixedPrecisionConfig"),
}


@functools.cache
def bridge_settings() -> dict[str, frozenset[str]]:
    """Returns the names of Bridge's configuration sections, each with the names of its settings.

    Raises:
        ConfigError: If Megatron-Bridge is not installed.
    """
    if _source_path(_CONFIG) is None:
        raise ConfigError("Megatron-Bridge is not installed. See 'Install' in the README.")
    sections = {"env_vars": frozenset[str]()}
    for name, annotation in _own_fields(_class_node(_CONFIG, _CONTAINER)).items():
        module, cls = _CHOSEN.get(name) or (_CONFIG, _first_class(annotation))
        found = _find_class(module, cls) if cls else None
        if found and not name.startswith("_"):
            sections[name] = frozenset(_all_fields(*found))
    return sections


def _first_class(annotation: ast.expr) -> str:
    """Returns the class that ``X`` or ``Optional[X]`` or ``X | None`` names."""
    names = [n.id for n in ast.walk(annotation) if isinstance(n, ast.Name) and n.id not in ("Optional", "Union")]
    return names[0] if names else ""


def _source_path(module: str) -> Path | None:
    """Returns the file of a module of the ``megatron`` namespace, which may be spread over several folders."""
    namespace = importlib.util.find_spec("megatron")
    parts = module.split(".")[1:]
    for root in (namespace.submodule_search_locations or []) if namespace else []:
        for candidate in (Path(root, *parts).with_suffix(".py"), Path(root, *parts, "__init__.py")):
            if candidate.is_file():
                return candidate
    return None


@functools.cache
def _module_tree(module: str) -> ast.Module | None:
    path = _source_path(module) if module.startswith("megatron.") else None
    return ast.parse(path.read_text(encoding="utf-8")) if path else None


def _class_node(module: str, name: str) -> ast.ClassDef:
    """Returns the definition of a class that stands in this very module."""
    tree = _module_tree(module)
    for node in tree.body if tree else []:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{module}.{name}")


def _find_class(module: str, name: str) -> tuple[str, str] | None:
    """Follows imports to the module that defines a class; None for a class from outside ``megatron``."""
    try:
        _class_node(module, name)
        return module, name
    except LookupError:
        pass
    tree = _module_tree(module)
    for node in ast.walk(tree) if tree else []:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find_class(_absolute(module, node), alias.name)
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """Returns the absolute name of the module that an import in ``module`` names."""
    if node.level == 0:
        return node.module or ""
    path = _source_path(module)
    parts = module.split(".")
    drop = node.level - (1 if path and path.name == "__init__.py" else 0)
    return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])


def _own_fields(node: ast.ClassDef) -> dict[str, ast.expr]:
    """Returns the dataclass fields that a class itself adds and that its constructor takes."""
    fields = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            text = ast.unparse(item)
            if not item.target.id.startswith("_") and "init=False" not in text and "ClassVar" not in text:
                fields[item.target.id] = item.annotation
    return fields


def _all_fields(module: str, name: str) -> set[str]:
    """Returns the fields of a dataclass and of all its bases."""
    node = _class_node(module, name)
    names = set(_own_fields(node))
    for base in node.bases:
        base_name = base.value.id if isinstance(base, ast.Subscript) and isinstance(base.value, ast.Name) else None
        base_name = base.id if isinstance(base, ast.Name) else base_name
        found = _find_class(module, base_name) if base_name else None
        if found:
            names |= _all_fields(*found)
    return names
