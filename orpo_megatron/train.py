"""The entry point: ``torchrun --nproc-per-node N -m orpo_megatron.train RECIPE [key=value ...]``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orpo_megatron import __version__
from orpo_megatron.bridge.recipe import RECORD, Recipe, load_recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.console import logged_to, rank, say, tell_torchrun

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from orpo_megatron.bridge.prepare import Prepared

RECIPE_FILE, DATA_REPORT_FILE, REPORT_FILE = "recipe.yaml", "data_report.json", "report.html"
EXIT_ERROR, EXIT_STOPPED = 2, 143
_RECORDED_PACKAGES = ("orpo-megatron", "torch", "megatron-core", "megatron-bridge", "transformer-engine", "transformers")


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
        return _run(load_recipe(args.recipe, args.overrides), args.dry_run)
    except ConfigError as error:
        # Every rank finds the same error; one says it.
        say(f"error: {error}")
        tell_torchrun(str(error))
        return EXIT_ERROR


def _run(recipe: Recipe, dry_run: bool) -> int:
    """Prepares, then prints or trains."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from orpo_megatron.bridge import prepare  # transformers takes seconds to import

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    hf_config = prepare.load_hf_config(recipe)
    pretrained = recipe.setting("checkpoint.pretrained_checkpoint")
    if pretrained:
        prepare.check_pretrained(pretrained, hf_config)
    before = _read_yaml(recipe.run_dir / RECIPE_FILE).get(RECORD) or {}
    step = _latest_step(recipe.run_dir)
    rows = before.get("rows_per_step") if step else None
    prepared = prepare.prepare_run(recipe, hf_config, world_size, rows, show_progress=rank() == 0)
    steps = prepared.plan.num_steps
    now = prepare.trajectory(recipe, prepared.store.content_hash, steps)
    if step:
        prepare.check_same_run(recipe.run_dir, before.get("trajectory") or {}, now)
    record = {
        "versions": _versions(),
        "rows_per_step": prepared.plan.rows_per_step,
        "content_hash": prepared.store.content_hash,
        "trajectory": now,
    }
    if dry_run:
        return _dry_run(recipe, hf_config, prepared, record)
    if step >= steps:
        return _finish(recipe, hf_config, prepared, trained_now=False)
    if rank() == 0:
        _write_records(recipe, prepared, record)
        _announce(recipe, prepared, step, world_size)
    if not _train(recipe, hf_config, prepared):
        say(f"Stopped at step {_latest_step(recipe.run_dir)} of {steps} by a signal. The checkpoint is saved in "
            f"{recipe.run_dir / 'checkpoints'}; the same command goes on from there.")  # fmt: skip
        return EXIT_STOPPED
    return _finish(recipe, hf_config, prepared, trained_now=True)


def _train(recipe: Recipe, hf_config: PretrainedConfig, prepared: Prepared) -> bool:
    """Imports Megatron and trains, its own output in a log file; returns whether the last step was reached."""
    with logged_to(recipe.run_dir / "logs" / f"rank_{rank()}.txt"):
        from orpo_megatron import cpu

        if cpu.activate():
            say("No GPU found: running on the CPU over gloo (for first runs, tests and debugging).")
        from orpo_megatron.bridge.train import train

        return train(recipe, hf_config, prepared)


def _finish(recipe: Recipe, hf_config: PretrainedConfig, prepared: Prepared, trained_now: bool) -> int:
    """Completes what a finished run leaves behind; rank 0 alone."""
    if rank() != 0:
        return 0
    run_dir = recipe.run_dir
    folder, partial = run_dir / "hf", run_dir / "hf.partial"
    if not trained_now:
        say(f"This run is finished: {prepared.plan.num_steps} steps are done. To train anew, give another run.dir.")
    if recipe.run.export and not folder.is_dir():
        with logged_to(run_dir / "logs" / "rank_0.txt"):
            from orpo_megatron import cpu

            cpu.activate()
            from orpo_megatron.bridge.convert import export_checkpoint, last_metrics
            from orpo_megatron.modelcard import model_card

            if not trained_now:
                say("Its export is missing: writing it from the checkpoint.")
                export_checkpoint(recipe, hf_config, run_dir, partial)
            card = model_card(
                base_model=recipe.hf or "",
                recipe=recipe.as_dict(),
                data_report=prepared.store.report.to_dict(),
                metrics=last_metrics(run_dir),
                versions=_versions(),
            )
            (partial / "README.md").write_text(card, encoding="utf-8")
            partial.rename(folder)
    from orpo_megatron.report import write_report

    report = write_report(run_dir)
    if folder.is_dir():
        say(f"Model:  {folder}  (transformers loads it as it is)")
    say(f"Report: {report}")
    return 0


def _dry_run(recipe: Recipe, hf_config: PretrainedConfig, prepared: Prepared, record: dict[str, Any]) -> int:
    """Prints the resolved recipe and the plan, and has Bridge validate its configuration."""
    if rank() != 0:
        return 0
    log = recipe.cache_dir / "logs" / "dry_run.txt"
    with logged_to(log):
        from orpo_megatron import cpu

        cpu.activate()
        from orpo_megatron.bridge.train import validate

        resolved = validate(recipe, hf_config, prepared)
    record.pop("trajectory")
    print(f"# Megatron-Bridge's configuration\nbridge:\n{textwrap.indent(resolved, '  ')}\n# The recipe, resolved")
    print(yaml.safe_dump({**recipe.as_dict(), RECORD: record}, sort_keys=False), end="", flush=True)
    say(f"\n{prepared.store.report.summary()}\n\n{prepared.plan.summary()}\n\nNothing was trained (--dry-run).")
    return 0


def _announce(recipe: Recipe, prepared: Prepared, step: int, world_size: int) -> None:
    """Says what is about to be trained."""
    say(prepared.store.report.summary())
    say(str(prepared.plan.summary()))
    split = ", ".join(
        f"{name} {size}"
        for name, size in (
            ("tensor", recipe.parallel_size("tensor_model")),
            ("pipeline", recipe.parallel_size("pipeline_model")),
            ("data", recipe.data_parallel_size(world_size)),
        )
    )
    say(f"objective    beta {recipe.orpo.beta:g}, NLL over {recipe.orpo.nll_scope} by {recipe.orpo.nll_reduction}")
    say(f"processes    {world_size} ({split})")
    if step:
        say(f"Resuming after step {step}.")


def _write_records(recipe: Recipe, prepared: Prepared, record: dict[str, Any]) -> None:
    """Writes ``recipe.yaml`` (resolved, with versions and data hash) and ``data_report.json``."""
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**recipe.as_dict(), RECORD: record}, sort_keys=False, allow_unicode=True)
    (recipe.run_dir / RECIPE_FILE).write_text(text, encoding="utf-8")
    reports = {"train": prepared.store.report.to_dict(), "plan": vars(prepared.plan.summary())}
    if prepared.eval_store is not None:
        reports["eval"] = prepared.eval_store.report.to_dict()
    (recipe.run_dir / DATA_REPORT_FILE).write_text(json.dumps(reports, indent=2), encoding="utf-8")


def _latest_step(run_dir: Path) -> int:
    """Returns the step of the run's latest complete checkpoint, 0 where there is none."""
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    sys.exit(main())
