"""``nemo llm orpo``: an ORPO run in NeMo's own training loop."""

# Annotations are evaluated at once here: NeMo-Run reads them.

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from nemo.collections import llm
from nemo.lightning.pytorch.callbacks import PEFT

from nemo import lightning as nl
from orpo_megatron.agreement import Peers
from orpo_megatron.config import ConfigError, DataConfig, OrpoConfig, build_section
from orpo_megatron.console import rank, say
from orpo_megatron.data.prepare import Prepared, padding_of, prepare_data
from orpo_megatron.facts import file_facts, pair_facts, start_facts
from orpo_megatron.machine import use_machine
from orpo_megatron.metrics import count_pairs
from orpo_megatron.nemo.callback import OrpoMetrics
from orpo_megatron.nemo.commandline import readable
from orpo_megatron.nemo.data import PreferenceDataModule
from orpo_megatron.nemo.fit import check_model, check_peft, check_trainer, fit_model, prefix_conflict
from orpo_megatron.nemo.loss import register

#: How long a process waits for the others while the pairs are made tokens.
PREPARE_SECONDS = 600.0

readable(OrpoConfig)


# Optional[...] rather than a bar: NeMo-Run's parser of command lines knows no other form.
@run.cli.entrypoint(namespace="llm")
def orpo(
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: nl.Trainer,
    log: Annotated[Optional[nl.NeMoLogger], run.Config[nl.NeMoLogger]] = None,  # noqa: UP045
    resume: Annotated[Optional[nl.AutoResume], run.Config[nl.AutoResume]] = None,  # noqa: UP045
    optim: Optional[nl.OptimizerModule] = None,  # noqa: UP045
    peft: Optional[PEFT] = None,  # noqa: UP045
    objective: OrpoConfig = OrpoConfig(),  # noqa: B008  (frozen)
) -> Path:
    """Aligns a model by ORPO, as ``llm.finetune`` would fine-tune it.

    Args:
        model: A ``GPTModel`` of ``nemo.collections.llm``; its weights come by ``resume``.
        data: A ``PreferenceDataModule``.
        trainer: With a ``MegatronStrategy``. ``max_steps`` is the number of optimizer steps.
        log: NeMo's logger and checkpoints.
        resume: Where weights come from, and whether a run goes on.
        optim: Optimizer and schedule; by default the model's.
        peft: Adapters to train in place of the weights.
        objective: Weight and scope of the loss, and how the head works.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: If something does not fit, cannot be exact, or differs between the processes of torchrun.
    """
    use_machine()
    peers = Peers.join(PREPARE_SECONDS)
    objective = peers.settle(
        "checking of the settings",
        lambda: _check(model, data, trainer, peft, objective),
        lambda checked: start_facts(_settings(data, trainer, checked)),
    )
    cache_dir = Path(data.cache_dir)
    peers.settle("reading of the data files", lambda: None, lambda _: file_facts(data.pairs, cache_dir))
    prepared = peers.settle("tokenising and planning", lambda: _prepare(model, data, trainer, objective), pair_facts)
    data.use(prepared)
    changes = fit_model(model, trainer, prepared.plan.share_prefix)
    register(model, objective)
    lengths = prepared.eval_plan.lengths if prepared.eval_plan else None
    trainer.callbacks.append(OrpoMetrics(count_pairs(lengths.chosen, lengths.rejected) if lengths else {}))
    if rank() == 0:
        for line in (
            prepared.store.report.summary(),
            f"{prepared.plan.summary()}\nprompts      {prepared.prompts}",
            f"objective    beta {objective.beta:g}, NLL over {objective.nll_scope} by {objective.nll_reduction}",
            *changes,
        ):
            say(str(line))
    return llm.train(
        model=model, data=data, trainer=trainer, log=log, resume=resume, optim=optim, model_transform=peft
    )


