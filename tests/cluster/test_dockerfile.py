"""The Dockerfile without Docker: each stage's steps, on the files that .dockerignore lets through and COPY takes."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import REPO, TinyRecipe

pytestmark = pytest.mark.slow

WORKDIR = "/opt/orpo-megatron"
#: What changes the system: written down instead. ``install`` makes its folder, for whichever user there is.
STAND_INS = {
    "apt-get": 'echo "apt-get $*" >> "$ROOT/system.txt"',
    "useradd": 'echo "useradd $*" >> "$ROOT/system.txt"',
    "install": 'echo "install $*" >> "$ROOT/system.txt"; for last; do :; done; mkdir -p "$last"',
}


def steps_of(stage: str) -> list[tuple[str, str]]:
    """Returns the instructions of a stage, as pairs of word and rest."""
    text = re.sub(r"^#.*\n", "", (REPO / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("FROM ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if lines[start].endswith(f" AS {stage}"):
            return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines[start + 1 : end]]
    raise AssertionError(f"no stage {stage}")


def is_sent(path: Path) -> bool:
    """Returns whether .dockerignore lets a file of the repository through to the engine; the last match wins."""
    sent, parts = True, path.relative_to(REPO).parts
    for line in (REPO / ".dockerignore").read_text(encoding="utf-8").split():
        pattern, places = line.removeprefix("!"), parts[:1]
        if pattern.startswith("**/"):
            pattern, places = pattern.removeprefix("**/"), parts
        assert "/" not in pattern
        if any(fnmatch.fnmatch(place, pattern) for place in places):
            sent = line.startswith("!")
    return sent


@dataclass(frozen=True)
class Container:
    """A folder that stands for a container's root, and a Python that stands for its own.

    Attributes:
        root: The folder.
        python: A virtual environment with pip.
    """

    root: Path
    python: Path

    def path(self, inside: str) -> Path:
        """Returns where a path of the container lies."""
        return self.root / inside.lstrip("/")

    def build(self, stage: str, images: dict[str, Container]) -> dict[str, str]:
        """Runs the steps of a stage; returns the rest of each word that came last (CMD, USER, ...)."""
        last: dict[str, str] = {}
        workdir = self.path("/")
        for word, rest in steps_of(stage):
            last[word] = rest
            if word == "WORKDIR":
                workdir = self.path(rest)
                workdir.mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                self._copy(shlex.split(rest), workdir, images)
            elif word == "RUN":
                self.run(re.sub(r"(?<![\w./])/(opt|src|tmp|var|wheels)\b", rf"{self.root}/\1", rest), workdir)
        return last

    def _copy(self, arguments: list[str], workdir: Path, images: dict[str, Container]) -> None:
        options = dict(word[2:].split("=") for word in arguments if word.startswith("--"))
        *sources, target = [word for word in arguments if not word.startswith("--")]
        if "from" in options:
            for source in sources:
                shutil.copytree(images[options["from"]].path(source), self.path(target))
            return
        for source in sources:
            files = [REPO / source] if (REPO / source).is_file() else sorted((REPO / source).rglob("*"))
            sent = [file for file in files if file.is_file() and ".git" not in file.parts and is_sent(file)]
            assert sent, f"COPY {source}: no such file in the build context"
            to = workdir / target
            for file in sent:
                place = to / (file.name if file == REPO / source else file.relative_to(REPO / source))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)

    def run(self, command: str, workdir: Path) -> str:
        """Runs a command as the engine would; returns its output."""
        tools = self.root / "stand-ins"
        tools.mkdir(exist_ok=True)
        for name, script in STAND_INS.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
        home = self.root / "home"
        home.mkdir(exist_ok=True)
        caches = {"UV_CACHE_DIR": "uv", "PIP_CACHE_DIR": "pip"}  # the step removes the ones of its own home
        # What the test itself was started from, `make test` for one, is not there in an engine.
        ours = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ours},
            **{name: os.environ.get(name, str(Path.home() / ".cache" / folder)) for name, folder in caches.items()},
            "PATH": f"{tools}:{self.python.parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "ROOT": str(self.root),
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(["sh", "-c", command], cwd=workdir, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    venv.create(tmp_path / "python", symlinks=True, with_pip=True)
    (tmp_path / "root").mkdir()
    yield Container(tmp_path / "root", tmp_path / "python" / "bin" / "python")
    shutil.rmtree(tmp_path / "root")  # gigabytes


def test_cpu_stage_makes_an_environment_in_which_the_demo_runs(container: Container, tiny: TinyRecipe) -> None:
    last = container.build("cpu", {})
    assert last["CMD"] == '["make", "demo"]' and last["USER"] == "10001"
    system = (container.root / "system.txt").read_text(encoding="utf-8").splitlines()
    folder = container.path(WORKDIR)
    assert system == [
        "apt-get update",
        "apt-get install --yes --no-install-recommends make",
        "useradd --uid 10001 --create-home orpo",
        f"install --directory --owner=orpo {folder}",
    ]
    assert not (container.root / "home" / ".cache").exists()
    # Nothing is set up anew when the container starts, and what runs is all there.
    assert container.run("make --dry-run demo", folder).splitlines() == [".venv/bin/python tools/demo.py"]
    container.run(".venv/bin/python -c 'import runpy; runpy.run_path(\"tools/demo.py\")'", folder)
    overrides = f"run.cache_dir={tiny.cache_dir} --dry-run"
    output = container.run(
        f".venv/bin/python -m orpo_megatron.train recipes/smollm2_135m_cpu.yaml {overrides}", folder
    )
    assert "640 pairs of 640 rows" in output and "Nothing was trained" in output
    installed = {path.name for path in (folder / ".venv" / "bin").iterdir()}
    assert "torchrun" in installed and not {"pytest", "mypy", "ruff"} & installed


def test_gpu_stage_adds_this_package_and_changes_no_other(container: Container, tmp_path: Path) -> None:
    wheel = Container(tmp_path / "wheel", container.python)
    wheel.root.mkdir()
    wheel.build("wheel", {})
    (file,) = wheel.path("/wheels").iterdir()
    with zipfile.ZipFile(file) as archive:
        packed = {name for name in archive.namelist() if name.startswith("orpo_megatron/")}
    ours = {path for path in (REPO / "orpo_megatron").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path.relative_to(REPO).as_posix() for path in ours}

    # The image's packages: those of the environment that runs this test.
    image = tmp_path / "image"
    venv.create(image, symlinks=True, with_pip=True)
    theirs = Path(sysconfig.get_path("purelib"))
    (own,) = image.glob("lib/python*/site-packages")
    (own / "image.pth").write_text(f"{theirs}\n")

    def packages() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for at in (own, theirs) for path in at.glob("*.dist-info/*")}

    before = packages()
    gpu = Container(tmp_path / "gpu", image / "bin" / "python")
    gpu.root.mkdir()
    last = gpu.build("gpu", {"wheel": wheel})

    after = packages()
    assert {path: after.get(path) for path in before} == before
    assert {path.parent.name.split("-")[0] for path in after.keys() - before.keys()} == {"orpo_megatron"}
    folder = gpu.path(WORKDIR)
    assert last["USER"] == "10001" and last["CMD"] == '["python", "-m", "orpo_megatron.train", "--help"]'
    assert "RECIPE" in gpu.run("python -m orpo_megatron.train --help", folder).upper()
    where = gpu.run("python -c 'import orpo_megatron; print(orpo_megatron.__file__)'", folder).strip()
    assert where == str(own / "orpo_megatron" / "__init__.py")


def test_gpu_stage_looks_for_exactly_what_this_package_depends_on() -> None:
    (command,) = [rest for word, rest in steps_of("gpu") if word == "RUN"]
    (line,) = re.findall(r'python -c "import ([^"]+)"', command)
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert set(line.split(", ")) == needed - {"pyyaml"} | {"yaml", "megatron.core"}
    assert sys.version_info[:2] == (3, 12)  # as both base images have
