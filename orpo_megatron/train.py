"""The entry point: ``torchrun --nproc-per-node N -m orpo_megatron.train RECIPE [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from typing import TYPE_CHECKING

import yaml

from orpo_megatron import __version__
from orpo_megatron.agreement import Peers
from orpo_megatron.bridge.common import prepare_alike
from orpo_megatron.bridge.recipe import RECORD, Recipe, load_recipe
from orpo_megatron.config import ConfigError, PeerError
from orpo_megatron.console import logged_to, rank, report_error, say
from orpo_megatron.facts import start_facts
from orpo_megatron.machine import use_machine

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from orpo_megatron.data.prepare import Prepared

EXIT_ERROR, EXIT_STOPPED = 2, 143


def main(argv: list[str] | None = None) -> int:
    """Runs a recipe.

    Args:
        argv: Command line without the program's name.

    Returns:
        Exit status: 0 when the run is done, 2 when a recipe, a file or the machine does not fit, 143 when a signal
        stopped the run after it saved a checkpoint.
    """
    parser = argparse.ArgumentParser(prog="orpo_megatron.train", description=__doc__)
    parser.add_argument("recipe", help="YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--dry-run", action="store_true", help="resolve, validate and print everything; do not train")
    parser.add_argument("--version", action="version", version=__version__)
    args = parser.parse_intermixed_args(argv)
    try:
        peers = Peers.join()
        recipe = peers.settle(
            "reading of the recipe",
            lambda: load_recipe(args.recipe, args.overrides),
            lambda read: start_facts(read.as_dict()),
        )
        return _run(recipe, args.dry_run, peers)
    except ConfigError as error:
        report_error(str(error), each_node=isinstance(error, PeerError))
        return EXIT_ERROR


def _run(recipe: Recipe, dry_run: bool, peers: Peers) -> int:
    """Prepares, then prints or trains."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, value in recipe.sections.get("env_vars", {}).items():
        os.environ.setdefault(name, str(value))  # Bridge does it too, when CUDA has read them already
    world_size, run_dir = int(os.environ.get("WORLD_SIZE", "1")), recipe.run_dir
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise ConfigError("This is one of several Slurm tasks without WORLD_SIZE. Have each node start torchrun.")
    peers.timeout = 60.0 * recipe.setting("dist.distributed_timeout_minutes", 10)
    hf_config, prepared, step = prepare_alike(
        peers, recipe, lambda: _prepare(recipe, world_size, dry_run), make_run_dir=not dry_run
    )
    if dry_run:
        return _dry_run(recipe, hf_config, prepared)
    if world_size > 1 and "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE is {world_size} but RANK is not set. Have each node start torchrun.")
    from orpo_megatron.bridge import rundir

    steps = prepared.plan.num_steps
    if step >= steps:
        return _finish(recipe, hf_config, steps, trained_now=False)
    if rank() == 0:
        rundir.write_records(recipe, prepared)
        _announce(recipe, prepared, step, world_size)
    if not _train(recipe, hf_config, prepared):
        checkpoints = run_dir / rundir.CHECKPOINTS
        say(
            f"Stopped at step {rundir.latest_step(checkpoints)} of {steps} as asked. The checkpoint is saved in "
            f"{checkpoints}; the same command goes on from there."
        )
        return EXIT_STOPPED
    return _finish(recipe, hf_config, steps, trained_now=True)


def _prepare(recipe: Recipe, world_size: int, dry_run: bool) -> tuple[PretrainedConfig, Prepared, int]:
    """Reads model and data and plans; returns the model's configuration, the plans and the step to go on from."""
    from orpo_megatron.bridge import prepare, rundir  # transformers takes seconds to import

    hf_config = prepare.load_hf_config(recipe, dry_run=dry_run)
    prepare.check_pretrained(recipe, hf_config)
    checkpoints = recipe.run_dir / rundir.CHECKPOINTS
    return hf_config, *rundir.plan_run(recipe, hf_config, world_size, checkpoints, here=not dry_run)


def _train(recipe: Recipe, hf_config: PretrainedConfig, prepared: Prepared) -> bool:
    """Imports Megatron and trains, its own output in a log file; returns whether the last step was reached."""
    with logged_to(recipe.run_dir / "logs" / f"rank_{rank()}.txt"):
        use_machine()
        from orpo_megatron.bridge.train import train

        return train(recipe, hf_config, prepared)


def _finish(recipe: Recipe, hf_config: PretrainedConfig, steps: int, trained_now: bool) -> int:
    """Completes what a finished run leaves behind; rank 0 alone."""
    if rank() != 0:
        return 0
    from orpo_megatron.bridge import rundir
    from orpo_megatron.report import write_report

    run_dir = recipe.run_dir
    folder, partial = run_dir / rundir.HF, rundir.partial_export(run_dir)
    if not trained_now:
        say(f"This run is finished: all of its {steps} steps are done. To train anew, give another run.dir.")
    if recipe.run.export and not folder.is_dir():
        if not trained_now:
            say("Its export is missing; writing it from the checkpoint.")
            with logged_to(run_dir / "logs" / "rank_0.txt"):
                from orpo_megatron import cpu

                cpu.activate()
                from orpo_megatron.bridge.conversion.convert import export_checkpoint

                export_checkpoint(recipe, hf_config, run_dir, partial)
        rundir.write_model_card(recipe, partial)
        partial.rename(folder)
    report = write_report(run_dir)
    if folder.is_dir():
        say(f"Model:  {folder}  (transformers loads it as it is)")
    say(f"Report: {report}")
    return 0


def _dry_run(recipe: Recipe, hf_config: PretrainedConfig, prepared: Prepared) -> int:
    """Prints the resolved recipe and the plan, and has Bridge validate its configuration."""
    if rank() != 0:
        return 0
    from orpo_megatron.bridge import rundir
    from orpo_megatron.data.report import ROWS_IN_SUMMARY

    with logged_to(recipe.cache_dir / "logs" / "dry_run.txt"):
        from orpo_megatron import cpu

        cpu.activate()
        from orpo_megatron.bridge.train import validate

        resolved = validate(recipe, hf_config, prepared, here=False)
    record = rundir.make_record(recipe, prepared)
    del record["trajectory"]  # what the recipe says anyway
    print(f"# Megatron-Bridge's configuration\nbridge:\n{textwrap.indent(resolved, '  ')}\n# The recipe, resolved")
    print(yaml.safe_dump({**recipe.as_dict(), RECORD: record}, sort_keys=False), end="", flush=True)
    for store in filter(None, (prepared.store, prepared.eval_store)):
        say(f"\n{store.report.summary()}")
        if len(store.report.bad_rows) > ROWS_IN_SUMMARY:
            say("  all unusable rows:\n" + "\n".join(f"    {row}" for row in store.report.bad_rows))
    say(f"\n{prepared.plan.summary()}\nprompts      {prepared.prompts}\n\nNothing was trained (--dry-run).")
    return 0


def _announce(recipe: Recipe, prepared: Prepared, step: int, world_size: int) -> None:
    """Says what is about to be trained."""
    from orpo_megatron.bridge.parity import describe_sharding

    say(prepared.store.report.summary())
    say(f"{prepared.plan.summary()}\nprompts      {prepared.prompts}")
    say(f"objective    beta {recipe.orpo.beta:g}, NLL over {recipe.orpo.nll_scope} by {recipe.orpo.nll_reduction}")
    say(f"processes    {world_size} ({describe_sharding(recipe, world_size)})")
    if step:
        say(f"Resuming after step {step}.")


if __name__ == "__main__":
    sys.exit(main())
