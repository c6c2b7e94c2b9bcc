"""Launches a recipe with NeMo-Run: on the machines at hand, on Slurm (with a container), or on Kubernetes.

    python tools/launch.py local --gpus-per-node 8 RECIPE [section.key=value ...]
    python tools/launch.py slurm --account A --nodes 4 --image IMAGE --mount /lustre RECIPE run.dir=/lustre/run
    python tools/launch.py kubernetes --image IMAGE --pvc CLAIM:/shared --nodes 4 RECIPE run.dir=/shared/run

Each node starts torchrun, which starts a process a GPU; they meet on the first node. The recipe is checked and
resolved here, and a job elsewhere gets the result. --dryrun prints what would be submitted. Needs the extra `launch`
(pip install 'orpo-megatron[launch]'). Exit status: 0 if the job was submitted, or did its work where this waits for it
(local, Kubernetes), 1 if it failed, 2 if something does not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from orpo_megatron.bridge.paths import check_paths
from orpo_megatron.bridge.recipe import Recipe, check_layout, load_recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.console import report_error, say

EXIT_FAILED, EXIT_ERROR = 1, 2
TRAIN, RESOLVED = "orpo_megatron.train", "recipe.yaml"
#: What a job's environment holds unless --env says otherwise.
ENVIRONMENT = {"LOGLEVEL": "WARNING"}
#: Which kinds of launch an option is for; the others are for all.
ONLY_FOR = {
    "account": ("slurm",),
    "partition": ("slurm",),
    "time": ("slurm",),
    "save_before": ("slurm",),
    "requeues": ("slurm",),
    "sbatch": ("slurm",),
    "mount": ("slurm",),
    "image": ("slurm", "kubernetes"),
    "env": ("slurm", "kubernetes"),
    "pvc": ("kubernetes",),
    "namespace": ("kubernetes",),
    "runtime": ("kubernetes",),
    "rendezvous": ("local",),
    "wait": ("local",),
}


def main(argv: list[str] | None = None) -> int:
    """Launches a recipe; returns the exit status."""
    args = parse(argv)
    try:
        for name, kinds in ONLY_FOR.items():
            if args.where not in kinds and getattr(args, name) != args.defaults[name]:
                raise ConfigError(f"--{name.replace('_', '-')} is for {' and '.join(kinds)}, not for {args.where}.")
        recipe = load_recipe(args.recipe, args.overrides)
        experts = recipe.parallel_size("expert_model")  # the job checks the model itself
        check_layout(
            recipe, SimpleNamespace(num_experts=experts if experts > 1 else 0), args.nodes * args.gpus_per_node
        )
        return {"local": launch_local, "slurm": launch_slurm, "kubernetes": launch_kubernetes}[args.where](
            args, recipe
        )
    except ConfigError as error:
        report_error(str(error))
        return EXIT_ERROR


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; ``defaults`` holds what options are where they are not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("where", choices=("local", "slurm", "kubernetes"))
    add("recipe", help="YAML file, see recipes/")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    add("--nodes", type=count, default=1, help="machines (default 1)")
    add("--gpus-per-node", type=count, default=8, help="GPUs, and so processes, on each (default 8)")
    add("--name", help="of the job (default: the recipe's)")
    add("--dryrun", action="store_true", help="print what would be submitted, and submit nothing")
    add("--image", help="container image: a name or, on Slurm, a .sqsh file; Slurm does without if not given")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="variable for the job, any number of times")
    slurm = parser.add_argument_group("Slurm")
    add = slurm.add_argument
    add("--account", help="account that pays")
    add("--partition", help="partition (default: the cluster's)")
    add("--time", default="04:00:00", help="time limit, [days-]hours:minutes:seconds (default 04:00:00)")
    add(
        "--mount",
        action="append",
        default=[],
        metavar="PATH[:PATH]",
        help="folder for the container, any number of times",
    )
    add(
        "--save-before",
        type=count,
        default=300,
        metavar="SECONDS",
        help="before the time limit, when the run saves and stops",
    )
    add(
        "--requeues",
        type=int,
        default=0,
        help="how often a run that stopped or failed goes on in a new job (default 0)",
    )
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="more options of sbatch, such as qos=high")
    kubernetes = parser.add_argument_group("Kubernetes (Kubeflow's Training Operator)")
    add = kubernetes.add_argument
    add("--namespace", default="default", help="namespace (default: default)")
    add("--pvc", metavar="CLAIM:PATH", help="shared volume and where the job sees it; the recipe travels on it")
    add("--runtime", default="torch-distributed", help="ClusterTrainingRuntime (default torch-distributed)")
    local = parser.add_argument_group("several nodes by hand (local): the same command on each")
    add = local.add_argument
    add("--rendezvous", metavar="HOST:PORT", help="one of the nodes, and a free port there")
    add("--wait", type=count, default=300, metavar="SECONDS", help="for that node to start (default 300)")
    args = parser.parse_intermixed_args(argv)
    args.defaults = {name: parser.get_default(name) for name in ONLY_FOR}
    args.name = args.name or Path(args.recipe).stem
    return args


def count(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def launch_local(args: argparse.Namespace, recipe: Recipe) -> int:
    """Runs torchrun on this machine, which may be one of several, and waits for its end."""
    if args.nodes > 1:
        if not args.rendezvous:
            raise ConfigError("--rendezvous is missing: the nodes have to meet at the HOST:PORT of one of them.")
        host, port = check_rendezvous(args.rendezvous, args.wait)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), NODE_RANK="0")  # where NeMo-Run looks for them
    run = nemo_run()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    executor = run.LocalExecutor(
        nodes=args.nodes, ntasks_per_node=args.gpus_per_node, launcher=run.Torchrun(), env_vars=ENVIRONMENT
    )
    task = run.Script(path=TRAIN, m=True, entrypoint="python", args=[args.recipe, *args.overrides])
    with run.Experiment(args.name, executor=executor, log_level="WARN", skip_status_at_exit=True) as experiment:
        experiment.add(task, name=args.name, tail_logs=True)
        if args.dryrun:
            experiment.dryrun()
            return 0
        experiment.run()
    return 0 if experiment.jobs[0].state.name == "SUCCEEDED" else EXIT_FAILED


def launch_slurm(args: argparse.Namespace, recipe: Recipe) -> int:
    """Submits a job to Slurm from one of its login nodes."""
    if not args.account:
        raise ConfigError("--account is missing: Slurm has to know which account pays.")
    if not re.fullmatch(r"(\d+-)?\d{1,2}:\d\d:\d\d", args.time):
        raise ConfigError(f"--time ({args.time}) must be hours:minutes:seconds, with days- before it if need be.")
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in args.mount]
    for mount in mounts:
        if not all(side.startswith("/") for side in mount.split(":")[:2]):
            raise ConfigError(f"--mount ({mount}) must be absolute paths: on the node, and in the container.")
    check_paths(recipe, [mount.split(":")[1] for mount in mounts] if args.image else None)
    # At SIGTERM the processes save and stop; torchrun would give them 30 s for it.
    environment = {**ENVIRONMENT, "PET_SHUTDOWN_TIMEOUT": str(args.save_before), **variables(args.env)}
    more = assignments(args.sbatch, "--sbatch")
    if not (args.dryrun or shutil.which("sbatch")):
        raise ConfigError(
            "sbatch is not here. Start this on a login node of the cluster, or look at it with --dryrun."
        )
    run = nemo_run()
    with tempfile.TemporaryDirectory() as folder:
        executor = run.SlurmExecutor(
            account=args.account,
            job_name_prefix="orpo-",
            partition=args.partition,
            time=args.time,
            nodes=args.nodes,
            ntasks_per_node=1,
            gpus_per_node=args.gpus_per_node,
            torchrun_nproc_per_node=args.gpus_per_node,
            exclusive=True,
            mem="0",
            signal=f"TERM@{args.save_before}",
            retries=args.requeues,
            poll_estimated_start_time=False,
            container_image=args.image,
            container_mounts=mounts,
            env_vars=environment,
            additional_parameters=more or None,
            packager=run.PatternPackager(include_pattern=str(write(recipe, folder)), relative_path=folder),
            launcher=run.Torchrun(),
        )
        return submit(run, args, executor, RESOLVED, sbatch_script)


def launch_kubernetes(args: argparse.Namespace, recipe: Recipe) -> int:
    """Submits a TrainJob to Kubeflow's Training Operator."""
    for name in ("image", "pvc"):
        if not getattr(args, name):
            raise ConfigError(f"--{name} is missing: a job on Kubernetes needs one.")
    claim, _, path = args.pvc.partition(":")
    if not (claim and path.startswith("/")):
        raise ConfigError(f"--pvc ({args.pvc}) must be CLAIM:PATH with an absolute path.")
    check_paths(recipe, [path])
    run = nemo_run()
    from kubernetes.config import ConfigException

    with tempfile.TemporaryDirectory() as folder:
        write(recipe, folder)
        try:
            executor = run.KubeflowExecutor(
                image=args.image,
                namespace=args.namespace,
                runtime_ref=args.runtime,
                num_nodes=args.nodes,
                gpus_per_node=args.gpus_per_node,
                env_vars={**ENVIRONMENT, **variables(args.env)},
                volumes=[{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}],
                volume_mounts=[{"name": "shared", "mountPath": path}],
                workdir_pvc=claim,
                workdir_pvc_path=path,
                workdir_local_path=folder,
                train_job_basename=args.name,
                launcher=run.Torchrun(),
            )
        except ConfigException as error:
            raise ConfigError(f"No access to a Kubernetes cluster: {error} Set KUBECONFIG, or log in.") from error
        return submit(run, args, executor, f"/nemo_run/{RESOLVED}", manifest)


