"""Token ids against text derived by hand, the end of sequence, and what is cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_megatron.config import ConfigError
from orpo_megatron.data.rows import BadRow, Message, PreferenceRow
from orpo_megatron.data.sources import load_tokenizer
from orpo_megatron.data.tokens import Limits, TokenizedPair, encode_pairs

EOS = 2
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
DIALOGUE = (Message("user", "2 + 2?"), Message("assistant", "4."), Message("user", "3 + 3?"))


def row(prompt: Any, chosen: str, rejected: str, layout: str = "explicit_prompt") -> PreferenceRow:
    return PreferenceRow(prompt, chosen, rejected, "rows.jsonl", 7, layout)


def encode(row: PreferenceRow, tokenizer: Any, **limits: Any) -> TokenizedPair | BadRow:
    settings = {"max_length": 256, "max_prompt_length": 128, "overlong": "drop", **limits}
    (pair,) = encode_pairs([row], tokenizer, Limits(**settings))
    return pair


def texts(pair: TokenizedPair | BadRow, tokenizer: Any) -> list[str]:
    assert isinstance(pair, TokenizedPair), pair
    return [tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]


def test_chat_follows_the_template_and_ends_with_its_end_of_turn(tokenizer) -> None:
    pair = encode(row(DIALOGUE, "6.", "Seven"), tokenizer)
    prompt = (
        f"{SYSTEM}<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts(pair, tokenizer) == [prompt, "6.<|im_end|>", "Seven<|im_end|>"]  # no "\n" of the template after it
    assert {ids.dtype for ids in (pair.prompt, pair.chosen, pair.rejected)} == {np.dtype(np.int32)}
    assert [ids[-1] for ids in (pair.chosen, pair.rejected)] == [EOS, EOS]
    assert list(pair.chosen).count(EOS) == 1
    assert not pair.truncated


def test_chat_with_a_system_message(tokenizer) -> None:
    pair = encode(row((Message("system", "Be brief."), Message("user", "3 + 3?")), "6.", "7"), tokenizer)
    assert texts(pair, tokenizer)[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_ids_are_those_of_the_whole_conversation(tokenizer) -> None:
    pair = encode(row(DIALOGUE, "6.", "Seven"), tokenizer)
    messages = [message._asdict() for message in (*DIALOGUE, Message("assistant", "6."))]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert [*pair.prompt, *pair.chosen, *tokenizer("\n")["input_ids"]] == whole


def test_text_stays_text_and_gets_an_end(tokenizer) -> None:
    pair = encode(row("The sky is", " blue.", " black.<|im_end|>"), tokenizer)
    assert texts(pair, tokenizer) == ["The sky is", " blue.<|im_end|>", " black.<|im_end|>"]


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (DIALOGUE, "6.<|im_end|>"),
        ("3 + 3 =", "6.<|im_end|>"),
        ("3 + 3 =", "6.<|im_end|><|im_end|>"),
        ("3 + 3 =", "6.<|im_end|>\n"),
    ],
)
def test_one_end_of_sequence_where_the_data_has_its_own(prompt: Any, response: str, tokenizer) -> None:
    assert texts(encode(row(prompt, response, "7"), tokenizer), tokenizer)[1] == "6.<|im_end|>"


def test_end_of_sequence_inside_a_response_is_kept(tokenizer) -> None:
    pair = encode(row("a", " b<|im_end|> c", " d"), tokenizer)
    assert texts(pair, tokenizer)[1] == " b<|im_end|> c<|im_end|>"


def test_template_without_an_end_of_turn_gets_one(tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    pair = encode(row(DIALOGUE[:1], "4.", "5."), tokenizer)
    # without a generation prompt the response begins with its role
    assert texts(pair, tokenizer) == ["user: 2 + 2?\n", "assistant: 4.\n<|im_end|>", "assistant: 5.\n<|im_end|>"]


def test_template_that_opens_a_thought_when_it_generates(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    pair = encode(row(DIALOGUE[:1], "4.", "5."), tokenizer)
    prompt = "<|im_start|>user\n2 + 2?<|im_end|><|im_start|>assistant\n"
    assert texts(pair, tokenizer) == [prompt, "4.<|im_end|>", "5.<|im_end|>"]


def test_template_that_rewrites_the_prompt(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "chat template rewrites the prompt" in str(encode(row(DIALOGUE, "6.", "7"), tokenizer))


def test_template_that_refuses_and_one_that_is_broken(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    bad = encode(row(DIALOGUE, "6.", "7"), tokenizer)
    assert str(bad) == "rows.jsonl:7: chat template refuses the messages (no system messages)"
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(ConfigError, match="no valid Jinja template"):
        encode(row(DIALOGUE, "6.", "7"), tokenizer)


def test_messages_without_a_template(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"rows.jsonl:7 .*Set data.chat_template"):
        encode(row(DIALOGUE, "6.", "7"), tokenizer)
    pair = encode(row(DIALOGUE, "6.", "7", layout="hh"), tokenizer)  # HH is text by nature
    prompt = "\n\nHuman: 2 + 2?\n\nAssistant: 4.\n\nHuman: 3 + 3?\n\nAssistant:"
    assert texts(pair, tokenizer) == [prompt, " 6.<|im_end|>", " 7<|im_end|>"]


def test_empty_text_prompt_needs_a_beginning_of_sequence(tokenizer) -> None:
    assert str(encode(row("", "a", "b"), tokenizer)).startswith("rows.jsonl:7: empty prompt")


def test_responses_that_are_equal_or_empty_once_tokenised(tokenizer) -> None:
    assert str(encode(row("a", " b", " b<|im_end|>"), tokenizer)) == "rows.jsonl:7: equal responses once tokenised"
    assert str(encode(row("a", " b", "<|im_end|>"), tokenizer)) == "rows.jsonl:7: empty response once tokenised"


SNIPPETS = [
    "",
    " ",
    "\n",
    "a",
    " The sky",
    "3.14",
    "é",
    "日本",
    "🙂",
    "\t\t",
    "<|im_start|>",
    "<|im_end|>",
    "user",
    " \u00a0x",
]


def test_many_rows_at_once_are_each_what_it_is_alone(tokenizer) -> None:
    """Rows of every fate in one batch, against the tokenizer's own call for each text."""
    generator = np.random.default_rng(0)

    def text() -> str:
        return "".join(generator.choice(SNIPPETS, generator.integers(0, 9)))

    rows = [row(text(), text(), text()) for _ in range(200)]
    rows[::7] = [row((Message("user", text()),), text(), text()) for _ in rows[::7]]
    rows[5] = BadRow("rows.jsonl", 5, "broken JSON")
    rows[8] = row("a", " b", " b<|im_end|>")
    limits = Limits(max_length=12, max_prompt_length=6, overlong="truncate")
    together = encode_pairs(rows, tokenizer, limits)
    reasons = {result.reason for result in together if isinstance(result, BadRow)}
    assert reasons >= {"broken JSON", "empty prompt", "empty response", "equal responses"}
    assert sum(isinstance(result, TokenizedPair) for result in together) > 100
    for one, result in zip(rows, together, strict=True):
        if isinstance(result, BadRow):
            assert result == (one if isinstance(one, BadRow) else encode(one, tokenizer, **limits._asdict()))
            continue
        alone = encode(one, tokenizer, **limits._asdict())
        for part in ("prompt", "chosen", "rejected"):
            assert getattr(result, part).tolist() == getattr(alone, part).tolist()
        if isinstance(one.prompt, str):
            assert result.prompt.tolist() == tokenizer(one.prompt)["input_ids"][-6:]
            whole = tokenizer(one.chosen)["input_ids"]
            if EOS in whole:  # the tests of the end of sequence cover that
                continue
            assert result.chosen.tolist() == [*whole, EOS][: 12 - len(result.prompt)]


