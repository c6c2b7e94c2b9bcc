"""tools/launch.py on NeMo-Run: what it submits, what it refuses, and a run on this machine."""

import importlib.util
import io
import os
import re
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from launch import REPO, TINY, Command, TinyRecipe, read_metrics

nemo_run = pytest.importorskip("nemo_run", reason="NeMo-Run is not installed (see the Makefile)")


def load(path: Path) -> ModuleType:
    """Imports a program of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load(REPO / "tools" / "launch.py")
GOLDEN = Path(__file__).parent / "golden"
CONTAINER = ["--image", "/lustre/orpo.sqsh", "--mount", "/lustre"]
SLURM = ["slurm", "--account", "research", "--nodes", "4"]
#: Data without paths of this machine, and a folder that the container shares.
RECIPE = [
    str(TINY),
    "data.train=org/pairs",
    "data.eval=null",
    "validation.eval_interval=null",
    "run.dir=/lustre/runs/a",
]
KUBERNETES = ["kubernetes", "--image", "registry/orpo:1", "--pvc", "shared:/lustre", "--nodes", "2"]
KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [{"name": "c", "cluster": {"server": "https://kubernetes.invalid"}}],
    "users": [{"name": "u", "user": {}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "x",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, in which NeMo-Run keeps its records; a user and a cluster."""
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text(yaml.safe_dump(KUBECONFIG), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "records"))
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "me")
    return tmp_path


def launch(home: Path, *arguments: str) -> Command:
    return Command(["tools/launch.py", *arguments], home / "output.txt")


def normalised(text: str, home: Path) -> str:
    """Returns a job's text without what differs from launch to launch and from machine to machine."""
    text = text.replace(str(home), "$HOME")
    return re.sub(r"--rdzv-id \d+", "--rdzv-id ID", re.sub(r"tiny_cpu_\d+", "tiny_cpu_ID", text))


