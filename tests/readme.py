"""The commands that the README gives, for tests to run."""

from __future__ import annotations

import re
import shlex

from launch import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def readme_commands() -> list[str]:
    """Returns the commands of the README's shell blocks, without comments, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = (line.split("#")[0].strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines())
    return [line for line in lines if line]


def the(pattern: str) -> str:
    """Returns the one command of the README that contains ``pattern``."""
    (found,) = [command for command in readme_commands() if pattern in command]
    return found


def arguments(command: str, *overrides: str) -> list[str]:
    """Returns what follows ``python`` in a command of the README, with overrides at its end."""
    program, *rest = shlex.split(command)
    assert program in ("python", "torchrun")
    return [*(TORCHRUN if program == "torchrun" else []), *rest, *overrides]
