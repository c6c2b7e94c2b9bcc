"""Files -> preference rows: five layouts, recognised by themselves, every unusable row named.

A row is text (a prompt and two continuations) or a conversation (messages and two final assistant messages):

- ``explicit_prompt``: ``prompt``, ``chosen``, ``rejected``. All text stays text. A prompt of messages, or responses
  that are one assistant message each, make a conversation.
- ``prompt_beside``: a ``prompt`` beside ``chosen`` and ``rejected`` that are whole conversations and hold it already.
  The prompt is taken from the conversation; ``prompt`` must agree with it.
- ``implicit_prompt``: ``chosen`` and ``rejected`` are whole conversations, alike but for the final assistant message,
  or plain texts with a shared beginning. Of plain texts the prompt is what they share, cut back to the last white
  space: words that both responses start with count as prompt, which text alone cannot tell apart.
- ``hh``: whole transcripts as plain text, turns that start with ``Human:`` and ``Assistant:`` after an
  empty line (Anthropic's HH-RLHF), read as conversations, so that a chat model is trained in its own format.
- ``sharegpt``: ``conversations`` of turns with ``from`` and ``value``, and one turn each as ``chosen`` and
  ``rejected``.

A ``system`` text beside a conversation becomes its first message. Messages may say ``role`` and ``content`` or
``from`` and ``value`` everywhere. A conversation is: perhaps a system message, then user and assistant in turn, the
response an assistant message after a user message.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from orpo_megatron.data.files import Block, DataFile, Record, UnusableError, find_files

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
ROWS_TO_RECOGNISE = 100
#: What others render into the prompt. A row that has one is not trained on without it.
UNSUPPORTED_FIELDS = ("tools", "images", "videos", "chat_template_kwargs")


class Message(NamedTuple):
    """One message of a conversation; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with a preferred and a less preferred response.

    Attributes:
        prompt: Text, or the messages before the response.
        chosen: The preferred response: the continuation of a text, or the content of the assistant's message.
        rejected: The other response.
        file: Where the row was read.
        line: Its line in a JSONL file, its number elsewhere, from 1.
        layout: The layout it was read by.
    """

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str
    file: str
    line: int
    layout: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        file: Where it was read.
        line: Its line in a JSONL file, its number elsewhere, from 1.
        reason: A fixed phrase, to count by.
        detail: What it is about in this row, or nothing.
    """

    file: str
    line: int
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        """Returns the place and the reason in one line."""
        return f"{self.file}:{self.line}: {self.reason} {self.detail}".rstrip()


def read_rows(source: str, split: str, layout: str = "auto") -> Iterator[PreferenceRow | BadRow]:
    """Yields every row of a source in order, usable or not.

    Args:
        source: A JSONL, JSON or Parquet file, a folder of them, a folder saved by ``datasets``, or a hub name.
        split: Split to take from a folder or from the hub.
        layout: ``data.layout``, as in ``DataConfig``; ``auto`` looks at each row's fields.

    Raises:
        ConfigError: If there is no such source or a file cannot be read at all.
    """
    for file in find_files(source, split):
        usual, blocks = usual_layout(file)
        for block in blocks:
            yield from rows_of_block(block, file.name, layout, usual)


def usual_layout(file: DataFile) -> tuple[str, Iterator[Block]]:
    """Returns the layout that most of a file's first rows speak for, and all blocks of the file."""
    blocks = file.blocks()
    first, records = [], list[Record]()
    for block in blocks:
        first.append(block)
        records += itertools.islice(block.records(), ROWS_TO_RECOGNISE - len(records))
        if len(records) == ROWS_TO_RECOGNISE:
            break
    layouts = Counter(recognise(record) for _, record in records if isinstance(record, dict))
    usual = layouts.most_common(1)[0][0] if layouts else "implicit_prompt"
    return usual, itertools.chain(first, blocks)


