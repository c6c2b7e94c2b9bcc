"""The data of a run: pairs, tokenised and planned, ready to be packed into rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_megatron.config import ConfigError, DataConfig
from orpo_megatron.data.plan import NllScope, Padding, StepPlan, make_eval_plan, make_plan
from orpo_megatron.data.prefix import choose_prefix
from orpo_megatron.data.sources import load_tokenizer
from orpo_megatron.data.store import PairStore, prepare


@dataclass(frozen=True)
class Prepared:
    """Data and plans of a run.

    Attributes:
        store: Token ids of the training pairs.
        plan: Their steps.
        eval_store: Token ids of the held-out pairs, if there are any.
        eval_plan: An evaluation's steps.
        prompts: What was decided about prompts, in words.
    """

    store: PairStore
    plan: StepPlan
    eval_store: PairStore | None
    eval_plan: StepPlan | None
    prompts: str


def prepare_data(
    data: DataConfig,
    *,
    tokenizer_name: str,
    cache_dir: str | Path,
    vocab_size: int | None,
    nll_scope: NllScope,
    seed: int,
    num_steps: Callable[[int], int],
    rows_multiple_of: int,
    padding: Padding,
    rows_per_step: int | None,
    prefix_conflict: str | None,
    on_gpu: bool,
    show_progress: bool,
) -> Prepared:
    """Tokenises what is not in the cache and plans the run; every rank may call it, one does the work.

    Args:
        data: What the pairs are and how they become global batches.
        tokenizer_name: What ``load_tokenizer`` takes.
        cache_dir: Folder for tokenised data.
        vocab_size: Ids that the model knows, if that can be told.
        nll_scope: Which tokens of the chosen sequence the NLL covers.
        seed: Seed of the order of pairs.
        num_steps: Tells the optimizer steps for a number of pairs.
        rows_multiple_of: As in ``make_plan``.
        padding: What lengths have to be a multiple of.
        rows_per_step: Rows of a step as a checkpoint fixed them, or None.
        prefix_conflict: What of the run a shared prompt does not go with, in words, if there is anything.
        on_gpu: Whether the run is for a GPU.
        show_progress: Whether this rank shows the progress of tokenising.

    Raises:
        ConfigError: If the data, the tokenizer or the rows do not fit.
    """
    tokenizer = load_tokenizer(tokenizer_name, cache_dir, data.chat_template)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer_name} has {len(tokenizer)} tokens but the model's vocabulary has "
            f"{vocab_size}. Use the model's own tokenizer (leave data.tokenizer out) or a model with more."
        )

    def store_of(sources: str | list[str], split: str, role: str) -> PairStore:
        return prepare(
            sources,
            split,
            config=data,
            tokenizer_name=tokenizer_name,
            cache_dir=cache_dir,
            role=role,
            show_progress=show_progress,
        )

    store = store_of(data.train, data.train_split, "train")
    eval_store = store_of(data.eval, data.eval_split, "eval") if data.eval is not None else None
    prefix = choose_prefix(str(data.share_prefix), prefix_conflict, store.lengths, on_gpu=on_gpu)  # a word by now
    alike: dict[str, Any] = {
        "nll_scope": nll_scope,
        "pairs_per_step": data.pairs_per_step,
        "max_tokens_per_row": data.row_budget,
        "rows_multiple_of": rows_multiple_of,
        "sequence_multiple_of": padding.sequence,
        "row_length_multiple_of": padding.row,
        "share_prefix": prefix.shared,
    }
    plan = make_plan(
        store.lengths,
        num_steps=num_steps(len(store)),
        seed=seed,
        shuffle=data.shuffle,
        rows_per_step=rows_per_step or data.rows_per_step,
        **alike,
    )
    eval_plan = None if eval_store is None else make_eval_plan(eval_store.lengths, **alike)
    return Prepared(store, plan, eval_store, eval_plan, prefix.why)


def padding_of(sequence_ranks: int, cp_size: int, *, fp8: bool, mxfp8: bool, pad_to_multiple_of: int) -> Padding:
    """Returns what kernels, the split of rows and the user demand.

    Args:
        sequence_ranks: Ranks that each hold a part of a row: those of sequence and context parallel.
        cp_size: Those of context parallel alone.
        fp8: Whether matrix products are in FP8 of any kind.
        mxfp8: Whether they are in MXFP8.
        pad_to_multiple_of: ``data.pad_to_multiple_of``.
    """
    # Context parallel cuts each sequence into two chunks a rank.
    sequence = math.lcm(2 * cp_size if cp_size > 1 else 1, pad_to_multiple_of)
    # Each rank's tokens of a row in multiples of 32 for MXFP8 and of 16 for other FP8 (Megatron-Core 0.19, fp8_utils).
    return Padding(sequence, math.lcm(sequence, sequence_ranks * (32 if mxfp8 else 16 if fp8 else 1)))
