"""What software a process runs: what a run records, and what its processes must have in common."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

_PACKAGES = ("orpo-megatron", "torch", "megatron-core", "megatron-bridge", "transformer-engine", "transformers")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_hash() -> str:
    """Returns a hash of this package's own source, which tells apart what has one version number."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
