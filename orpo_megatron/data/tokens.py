"""Preference rows -> token ids: chat template, end of sequence, length limits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def encode_pair(
    row: PreferenceRow,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    overlong: str,
) -> TokenizedPair | BadRow:
    """Tokenises one row.

    Messages go through the tokenizer's chat template, which writes its own special tokens; an HH transcript stays a
    transcript where there is no template. Text stays text, after the tokenizer's beginning of sequence if it adds one.
    Every response ends with exactly one end of sequence: the template's own where it writes one, else an added one.

    Args:
        row: The row.
        tokenizer: Its ``eos_token_id`` is set.
        max_length: Longest prompt plus response, in tokens; more than ``max_prompt_length``.
        max_prompt_length: Longest prompt, in tokens.
        overlong: ``drop`` refuses a pair that is too long; ``truncate`` keeps the end of the prompt and the
            beginning of the responses, each cut on its own.

    Raises:
        ConfigError: If the row holds messages and there is no chat template, or the template is no valid one.
    """
    try:
        prompt_text, chosen_text, rejected_text, templated = _texts(row, tokenizer)
        prompt = _prompt_ids(tokenizer, prompt_text, add_bos=not templated)
        chosen, rejected = (_response_ids(tokenizer, text) for text in (chosen_text, rejected_text))
        if chosen == rejected:
            raise UnusableError("equal responses", "once tokenised")
        if overlong == "drop":
            _check_lengths(len(prompt), max(len(chosen), len(rejected)), max_length, max_prompt_length)
        kept_prompt = prompt[-max_prompt_length:]
        room = max_length - len(kept_prompt)
        if chosen[:room] == rejected[:room]:
            raise UnusableError("equal responses", f"once cut to {room} tokens")
    except UnusableError as problem:
        return BadRow(row.file, row.line, problem.reason, problem.detail)
    return TokenizedPair(
        np.array(kept_prompt, np.int32),
        np.array(chosen[:room], np.int32),
        np.array(rejected[:room], np.int32),
        truncated=len(prompt) > max_prompt_length or max(len(chosen), len(rejected)) > room,
    )


def _texts(row: PreferenceRow, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str, bool]:
    """Returns prompt, chosen and rejected as text, and whether a chat template wrote them."""
    if isinstance(row.prompt, str):
        return row.prompt, row.chosen, row.rejected, False
    if tokenizer.chat_template:
        return *_templated(row.prompt, row.chosen, row.rejected, tokenizer), True
    if row.layout == "hh":
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
    prompt_text = _render(tokenizer, prompt, add_generation_prompt=True)
    full = [_render(tokenizer, (*prompt, Message("assistant", response))) for response in (chosen, rejected)]
    if not all(text.startswith(prompt_text) for text in full):
        prompt_text = os.path.commonprefix([prompt_text, *full])
        if not prompt_text.startswith(_render(tokenizer, prompt)):
            raise UnusableError("chat template rewrites the prompt", "(when a response follows)")
    return prompt_text, full[0][len(prompt_text) :], full[1][len(prompt_text) :]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], add_generation_prompt: bool = False
) -> str:
    """Applies the chat template."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        return str(
            tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
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


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenises a text without adding special tokens and without a warning about its length."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, add_bos: bool) -> list[int]:
    """Tokenises a prompt, after a beginning of sequence if ``add_bos`` and the tokenizer adds one."""
    ids = _ids(tokenizer, text)
    if add_bos and tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise UnusableError("empty prompt", "(the tokenizer adds no beginning of sequence)")
    return ids


def _response_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenises a response so that it ends with one end of sequence."""
    ids, eos = _ids_after_text(tokenizer, text), tokenizer.eos_token_id
    if eos in ids:
        end = len(ids) - ids[::-1].index(eos)
        if not tokenizer.decode(ids[end:]).strip():  # what a template writes after its end of turn
            ids = ids[:end]
    while ids and ids[-1] == eos:
        ids.pop()
    if not ids:
        raise UnusableError("empty response", "once tokenised")
    return [*ids, eos]


def _ids_after_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenises a text that follows another: without the space that SentencePiece puts before a beginning."""
    ids = _ids(tokenizer, text)
    if not ids or not tokenizer.convert_ids_to_tokens(ids[0]).startswith("\u2581"):
        return ids
    anchor, anchored = _ids(tokenizer, "\n"), _ids(tokenizer, "\n" + text)
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else ids


def _check_lengths(prompt: int, response: int, max_length: int, max_prompt_length: int) -> None:
    """Raises if a pair is too long; ``response`` is the longer one."""
    if prompt > max_prompt_length:
        raise UnusableError("prompt too long", f"({prompt} tokens, limit {max_prompt_length})")
    if prompt + response > max_length:
        raise UnusableError("response too long", f"({prompt + response} tokens with the prompt, limit {max_length})")