def submit(run: Any, args: argparse.Namespace, executor: Any, recipe: str, show: Callable[[Any], str]) -> int:
    """Has NeMo-Run submit a job, or prints what it would submit.

    Args:
        run: The package ``nemo_run``.
        args: The command line.
        executor: Where the job runs.
        recipe: Path of the resolved recipe, as the job sees it.
        show: Returns what NeMo-Run has prepared for its job.

    Returns:
        The exit status.
    """
    task = run.Script(path=TRAIN, m=True, entrypoint="python", args=[recipe])
    with (
        contextlib.redirect_stdout(sys.stderr),
        run.Experiment(
            args.name, executor=executor, log_level="WARN", enable_goodbye_message=False, skip_status_at_exit=True
        ) as experiment,
    ):
        experiment.add(task, name=args.name)
        job = experiment.jobs[0]
        if args.dryrun:
            experiment.dryrun(log=False, delete_exp_dir=False)
            shown = show(job)
            shutil.rmtree(job.executor.experiment_dir)
        else:
            experiment.run(detach=True)
    if args.dryrun:
        print(shown)
        return 0
    say(f"Job {job.handle.split('/')[3]} is submitted. Its records and logs: {job.executor.job_dir}")
    return EXIT_FAILED if job.state.name in ("FAILED", "CANCELLED", "UNKNOWN") else 0


