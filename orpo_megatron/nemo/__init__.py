"""ORPO for NeMo 2.x (``nemo.collections.llm``): ``nemo llm orpo --factory llama31_8b data.pairs.train=pairs.jsonl``.

NeMo-Run finds this package by its entry point ``nemo_run.cli``, so that ``nemo llm`` has the command ``orpo`` beside
``pretrain`` and ``finetune``. It needs an environment of its own (``make test-nemo``): nemo-toolkit 2.7, whose
Megatron-Core (0.15) is older than Megatron-Bridge's.
"""

from orpo_megatron.nemo.data import PreferenceDataModule
from orpo_megatron.nemo.finetune import orpo
from orpo_megatron.nemo.recipes import orpo_recipe

__all__ = ["PreferenceDataModule", "orpo", "orpo_recipe"]