def _check(model: Any, data: Any, trainer: nl.Trainer, peft: Any, objective: OrpoConfig) -> OrpoConfig:
    """Checks everything that was given; returns the objective as it was read strictly.

    Raises:
        ConfigError: If something does not fit, or cannot be exact.
    """
    if not isinstance(data, PreferenceDataModule):
        raise ConfigError(f"data ({type(data).__name__}) must be a PreferenceDataModule of orpo_megatron.nemo.")
    # Once more, strictly: NeMo-Run checks names, but not every value.
    data.pairs = build_section(DataConfig, dataclasses.asdict(data.pairs), "data.pairs")
    objective = build_section(OrpoConfig, dataclasses.asdict(objective), "objective")
    check_model(model)
    check_trainer(trainer, has_eval=data.pairs.eval is not None)
    check_peft(peft)
    return objective


def _settings(data: PreferenceDataModule, trainer: nl.Trainer, objective: OrpoConfig) -> dict[str, Any]:
    """Returns the settings that decide which pairs are trained on when, and by which loss."""
    return {
        "data": {"pairs": dataclasses.asdict(data.pairs), "seed": data.seed},
        "objective": dataclasses.asdict(objective),
        "trainer": {"max_steps": trainer.max_steps},
    }


def _prepare(model: Any, data: PreferenceDataModule, trainer: nl.Trainer, objective: OrpoConfig) -> Prepared:
    """Tokenises and plans the run, with one row count for training and evaluation."""
    strategy, config = trainer.strategy, model.config
    tp, cp = strategy.tensor_model_parallel_size, strategy.context_parallel_size
    precision: Any = getattr(strategy.precision_plugin, "dtype_config", None)
    fp8 = bool(getattr(precision, "fp8", None))
    prepared = prepare_data(
        data.pairs,
        tokenizer_name=_tokenizer_name(data, model),
        cache_dir=data.cache_dir,
        vocab_size=config.vocab_size,
        nll_scope=objective.nll_scope,
        seed=data.seed,
        num_steps=lambda num_pairs: trainer.max_steps,
        rows_multiple_of=_data_parallel_size(trainer),
        padding=padding_of(
            (tp if strategy.sequence_parallel and tp > 1 else 1) * cp,
            cp,
            fp8=fp8,
            mxfp8=fp8 and precision.fp8_recipe == "mxfp8",
            pad_to_multiple_of=data.pairs.pad_to_multiple_of,
        ),
        rows_per_step=None,
        prefix_conflict=prefix_conflict(config),
        on_gpu=torch.cuda.is_available(),
        show_progress=rank() == 0,
    )
    plan, eval_plan = prepared.plan, prepared.eval_plan
    if eval_plan is None or eval_plan.rows_per_step == plan.rows_per_step:
        return prepared
    # A step that fits some number of rows fits any larger one.
    rows = max(plan.rows_per_step, eval_plan.rows_per_step)
    if data.pairs.rows_per_step not in (None, rows):
        raise ConfigError(
            f"data.pairs.rows_per_step ({data.pairs.rows_per_step}) must be at least {rows}, which a step of the "
            "evaluation takes: NeMo has one global batch size for both. Raise it, or leave it out."
        )
    return dataclasses.replace(
        prepared,
        plan=dataclasses.replace(plan, rows_per_step=rows),
        eval_plan=dataclasses.replace(eval_plan, rows_per_step=rows),
    )


def _data_parallel_size(trainer: nl.Trainer) -> int:
    """Returns the number of replicas.

    Raises:
        ConfigError: If the ranks are no multiple of what a replica takes.
    """
    strategy, world_size = trainer.strategy, trainer.num_devices * trainer.num_nodes
    sizes = [getattr(strategy, f"{k}_size") for k in ("tensor_model_parallel", "pipeline_model_parallel")]
    tp, pp, cp = *sizes, strategy.context_parallel_size
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes ({world_size}) must be a multiple of tensor x pipeline x context "
            f"parallel size ({tp} x {pp} x {cp} = {tp * pp * cp})."
        )
    return int(world_size // (tp * pp * cp))


def _tokenizer_name(data: PreferenceDataModule, model: Any) -> str:
    """Returns the Hugging Face tokenizer that the pairs are made tokens by.

    Raises:
        ConfigError: If neither the data nor the model names one.
    """
    of_model = getattr(getattr(model.tokenizer, "tokenizer", None), "name_or_path", None)
    name = data.pairs.tokenizer or of_model
    if not name:
        raise ConfigError("data.pairs.tokenizer is missing: the model has no Hugging Face tokenizer yet. Name it.")
    return str(name)
