"""Models that come and go in one process group: a recipe's model, one global batch through it, its gradients.

Two such sessions, one after the other, tell whether two shardings of a recipe are one model (``bridge/parity.py``).
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.initialize import destroy_global_state
from megatron.bridge.training.setup import setup
from megatron.bridge.training.state import GlobalState
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, is_main_replica
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config, unwrap_model
from transformers import PretrainedConfig

from orpo_megatron.batch import PackedRow
from orpo_megatron.bridge.container import PreferenceData, make_container
from orpo_megatron.bridge.model import make_bridge, make_provider
from orpo_megatron.bridge.parity import (
    Comparison,
    GradientError,
    gradient_errors,
    merge_shards,
    metric_errors,
)
from orpo_megatron.bridge.recipe import Recipe
from orpo_megatron.bridge.train import finalise
from orpo_megatron.config import OrpoConfig
from orpo_megatron.console import rank
from orpo_megatron.core.ranks import from_all_ranks, on_rank_0
from orpo_megatron.core.step import make_forward_step
from orpo_megatron.metrics import METRICS, count_pairs, evaluation_metrics

Shards = dict[str, torch.Tensor]
_ADAPTER_STD = 0.02


class Session:
    """A recipe's model under its sharding, set up by Bridge as for training, without data, checkpoints and loggers.

    A context manager. It uses the torch process group that is there, or makes it and leaves it to the next session;
    everything else, memory above all, is given back at the end.
    """

    def __init__(
        self,
        recipe: Recipe,
        hf_config: PretrainedConfig,
        rows_per_step: int,
        num_steps: int = 1,
        share_prefix: bool = False,
    ) -> None:
        """Prepares a session; nothing is built before it is entered.

        Args:
            recipe: The recipe, its weights' source and all.
            hf_config: The model's Hugging Face configuration.
            rows_per_step: Rows of a global batch, a multiple of the data-parallel size.
            num_steps: Steps of the run, which the schedule is checked against.
            share_prefix: Whether rows hold the prompt of a pair once.
        """
        self.recipe, self.hf_config = recipe, hf_config
        self.rows_per_step, self.num_steps, self.share_prefix = rows_per_step, num_steps, share_prefix

    def __enter__(self) -> Session:
        """Builds the model and loads its weights.

        Raises:
            ConfigError: If a setting does not fit.
        """
        container = self._container()
        finalise(container, self.recipe)
        state = GlobalState()
        state.cfg = container
        self._setup = setup(state, lambda num_samples, dataset: (None, None, None))
        self.model: list[Any] = self._setup.model
        for chunk in self.model:
            chunk.train()
        return self

    def __exit__(self, *exception: object) -> None:
        """Frees the model and forgets the sharding."""
        for chunk in self.model:
            # Autograd holds hooks that hold the wrapper, out of the garbage collector's sight: let it hold nothing.
            vars(chunk).clear()
        del self.model, self._setup
        if exception[0] is None:  # else the other ranks may be anywhere
            dist.barrier()
            # Megatron only forgets its groups, and over NCCL each of them keeps memory on the GPU. The first of the
            # list stands for the group of all ranks, which stays.
            for group in (parallel_state._global_process_group_list or [])[1:]:
                dist.destroy_process_group(group)
        destroy_global_state()
        gc.collect()  # buckets, hooks and parameters refer to one another
        torch.cuda.empty_cache()

    def _container(self) -> ConfigContainer:
        """Returns Bridge's configuration; weights come from where a run's would."""
        recipe = self.recipe
        from_checkpoint = bool(recipe.sections.get("peft")) or recipe.setting("checkpoint.pretrained_checkpoint")
        bridge = make_bridge(recipe, self.hf_config)
        provider = make_provider(recipe, bridge, load_weights=not from_checkpoint, share_prefix=self.share_prefix)
        dataset = PreferenceData(
            seq_length=recipe.data.row_budget, rows_per_step=self.rows_per_step, content_hash="", pin_memory=False
        )
        container = make_container(recipe, provider, dataset, num_steps=self.num_steps, eval_plan=None)
        container.checkpoint.save = container.checkpoint.load = container.logger.tensorboard_dir = None
        return container

    def run(self, rows: Sequence[PackedRow], objective: OrpoConfig, *, replicate: bool = False) -> dict[str, float]:
        """Runs one global batch forward and backward; gradients are then reduced, and whole on every rank.

        Args:
            rows: All rows of the global batch, the same on every rank.
            objective: The loss.
            replicate: Have every data-parallel replica run all rows. Counts grow with the replicas, so that the mean
                of their gradients is the gradient of one process that runs all rows.

        Returns:
            The metrics of the global batch by name, on every rank.
        """
        if replicate:
            replicas = parallel_state.get_data_parallel_world_size()
            mine = [
                replace(row, num_pairs=replicas * row.num_pairs, num_nll_tokens=replicas * row.num_nll_tokens)
                for row in rows
            ]
        else:
            mine = _of_this_replica(rows)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        losses = self._microbatches(mine, objective, forward_only=False)
        self._gather_gradients()
        return self._metrics(losses, tuple(METRICS))

    def evaluate(self, rows: Sequence[PackedRow], objective: OrpoConfig) -> dict[str, float]:
        """Runs rows forward alone, as an evaluation does.

        Args:
            rows: All rows, the same on every rank.
            objective: The loss.

        Returns:
            The metrics over all pairs by name, those by length included, on every rank.
        """
        lengths = torch.cat([row.num_response_tokens[: 2 * len(row.pair_ids)] for row in rows]).numpy()
        for chunk in self.model:
            chunk.eval()
        with torch.no_grad():
            losses = self._microbatches(_of_this_replica(rows), objective, forward_only=True)
        for chunk in self.model:
            chunk.train()
        return self._metrics(losses, evaluation_metrics(count_pairs(lengths[0::2], lengths[1::2])))

    def _microbatches(
        self, rows: list[PackedRow], objective: OrpoConfig, *, forward_only: bool
    ) -> list[dict[str, torch.Tensor]]:
        """Runs this replica's rows through Megatron-Core's schedule; returns the metrics of each microbatch."""
        groups, config = self._setup.pg_collection, get_model_config(self.model[0])
        iterators = [iter(rows) for _ in self.model]
        schedule = get_forward_backward_func(
            pp_size=groups.pp.size(), vp_size=config.virtual_pipeline_model_parallel_size
        )
        return schedule(
            forward_step_func=make_forward_step(objective, lambda: len(rows)),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model,
            num_microbatches=len(rows),
            seq_length=self.recipe.data.row_budget,
            decoder_seq_length=self.recipe.data.row_budget,
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=config),
            pg_collection=groups,
        )

    def _metrics(self, losses: list[dict[str, torch.Tensor]], names: Sequence[str]) -> dict[str, float]:
        """Sums [sum, count] pairs over microbatches and ranks, as Bridge does."""
        totals = {}
        for name in losses[0] if losses else ():  # there are none but on the last pipeline stage
            total = torch.stack([loss[name] for loss in losses]).sum(dim=0)
            dist.all_reduce(total, group=self._setup.pg_collection.dp_cp)
            totals[name] = total[0] / total[1]
        return on_rank_0(totals, names)

    def _gather_gradients(self) -> None:
        """Completes buckets of which the distributed optimizer's reduce-scatter left a shard on each rank."""
        for chunk in self.model:
            if not chunk.ddp_config.use_distributed_optimizer:
                continue
            for buckets in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group = buckets.intra_distributed_optimizer_instance_group
                for bucket in buckets.buckets:
                    shard = shard_buffer(bucket.grad_data, group.size())[group.rank()]
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)

    def _sharded(self, value: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, ShardedBase]:
        """Describes a value for each trainable parameter as a checkpoint would describe the parameter.

        Returns:
            The parameter's name in a checkpoint, with global layer and expert numbers, -> its shard on this rank.
        """
        found = {}
        for chunk in unwrap_model(self.model):
            described = chunk.sharded_state_dict(metadata={"singleton_local_shards": True})
            trainable = {id(parameter) for parameter in chunk.parameters() if parameter.requires_grad}
            for entry in nested_values(described):
                if id(entry.data) in trainable:
                    trainable.discard(id(entry.data))
                    data = value(entry.data)
                    dtype = {"dtype": data.dtype} if isinstance(entry, ShardedTensor) else {}
                    found[entry.key] = replace(entry, data=data, **dtype)
            names = [name for name, parameter in chunk.named_parameters() if id(parameter) in trainable]
            assert not names, f"{names} are trained but no part of a checkpoint"
        return found

    def trainable(self) -> set[str]:
        """Returns the names of the trainable parameters of all ranks."""
        return set().union(*from_all_ranks(set(self._sharded(lambda parameter: parameter))))

    def save_gradients(self, folder: Path) -> None:
        """Writes the gradients of the last batch as a distributed checkpoint, fp32; each shard is written once."""
        _save(self._sharded(_gradient), folder)

    def load_gradients(self, folder: Path, names: Collection[str]) -> Shards:
        """Reads the reference's gradients as this session shards them.

        Args:
            folder: From ``save_gradients``, on a file system that all ranks share.
            names: Parameters that the reference has.

        Returns:
            This rank's shard of each parameter, fp32, in host memory: a GPU may have no room for it.
        """
        empty = self._sharded(lambda parameter: torch.empty(parameter.shape, dtype=torch.float32, device="cpu"))
        return _load({name: entry for name, entry in empty.items() if name in names}, folder)

    def gradient_errors(self, reference: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Returns the relative error of each parameter, see ``parity.gradient_errors``; else as ``differences``."""
        return gradient_errors(self.differences(reference))

    def differences(self, reference: Mapping[str, torch.Tensor]) -> dict[str, GradientError]:
        """Compares the gradients of the last batch with the reference's, on every shard and replica.

        Args:
            reference: From ``load_gradients``.

        Returns:
            Name -> error over all ranks.
        """
        shards = {}
        for name, entry in self._sharded(_gradient).items():
            if name in reference:
                right = reference[name].to(entry.data.device)
                off, counted = entry.data - right, is_main_replica(entry.replica_id)
                difference = off.abs().max().item()
                # A NaN is no number to be close to, and max() would lose it.
                shards[name] = GradientError(
                    difference=math.inf if math.isnan(difference) else difference,
                    largest=right.abs().max().item(),
                    square_sum=_square_sum(right) if counted else 0.0,
                    difference_square_sum=_square_sum(off) if counted else 0.0,
                )
        return merge_shards(from_all_ranks(shards))

    def draw_zero_weights(self) -> None:
        """Draws weights for adapters that start at zero, so that those before them get a gradient as well."""
        for chunk in self.model:
            for parameter in chunk.parameters():
                if parameter.requires_grad and not parameter.any():
                    torch.nn.init.normal_(parameter, std=_ADAPTER_STD)

    def save_weights(self, folder: Path) -> None:
        """Writes the trainable weights as a distributed checkpoint."""
        _save(self._sharded(lambda parameter: parameter.detach()), folder)

    def load_weights(self, folder: Path, names: Collection[str]) -> None:
        """Reads the trainable weights that ``names`` lists, whatever the sharding that wrote them."""
        empty = self._sharded(lambda parameter: torch.empty_like(parameter))
        loaded = _load({name: entry for name, entry in empty.items() if name in names}, folder)
        for name, entry in self._sharded(lambda parameter: parameter.detach()).items():
            if name in loaded:
                entry.data.copy_(loaded[name])


def compare(
    recipe: Recipe,
    rows: Sequence[PackedRow],
    reference: Recipe,
    reference_rows: Sequence[PackedRow],
    hf_config: PretrainedConfig,
    *,
    num_steps: int,
    folder: Path,
    bound: float,
    exact: bool,
) -> Comparison:
    """Runs one global batch under a reference sharding and under a recipe's own.

    Args:
        recipe: The recipe in question.
        rows: The batch as the recipe packs it.
        reference: The same recipe under the sharding that is right.
        reference_rows: The batch as the reference packs it. Every data-parallel replica runs all of it.
        hf_config: The model's Hugging Face configuration.
        num_steps: Steps of the run.
        folder: Scratch folder on a file system that all ranks share; it is removed.
        bound: Largest error that passes.
        exact: Whether both compute in fp32.

    Returns:
        The comparison, on every rank.

    Raises:
        ConfigError: If a sharding does not fit.
    """
    # Adapters are drawn at random, differently for each sharding; all other weights come from files.
    adapters = bool(recipe.sections.get("peft"))
    replicas = reference.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    with _scratch(folder):
        shared = any(row.shares_prefix for row in reference_rows)
        with Session(reference, hf_config, len(reference_rows) * replicas, num_steps, shared) as session:
            names = session.trainable()
            if adapters:
                session.draw_zero_weights()
                session.save_weights(folder / "weights")
                session.load_weights(folder / "weights", names)  # what replicas drew differs
            expected = session.run(reference_rows, recipe.orpo, replicate=True)
            session.save_gradients(folder / "gradients")
        shared = any(row.shares_prefix for row in rows)
        with Session(recipe, hf_config, len(rows), num_steps, shared) as session:
            unmatched = names ^ session.trainable()
            if adapters:
                session.load_weights(folder / "weights", names)
            metrics = session.run(rows, recipe.orpo)
            gradients = session.gradient_errors(session.load_gradients(folder / "gradients", names))
    return Comparison(
        reference=expected,
        metrics=metrics,
        metric_errors=metric_errors(expected, metrics, recipe.orpo.beta),
        gradient_errors=gradients,
        unmatched=tuple(sorted(unmatched)),
        bound=bound,
        exact=exact,
    )


def _of_this_replica(rows: Sequence[PackedRow]) -> list[PackedRow]:
    """Returns the rows of this data-parallel replica."""
    replicas = parallel_state.get_data_parallel_world_size()
    return list(rows[parallel_state.get_data_parallel_rank() :: replicas])


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns the reduced gradient in fp32."""
    return parameter.main_grad.float()  # type: ignore[attr-defined]


def _square_sum(values: torch.Tensor) -> float:
    """Returns the sum of squares, added up in fp64."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2


def _save(sharded: dict[str, ShardedBase], folder: Path) -> None:
    """Writes shards to a new folder; only what each rank is the main replica of."""
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded, str(folder))


def _load(sharded: dict[str, ShardedBase], folder: Path) -> Shards:
    """Reads shards as they are described; several ranks may read the same one."""
    names = set(sharded)
    loaded = dist_checkpointing.load(sharded, str(folder), validate_access_integrity=False)
    return {name: loaded[name] for name in names}


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Removes the folder in the end, whatever happens."""
    try:
        yield
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
