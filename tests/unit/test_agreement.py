"""Processes that compare notes: what rank 0 says of them, and that nobody hangs."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from orpo_megatron.agreement import Peers, find_error, is_lost_peer
from orpo_megatron.config import PeerError

REMEDY = "Do so and so."


def record(host: str, **facts: Any) -> dict[str, Any]:
    return {"host": host, "facts": {name: [value, REMEDY] for name, value in facts.items()}}


def test_what_agrees_is_no_error() -> None:
    assert find_error([record("a", beta=0.1, train=["x", "y"]), record("b", train=["x", "y"], beta=0.1)]) is None


def test_a_value_that_differs_is_told_with_ranks_and_hosts_the_common_one_first() -> None:
    records = [
        record("a", beta=0.2),
        *[record("a", beta=0.1)] * 3,
        *[record("b", beta=0.1)] * 2,
        record("c", beta=0.3),
    ]
    assert find_error(records) == (
        "beta differs between processes: 0.1 on ranks 1-5 (a, b), 0.2 on rank 0 (a), 0.3 on rank 6 (c). Do so and so."
    )


def test_a_value_that_is_there_in_some_processes_only() -> None:
    assert find_error([record("a", apex="1.0"), record("b")]) == (
        'apex differs between processes: "1.0" on rank 0 (a), not there on rank 1 (b). Do so and so.'
    )


def test_many_values_and_many_hosts_are_cut_short() -> None:
    records = [record(f"n{rank}", seed=max(0, rank - 5)) for rank in range(10)]
    assert find_error(records) == (
        "seed differs between processes: 0 on ranks 0-5 (n0, n1, n2, 3 more), 1 on rank 6 (n6), 2 on rank 7 (n7), and "
        "2 more values. Do so and so."
    )


def test_an_error_of_all_is_told_as_it_is_and_an_error_of_some_with_their_ranks() -> None:
    failed = {"host": "b", "error": "There is no data."}
    assert find_error([failed, failed]) == "There is no data."
    assert find_error(
        [record("a", beta=1), record("a", beta=2), failed, {"host": "b", "error": "Other."}, failed]
    ) == ("On ranks 2, 4 (b): There is no data.")


def test_a_single_process_only_works() -> None:
    peers = Peers(None, 0, 1, 1.0)
    assert peers.settle("part", lambda: 3, lambda _: pytest.fail("compared with nobody")) == 3  # type: ignore[arg-type]
    peers.check_shared(Path("/nowhere"), "run.dir")


def test_errors_that_mean_a_lost_process() -> None:
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.1]:4321"
    assert is_lost_peer(RuntimeError(gloo)) and not is_lost_peer(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK (2) must be below WORLD_SIZE (2)."),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK ('x') must be a number."),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ""}, "MASTER_ADDR ('') must be a host."),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "abc"}, "MASTER_PORT ('abc') must be a number."),
    ],
)
def test_an_environment_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerError) as caught:
        Peers.join()
    assert str(caught.value) == f"{message} torchrun sets it: have each node start torchrun."


# Each process runs parts one after another, and says what became of each.
PROGRAM = """
    import os, sys, time
    from pathlib import Path
    import orpo_megatron.agreement as agreement
    from orpo_megatron.config import ConfigError
    agreement.VISIBLE_SECONDS = 1
    rank = int(os.environ["RANK"])
    def fail(message):
        raise ConfigError(message)
    def attempt(part):
        try:
            print(part(), flush=True)
        except (ConfigError, ZeroDivisionError) as error:
            print(f"{{type(error).__name__}}: {{error}}", flush=True)
    try:
        peers = agreement.Peers.join(timeout=float(os.environ.get("WAIT", "60")))
        {body}
    except ConfigError as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)
    time.sleep(0.5)  # the store is rank 0's
    os._exit(0)
"""


def run(body: str, *processes: dict[str, str], cwd: tuple[Path, ...] = ()) -> list[list[str]]:
    """Runs processes that meet at a free port of this machine; returns the lines that each says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = textwrap.dedent(PROGRAM).format(body=textwrap.indent(textwrap.dedent(body), " " * 4).strip())
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**environment, "RANK": str(rank), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd[rank] if cwd else None,
        )
        for rank, variables in enumerate(processes)
    ]
    return [process.communicate(timeout=120)[0].splitlines() for process in started]


def test_two_processes_hear_the_same_of_every_part(tmp_path: Path) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        (folder / "run").mkdir(parents=True)
    body = """
        attempt(lambda: peers.settle("a", lambda: rank, lambda _: {"x": (1, "")}))
        attempt(lambda: peers.settle("b", lambda: None, lambda _: {"x": (rank, "Do so.")}))
        attempt(lambda: peers.settle("c", lambda: fail("No such file.") if rank else None))
        attempt(lambda: peers.settle("d", lambda: 1 // (1 - rank)))
        attempt(lambda: peers.check_shared(Path("run"), "run.dir"))
        attempt(lambda: peers.check_shared(Path("/tmp"), "run.cache_dir"))
        import torch.distributed as dist  # whose process group meets at the same place, on rank 0
        attempt(lambda: dist.init_process_group("gloo") or dist.get_world_size())
        peers.timeout = 1.0
        attempt(lambda: rank or peers.settle("plan", lambda: None))
        attempt(lambda: agreement.Peers.join().settle("a", lambda: "again", lambda _: {"x": (1, "")}))
    """
    here = socket.gethostname()
    first, second = run(body.replace("/tmp", str(tmp_path)), {}, {}, cwd=folders)
    both = [
        f"ConfigError: x differs between processes: 0 on rank 0 ({here}), 1 on rank 1 ({here}). Do so.",
        f"ConfigError: On rank 1 ({here}): No such file.",
    ]
    defect = "ZeroDivisionError: integer division or modulo by zero"
    unshared = (
        f"ConfigError: On rank 1 ({here}): run.dir ({folders[1]}/run) is another folder than that of rank 0, which "
        "left a file there. Give one on a file system that all nodes share."
    )
    late = (
        "ConfigError: Rank 1 of 2 did not finish the plan within 1 s of rank 0. See what these processes say "
        "themselves. Where they were only slow, start again; a recipe may raise dist.distributed_timeout_minutes."
    )
    assert first == ["0", *both, f"ConfigError: On rank 1 ({here}): {defect}", unshared, "None", "2", late, "again"]
    assert second == ["1", *both, defect, unshared, "None", "2", "1", "again"]
    assert [list((folder / "run").iterdir()) for folder in folders] == [[], []] and len(list(tmp_path.iterdir())) == 2


def test_nobody_answers() -> None:
    (said,) = run("pass", {"RANK": "1", "WAIT": "2"})
    assert said[-1].startswith(f"PeerError: {socket.gethostname()} does not reach rank 0's node at 127.0.0.1, port ")
    assert said[-1].endswith("give torchrun on that node a better one as --local-addr.")


def test_processes_that_count_themselves_differently() -> None:
    said = sum(run("time.sleep(1)", {}, {"WORLD_SIZE": "3"}), [])
    (message,) = said
    assert message.startswith(
        (
            "PeerError: WORLD_SIZE is 3 in rank 1 and 2 in another process. ",
            "PeerError: WORLD_SIZE is 2 in rank 0 and 3 in another process. ",
        )
    )
    said = sum(run("time.sleep(1)", {}, {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}), [])
    assert said == ["PeerError: RANK is 0 in two processes. torchrun sets it: have each node start torchrun."]
