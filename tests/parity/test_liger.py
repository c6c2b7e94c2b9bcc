"""Liger's own ORPO loss beside ours, and what Liger and TRL do otherwise: the pins of docs/conventions.md.

Liger's conventions (0.8.5), reproduced here by settings: a padded batch holds the chosen sequences, then the rejected
ones; labels are shifted by the caller, and -100 is not scored. Log-probs are averaged over the labels of ``target``,
here those of the response. The NLL covers the same labels of the chosen half (``nll_scope: response``), or those of
``nll_target``. Both terms are divided by the tokens and pairs of the batch that Liger is given.

A pin states what a peer does today, with figures; where one fails after an update, correct docs/conventions.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import pytest
import torch

from orpo_megatron.batch import PackedRow
from orpo_megatron.data.rows import Message, PreferenceRow
from orpo_megatron.data.tokens import Limits, encode_pairs
from orpo_megatron.logps import vocab_parallel_logps
from orpo_megatron.loss import EPSILON, OrpoLoss, PairLogps, log_odds_ratio, odds_ratio_loss, orpo_loss
from orpo_megatron.metrics import averages, step_metrics
from orpo_megatron.segments import pair_logps

liger_orpo = pytest.importorskip("liger_kernel.chunked_loss.orpo_loss", reason="Liger is not installed")

BOUND = 1e-5
IGNORED = -100
VOCAB, WIDTH = 97, 16
UNEVEN = [(3, 2, 9), (1, 30, 4), (12, 1, 1), (5, 17, 40), (8, 6, 23)]  # tokens of prompt, chosen and rejected
END = 2  # SmolLM2's <|im_end|>
Pair = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class PaddedBatch:
    """What Liger is given: hidden states [2 * pairs, s, h], weight [v, h] and shifted labels [2 * pairs, s]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    whole_target: torch.Tensor

    def rows(self, pairs: slice) -> "PaddedBatch":
        """The batch of some of the pairs."""
        half = len(self.hidden) // 2
        index = torch.cat([torch.arange(half)[pairs], torch.arange(half, 2 * half)[pairs]])
        return PaddedBatch(self.hidden[index], self.weight, self.target[index], self.whole_target[index])


def random_pairs(lengths: list[tuple[int, int, int]]) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=generator).tolist()

    return [(draw(prompt), draw(chosen), draw(rejected)) for prompt, chosen, rejected in lengths]


def padded(pairs: list[Pair], hidden: torch.Tensor | None = None, weight: torch.Tensor | None = None) -> PaddedBatch:
    """Lays pairs out for Liger; hidden states and weight are drawn at random where they are not given."""
    generator = torch.Generator().manual_seed(1)
    sequences = [(p, p + c) for p, c, _ in pairs] + [(p, p + r) for p, _, r in pairs]
    longest = max(len(ids) for _, ids in sequences)
    target = torch.full((len(sequences), longest), IGNORED)
    whole_target = target.clone()
    for row, (prompt, ids) in enumerate(sequences):
        whole_target[row, : len(ids) - 1] = torch.tensor(ids[1:])
        target[row, len(prompt) - 1 : len(ids) - 1] = torch.tensor(ids[len(prompt) :])
    if hidden is None:
        hidden = torch.randn(*target.shape, WIDTH, generator=generator)
    if weight is None:
        weight = torch.randn(VOCAB, WIDTH, generator=generator) / 2
    return PaddedBatch(hidden.requires_grad_(), weight.requires_grad_(), target, whole_target)


def liger(batch: PaddedBatch, beta: float, nll_scope: str = "response", **settings: Any) -> tuple[torch.Tensor, Any]:
    """Liger's loss and what it returns beside it."""
    loss = liger_orpo.LigerFusedLinearORPOLoss(beta=beta, compiled=False, **settings)
    nll_target = batch.whole_target if nll_scope == "prompt_and_response" else None
    return loss(batch.weight, batch.hidden, batch.target, nll_target=nll_target)