REFUSED = [
    (["slurm"], "--account is missing: Slurm has to know which account pays."),
    (["local", "--account", "research"], "--account is for slurm, not for local."),
    (["slurm", "--rendezvous", "a:1"], "--rendezvous is for local, not for slurm."),
    ([*SLURM, "orpo.bta=0.3"], "orpo.bta is not a setting. Did you mean 'beta'?"),
    (
        [*SLURM, "model.tensor_model_parallel_size=3"],
        "The number of processes (32) must be a multiple of tensor x pipeline x context parallel size (3 x 1 x 1 = 3)."
        " Start 33 processes (torchrun --nproc-per-node), or split less.",
    ),
    (
        [*SLURM, "--time", "2h"],
        "--time (2h) must be hours:minutes:seconds, with days- before it if need be.",
    ),
    ([*SLURM, "--mount", "data"], "--mount (data:data) must be absolute paths: on the node, and in the container."),
    (
        [*SLURM, "run.dir=runs/a"],
        "run.dir (runs/a) is relative, and the job does not start in this folder. Give an absolute path on a file "
        "system that all nodes share.",
    ),
    (
        [*SLURM, *CONTAINER, "run.dir=/scratch/a"],
        "run.dir (/scratch/a) must lie in a folder that the container shares with the nodes (/lustre).",
    ),
    (
        [*SLURM, "data.train=examples/demo/train.jsonl"],
        "data.train (examples/demo/train.jsonl) is relative, and the job does not start in this folder. Give an "
        "absolute path on a file system that all nodes share.",
    ),
    ([*SLURM, "--env", "HF_HOME"], "--env (HF_HOME) must be NAME=VALUE."),
    (
        [*SLURM, "--env", "NOTE=two words"],
        "--env (NOTE=two words) must have a name in capitals and a value without blanks and shell characters.",
    ),
    (["kubernetes"], "--image is missing: a job on Kubernetes needs one."),
    ([*KUBERNETES, "--pvc", "shared"], "--pvc (shared) must be CLAIM:PATH with an absolute path."),
    (["local", "--nodes", "2"], "--rendezvous is missing: the nodes have to meet at the HOST:PORT of one of them."),
    (
        ["local", "--nodes", "2", "--rendezvous", "node-a"],
        "--rendezvous (node-a) must be HOST:PORT with a port from 1 to 65535.",
    ),
    (
        ["local", "--nodes", "2", "--rendezvous", "localhost:29500"],
        "--rendezvous (localhost:29500) is another place on every node. Give the name of one of them.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_bad_input_is_one_message(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    where, *options = arguments
    assert tool.main([where, *RECIPE, *options]) == 2
    assert capfd.readouterr() == ("", f"error: {message}\n")


def test_without_slurm(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert tool.main([*SLURM, *RECIPE]) == 2
    assert capfd.readouterr().err == (
        "error: sbatch is not here. Start this on a login node of the cluster, or look at it with --dryrun.\n"
    )


def test_without_a_cluster(home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".kube" / "config").unlink()
    assert tool.main([*KUBERNETES, *RECIPE]) == 2
    assert capfd.readouterr().err == (
        "error: No access to a Kubernetes cluster: Invalid kube-config file. No configuration found. Set KUBECONFIG, "
        "or log in.\n"
    )


def test_a_host_that_is_not_known(capfd: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["local", "--nodes", "2", "--rendezvous", "node.invalid:29500", *RECIPE]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --rendezvous (node.invalid:29500): node.invalid is not known here (")
    assert error.endswith("). Give a name or an address that every node knows.\n")


def test_this_host() -> None:
    name = socket.gethostname()
    assert tool.check_rendezvous(f"{name}:29500", 1) == (name, 29500)


@pytest.mark.parametrize(
    ("golden", "arguments"),
    [
        ("slurm.sh", [*SLURM, *CONTAINER, "--partition", "gpu", "--env", "HF_HOME=/lustre/hf", "--requeues", "3"]),
        ("slurm_bare.sh", [*SLURM, "--nodes", "1", "--sbatch", "qos=high", "--time", "1-00:00:00"]),
        ("kubernetes.yaml", [*KUBERNETES, "--env", "HF_HOME=/lustre/hf"]),
    ],
)
def test_a_dry_run_prints_what_would_be_submitted(
    home: Path,
    golden: str,
    arguments: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a new NeMo-Run: look at what differs, then write the file anew with the text that the assertion shows."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's shell commands read it
    nemo_run.config.set_nemorun_home(str(home / "records"))
    assert tool.main([*arguments, "--dryrun", *RECIPE]) == 0
    assert normalised(capfd.readouterr().out, home) == (GOLDEN / golden).read_text(encoding="utf-8")
    assert list((home / "records" / "experiments" / "tiny_cpu").iterdir()) == []  # nothing is left


STUBS = {
    # Slurm on a machine without it: a job runs at once, on one node, which is this machine.
    "sbatch": """for script; do :; done
        SLURM_JOB_ID=7 SLURM_JOB_NODELIST=here SLURM_NODEID=0 bash "$script" > "$HOME/job.txt" 2>&1
        echo $? > "$HOME/status.txt"
        echo 7""",
    "scontrol": """echo "$@" >> "$HOME/scontrol.txt"; echo here""",
    "srun": """while :; do case "$1" in
            --output | -w) shift 2 ;;
            --chdir) cd "$2"; shift 2 ;;
            -*) shift ;;
            *) break ;;
        esac; done
        exec "$@\"""",
}


@pytest.mark.slow
def test_a_job_trains_on_a_node_of_slurm(tiny: TinyRecipe, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch gets is run as it is: the recipe travels with it, and a failed run is put back into the queue."""
    (home / "bin").mkdir()
    for name, script in STUBS.items():
        (home / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (home / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    run_dir = home / "run"
    _, *settings = tiny.arguments(run_dir, "train.train_iters=2", "run.export=false")
    slurm = ["slurm", "--account", "research", "--gpus-per-node", "1", "--requeues", "1", "--env", "OMP_NUM_THREADS=1"]

    outcome = launch(home, *slurm, str(TINY), *settings).wait()
    assert outcome.code == 0 and "Job 7 is submitted." in outcome.output, outcome.output
    assert (home / "status.txt").read_text() == "0\n", (home / "job.txt").read_text()
    assert [record["step"] for record in read_metrics(run_dir) if "loss" in record] == [1, 2]
    assert "requeue" not in (home / "scontrol.txt").read_text()

    launch(home, *slurm, str(TINY), *settings, f"data.train={home}/none.jsonl").wait()
    assert (home / "status.txt").read_text() == "1\n"
    assert "requeue 7" in (home / "scontrol.txt").read_text()
    assert f"'{home}/none.jsonl'" in (home / "job.txt").read_text()


@pytest.mark.slow
def test_a_run_on_this_machine(tiny: TinyRecipe, home: Path) -> None:
    run_dir = home / "run"
    recipe = tiny.arguments(run_dir, "train.train_iters=2", "run.export=false")
    outcome = launch(home, "local", "--gpus-per-node", "2", *recipe).wait()
    assert outcome.code == 0, outcome.output
    assert "processes    2 (data 2)" in outcome.output
    assert [record["step"] for record in read_metrics(run_dir) if "loss" in record] == [1, 2]
    failed = launch(home, "local", "--gpus-per-node", "1", *recipe, f"data.train={home}/none.jsonl").wait()
    assert failed.code == 1 and f"'{home}/none.jsonl'" in failed.output
