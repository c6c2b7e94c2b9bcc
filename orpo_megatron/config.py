"""The recipe schema: what ``orpo``, ``data`` and ``run`` may say, checked once, before anything is imported.

The other sections of a recipe carry Megatron-Bridge's own names and are checked in ``bridge/recipe.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar


class ConfigError(ValueError):
    """A recipe, a file, a machine or a step that does not fit: shown as one message, without a traceback."""


class PeerError(ConfigError):
    """Another process is gone or never came. It may be rank 0, so a process of each node tells the user."""


@dataclass(frozen=True)
class OrpoConfig:
    """The objective (paper: arXiv 2403.07691, eq. 6 and 7).

    Attributes:
        beta: Weight of the odds-ratio term, the paper's lambda. 0 is plain supervised fine-tuning.
        nll_scope: Which tokens of the chosen sequence the NLL covers. It takes effect where the steps are planned
            (``make_plan``), which count these tokens.
        nll_reduction: ``tokens`` averages the NLL over all tokens of the global batch, ``pairs`` over each pair
            first and then over pairs.
        head: What the head does about softmaxes in backward: ``cache`` keeps exponentials from forward, ``recompute``
            keeps nothing and computes the logits again. ``auto`` caches up to ``head_cache_gib``. The result is the
            same up to rounding, so a run may go on with another.
        head_cache_gib: Budget of ``auto`` in GiB, for a microbatch on one rank; a rank holds one cache at a time.
    """

    beta: float = 0.1
    nll_scope: Literal["prompt_and_response", "response"] = "prompt_and_response"
    nll_reduction: Literal["tokens", "pairs"] = "tokens"
    head: Literal["auto", "cache", "recompute"] = "auto"
    head_cache_gib: float = 1.0

    def __post_init__(self) -> None:
        """Checks ranges."""
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ConfigError(f"orpo.beta ({self.beta}) must be a finite number of at least 0.")
        if not (math.isfinite(self.head_cache_gib) and self.head_cache_gib >= 0):
            raise ConfigError(f"orpo.head_cache_gib ({self.head_cache_gib}) must be a finite number of at least 0.")


@dataclass(frozen=True)
class DataConfig:
    """Where the preference pairs come from and how they become global batches.

    Attributes:
        train: File, folder or hub name of the training pairs, or a list of them.
        eval: The same for held-out pairs.
        train_split: Split to read where ``train`` is a hub name or a folder saved by ``datasets``.
        eval_split: The same for ``eval``.
        layout: Row layout; ``auto`` recognises it.
        tokenizer: HF id or folder, or GGUF file; the model's own where it is not given.
        chat_template: Jinja template, or a file that holds one, in place of the tokenizer's.
        max_length: Longest prompt plus response, in tokens.
        max_prompt_length: Longest prompt, in tokens.
        overlong: ``drop`` a pair that is too long, or ``truncate`` it.
        pairs_per_step: Preference pairs in a global batch (an optimizer step).
        max_tokens_per_row: Token budget of a packed row; twice ``max_length`` where it is not given, which admits
            every pair unless padding makes one longer.
        rows_per_step: Packed rows in a global batch; planned where it is not given.
        pad_to_multiple_of: What the length of every packed sequence is padded to a multiple of, beside what the
            layout and the precision demand. At ``max_length`` every sequence takes as much as in a padded batch.
        share_prefix: Whether the prompt of a pair is computed once for both responses (``on``) or for each of them
            (``off``); the result is the same. ``auto`` decides by what it saves, and says so; on a GPU it stays off.
        shuffle: Whether each epoch visits the pairs in a new order, drawn from ``rng.seed``.
        max_bad_rows: Rows that may be unusable (broken, empty, too long, ...) before a run refuses to start: a
            count if a whole number of at least 1, else a fraction of all rows.
        num_workers: Tokenising processes; all cores where it is not given.
    """

    train: str | list[str]
    eval: str | list[str] | None = None
    train_split: str = "train"
    eval_split: str = "test"
    layout: Literal["auto", "explicit_prompt", "implicit_prompt", "prompt_beside", "hh", "sharegpt"] = "auto"
    tokenizer: str | None = None
    chat_template: str | None = None
    max_length: int = 2048
    max_prompt_length: int = 1792
    overlong: Literal["drop", "truncate"] = "drop"
    pairs_per_step: int = 32
    max_tokens_per_row: int | None = None
    rows_per_step: int | None = None
    pad_to_multiple_of: int = 1
    share_prefix: Literal["auto", "on", "off"] | bool = "auto"
    shuffle: bool = True
    max_bad_rows: int | float = 0.05
    num_workers: int | None = None

    def __post_init__(self) -> None:
        """Checks ranges."""
        if isinstance(self.share_prefix, bool):  # what YAML makes of on and off
            object.__setattr__(self, "share_prefix", "on" if self.share_prefix else "off")
        for name in ("max_length", "max_prompt_length", "pairs_per_step", "pad_to_multiple_of"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} ({getattr(self, name)}) must be at least 1.")
        for name in ("max_tokens_per_row", "rows_per_step", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} ({value}) must be at least 1, or null to have it chosen.")
        if self.max_prompt_length >= self.max_length:
            raise ConfigError(
                f"data.max_prompt_length ({self.max_prompt_length}) must be below data.max_length "
                f"({self.max_length}), so that a response has room. Use at most {self.max_length - 1}."
            )
        if not (math.isfinite(self.max_bad_rows) and self.max_bad_rows >= 0):
            raise ConfigError(f"data.max_bad_rows ({self.max_bad_rows}) must be a count or a fraction, at least 0.")

    @property
    def row_budget(self) -> int:
        """Token budget of a packed row."""
        return self.max_tokens_per_row if self.max_tokens_per_row is not None else 2 * self.max_length


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it leaves behind.

    Attributes:
        dir: Folder of the run; everything it writes but the cache lies in it.
        cache_dir: Folder for tokenised data and converted models, shared between runs; ``cache`` beside ``dir``
            where it is not given.
        export: Whether the trained model is written to ``dir/hf`` in Hugging Face format at the end.
        progress: Progress bar: ``auto`` shows it in a terminal and plain lines elsewhere. (Not ``off``, which YAML
            reads as a truth value.)
        on_nonfinite: What all ranks do about a step whose loss or gradient is NaN or infinite on any of them:
            ``stop`` the run or ``skip`` the step, though not more than 9 in a row. The step's rows are kept in
            ``dir/nonfinite``, and where the run stops its weights as well.
    """

    dir: str
    cache_dir: str | None = None
    export: bool = True
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    on_nonfinite: Literal["stop", "skip"] = "stop"


