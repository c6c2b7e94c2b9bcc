"""What core/ does over two real gloo ranks, against one: attention, the loss, and a mixture of experts.

The ranks run all cases once; the tests read what they left behind.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_attention import DIM, GROUPS, HEADS, make_attention, packed
from test_moe import Chunk, moe_config
from test_step import Model, rows_of

from orpo_megatron.config import OrpoConfig
from orpo_megatron.metrics import METRICS
from orpo_megatron.segments import zigzag_positions

LENGTHS = (8, 4, 20)
SHARED = ((3, 5), (1, 4), (7, 11))  # the second has no rejected side
OBJECTIVE = OrpoConfig(beta=0.3)
PADDING = torch.tensor([False, False, True, False, True, True])
MICROBATCHES = 2


def attention_inputs() -> list[torch.Tensor]:
    """Returns query, key, value and the gradient of the output, of a whole row."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS, HEADS)]


def attend(inputs: list[torch.Tensor], cp: tuple[int, int] = (1, 0)) -> list[torch.Tensor]:
    """Returns the output and the gradients of query, key and value, of separate sequences and of shared prompts."""
    results = []
    for ends in (None, SHARED):
        *qkv, upstream = inputs
        qkv = [x.clone().requires_grad_() for x in qkv]
        output = make_attention()(*qkv, None, packed_seq_params=packed(LENGTHS, ends, cp))
        results += [output.detach(), *torch.autograd.grad(output, qkv, upstream)]
    return results


def step() -> dict[str, Any]:
    """Returns loss shares, metrics and the gradient of the weights of a step of three rows, the last one empty."""
    from orpo_megatron.core.step import make_forward_step

    rows, model = rows_of(7, sequence_multiple_of=4), Model()
    forward_step, iterator = make_forward_step(OBJECTIVE, lambda: len(rows)), iter(rows)
    shares, metrics = [], []
    for _ in rows:
        output, loss_function = forward_step(iterator, model)
        share, row_metrics = loss_function(output)
        share.backward()
        shares.append(share.detach())
        metrics.append({name: value.detach() for name, value in row_metrics.items()})
    return {"shares": shares, "metrics": metrics, "gradient": model.weights.grad}


def route(rank: int) -> dict[str, dict[str, float]]:
    """Returns the auxiliary losses of two microbatches as we and as Megatron-Core report them."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import moe_logging
    from megatron.core.transformer.moe.router import TopKRouter

    from orpo_megatron.core.moe_log import auxiliary_losses

    kinds = ["aux_loss", "seq_aux_loss", "global_aux_loss"]
    config = moe_config(
        moe_layer_freq=[1, 0, 1, 0],
        moe_router_load_balancing_type=kinds,
        moe_aux_loss_coeff=[0.1, 0.2, 0.3],
        moe_z_loss_coeff=1e-3,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    moe_logging.destroy_moe_metrics_tracker()
    for layer in (1, 3):
        router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
        router.set_layer_number(layer)
        generator = torch.Generator().manual_seed(layer)
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        for microbatch in range(MICROBATCHES):
            generator.manual_seed(10 * layer + 2 * microbatch + rank)  # tokens of its own for each rank
            router(torch.randn(6, 1, config.hidden_size, generator=generator))
    ours = [auxiliary_losses(config, MICROBATCHES) for _ in range(2)]
    assert ours[0] == ours[1]  # asking changes nothing
    theirs: dict[str, Any] = {}
    moe_logging.get_moe_metrics_tracker().report(
        1 / MICROBATCHES, 0, num_layers=4, moe_layer_freq=config.moe_layer_freq, total_loss_dict=theirs
    )
    return {"ours": ours[0], "megatron": {name: float(value) for name, value in theirs.items()}}


def masks() -> list[torch.Tensor | None]:
    """Returns the router's mask under sequence parallel, on the stage with the embedding and on a later one."""
    from orpo_megatron.core.moe import router_padding_mask

    config = moe_config(sequence_parallel=True, tensor_model_parallel_size=2, expert_tensor_parallel_size=1)
    return [router_padding_mask(PADDING, Chunk(pre_process), config) for pre_process in (True, False)]


def rank_main(rank: int, folder: str) -> None:
    """Runs all cases on one of two ranks, with one layout after another, and leaves the results in ``folder``."""
    from orpo_megatron import cpu

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cpu.activate()
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    held = zigzag_positions(LENGTHS, 2, rank)
    results["attention"] = attend([x[held] for x in attention_inputs()], (2, rank))
    results["step"] = step()
    results["auxiliary losses, context 2"] = route(rank)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    results["masks"] = masks()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    results["auxiliary losses, data 2"] = route(rank)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(megatron_on_cpu: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_context_parallel_attention(ranks: list[dict[str, Any]], one_rank: None) -> None:
    """Each rank has the output and the gradients of its own positions, those of keys and values added up."""
    whole = attend(attention_inputs())
    for rank, results in enumerate(ranks):
        held = zigzag_positions(LENGTHS, 2, rank)
        for ours, theirs in zip(results["attention"], whole, strict=True):
            torch.testing.assert_close(ours, theirs[held], rtol=0, atol=2e-6 * float(theirs.abs().max()))


def test_context_parallel_step(ranks: list[dict[str, Any]], one_rank: None) -> None:
    """Both ranks have the loss and the metrics of the whole row; their gradients are parts that add up."""
    whole = step()
    assert len(whole["shares"]) == 7 and float(whole["shares"][0]) > 0
    for results in (rank["step"] for rank in ranks):
        torch.testing.assert_close(results["shares"], whole["shares"], rtol=1e-6, atol=0)
        for ours, theirs in zip(results["metrics"], whole["metrics"], strict=True):
            for name in METRICS:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9)
    parts = [rank["step"]["gradient"] for rank in ranks]
    assert all(part.abs().min() > 0 for part in parts)
    torch.testing.assert_close(parts[0] + parts[1], whole["gradient"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["context 2", "data 2"])
def test_auxiliary_losses_are_those_that_megatron_logs(ranks: list[dict[str, Any]], layout: str) -> None:
    found = [rank[f"auxiliary losses, {layout}"] for rank in ranks]
    names = {"load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss"}
    assert found[0]["ours"] == found[1]["ours"] and set(found[0]["ours"]) == names
    assert found[0]["ours"] == pytest.approx(found[0]["megatron"], rel=1e-6)
    assert min(found[0]["ours"].values()) > 0.5


def test_router_masks_under_sequence_parallel(ranks: list[dict[str, Any]]) -> None:
    """The first stage gets the whole mask, which Megatron-Core cuts; a later one that of the rank's own tokens."""
    (first, later), (other_first, other_later) = (rank["masks"] for rank in ranks)
    assert first.tolist() == other_first.tolist() == [PADDING.tolist()]
    assert later.tolist() == [[False, False, True]]  # tensor rank 0 holds the first half of the tokens
    assert other_later.tolist() == [[False, True, True]]