def test_truncation_and_padding_of_the_tokenizer_itself_are_off(tokenizer) -> None:
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    pair = encode(row(words("x", 20), words("b", 30), " c"), tokenizer)
    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (20, 31, 2)


def words(letter: str, count: int) -> str:
    return f" {letter}" * count  # one token each


@pytest.mark.parametrize(
    ("prompt", "chosen", "limit", "lengths"),
    [
        # prompt 20, chosen 5000, rejected 600 with their ends: the prompt stays, only what does not fit is cut
        (20, 4999, 2048, (20, 2028, 600)),
        (20, 2027, 2048, (20, 2028, 600)),  # fits exactly
        (3000, 4999, 2048, (1024, 1024, 600)),
        (3000, 4999, 1025, (1024, 1, 1)),  # never empty
    ],
)
def test_truncation(prompt: int, chosen: int, limit: int, lengths: tuple[int, ...], tokenizer) -> None:
    long = row(words("x", prompt - 1) + " y", words("b", chosen), words("c", 599))
    pair = encode(long, tokenizer, max_length=limit, max_prompt_length=1024, overlong="truncate")
    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == lengths
    assert tokenizer.decode(pair.prompt[-2:]) == " x y"  # the end of the prompt is kept
    assert tokenizer.decode(pair.chosen[:1]) == " b"
    assert (pair.chosen[-1] == EOS) == (chosen + 1 <= lengths[1])  # cut off with the tail, and only then
    assert (pair.rejected[-1] == EOS) == (lengths[2] == 600)
    assert pair.truncated == (prompt > 1024 or chosen + 1 > lengths[1])


