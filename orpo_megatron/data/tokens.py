"""Preference rows -> token ids: chat template, end of sequence, length limits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from orpo_megatron.config import ConfigError
from orpo_megatron.data.files import UnusableError
from orpo_megatron.data.rows import BadRow, Message, PreferenceRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOUNDARY_NOTE = (
    "Prompt and response are tokenised separately and concatenated, so the boundary between them is a token boundary "
    "in the chosen and in the rejected sequence."
)
HH_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


class Limits(NamedTuple):
    """How long a pair may be.

    Attributes:
        max_length: Longest prompt plus response, in tokens; more than ``max_prompt_length``.
        max_prompt_length: Longest prompt, in tokens.
        overlong: ``drop`` refuses a pair that is too long; ``truncate`` keeps the end of the prompt and the
            beginning of the responses, each cut on its own.
    """

    max_length: int
    max_prompt_length: int
    overlong: str


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of one pair; a response follows the prompt.

    Attributes:
        prompt: Token ids of the prompt, int32 [at least 1].
        chosen: Token ids of the chosen response with its end of sequence, int32 [at least 1].
        rejected: The same of the rejected response.
        truncated: Whether any of the three was cut.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    truncated: bool = False


def encode_pairs(
    rows: Sequence[PreferenceRow | BadRow], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[TokenizedPair | BadRow]:
    """Tokenises rows, their texts all at once, which is where a fast tokenizer is fast.

    Messages go through the tokenizer's chat template, which writes its own special tokens; an HH transcript stays a
    transcript where there is no template. Text stays text, after the tokenizer's beginning of sequence if it adds one.
    Every response ends with exactly one end of sequence: the template's own where it writes one, else an added one.

    Args:
        rows: The rows; one that is unusable already stays what it is.
        tokenizer: Its ``eos_token_id`` is set.
        limits: How long a pair may be.

    Returns:
        What became of every row, in order.

    Raises:
        ConfigError: If a row holds messages and there is no chat template, or the template is no valid one.
    """
    rendered = [_rendered(row, tokenizer) for row in rows]
    good = [texts for texts in rendered if isinstance(texts, _Texts)]
    encoder = _Encoder(tokenizer)
    prompts = iter(encoder.ids([texts.prompt for texts in good]))
    responses = iter(encoder.ids_after_text([side for texts in good for side in (texts.chosen, texts.rejected)]))
    results: list[TokenizedPair | BadRow] = []
    for texts in rendered:
        if isinstance(texts, BadRow):
            results.append(texts)
            continue
        prompt, chosen, rejected = next(prompts), next(responses), next(responses)
        try:
            prompt = encoder.prompt(prompt, add_bos=not texts.templated)
            chosen, rejected = encoder.response(chosen), encoder.response(rejected)
            results.append(_cut(prompt, chosen, rejected, limits))
        except UnusableError as problem:
            results.append(BadRow(texts.row.file, texts.row.line, problem.reason, problem.detail))
    return results


def _cut(prompt: list[int], chosen: list[int], rejected: list[int], limits: Limits) -> TokenizedPair:
    """Returns the pair, as much of it as the limits admit."""
    if chosen == rejected:
        raise UnusableError("equal responses", "once tokenised")
    longest = max(len(chosen), len(rejected))
    if limits.overlong == "drop":
        _check_lengths(len(prompt), longest, limits)
    kept_prompt = prompt[-limits.max_prompt_length :]
    room = limits.max_length - len(kept_prompt)
    if chosen[:room] == rejected[:room]:
        raise UnusableError("equal responses", f"once cut to {room} tokens")
    return TokenizedPair(
        np.array(kept_prompt, np.int32),
        np.array(chosen[:room], np.int32),
        np.array(rejected[:room], np.int32),
        truncated=len(prompt) > limits.max_prompt_length or longest > room,
    )


class _Texts(NamedTuple):
    """A row as text, and whether a chat template wrote it."""

    row: PreferenceRow
    prompt: str
    chosen: str
    rejected: str
    templated: bool


def _rendered(row: PreferenceRow | BadRow, tokenizer: PreTrainedTokenizerBase) -> _Texts | BadRow:
    """Returns a row as text, or why it cannot be had."""
    if isinstance(row, BadRow):
        return row
    try:
        return _Texts(row, *_texts(row, tokenizer))
    except UnusableError as problem:
        return BadRow(row.file, row.line, problem.reason, problem.detail)


def _texts(row: PreferenceRow, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str, bool]:
    """Returns prompt, chosen and rejected as text, and whether a chat template wrote them."""
    if isinstance(row.prompt, str):
        return row.prompt, row.chosen, row.rejected, False
    if tokenizer.chat_template:
        return *_templated(row.prompt, row.chosen, row.rejected, tokenizer), True
    if row.layout == "hh" and HH_SPEAKERS.keys() >= {message.role for message in row.prompt}:
        turns = (f"\n\n{HH_SPEAKERS[message.role]}: {message.content}" for message in row.prompt)
        return "".join(turns) + "\n\nAssistant:", f" {row.chosen}", f" {row.rejected}", False
    raise ConfigError(
        f"{row.file}:{row.line} holds messages, but tokenizer {tokenizer.name_or_path!r} has no chat template. Set "
        "data.chat_template, or data.tokenizer to one that has a template."
    )


def _templated(
    prompt: tuple[Message, ...], chosen: str, rejected: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str, str]:
    """Renders a conversation; a response is what the template adds after the prompt.

    Some templates start the answer differently when it is to be generated (``<think>``) than when it is there. Then
    the prompt ends where the renderings part, provided that it is all there by then.
    """
    messages = [message._asdict() for message in prompt]
    prompt_text = _render(tokenizer, messages, add_generation_prompt=True)
    full = [_render(tokenizer, [*messages, {"role": "assistant", "content": text}]) for text in (chosen, rejected)]
    if not all(text.startswith(prompt_text) for text in full):
        prompt_text = os.path.commonprefix([prompt_text, *full])
        if not prompt_text.startswith(_render(tokenizer, messages)):
            raise UnusableError("chat template rewrites the prompt", "(when a response follows)")
    return prompt_text, full[0][len(prompt_text) :], full[1][len(prompt_text) :]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    """Applies the chat template."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"The chat template is no valid Jinja template: {error.message} (line {error.lineno}). Repair "
            "data.chat_template, or the tokenizer's own."
        ) from error
    except TemplateError as error:
        raise UnusableError("chat template refuses the messages", f"({error.message})") from error