def rows_of_block(block: Block, file: str, layout: str, usual: str) -> Iterator[PreferenceRow | BadRow]:
    """Yields every row of a block in order, usable or not.

    Args:
        block: The block.
        file: The name of its file.
        layout: As for :func:`read_rows`.
        usual: What :func:`usual_layout` says of the file.
    """
    for line, record in block.records():
        try:
            if isinstance(record, UnusableError):
                raise record
            if not isinstance(record, dict):
                raise UnusableError("wrong type", f"(the row is a {_kind(record)}, not an object with fields)")
            found = recognise(record) if layout == "auto" else layout
            prompt, chosen, rejected = PARSERS[found](record)
            prompt = _after_system(record, prompt)
            if layout == "auto" and found == "implicit_prompt" != usual and isinstance(prompt, str):
                raise UnusableError("missing field", "'prompt'")  # two texts may well begin alike by chance
            _check_responses(chosen, rejected, tie=found in ("implicit_prompt", "hh"))
            yield PreferenceRow(prompt, chosen, rejected, file, line, found)
        except UnusableError as problem:
            yield BadRow(file, line, problem.reason, problem.detail)


def recognise(record: dict[str, Any]) -> str:
    """Returns the layout that a row's fields speak for."""
    chosen = record.get("chosen")
    if record.get("conversations") is not None:
        return "sharegpt"
    if record.get("prompt") is not None:
        if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) and _role(chosen[0]) != "assistant":
            return "prompt_beside"
        return "explicit_prompt"
    return "hh" if isinstance(chosen, str) and HH_TURN.match(chosen) else "implicit_prompt"


Parts = tuple[str | tuple[Message, ...], str, str]
ConversationParts = tuple[tuple[Message, ...], str, str]


