"""Whether the prompt of a pair is computed once for both responses: ``data.share_prefix``."""

from __future__ import annotations

from dataclasses import dataclass

from orpo_megatron.config import ConfigError
from orpo_megatron.data.plan import PairLengths

#: What ``auto`` wants saved, as a share of all tokens.
WORTH_IT = 0.05


@dataclass(frozen=True)
class PrefixChoice:
    """What was decided.

    Attributes:
        shared: Whether the prompt of a pair is computed once.
        why: What that does, in words, for the user.
    """

    shared: bool
    why: str


def choose_prefix(setting: str, conflict: str | None, lengths: PairLengths, *, on_gpu: bool) -> PrefixChoice:
    """Decides whether the two sides of a pair share one prompt.

    With p prompt tokens a pair and c and r tokens of responses, sharing saves p of 2p + c + r.

    Args:
        setting: ``data.share_prefix``: auto, on or off.
        conflict: What of the run a shared prompt does not go with, in words, if there is anything.
        lengths: Token counts of the training pairs.
        on_gpu: Whether the run is for a GPU, where ``auto`` leaves it off until it is measured there.

    Raises:
        ConfigError: If it is on and would not be exact, or another setting would be without effect.
    """
    saved = 1 - lengths.padded_tokens(1, share_prefix=True).sum() / lengths.padded_tokens(1).sum()
    if setting == "on" and conflict:
        raise ConfigError(f"data.share_prefix (on) does not go with {conflict}. Leave one of them out.")
    if setting == "on":
        return PrefixChoice(True, f"computed once a pair, which saves {saved:.1%} of all tokens")
    twice = "computed for each response"
    if setting == "off":
        return PrefixChoice(False, f"{twice}; data.share_prefix=on would save {saved:.1%} of all tokens")
    if conflict:
        return PrefixChoice(False, f"{twice} (data.share_prefix auto: it does not go with {conflict})")
    if saved < WORTH_IT:
        return PrefixChoice(False, f"{twice} (data.share_prefix auto: once would save only {saved:.1%} of all tokens)")
    if on_gpu:
        return PrefixChoice(
            False,
            f"{twice} (data.share_prefix auto: not measured on a GPU yet; on would save {saved:.1%} of all tokens)",
        )
    return PrefixChoice(True, f"computed once a pair, which saves {saved:.1%} of all tokens (data.share_prefix auto)")