class _Encoder:
    """Texts -> token ids, many at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # This call also switches off any truncation and padding of the backend.
        self._bos = tokenizer("", verbose=False)["input_ids"][:1]
        if tokenizer.bos_token_id is None or self._bos != [tokenizer.bos_token_id]:
            self._bos = []
        self._eos: int = tokenizer.eos_token_id
        self._starts_with_space: dict[int, bool] = {}
        self._is_blank: dict[tuple[int, ...], bool] = {(): True}

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenises texts without adding special tokens."""
        if not texts:
            return []
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:  # saves the offsets and masks that nobody asks for
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def ids_after_text(self, texts: list[str]) -> list[list[int]]:
        """Tokenises texts that follow others: without the space that SentencePiece puts before a beginning."""
        every = self.ids(texts)
        spaced = [number for number, ids in enumerate(every) if ids and self._is_spaced(ids[0])]
        if spaced:
            anchor, *anchored = self.ids(["\n", *("\n" + texts[number] for number in spaced)])
            for number, ids in zip(spaced, anchored, strict=True):
                if ids[: len(anchor)] == anchor:
                    every[number] = ids[len(anchor) :]
        return every

    def _is_spaced(self, token_id: int) -> bool:
        """Tells whether a token begins with SentencePiece's space."""
        if token_id not in self._starts_with_space:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            self._starts_with_space[token_id] = token.startswith("\u2581")
        return self._starts_with_space[token_id]

    def prompt(self, ids: list[int], add_bos: bool) -> list[int]:
        """Returns a prompt's ids, after a beginning of sequence if ``add_bos`` and the tokenizer adds one."""
        ids = [*self._bos, *ids] if add_bos else ids
        if not ids:
            raise UnusableError("empty prompt", "(the tokenizer adds no beginning of sequence)")
        return ids

    def response(self, ids: list[int]) -> list[int]:
        """Returns a response's ids so that they end with one end of sequence."""
        eos = self._eos
        if eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            if self._says_nothing(tuple(ids[end:])):  # what a template writes after its end of turn
                ids = ids[:end]
        while ids and ids[-1] == eos:
            ids.pop()
        if not ids:
            raise UnusableError("empty response", "once tokenised")
        return [*ids, eos]

    def _says_nothing(self, ids: tuple[int, ...]) -> bool:
        """Tells whether tokens are white space alone."""
        if ids not in self._is_blank:
            self._is_blank[ids] = not self._tokenizer.decode(list(ids)).strip()
        return self._is_blank[ids]


def _check_lengths(prompt: int, response: int, limits: Limits) -> None:
    """Raises if a pair is too long; ``response`` is the longer one."""
    if prompt > limits.max_prompt_length:
        raise UnusableError("prompt too long", f"({prompt} tokens, limit {limits.max_prompt_length})")
    if prompt + response > limits.max_length:
        raise UnusableError(
            "response too long", f"({prompt + response} tokens with the prompt, limit {limits.max_length})"
        )