def sbatch_script(job: Any) -> str:
    """Returns the script of a job on Slurm."""
    return Path(f"{Path(job.executor.experiment_dir, job.id)}_sbatch.sh").read_text(encoding="utf-8")


def manifest(job: Any) -> str:
    """Returns the TrainJob and, as comments, the script that its nodes run."""
    command = ["/bin/bash", f"{job.executor.code_dir}/launch.sh"]
    script = Path(job.executor.job_dir, "launch.sh").read_text(encoding="utf-8")
    body = yaml.safe_dump(job.executor.get_job_body(job.id.lower().replace("_", "-"), command), sort_keys=False)
    return f"{body}\n# {command[1]}:\n#\n{textwrap.indent(script.strip(), '# ', lambda _: True)}"


def write(recipe: Recipe, folder: str) -> Path:
    """Writes the resolved recipe into a folder."""
    path = Path(folder, RESOLVED)
    path.write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def check_rendezvous(endpoint: str, seconds: int) -> tuple[str, int]:
    """Checks the place where nodes meet: on this node that its port is free, on the others that somebody answers.

    Args:
        endpoint: HOST:PORT.
        seconds: How long to wait for an answer.

    Returns:
        Host and port.

    Raises:
        ConfigError: If there is no such host, or nobody answers in time.
    """
    host, _, port = endpoint.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--rendezvous ({endpoint}) must be HOST:PORT with a port from 1 to 65535.")
    if host == "localhost" or host.startswith("127."):
        raise ConfigError(f"--rendezvous ({endpoint}) is another place on every node. Give the name of one of them.")
    try:
        address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"--rendezvous ({endpoint}): {host} is not known here ({error.strerror}). Give a name or an address that "
            "every node knows."
        ) from error
    with socket.socket(address[0]) as here:
        try:
            here.bind((address[4][0], 0))
            return host, int(port)  # the address is this node's
        except OSError:
            pass
    say(f"Waiting up to {seconds} s for {endpoint} ...")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2):
            return host, int(port)
        time.sleep(1)
    raise ConfigError(
        f"--rendezvous ({endpoint}): nobody answers there after {seconds} s. Start the same command on {host}, see "
        "that its firewall admits the port, or wait longer (--wait)."
    )


def variables(assigned: Sequence[str]) -> dict[str, str]:
    """Reads environment variables; NeMo-Run writes them into a shell script as they stand, names in capitals.

    Raises:
        ConfigError: If one would not arrive as it is.
    """
    values = assignments(assigned, "--env")
    for name, value in values.items():
        if name != name.upper() or shlex.quote(value) != value:
            raise ConfigError(
                f"--env ({name}={value}) must have a name in capitals and a value without blanks and shell characters."
            )
    return values


def assignments(assigned: Sequence[str], option: str) -> dict[str, str]:
    """Reads NAME=VALUE options."""
    for text in assigned:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_-]*=", text):
            raise ConfigError(f"{option} ({text}) must be NAME=VALUE.")
    return dict(text.split("=", 1) for text in assigned)


def nemo_run() -> Any:
    """Imports NeMo-Run.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            import kubernetes  # noqa: F401  NeMo-Run itself tells its absence with a traceback
            import nemo_run as run
    except ImportError as error:
        raise ConfigError(
            f"NeMo-Run is not here ({error}). Install it: pip install 'orpo-megatron[launch]'."
        ) from error
    return run


if __name__ == "__main__":
    sys.exit(main())
