"""Converts between Hugging Face and Megatron checkpoints, on the CPU, with one copy of the model in memory.

    python tools/convert.py import HF_MODEL MEGATRON_FOLDER          weights for checkpoint.pretrained_checkpoint
    python tools/convert.py export RUN_DIR HF_FOLDER                 a run's latest checkpoint, or one of its iter_*
    python tools/convert.py export CHECKPOINT HF_FOLDER --hf MODEL   any other checkpoint of Megatron-Bridge
    python tools/convert.py families                                 what can be converted and trained

HF_MODEL is a Hugging Face id or folder, a GGUF file, or package:NAME/FILE. What is written lies beside its place until
it is whole, and after an interruption the same command starts over. Exit status: 0 if all went well, 1 if --verify
found another model, 2 if there was nothing to convert or no way to.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from pathlib import Path

from orpo_megatron import cpu
from orpo_megatron.bridge.conversion.place import check_new
from orpo_megatron.config import ConfigError
from orpo_megatron.console import logged_to, say

CACHE = Path("runs/cache")
TEXT, NUM_TEXTS = Path(__file__).resolve().parents[1] / "examples" / "demo" / "facts.txt", 8
EXIT_DIFFERENT, EXIT_ERROR = 1, 2


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = arguments(argv)
    try:
        if args.command == "families":
            print(families(args.cache_dir), end="")
            return 0
        return convert(args)
    except ConfigError as error:
        say(f"error: {error}")
        return EXIT_ERROR
    except Exception:  # status 1 says that --verify found another model, and nothing else
        traceback.print_exc()
        return EXIT_ERROR


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Hugging Face to Megatron")
    importing.add_argument("model", help="id, folder, GGUF file or package:NAME/FILE")
    importing.add_argument("folder", type=Path, help="where the Megatron checkpoint goes")
    exporting = commands.add_parser("export", help="Megatron to Hugging Face")
    exporting.add_argument("run", type=Path, help="run.dir of a run, or a folder of one checkpoint or several")
    exporting.add_argument("folder", type=Path, help="where the Hugging Face folder goes")
    exporting.add_argument("--hf", metavar="MODEL", help="id or folder of the model that the checkpoint is one of")
    exporting.add_argument(
        "--max-shard-size", type=num_bytes, default="5GB", metavar="SIZE", help="of a safetensors file (default: 5GB)"
    )
    listing = commands.add_parser("families", help="what can be converted and trained, as Markdown")
    for command in (importing, exporting, listing):
        command.add_argument("--cache-dir", type=Path, default=CACHE, help=f"for converted models (default: {CACHE})")
    for command in (importing, exporting):
        command.add_argument(
            "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the weights"
        )
        command.add_argument(
            "--verify", action="store_true", help="compare logits with transformers, in fp32: 4 bytes a parameter"
        )
        command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser.parse_args(argv)


def num_bytes(size: str) -> int:
    """Returns a size such as 5GB or 500MB in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B", size.upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{size!r} is no size. Write one like 5GB or 500MB.")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2]])


def families(cache_dir: Path) -> str:
    """Returns docs/models.md."""
    with logged_to(cache_dir / "logs" / "convert.txt"):
        cpu.activate()
        from orpo_megatron.bridge.conversion.support import families_page

        return families_page()


def convert(args: argparse.Namespace) -> int:
    """Runs one conversion; returns the exit status."""
    check_new(args.folder)
    with logged_to(args.cache_dir / "logs" / "convert.txt"):
        cpu.activate()
        from orpo_megatron.bridge.conversion.convert import DifferentModelError, Options, export_model, import_model
        from orpo_megatron.data.sources import resolve

        options = Options(
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            texts=TEXT.read_text(encoding="utf-8").splitlines()[1 : 1 + NUM_TEXTS] if args.verify else (),
            **({"shard_bytes": args.max_shard_size} if args.command == "export" else {}),
        )
        try:
            if args.command == "import":
                import_model(resolve(args.model, args.cache_dir), args.folder, options)
            else:
                hf = resolve(args.hf, args.cache_dir) if args.hf else None
                export_model(args.run, args.folder, options, hf)
        except DifferentModelError as error:
            say(f"error: {error}")
            return EXIT_DIFFERENT
    say(f"Written: {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
