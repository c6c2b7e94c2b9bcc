"""Training on two nodes: the numbers of one, and what is seen when a node fails or is not like the other."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import (
    BETA,
    EVAL_INTERVAL,
    PAIRS_PER_STEP,
    REPO,
    SAVE_INTERVAL,
    Command,
    TinyRecipe,
    latest_checkpoint,
    read_metrics,
    worst_errors,
)
from nodes import Node, two_nodes

pytestmark = pytest.mark.slow

TWO_NODES = "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint node-a:29500 --rdzv-id tiny"
ONE_NODE = "--standalone --nproc-per-node 1"
#: Rows of a step that data parallel on two nodes and on one can share.
ROWS = ("data.rows_per_step=4", "run.export=false")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    with two_nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


def start(
    tiny: TinyRecipe, node: Node, run_dir: Path, *overrides: str, torchrun: str = TWO_NODES, setup: str = "true"
) -> Command:
    """Starts training on a node."""
    program = ["-m", "torch.distributed.run", *torchrun.split(), "-m", "orpo_megatron.train"]
    return tiny.command(*program, *tiny.arguments(run_dir, *overrides), prefix=node.prefix(setup))


def errors(output: str) -> list[str]:
    return [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]


def test_two_nodes_train_to_the_numbers_of_one(
    tiny: TinyRecipe, nodes: tuple[Node, Node], reference_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = ("model.tensor_model_parallel_size=2", "run.export=false")
    first, second = [start(tiny, node, run_dir, *overrides) for node in nodes]
    assert "processes    2 (tensor 2)" in first.succeed()
    assert "processes" not in second.succeed()  # rank 0 speaks
    worst = worst_errors(read_metrics(reference_run), read_metrics(run_dir), BETA)
    assert {name: error for name, error in worst.items() if not error <= 1e-5} == {}


def test_a_node_that_is_killed_ends_the_job_and_the_other_goes_on_alone(
    tiny: TinyRecipe, nodes: tuple[Node, Node], reference_run: Path, tmp_path: Path
) -> None:
    """The node that dies is the worse one: rank 0 and the rendezvous are there."""
    run_dir = tmp_path / "run"
    killed, left = [start(tiny, node, run_dir, *ROWS) for node in nodes]
    killed.wait_for(run_dir, EVAL_INTERVAL, "eval_loss")
    killed.kill()
    outcome = left.wait(timeout=90)
    assert outcome.code != 0 and latest_checkpoint(run_dir) == SAVE_INTERVAL
    (message,) = errors(outcome.output)
    assert re.match(r"Rank 1 lost contact with another process: .*\[10\.77\.0\.1\]", message)
    assert message.endswith(
        " It ended, and says why itself, or its node or the network failed. The same command goes on from step 4 "
        f"({run_dir}/checkpoints), also on fewer nodes, as long as their data-parallel size divides 4 (rows a step)."
    )

    output = start(tiny, nodes[1], run_dir, *ROWS, torchrun=ONE_NODE).succeed()
    assert f"Resuming after step {SAVE_INTERVAL}." in output and "processes    1" in output
    worst = worst_errors(read_metrics(reference_run), read_metrics(run_dir), BETA)
    assert {name: error for name, error in worst.items() if not error <= 1e-5} == {}


def test_a_network_that_falls_silent_ends_training_on_both_nodes(
    tiny: TinyRecipe, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first, second = [start(tiny, node, run_dir, *ROWS, "dist.distributed_timeout_minutes=1") for node in nodes]
    first.wait_for(run_dir, 2)
    nodes[1].pull_the_cable()
    try:
        assert first.wait(timeout=120).code != 0
        end = time.monotonic() + 20
        while not errors(second.output()) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        second.kill()  # its torchrun asks the other node, a minute at a time, before it ends
        nodes[1].plug_in()
    for rank, command in enumerate((first, second)):
        (message,) = errors(command.output())
        assert message.startswith(f"Rank {rank} lost contact with another process: ")
        assert "The same command starts anew (no checkpoint yet), also on fewer nodes, " in message


def test_a_run_dir_that_is_not_shared(tiny: TinyRecipe, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    message = (
        f"On rank 1 (node-b): run.dir ({run_dir}) is another folder than that of rank 0, which left a file there. "
        "Give one on a file system that all nodes share."
    )
    told_once(
        [start(tiny, nodes[0], run_dir), start(tiny, nodes[1], run_dir, setup=f"mount -t tmpfs none {run_dir}")],
        message,
    )
    assert list(run_dir.iterdir()) == []


def test_data_that_differs_between_nodes(tiny: TinyRecipe, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    other = tmp_path / "train.jsonl"
    other.write_text(tiny.train_file.read_text(encoding="utf-8").replace("a", "b"), encoding="utf-8")
    setup = f"mount --bind {other} {tiny.train_file}"
    message = told_once(
        [start(tiny, nodes[0], tmp_path / "run"), start(tiny, nodes[1], tmp_path / "run", setup=setup)]
    )
    assert re.fullmatch(
        rf'{tiny.train_file} \(its hash\) differs between processes: "[0-9a-f]{{64}}" on rank 0 \(node-a\), '
        r'"[0-9a-f]{64}" on rank 1 \(node-b\)\. Give every node the same files, or give files on a file system '
        r"that all nodes share\.",
        message,
    )


def test_another_source_of_this_package(tiny: TinyRecipe, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    ours, other = REPO / "orpo_megatron" / "loss.py", tmp_path / "loss.py"
    other.write_text(ours.read_text(encoding="utf-8") + "# Another version.\n", encoding="utf-8")
    setup = f"mount --bind {other} {ours}"
    message = told_once(
        [start(tiny, nodes[0], tmp_path / "run"), start(tiny, nodes[1], tmp_path / "run", setup=setup)]
    )
    assert re.fullmatch(
        r'the source of orpo_megatron \(its hash\) differs between processes: "[0-9a-f]{12}" on rank 0 \(node-a\), '
        r'"[0-9a-f]{12}" on rank 1 \(node-b\)\. Install the same on every node, or start the same container image\.',
        message,
    )


def test_another_setting(tiny: TinyRecipe, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    told_once(
        [start(tiny, nodes[0], tmp_path / "run"), start(tiny, nodes[1], tmp_path / "run", "orpo.beta=0.25")],
        f"orpo.beta differs between processes: {BETA} on rank 0 (node-a), 0.25 on rank 1 (node-b). Start the same "
        "recipe with the same overrides on every node.",
    )


def test_checkpoints_of_another_plan(
    tiny: TinyRecipe, nodes: tuple[Node, Node], reference_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference_run, run_dir)
    told_once(
        [start(tiny, node, run_dir, f"data.pairs_per_step={PAIRS_PER_STEP // 2}") for node in nodes],
        f"{run_dir} holds checkpoints of another run: there data.pairs_per_step was {PAIRS_PER_STEP}, now it is "
        f"{PAIRS_PER_STEP // 2}. Give another run.dir, or the old setting to go on.",
    )


def test_a_rendezvous_where_nobody_is(tiny: TinyRecipe, nodes: tuple[Node, Node], tmp_path: Path) -> None:
    arguments = ["tools/launch.py", "local", "--nodes", "2", "--rendezvous", "node-a:29500", "--wait", "2"]
    outcome = tiny.command(*arguments, *tiny.arguments(tmp_path / "run"), prefix=nodes[1].prefix()).wait(timeout=60)
    assert outcome.code == 2 and errors(outcome.output) == [
        "--rendezvous (node-a:29500): nobody answers there after 2 s. Start the same command on node-a, see that its "
        "firewall admits the port, or wait longer (--wait)."
    ]


def told_once(commands: list[Command], message: str | None = None) -> str:
    """Waits for both nodes; returns the one message, which rank 0 tells."""
    first, second = [command.wait(timeout=120) for command in commands]
    assert first.code != 0 and second.code != 0
    (said,) = errors(first.output)
    assert errors(second.output) == [] and message in (None, said)
    for outcome in (first, second):
        assert "RendezvousConnectionError" not in outcome.output
        summary = outcome.output[outcome.output.index("Root Cause") :]
        assert said in summary and re.search(r"exitcode +: 2 ", summary)
    return said
