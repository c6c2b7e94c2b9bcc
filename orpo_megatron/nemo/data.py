"""Packed preference pairs as a Lightning data module, in plan order."""

# Annotations are evaluated at once here: NeMo-Run reads them.

from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches, update_num_microbatches
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from orpo_megatron.config import ConfigError, DataConfig
from orpo_megatron.data.dataset import PackedRows, collate_fn
from orpo_megatron.data.plan import StepPlan
from orpo_megatron.data.prepare import Prepared
from orpo_megatron.data.store import PairStore
from orpo_megatron.nemo.commandline import readable

readable(DataConfig)


class PreferenceDataModule(pl.LightningDataModule):
    """Preference pairs, packed into rows: a row is a microbatch, and NeMo's global batch size counts rows.

    ``orpo`` plans the rows before training starts.

    Attributes:
        pairs: Where the pairs come from and how they become global batches: the section ``data`` of a recipe.
        cache_dir: Folder for tokenised data.
        seed: Seed of the order of pairs.
        num_workers: Processes that load rows; they are made from memory-mapped tokens, so none is needed.
    """

    micro_batch_size = 1

    def __init__(
        self, pairs: DataConfig, cache_dir: str = "runs/cache", seed: int = 1234, num_workers: int = 0
    ) -> None:
        """Keeps the settings; nothing is read."""
        super().__init__()
        self.pairs, self.cache_dir, self.seed, self.num_workers = pairs, cache_dir, seed, num_workers

    @property
    def seq_length(self) -> int:
        """Token budget of a row."""
        return self.pairs.row_budget

    @property
    def global_batch_size(self) -> int:
        """Rows of a step."""
        return self.prepared.plan.rows_per_step

    def use(self, prepared: Prepared) -> None:
        """Takes the data and the plans of the run.

        Args:
            prepared: Their plans have one row count: NeMo knows one global batch size.
        """
        self.prepared = prepared
        self.data_sampler = MegatronDataSampler(
            seq_len=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            dataloader_type="single",
        )

    def train_dataloader(self) -> DataLoader:
        """Returns the rows of the run; NeMo's sampler goes on where a checkpoint stopped."""
        self.data_sampler.init_global_step = self.trainer.global_step
        return self._loader(self.prepared.store, self.prepared.plan, "train")

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Returns the rows of an evaluation, or none."""
        store, plan = self.prepared.eval_store, self.prepared.eval_plan
        return [] if store is None or plan is None else self._loader(store, plan, "validation")

    def _loader(self, store: PairStore, plan: StepPlan, mode: str) -> DataLoader:
        """Returns the rows of a plan in plan order; NeMo deals them out to data-parallel ranks."""
        return WrappedDataLoader(
            mode=mode,
            dataset=PackedRows(store, plan, store.pad_token_id),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate_fn,
        )

    def reconfigure_limit_batches(self) -> None:
        """Has NeMo read every row, and count in microbatches what Lightning would count in steps."""
        self.trainer.limit_train_batches = self.trainer.limit_val_batches = 1.0
        if self.prepared.eval_plan is None:
            self.trainer.limit_val_batches, self.trainer.val_check_interval = 0.0, 1.0
        self.trainer.num_sanity_val_steps *= get_num_microbatches()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: how far the run is, and what its rows follow from."""
        steps = self.trainer.global_step - self.data_sampler.init_global_step
        consumed = self.data_sampler.compute_consumed_samples(steps)
        return {"consumed_samples": consumed, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint stopped.

        Raises:
            ConfigError: If the checkpoint's pairs or rows are others.
        """
        for name, ours in self._identity().items():
            theirs = state_dict.get(name)
            if theirs != ours:
                raise ConfigError(
                    f"The checkpoint is of another run: there {name} was {theirs}, now it is {ours}. Give the data "
                    "and settings of that run to go on (data.pairs.rows_per_step fixes the rows), or another folder."
                )
        self.data_sampler.init_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.prev_consumed_samples = state_dict["consumed_samples"]
        update_num_microbatches(state_dict["consumed_samples"], consistency_check=False)
        self.data_sampler.if_first_step = 1

    def _identity(self) -> dict[str, Any]:
        """Returns what decides which pairs lie in which step and row."""
        plan = self.prepared.plan
        return {
            "content_hash": self.prepared.store.content_hash,
            "pairs_per_step": plan.order.pairs_per_step,
            "seed": plan.order.seed,
            "rows_per_step": plan.rows_per_step,
        }
