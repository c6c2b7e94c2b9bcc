"""Checks that a recipe's sharding computes what one process would, before a cluster's time is spent on it.

    torchrun --nproc-per-node N tools/verify_parity.py RECIPE [section.key=value ...] [--against tp=1,pp=1]

One global batch, the run's first or one that it kept, goes through the recipe's own sharding and through a reference,
from the same weights: the loss, every metric and the gradient of every trainable parameter must agree. The reference
is not split but for what --against names (tp, pp, vpp, cp, ep, etp, sp), as a large model has to be. Exit status: 0 if
they agree, 1 if not, 2 if they could not be compared.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orpo_megatron.bridge import parity
from orpo_megatron.bridge.recipe import Recipe, load_recipe
from orpo_megatron.config import ConfigError
from orpo_megatron.console import logged_to, rank, report_error, say
from orpo_megatron.machine import use_machine

if TYPE_CHECKING:
    from orpo_megatron.batch import PackedRow
    from orpo_megatron.bridge.parity import Comparison
    from orpo_megatron.data.plan import Padding

EXIT_DIFFERENT, EXIT_ERROR = 1, 2


def main(argv: list[str] | None = None) -> int:
    """Compares two shardings; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--against", default="", metavar="tp=1,pp=1", help="the reference's sharding (default: none)")
    parser.add_argument(
        "--batch", metavar="FILE", help="a step that a run kept (nonfinite/step_*.pt), to run it again"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest error that passes (default: {parity.EXACT:g} in fp32, {parity.ROUNDED:g} with mixed_precision)",
    )
    args = parser.parse_intermixed_args(argv)
    try:
        recipe = parity.unobserved(load_recipe(args.recipe, args.overrides))
        reference = parity.reference_recipe(recipe, parity.parse_sharding(args.against))
        started = time.monotonic()
        comparison = compare(recipe, reference, args.tolerance, args.batch)
    except ConfigError as error:
        report_error(str(error))
        return EXIT_ERROR
    except Exception:  # status 1 says that the two sides differ, and nothing else
        traceback.print_exc()
        return EXIT_ERROR
    if rank() == 0:
        print(f"{comparison.table()}\n{time.monotonic() - started:.0f} s", flush=True)
    return 0 if comparison.passed else EXIT_DIFFERENT


def compare(recipe: Recipe, reference: Recipe, tolerance: float | None, batch: str | None) -> Comparison:
    """Prepares the data as a run would, then runs its first global batch, or a kept one, twice."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from orpo_megatron.bridge import kept, prepare  # transformers takes seconds to import

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    hf_config = prepare.load_hf_config(recipe)
    prepare.check_pretrained(recipe, hf_config)
    prepare.check_layout(reference, hf_config, world_size)
    prepared = prepare.prepare_run(recipe, hf_config, world_size, None, show_progress=rank() == 0)
    plan = prepared.plan
    if batch is None:
        rows = parity.first_batch(prepared.store, plan)
        reference_rows = parity.first_batch(prepared.store, plan, prepare.padding(reference), share_prefix=False)
    else:
        rows = reference_rows = kept.load_rows(batch)
        check_batch(rows, batch, [prepare.padding(side) for side in (recipe, reference)], plan.rows_per_step)
    bound, exact = parity.bound_of(recipe, tolerance)
    say(
        f"{sum(len(row.pair_ids) for row in rows)} pairs in {len(rows)} rows on {world_size} processes\n"
        f"reference    {parity.describe_sharding(reference, world_size)} (every replica runs all rows)\n"
        f"recipe       {parity.describe_sharding(recipe, world_size)}"
        f"{', prompts computed once a pair' if rows[0].shares_prefix else ''}"
    )
    if not exact:
        say(
            f"bf16 and fp16 round: the bound is {bound:g}, for metrics a tenth of it, and counts are not judged. What "
            f"one of more than {1 / bound:.0f} replicas does wrong is smaller; a small model in fp32 shows it."
        )
    with logged_to(recipe.run_dir / "logs" / f"parity_rank_{rank()}.txt"):
        use_machine()
        from orpo_megatron.bridge.session import compare as compare_sessions

        return compare_sessions(
            recipe,
            rows,
            reference,
            reference_rows,
            hf_config,
            num_steps=plan.num_steps,
            folder=recipe.run_dir / "parity",
            bound=bound,
            exact=exact,
        )


def check_batch(rows: Sequence[PackedRow], file: str, paddings: Sequence[Padding], rows_per_step: int) -> None:
    """Checks that kept rows fit both sides.

    Raises:
        ConfigError: If a length or the number of rows does not.
    """
    if len(rows) != rows_per_step:
        raise ConfigError(
            f"{file} holds {len(rows)} rows, but the recipe plans {rows_per_step} a step on these processes. Set "
            f"data.rows_per_step={len(rows)}."
        )
    lengths = {
        "sequence": {int(length) for row in rows for length in row.cu_seqlens.diff()},
        "row": {len(row.tokens) for row in rows},
    }
    for what, found in lengths.items():
        multiple = math.lcm(*(getattr(padding, what) for padding in paddings))
        for length in sorted(found):
            if length % multiple:
                raise ConfigError(
                    f"{file} holds a {what} of {length} tokens with padding, but these shardings take multiples of "
                    f"{multiple}. Use the sharding of the run that kept it."
                )


if __name__ == "__main__":
    sys.exit(main())
