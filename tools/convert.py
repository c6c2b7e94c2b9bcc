"""Converts between Hugging Face and Megatron checkpoints, on a CPU or a GPU.

    python tools/convert.py import HF_MODEL MEGATRON_FOLDER     weights for checkpoint.pretrained_checkpoint
    python tools/convert.py export RUN_DIR HF_FOLDER            a run's latest checkpoint, or one of its iter_* folders

HF_MODEL is a Hugging Face id or folder, a GGUF file, or package:NAME/FILE.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from orpo_megatron import cpu
from orpo_megatron.config import ConfigError
from orpo_megatron.console import logged_to, say

CACHE = Path("runs/cache")


def main(argv: list[str] | None = None) -> int:
    """Runs one conversion; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Hugging Face to Megatron")
    importing.add_argument("model", help="id, folder, GGUF file or package:NAME/FILE")
    importing.add_argument("folder", type=Path, help="where the Megatron checkpoint goes")
    exporting = commands.add_parser("export", help="Megatron to Hugging Face")
    exporting.add_argument("run", type=Path, help="run.dir of a run, or one of its checkpoints/iter_* folders")
    exporting.add_argument("folder", type=Path, help="where the Hugging Face folder goes")
    for command in (importing, exporting):
        command.add_argument("--cache-dir", type=Path, default=CACHE, help=f"for converted models (default: {CACHE})")
    args = parser.parse_args(argv)
    try:
        if args.folder.exists() and not (args.folder.is_dir() and not any(args.folder.iterdir())):
            raise ConfigError(f"{args.folder} is not empty. Give another folder, or empty it.")
        with logged_to(args.cache_dir / "logs" / "convert.txt"):
            if cpu.activate():
                say("No GPU found: converting on the CPU.")
            if args.command == "import":
                import_model(args.model, args.folder, args.cache_dir)
            else:
                export_run(args.run, args.folder)
    except ConfigError as error:
        say(f"error: {error}")
        return 2
    say(f"Written: {args.folder}")
    return 0


def import_model(model: str, folder: Path, cache_dir: Path) -> None:
    """Writes a Hugging Face model as a Megatron checkpoint."""
    from orpo_megatron.bridge.convert import import_checkpoint
    from orpo_megatron.data.sources import resolve

    import_checkpoint(resolve(model, cache_dir), folder)


def export_run(run: Path, folder: Path) -> None:
    """Writes a run's checkpoint as a Hugging Face folder, beside its place until it is whole."""
    from orpo_megatron.bridge.convert import checkpoint_folder, export_checkpoint
    from orpo_megatron.bridge.prepare import load_hf_config
    from orpo_megatron.bridge.rundir import read_run, write_model_card

    checkpoint = checkpoint_folder(run)
    recipe = read_run(checkpoint.parent.parent)
    partial = folder.with_name(folder.name + ".partial")
    export_checkpoint(recipe, load_hf_config(recipe), checkpoint, partial)
    write_model_card(recipe, partial, checkpoint.parent.parent, int(checkpoint.name.removeprefix("iter_")))
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


if __name__ == "__main__":
    sys.exit(main())
