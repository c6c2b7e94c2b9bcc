"""Scores a run's held-out pairs inside Megatron, row by row: ``python tests/score_inside.py RUN_DIR OUT.json``."""

import json
import sys
from pathlib import Path

import torch

from orpo_megatron import cpu

cpu.activate()

from megatron.bridge.training.model_load_save import temporary_distributed_context  # noqa: E402

from orpo_megatron.bridge.conversion.checkpoint import checkpoint_folder  # noqa: E402
from orpo_megatron.bridge.conversion.load import load_checkpoint_model  # noqa: E402
from orpo_megatron.bridge.rundir import read_run  # noqa: E402
from orpo_megatron.core.step import make_forward_step  # noqa: E402
from orpo_megatron.data.dataset import PackedRows  # noqa: E402
from orpo_megatron.data.plan import make_eval_plan  # noqa: E402
from orpo_megatron.data.store import prepare  # noqa: E402
from orpo_megatron.loss import log_odds_ratio  # noqa: E402
from orpo_megatron.segments import pair_logps  # noqa: E402

run_dir, out = map(Path, sys.argv[1:])
recipe = read_run(run_dir)
store = prepare(
    recipe.data.eval, "test", config=recipe.data, tokenizer_name=recipe.tokenizer, cache_dir=recipe.cache_dir
)
plan = make_eval_plan(
    store.lengths,
    nll_scope=recipe.orpo.nll_scope,
    pairs_per_step=recipe.data.pairs_per_step,
    max_tokens_per_row=recipe.data.row_budget,
)
rows = PackedRows(store, plan, store.pad_token_id)
scores: dict[int, float] = {}
with temporary_distributed_context("gloo"), torch.no_grad():
    (model,) = load_checkpoint_model(checkpoint_folder(run_dir))
    model.eval()
    forward_step = make_forward_step(recipe.orpo, num_microbatches=lambda: 1)
    for row in (rows[index] for index in range(len(rows))):
        per_token_logps, _ = forward_step(iter([row]), model)
        logps = pair_logps(per_token_logps, row)
        values = log_odds_ratio(logps.chosen_logps, logps.rejected_logps)
        scores.update(zip(row.pair_ids.tolist(), values.tolist(), strict=True))
out.write_text(json.dumps([scores[index] for index in range(len(store))]))