Section = TypeVar("Section")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint such as `` Did you mean 'beta'?`` for a misspelt name, or nothing."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else f" Known: {', '.join(known)}."


def build_section(cls: type[Section], values: Mapping[str, Any], section: str) -> Section:
    """Builds one section of a recipe from plain values, strictly.

    Args:
        cls: The section's dataclass.
        values: Keys and values as YAML gives them.
        section: The section's name, for messages.

    Returns:
        The checked section.

    Raises:
        ConfigError: On an unknown key, a missing key, or a value of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section} must be a mapping of settings, not {values!r}.")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{section}.{key} is not a setting.{nearest(str(key), hints)}")
    checked = {key: checked_value(value, hints[key], f"{section}.{key}") for key, value in values.items()}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in checked:
            raise ConfigError(f"{section}.{field.name} is missing: the recipe must give it.")
    return cls(**checked)


def checked_value(value: Any, hint: Any, name: str) -> Any:
    """Returns ``value`` if it has the type that ``hint`` asks for (an int is a float), else raises."""
    origin = typing.get_origin(hint)
    options = typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option) and not isinstance(value, bool):
                return value
        elif typing.get_origin(option) is list:
            if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
                return value
        elif option is float and isinstance(value, int) and not isinstance(value, bool) and int not in options:
            return float(value)
        elif isinstance(value, option) and not (isinstance(value, bool) and option is not bool):
            return value
    for option in options:
        if typing.get_origin(option) is Literal:
            raise ConfigError(f"{name} ({value!r}) must be one of {', '.join(map(str, typing.get_args(option)))}.")
    words = " or ".join(_in_words(option) for option in options)
    raise ConfigError(f"{name} ({value!r}) must be of type {words}.")


def _in_words(hint: Any) -> str:
    """Returns what a type is called in a message."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is list:
        return "list (not empty, of str)"
    return str(getattr(hint, "__name__", hint))
