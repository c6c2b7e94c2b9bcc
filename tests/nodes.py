"""Two nodes on one machine: network namespaces joined by a cable, each with its own name, address and mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

INTERFACE = "eth0"


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        name: Its host name.
        namespace: Its network namespace.
        hosts: The file that names all nodes, in place of /etc/hosts.
    """

    name: str
    namespace: str
    hosts: Path

    def prefix(self, setup: str = "true") -> list[str]:
        """Returns what starts a command on this node, after a line of shell; its mounts are seen on this node only."""
        mounts = f"mount --bind {self.hosts} /etc/hosts && {setup}"
        script = f'echo {self.name} > /proc/sys/kernel/hostname && {mounts} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", script, "sh"]

    def pull_the_cable(self) -> None:
        """Takes the network down without a word to the other side."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def plug_in(self) -> None:
        """Brings the network up (again)."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "up")


def ip(*arguments: str) -> None:
    """Runs iproute2's ``ip``."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Makes two nodes, ``node-a`` and ``node-b``, and removes them; skips the test where that is not allowed."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: iproute2 is not installed (apt install iproute2)")
    hosts = folder / "hosts"
    nodes = tuple(Node(f"node-{side}", f"orpo-{os.getpid()}-{side}", hosts) for side in "ab")
    hosts.write_text(
        "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i} {node.name}\n" for i, node in enumerate(nodes, start=1))
    )
    made = []
    try:
        for node in nodes:
            try:
                ip("netns", "add", node.namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces: {error.stderr.strip()}")
            made.append(node)
        a, b = nodes
        ip("link", "add", INTERFACE, "netns", a.namespace, "type", "veth", "peer", INTERFACE, "netns", b.namespace)
        for i, node in enumerate(nodes, start=1):
            ip("-n", node.namespace, "address", "add", f"10.77.0.{i}/24", "dev", INTERFACE)
            ip("-n", node.namespace, "link", "set", "lo", "up")
            node.plug_in()
        yield a, b
    finally:
        for node in made:
            ip("netns", "delete", node.namespace)
