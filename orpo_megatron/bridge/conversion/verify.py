"""Whether a converted model is the same: logits of text in transformers and in Megatron, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_megatron.batch import PackedRow
from orpo_megatron.bridge.conversion.load import load_checkpoint_model, one_process
from orpo_megatron.config import ConfigError
from orpo_megatron.core.row import row_params
from orpo_megatron.data.sources import first_line

#: Largest difference that passes, as a part of the largest logit. The two sides differ in the order of fp32 sums.
BOUND = 1e-4
MAX_TOKENS = 256
#: Without any of them transformers makes an empty tokenizer of some architectures.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Verdict:
    """How far the logits of two models are apart.

    Attributes:
        error: Largest absolute difference of two logits.
        largest: Largest absolute logit in transformers.
        other_tokens: Positions at which the likeliest next token differs.
        num_tokens: Positions compared.
    """

    error: float
    largest: float
    other_tokens: int
    num_tokens: int

    @property
    def passed(self) -> bool:
        """Whether the two are one model."""
        return self.error <= BOUND * self.largest

    def __str__(self) -> str:
        """Returns the verdict in one line."""
        return (
            f"{'PASS' if self.passed else 'FAIL'}: logits of {self.num_tokens} tokens differ by at most "
            f"{self.error:.1e} (bound {BOUND * self.largest:.1e}, {BOUND:g} of the largest, {self.largest:.1f}); the "
            f"likeliest next token differs at {self.other_tokens}."
        )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[torch.Tensor]:
    """Returns the token ids of each text, int64 [t], at most ``MAX_TOKENS`` of them."""
    return [tokenizer(text, return_tensors="pt").input_ids[0, :MAX_TOKENS] for text in texts]


def load_tokenizer_of(model: str, trust_remote_code: bool) -> Any:
    """Loads a model's own tokenizer.

    Raises:
        ConfigError: If it has none.
    """
    try:
        if Path(model).is_dir() and not any(any(Path(model).glob(name)) for name in _TOKENIZER_FILES):
            raise OSError(f"There is none of {', '.join(_TOKENIZER_FILES)}")
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"--verify needs text as the model sees it, but {model} has no tokenizer that can be loaded: "
            f"{first_line(error)} Put one there, or leave --verify out."
        ) from error


@torch.no_grad()
def hf_logits(folder: str, tokens: Sequence[torch.Tensor], dtype: torch.dtype, trust: bool) -> list[torch.Tensor]:
    """Runs a Hugging Face model.

    Args:
        folder: Folder or id.
        tokens: Token ids of each text, int64 [t].
        dtype: What its weights are rounded to; it computes in fp32.
        trust: Whether to run code that comes with it.

    Returns:
        Logits of each text, fp32 [t, v].
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust).eval()
    _round(model, dtype)
    model.to(_device())
    return [model(ids[None].to(_device())).logits[0].float().cpu() for ids in tokens]


@torch.no_grad()
def megatron_logits(checkpoint: Path, tokens: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Runs a Megatron checkpoint on one process; arguments and result as ``hf_logits``."""
    with one_process():
        (model,) = load_checkpoint_model(checkpoint, torch.float32)
        _round(model.eval(), dtype)
        model.to(_device())
        return [_forward(model, ids).float().cpu() for ids in tokens]


def _forward(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits of one text, [t, v]."""
    length = torch.tensor([len(ids)])
    none = ids.new_empty(0)
    row = PackedRow(
        tokens=ids,
        position_ids=torch.arange(len(ids)),
        padding_mask=torch.zeros(len(ids), dtype=torch.bool),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        prompt_ends=length,
        chosen_ends=length,
        score_positions=none,
        score_labels=none,
        score_is_response=none.bool(),
        score_lengths=torch.tensor([0]),
        num_scored_tokens=torch.tensor([0]),
        num_response_tokens=torch.tensor([0]),
        pair_ids=none,
        num_nll_tokens=0,
        num_pairs=0,
    ).to(_device())
    # Transformer Engine attends to packed rows in bf16 and fp16 only; one text alone is causal without.
    packed = None if torch.cuda.is_available() else row_params(row, "cpu")
    logits = model(
        input_ids=row.tokens[None], position_ids=row.position_ids[None], attention_mask=None, packed_seq_params=packed
    )
    return logits[0]


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Rounds a model's weights to ``dtype`` and keeps them in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def compare(hf: str, checkpoint: Path, tokens: Sequence[torch.Tensor], dtype: torch.dtype, trust: bool) -> Verdict:
    """Compares a Hugging Face model and a Megatron checkpoint.

    Args:
        hf: Folder or id.
        checkpoint: The folder of one checkpoint.
        tokens: Token ids of each text, int64 [t].
        dtype: What the converted weights are stored as; both sides are rounded to it, and compute in fp32.
        trust: Whether to run code that comes with the Hugging Face model.
    """
    theirs = hf_logits(hf, tokens, dtype, trust)
    gc.collect()  # the model goes before the other one comes
    ours = megatron_logits(checkpoint, tokens, dtype)
    return judge(theirs, ours)


def judge(theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> Verdict:
    """Compares logits, fp32 [t, v] of each text; columns that pad the vocabulary on our side are left out."""
    pairs = [(right, left[:, : right.shape[1]]) for right, left in zip(theirs, ours, strict=True)]
    return Verdict(
        # a tensor's maximum, since Python's passes over NaN
        error=float(torch.stack([(right - left).abs().max() for right, left in pairs]).max()),
        largest=float(torch.stack([right.abs().max() for right, _ in pairs]).max()),
        other_tokens=sum(int((right.argmax(-1) != left.argmax(-1)).sum()) for right, left in pairs),
        num_tokens=sum(len(right) for right, _ in pairs),
    )