def ours(batch: PaddedBatch, row: PackedRow, beta: float) -> tuple[PairLogps, OrpoLoss]:
    """The same hidden states through our head's log-probs, sums and loss, without padding."""
    half = len(batch.hidden) // 2
    order = [side * half + pair for pair in range(half) for side in (0, 1)]
    lengths = row.cu_seqlens.diff().tolist()
    hidden = torch.cat([batch.hidden[i, :length] for i, length in zip(order, lengths, strict=True)])
    logits = hidden[row.score_positions] @ batch.weight.T
    logps = pair_logps(vocab_parallel_logps(logits, row.score_labels), row)
    loss = orpo_loss(
        logps, beta=beta, nll_reduction="tokens", num_nll_tokens=row.num_nll_tokens, num_pairs=row.num_pairs
    )
    return logps, loss


def gradients(loss: torch.Tensor, batch: PaddedBatch) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [batch.hidden, batch.weight]))


def assert_near(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Within `BOUND` of the value itself, or of ``scale`` where the value is a difference."""
    beyond = (found - expected).abs() - BOUND * (expected if scale is None else scale).abs()
    worst = beyond.argmax()  # of a NaN, where there is one
    assert (beyond <= 0).all(), f"{found.flatten()[worst].item()} against {expected.flatten()[worst].item()}"


def assert_same(batch: PaddedBatch, row: PackedRow, nll_scope: str, beta: float, chunk_size: int) -> None:
    """Loss, all that Liger returns, and gradients, with an upstream gradient other than 1."""
    loss, (chosen, rejected, _, _, nll, *pieces) = liger(batch, beta, nll_scope, chunk_size=chunk_size)
    logps, result = ours(batch, row, beta)
    means = averages(step_metrics(result, logps, beta))
    largest = torch.maximum(chosen.abs(), rejected.abs())
    assert_near(logps.chosen_logps, chosen)
    assert_near(logps.rejected_logps, rejected)
    assert_near(result.loss, loss)
    assert means["loss"] == pytest.approx(loss.item(), rel=BOUND)
    assert means["nll_loss"] == pytest.approx(nll.item(), rel=BOUND)
    chosen_rewards, rejected_rewards, log_odds_ratios, log_odds_chosen = pieces
    assert means["rewards/chosen"] == pytest.approx(chosen_rewards.mean().item(), rel=BOUND)
    assert means["rewards/rejected"] == pytest.approx(rejected_rewards.mean().item(), rel=BOUND)
    scale = BOUND * largest.mean().item()
    assert means["log_odds_ratio"] == pytest.approx(log_odds_ratios.item(), abs=scale)
    assert means["log_odds_chosen"] == pytest.approx(log_odds_chosen.item(), abs=scale)
    for found, expected in zip(gradients(3 * result.loss, batch), gradients(3 * loss, batch), strict=True):
        assert_near(found, expected, scale=expected.abs().max())


@pytest.mark.parametrize("nll_scope", ["response", "prompt_and_response"])
@pytest.mark.parametrize(("beta", "chunk_size"), [(0.1, 1), (2.0, 2), (0.0, 5)])
def test_common_ground(nll_scope: str, beta: float, chunk_size: int, packed_row: Callable) -> None:
    """Random hidden states of uneven pairs, of prompts and responses down to one token."""
    pairs = random_pairs(UNEVEN)
    assert_same(padded(pairs), packed_row(pairs, nll_scope), nll_scope, beta, chunk_size)


def test_odds_ratio_term_alone(packed_row: Callable) -> None:
    """Liger's ``compute_nll_loss=False`` is our loss without its NLL, also in the gradient."""
    pairs = random_pairs(UNEVEN)
    batch, row = padded(pairs), packed_row(pairs, "response")
    loss, _ = liger(batch, beta=0.5, compute_nll_loss=False)
    logps, _ = ours(batch, row, beta=0.5)
    term = 0.5 * odds_ratio_loss(logps.chosen_logps, logps.rejected_logps).mean()
    assert_near(term, loss)
    for found, expected in zip(gradients(term, batch), gradients(loss, batch), strict=True):
        assert_near(found, expected, scale=expected.abs().max())


def test_real_pairs(trainer: Any, real_pairs: Callable, trl_batch: Callable, packed_row: Callable) -> None:
    """Real pairs and SmolLM2's vocabulary, hidden states of TRL's model: Liger, TRL and we find the same."""
    pairs = real_pairs("dpo_en_demo.sharegpt.json")[:4]
    batch = trainer.concatenated_inputs(trl_batch(pairs), padding_value=END)
    ids, mask = batch["concatenated_input_ids"], batch["concatenated_attention_mask"]
    with torch.no_grad():
        trl_loss, _ = trainer.get_batch_loss_metrics(trainer.model, trl_batch(pairs))
        hidden = trainer.model.model(ids, attention_mask=mask).last_hidden_state
    inputs = padded(pairs, hidden, trainer.model.lm_head.weight.detach().clone())
    row = packed_row(pairs, "prompt_and_response")
    assert_same(inputs, row, "prompt_and_response", trainer.beta, chunk_size=1)
    assert_near(ours(inputs, row, trainer.beta)[1].loss, trl_loss)


def edge(odds: Callable, l_c: float, l_r: float) -> list[float]:
    """Odds-ratio loss of one pair and its gradients for chosen and rejected, as ``odds`` has them."""
    chosen, rejected = torch.tensor([l_c]).requires_grad_(), torch.tensor([l_r]).requires_grad_()
    loss = odds(chosen, rejected)
    return [value.item() for value in (loss, *torch.autograd.grad(loss.sum(), [chosen, rejected]))]


def liger_odds(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    one_pair = torch.zeros(2, 1)  # of which Liger reads the number of pairs
    return liger_orpo.LigerFusedLinearORPOFunction.preference_loss_fn(chosen, rejected, one_pair, beta=1.0)[0]


def trl_odds(trainer: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda chosen, rejected: -trainer.odds_ratio_loss(chosen, rejected)[0] / trainer.beta


def truth(l_c: float, l_r: float) -> list[float]:
    """The textbook formulas in 60 digits with no floor; at p = 1 their limits."""
    with mpmath.workdps(60):
        c, r = (mpmath.mpf(torch.tensor(value).item()) for value in (l_c, l_r))
        p_c, p_r, q_c, q_r = mpmath.exp(c), mpmath.exp(r), -mpmath.expm1(c), -mpmath.expm1(r)
        d = p_r * q_c + p_c * q_r
        d_rejected = p_r * q_c / (q_r * d) if q_r else mpmath.inf
        loss = mpmath.log(d / (p_c * q_r)) if q_r else mpmath.inf
        return [float(loss), float(-p_r / d), float(d_rejected)]


def test_near_certain_pair_is_a_percent_off_in_liger(trainer: Any) -> None:
    """At l = -1e-6 fp32 holds 1 - exp(l) to 6%: Liger takes it from there, TRL and we from expm1."""
    for l_c, l_r in [(-1e-6, -1.0), (-1.0, -1e-6)]:
        expected = truth(l_c, l_r)
        assert edge(odds_ratio_loss, l_c, l_r) == pytest.approx(expected, rel=BOUND)
        assert edge(trl_odds(trainer), l_c, l_r) == pytest.approx(expected, rel=BOUND)
        found = edge(liger_odds, l_c, l_r)
        # 1.3% here; the last bit of exp decides, and another processor may round it down to 5%.
        assert 0.01 < abs(found[2] / expected[2] - 1) < 0.06
    assert 0.01 < abs(edge(liger_odds, -1e-6, -1.0)[0] / truth(-1e-6, -1.0)[0] - 1) < 0.06


@pytest.mark.parametrize("certain", [-1e-8, 0.0])
def test_certain_chosen_response(certain: float, trainer: Any) -> None:
    """p_chosen = 1: the gradient has the limit -odds_rejected, which we find; theirs is NaN beside a finite loss."""
    loss, d_chosen, d_rejected = truth(certain, -1.0)
    assert d_chosen == pytest.approx(-0.581977, abs=1e-6)
    found = edge(odds_ratio_loss, certain, -1.0)
    assert found[1] == pytest.approx(d_chosen, rel=BOUND)
    # Below the floor these two are what they are at the floor: as good as 0.
    assert found[0] == pytest.approx(loss, abs=1e-7) and found[2] == pytest.approx(d_rejected, abs=1e-7)
    for odds in (liger_odds, trl_odds(trainer)):
        loss_, d_chosen_, _ = edge(odds, certain, -1.0)
        assert loss_ == pytest.approx(loss, abs=1e-8) and math.isnan(d_chosen_)


@pytest.mark.parametrize(("certain", "trl_loss"), [(-1e-8, 18.962006), (0.0, float("inf"))])
def test_certain_rejected_response(certain: float, trl_loss: float, trainer: Any) -> None:
    """p_rejected = 1: the true gradient grows as 1 / (1 - p). Ours is capped; Liger's is infinite, TRL's NaN."""
    loss, d_chosen, d_rejected = edge(odds_ratio_loss, -1.0, certain)
    assert loss == pytest.approx(17.176857, abs=1e-5)  # what it is at the floor
    assert d_chosen == pytest.approx(truth(-1.0, certain)[1] if certain else -1.581977, rel=BOUND)
    assert d_rejected == pytest.approx(1 / EPSILON, rel=BOUND)
    assert edge(liger_odds, -1.0, certain)[::2] == [float("inf")] * 2
    loss, _, d_rejected = edge(trl_odds(trainer), -1.0, certain)
    assert loss == pytest.approx(trl_loss, rel=BOUND) and math.isnan(d_rejected)


def test_one_certain_pair_spoils_ligers_whole_step(packed_row: Callable) -> None:
    """Weight and hidden states such that one chosen response of five has p = 1: no gradient of the weight is left."""
    pairs = random_pairs(UNEVEN)
    drawn, row = padded(pairs), packed_row(pairs, "response")
    prompt, chosen, _ = UNEVEN[3]
    scored = slice(prompt - 1, prompt + chosen - 1)
    hidden = drawn.hidden.detach().clone()
    rows = drawn.weight.detach()[drawn.target[3, scored]]
    hidden[3, scored] = 100 * rows / rows.norm(dim=1, keepdim=True)
    batch = padded(pairs, hidden, drawn.weight.detach() / drawn.weight.detach().norm(dim=1, keepdim=True))
    logps, result = ours(batch, row, beta=0.1)
    loss, (chosen_logps, *_) = liger(batch, beta=0.1)
    assert chosen_logps[3] > -EPSILON and logps.chosen_logps[3] == chosen_logps[3]
    assert_near(result.loss, loss)
    assert gradients(loss, batch)[1].isnan().all()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(result.loss, batch))


def test_denominators_of_liger(packed_row: Callable) -> None:
    """Microbatches of 2 and of 57 NLL tokens: a mean of their means gives a token 1/4 or 1/114, where 1/59 is due."""
    pairs = random_pairs([(3, 1, 9), (4, 1, 7), (5, 17, 40), (2, 40, 6)])
    batch = padded(pairs)
    whole, _ = liger(batch, beta=0.0)
    theirs, shares = [], []
    for part in (slice(0, 2), slice(2, 4)):
        row = replace(packed_row(pairs[part], "response"), num_nll_tokens=59, num_pairs=4)
        theirs.append(liger(batch.rows(part), beta=0.0)[0])
        shares.append(ours(batch.rows(part), row, beta=0.0)[1].loss)
    assert_near(sum(shares), whole)
    due, given = gradients(sum(shares), batch)[0], gradients(sum(theirs) / 2, batch)[0]
    assert_near(given[:2], due[:2] * 59 / 4, scale=given[:2].abs().max())
    assert_near(given[2:4], due[2:4] * 59 / 114, scale=given[2:4].abs().max())


def test_denominators_of_trl(trainer: Any, trl_batch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own training steps under gradient accumulation: a microbatch of 3 NLL tokens counts as one of 70."""
    rare, frequent = 40000, 300
    pairs: list[Pair] = [
        ([5, 6], [rare, END], [frequent, END]),
        (list(range(50, 60)), [*range(frequent, frequent + 60), END], [rare, END]),
    ]
    losses = [trainer.get_batch_loss_metrics(trainer.model, trl_batch(part))[0] for part in (pairs[:1], pairs[1:])]
    whole, _ = trainer.get_batch_loss_metrics(trainer.model, trl_batch(pairs))
    weight = trainer.model.lm_head.weight
    (due,) = torch.autograd.grad(whole, weight)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 2, raising=False)
    accumulated = sum(trainer.training_step(trainer.model, trl_batch([pair])) for pair in pairs)
    given = weight.grad.clone()
    trainer.model.zero_grad()
    assert_near(accumulated, sum(losses).detach() / 2)
    assert abs(accumulated / whole - 1) > 0.02
    assert (given - due).abs().max() > 0.2 * due.abs().max()


def test_ligers_nll_target_of_chosen_rows_alone_is_divided_by_half_of_them(packed_row: Callable) -> None:
    """Liger counts in the first half of ``nll_target``, so it must have the rejected rows as well."""
    pairs = random_pairs([(3, 2, 9), (1, 29, 4), (5, 17, 40), (8, 6, 23)])
    batch = padded(pairs)
    loss = liger_orpo.LigerFusedLinearORPOLoss(compiled=False)
    nll = loss(batch.weight, batch.hidden, batch.target, nll_target=batch.whole_target[:4])[1][4]
    _, result = ours(batch, packed_row(pairs, "prompt_and_response"), beta=0.1)
    counted = 4 + 29 + 21 + 13, 4 + 29
    assert result.nll_count == counted[0]
    assert nll.item() == pytest.approx(result.nll_sum.item() / counted[1], rel=BOUND)


def test_one_empty_response_spoils_ligers_whole_step() -> None:
    batch = padded(random_pairs(UNEVEN))
    batch.target[len(UNEVEN) + 2] = IGNORED  # the third rejected response
    loss, _ = liger(batch, beta=0.1)
    assert loss.isnan() and gradients(loss, batch)[1].isnan().all()


def text_row(prompt: int, chosen: int, rejected: int) -> PreferenceRow:
    """A row of so many one-token words."""
    words = [f" {letter}" * count for letter, count in (("a", prompt), ("b", chosen), ("c", rejected))]
    return PreferenceRow(*words, "rows.jsonl", 7, "explicit_prompt")


def trl_tokens(trainer: Any, row: PreferenceRow) -> Pair:
    """Prompt, chosen and rejected as TRL tokenises and cuts them."""
    tokens = trainer.tokenize_row({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected})
    sides = [[i for i in tokens[f"{side}_labels"] if i != IGNORED] for side in ("chosen", "rejected")]
    return tokens["chosen_input_ids"][: len(tokens["chosen_input_ids"]) - len(sides[0])], *sides


def our_tokens(row: PreferenceRow, tokenizer: Any, overlong: str) -> Any:
    (pair,) = encode_pairs([row], tokenizer, Limits(2048, 1792, overlong))
    return pair


def lengths_and_ends(prompt: Any, chosen: Any, rejected: Any) -> list[tuple[int, bool]]:
    return [(len(ids), len(ids) > 0 and int(ids[-1]) == END) for ids in (prompt, chosen, rejected)]


def test_long_response(trainer: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """20, 5000 and 600 tokens for 2048: both keep the rejected response and cut the chosen one's end; we by request.

    TRL puts a beginning of sequence before the prompt, which SmolLM2's tokenizer by itself does not.
    """
    monkeypatch.setattr(trainer, "max_length", 2048)
    row = text_row(20, 5000, 600)
    assert lengths_and_ends(*trl_tokens(trainer, row)) == [(21, False), (2027, False), (601, True)]
    cut = our_tokens(row, tokenizer, "truncate")
    assert lengths_and_ends(cut.prompt, cut.chosen, cut.rejected) == [(20, False), (2028, False), (601, True)]
    assert str(our_tokens(row, tokenizer, "drop")) == (
        "rows.jsonl:7: response too long (5021 tokens with the prompt, limit 2048)"
    )


def test_long_prompt(trainer: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """3000, 50 and 60 tokens for 2048: TRL leaves the prompt whole and both responses empty; we never do."""
    monkeypatch.setattr(trainer, "max_length", 2048)
    row = text_row(3000, 50, 60)
    assert lengths_and_ends(*trl_tokens(trainer, row)) == [(3001, False), (0, False), (0, False)]
    cut = our_tokens(row, tokenizer, "truncate")
    assert lengths_and_ends(cut.prompt, cut.chosen, cut.rejected) == [(1792, False), (51, True), (61, True)]
    assert str(our_tokens(row, tokenizer, "drop")) == "rows.jsonl:7: prompt too long (3000 tokens, limit 1792)"


def test_one_long_prompt_spoils_trls_whole_step(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "max_length", 32)
    rows = [trainer.tokenize_row(vars(row)) for row in (text_row(40, 5, 6), text_row(3, 2, 4))]
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(rows))
    (gradient,) = torch.autograd.grad(loss, trainer.model.lm_head.weight)
    assert loss.isnan() and gradient.isnan().all()


def test_end_of_sequence_of_a_chat(trainer: Any, tokenizer: Any) -> None:
    """The template ends a turn with <|im_end|> and a line break: TRL adds a second end and averages over both."""
    from trl.data_utils import maybe_apply_chat_template

    speakers = {"prompt": ("user", "3 + 3?"), "chosen": ("assistant", "6."), "rejected": ("assistant", "7")}
    messages = {part: [{"role": role, "content": text}] for part, (role, text) in speakers.items()}
    texts = maybe_apply_chat_template(messages, tokenizer)
    row = PreferenceRow(texts["prompt"], texts["chosen"], texts["rejected"], "rows.jsonl", 7, "explicit_prompt")
    assert tokenizer.decode(trl_tokens(trainer, row)[1]) == "6.<|im_end|>\n<|im_end|>"
    chat = PreferenceRow((Message("user", "3 + 3?"),), "6.", "7", "rows.jsonl", 7, "explicit_prompt")
    assert tokenizer.decode(our_tokens(chat, tokenizer, "drop").chosen) == "6.<|im_end|>"


def test_boundary_of_prompt_and_response(trainer: Any, tokenizer: Any) -> None:
    """A space at a prompt's end: TRL tokenises the joined text, which moves it into the response."""
    row = PreferenceRow("The sky is ", "blue.", "black.", "rows.jsonl", 7, "explicit_prompt")
    prompt, chosen, _ = trl_tokens(trainer, row)
    assert [tokenizer.decode(ids) for ids in (prompt, chosen)] == ["<|im_start|>The sky is", " blue.<|im_end|>"]
    pair = our_tokens(row, tokenizer, "drop")
    assert [tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen)] == ["The sky is ", "blue.<|im_end|>"]


def test_padding(trainer: Any, trl_batch: Callable, packed_row: Callable) -> None:
    """Two pairs of 5 + 3 and 25 + 7 tokens: TRL pads all four sequences to 25 positions."""
    pairs = random_pairs([(2, 3, 1), (5, 20, 2)])
    batch = trainer.concatenated_inputs(trl_batch(pairs), padding_value=END)
    assert batch["concatenated_input_ids"].shape == (4, 25)
    assert packed_row(pairs).tokens.shape == (40,)


def test_accuracy(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL compares rewards, beta times the log-probs: rounding makes ties of them, and beta 0 makes ties of all."""
    chosen = -torch.linspace(1, 2, 1001)
    rejected = torch.nextafter(chosen, torch.tensor(-torch.inf))  # one unit in the last place less: all are right
    for beta, expected in ((0.1, 0.85), (0.0, 0.0)):
        monkeypatch.setattr(trainer, "beta", beta)
        _, chosen_rewards, rejected_rewards, *_ = trainer.odds_ratio_loss(chosen, rejected)
        assert (chosen_rewards > rejected_rewards).float().mean().item() == pytest.approx(expected, abs=0.01)
        logps = PairLogps(chosen, rejected, torch.ones(1001), torch.ones(1001, dtype=torch.int64))
        loss = orpo_loss(logps, beta=beta, nll_reduction="tokens", num_nll_tokens=1001, num_pairs=1001)
        assert averages(step_metrics(loss, logps, beta))["rewards/accuracies"] == 1.0
        assert log_odds_ratio(chosen, rejected).min() > 0
