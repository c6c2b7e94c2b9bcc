"""``tools/verify_parity.py`` with a mistake in it: under tensor parallel the loss is twice what it should be."""

import runpy
from pathlib import Path

from orpo_megatron import cpu

cpu.activate()

from megatron.core import parallel_state  # noqa: E402

from orpo_megatron.core import step  # noqa: E402

right = step.row_loss


def row_loss(*args, **kwargs):
    loss, metrics = right(*args, **kwargs)
    return loss * parallel_state.get_tensor_model_parallel_world_size(), metrics


step.row_loss = row_loss
runpy.run_path(str(Path(__file__).parents[2] / "tools" / "verify_parity.py"), run_name="__main__")