def test_truncation_that_leaves_nothing_to_prefer(tokenizer) -> None:
    alike = row("x", words("b", 10) + " c", words("b", 10) + " d")
    bad = encode(alike, tokenizer, max_length=8, max_prompt_length=4, overlong="truncate")
    assert str(bad) == "rows.jsonl:7: equal responses once cut to 7 tokens"


def test_drop_names_the_length_and_the_limit(tokenizer) -> None:
    limits = {"max_length": 10, "max_prompt_length": 6}
    assert isinstance(encode(row(words("x", 6), words("b", 3), " c"), tokenizer, **limits), TokenizedPair)
    bad = encode(row(words("x", 7), " b", " c"), tokenizer, **limits)
    assert str(bad) == "rows.jsonl:7: prompt too long (7 tokens, limit 6)"
    bad = encode(row(words("x", 6), " b", words("c", 4)), tokenizer, **limits)
    assert str(bad) == "rows.jsonl:7: response too long (11 tokens with the prompt, limit 10)"


@pytest.fixture
def spacing_tokenizer() -> Any:
    """A tokenizer of single letters that, as SentencePiece does, puts a space before a text, and begins with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", "\u2581", "\n", "y", "e", "s", "n", "o"]
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_a_response_gets_no_space_that_its_text_does_not_have(spacing_tokenizer) -> None:
    pair = encode(row("yes", "no", " yes"), spacing_tokenizer)
    assert list(pair.prompt) == [0, 2, 4, 5, 6]  # <s>, space, y, e, s
    assert list(pair.chosen) == [7, 8, 1]  # n, o, </s>
    assert list(pair.rejected) == [2, 4, 5, 6, 1]


def test_beginning_of_sequence_comes_once(spacing_tokenizer) -> None:
    assert list(encode(row("", "no", "yes"), spacing_tokenizer).prompt) == [0]  # enough of a prompt
    spacing_tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}\n{% endfor %}"
    pair = encode(row((Message("user", "yes"),), "no", "yes"), spacing_tokenizer)
    assert list(pair.prompt).count(0) == 1  # the template's own


def test_pair_from_a_tokenizer_with_another_template(tokenizer_folder: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    tokenizer = load_tokenizer(tokenizer_folder, tmp_path, template)
    pair = encode(row(DIALOGUE, "6.", "7"), tokenizer)
    assert texts(pair, tokenizer) == ["[2 + 2?][4.]<|im_end|>[3 + 3?]", "[6.]<|im_end|>", "[7]<|im_end|>"]