def _explicit_prompt(record: dict[str, Any]) -> Parts:
    """Reads a prompt and two responses."""
    prompt, chosen, rejected = (_field(record, name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return _text(prompt, "prompt"), _text(chosen, "chosen"), _text(rejected, "rejected")
    messages = (Message("user", _text(prompt, "prompt")),) if isinstance(prompt, str) else _messages(prompt, "prompt")
    _check_roles(messages)
    return messages, _response(chosen, "chosen"), _response(rejected, "rejected")


def _prompt_beside(record: dict[str, Any]) -> Parts:
    """Reads two whole conversations and checks that the prompt beside them says nothing else."""
    beside = _field(record, "prompt")
    messages, chosen, rejected = _conversations(record)
    user_turns = [message.content.strip() for message in messages if message.role == "user"]
    if isinstance(beside, list):
        agrees = _messages(beside, "prompt") in (messages, messages[1:])
    else:
        text = _text(beside, "prompt").strip()
        agrees = text in user_turns or all(turn in text for turn in user_turns)
    if not agrees:
        raise UnusableError("prompt differs from the conversation", "('prompt' is none of its user turns)")
    return messages, chosen, rejected


def _implicit_prompt(record: dict[str, Any]) -> Parts:
    """Reads two whole conversations or two texts with a shared beginning."""
    chosen, rejected = _field(record, "chosen"), _field(record, "rejected")
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return _conversations(record)
    common = os.path.commonprefix([_text(chosen, "chosen"), _text(rejected, "rejected")])
    if chosen == rejected:
        raise UnusableError("tie in an implicit prompt", "('chosen' and 'rejected' are the same)")
    beginning = re.match(r"(.*\S)\s", common, re.DOTALL)
    if beginning is None:
        raise UnusableError("no shared beginning", "(of 'chosen' and 'rejected', which would be the prompt)")
    prompt = beginning.group(1)
    if not chosen[len(prompt) :].strip() or not rejected[len(prompt) :].strip():
        raise UnusableError("tie in an implicit prompt", "(nothing is left of a response after the shared beginning)")
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _hh(record: dict[str, Any]) -> Parts:
    """Reads two transcripts; white space around a turn belongs to the format."""
    transcripts = []
    for name in ("chosen", "rejected"):
        before, *turns = HH_TURN.split(_text(_field(record, name), name))
        if before.strip() or not turns:
            raise UnusableError("wrong type", f"({name!r} is no transcript that starts with '\\n\\nHuman:')")
        speakers = ("user" if speaker == "Human" else "assistant" for speaker in turns[::2])
        transcripts.append(tuple(map(Message, speakers, (turn.strip() for turn in turns[1::2]))))
    return _split_conversations(*transcripts)


def _sharegpt(record: dict[str, Any]) -> Parts:
    """Reads the turns so far and one turn each for the responses."""
    messages = _messages(_field(record, "conversations"), "conversations")
    _check_roles(messages)
    chosen, rejected = (_response(_field(record, name), name) for name in ("chosen", "rejected"))
    return messages, chosen, rejected


PARSERS: dict[str, Callable[[dict[str, Any]], Parts]] = {
    "explicit_prompt": _explicit_prompt,
    "prompt_beside": _prompt_beside,
    "implicit_prompt": _implicit_prompt,
    "hh": _hh,
    "sharegpt": _sharegpt,
}


def _after_system(record: dict[str, Any], prompt: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
    """Returns a prompt after the system text beside it, and refuses a row with a field that cannot be rendered."""
    for name in UNSUPPORTED_FIELDS:
        if record.get(name) not in (None, "", "[]", [], {}):
            raise UnusableError("field not supported", repr(name))
    if not record.get("system"):
        return prompt
    if isinstance(prompt, str):
        raise UnusableError("field not supported", "('system' beside plain text, which has no place for it)")
    system = Message("system", _text(record["system"], "system"))
    if prompt[0].role != "system":
        return system, *prompt
    if prompt[0] != system:
        raise UnusableError("roles out of order", "('system' differs from the conversation's own system message)")
    return prompt


def _conversations(record: dict[str, Any]) -> ConversationParts:
    """Reads ``chosen`` and ``rejected`` as whole conversations."""
    return _split_conversations(*(_messages(_field(record, name), name) for name in ("chosen", "rejected")))


def _split_conversations(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> ConversationParts:
    """Splits two whole conversations into the messages they share and their final assistant messages."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise UnusableError("roles out of order", f"({name!r} does not end with an assistant message)")
        _check_roles(messages[:-1])
    if chosen[:-1] != rejected[:-1]:
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
        raise UnusableError("no shared beginning", f"(message {same + 1} differs and is not the final one of both)")
    return chosen[:-1], chosen[-1].content, rejected[-1].content


def _check_roles(prompt: tuple[Message, ...]) -> None:
    """Raises unless the messages are: perhaps system, then user and assistant in turn, user last."""
    turns = prompt[1:] if prompt and prompt[0].role == "system" else prompt
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            place = len(prompt) - len(turns) + number + 1
            raise UnusableError("roles out of order", f"(message {place} is {message.role!r}, expected {expected!r})")
    if len(turns) % 2 == 0:
        raise UnusableError("roles out of order", "(the prompt does not end with a user message)")


def _check_responses(chosen: str, rejected: str, tie: bool) -> None:
    """Raises unless the responses say something, and something different."""
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise UnusableError("empty response", f"in {name!r}")
    if chosen.strip() == rejected.strip():
        raise UnusableError("tie in an implicit prompt" if tie else "equal responses")


def _field(record: dict[str, Any], name: str) -> Any:
    """Returns a field, which must be there."""
    if record.get(name) is None:
        raise UnusableError("missing field", repr(name))
    return record[name]


def _text(value: Any, name: str) -> str:
    """Returns a field's text; half a surrogate pair, which JSON can escape, is no text."""
    if not isinstance(value, str):
        raise UnusableError("wrong type", f"({name!r} is a {_kind(value)}, expected text)")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableError("not UTF-8", f"(half a surrogate pair in {name!r})") from None
    return value


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    """Returns a field's messages."""
    if not isinstance(value, list):
        raise UnusableError("wrong type", f"({name!r} is a {_kind(value)}, expected a list of messages)")
    return tuple(_message(item, name) for item in value)


def _message(value: Any, name: str) -> Message:
    """Returns one message, from ``role`` and ``content`` or ``from`` and ``value``."""
    if not isinstance(value, dict):
        raise UnusableError("wrong type", f"({name!r} holds a {_kind(value)}, expected a message)")
    if value.get("tool_calls"):
        raise UnusableError("field not supported", f"'tool_calls' of a message in {name!r}")
    content = value["content"] if value.get("content") is not None else value.get("value")
    if content is None:
        raise UnusableError("missing field", f"'content' of a message in {name!r}")
    return Message(_role(value), _text(content, name))


def _role(message: dict[str, Any]) -> str:
    """Returns a message's role by our name, or as it stands where we have none for it."""
    role = message.get("role") or message.get("from")
    return ROLES.get(role, role) if isinstance(role, str) else "missing"


def _response(value: Any, name: str) -> str:
    """Returns the content of a response: text, one assistant message, or a list that holds one."""
    if isinstance(value, str):
        return _text(value, name)
    messages = (_message(value, name),) if isinstance(value, dict) else _messages(value, name)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise UnusableError("roles out of order", f"({name!r} is not one assistant message)")
    return messages[0].content


def _kind(value: Any) -> str:
    """Returns what JSON calls a value's type."""
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
