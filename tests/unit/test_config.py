"""The recipe's own sections: which values pass, as what, and what the message says about the others."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from orpo_megatron.config import ConfigError, DataConfig, OrpoConfig, RunConfig, build_section, checked_value, nearest


def message_of(call: Any, *args: Any) -> str:
    """Returns the message of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as error:
        call(*args)
    return str(error.value)


def test_defaults_are_those_of_the_documentation() -> None:
    orpo, data = build_section(OrpoConfig, {}, "orpo"), build_section(DataConfig, {"train": "a.jsonl"}, "data")
    assert (orpo.beta, orpo.nll_scope, orpo.nll_reduction) == (0.1, "prompt_and_response", "tokens")
    assert (orpo.head, orpo.head_cache_gib) == ("auto", 1.0)
    assert (data.max_length, data.max_prompt_length, data.pairs_per_step, data.overlong) == (2048, 1792, 32, "drop")
    assert (data.layout, data.shuffle, data.max_bad_rows) == ("auto", True, 0.05)
    assert data.pad_to_multiple_of == 1  # packed rows have no padding unless something asks for it


@pytest.mark.parametrize(("given", "budget"), [(None, 4096), (5000, 5000)])
def test_row_budget_is_twice_the_longest_sequence_unless_given(given: int | None, budget: int) -> None:
    assert DataConfig(train="a", max_tokens_per_row=given).row_budget == budget


def test_an_int_becomes_a_float_where_a_float_is_asked_for() -> None:
    beta = build_section(OrpoConfig, {"beta": 1}, "orpo").beta
    assert beta == 1.0 and type(beta) is float


def test_max_bad_rows_keeps_counts_and_fractions_apart() -> None:
    for value in (3, 0.25, 0):
        checked = build_section(DataConfig, {"train": "a", "max_bad_rows": value}, "data").max_bad_rows
        assert checked == value and type(checked) is type(value)


@pytest.mark.parametrize(
    ("cls", "section", "values", "message"),
    [
        (OrpoConfig, "orpo", {"bta": 0.1}, "orpo.bta is not a setting. Did you mean 'beta'?"),
        (
            OrpoConfig,
            "orpo",
            {"xyzzy": 1},
            "orpo.xyzzy is not a setting. Known: beta, head, head_cache_gib, nll_reduction, nll_scope.",
        ),
        (OrpoConfig, "orpo", {1: 1}, "orpo.1 is not a setting. Known: beta, head, head_cache_gib, nll_"),
        (OrpoConfig, "orpo", [1], "orpo must be a mapping of settings, not [1]."),
        (OrpoConfig, "orpo", {"beta": "big"}, "orpo.beta ('big') must be of type float."),
        (OrpoConfig, "orpo", {"beta": True}, "orpo.beta (True) must be of type float."),
        (OrpoConfig, "orpo", {"beta": None}, "orpo.beta (None) must be of type float."),
        (OrpoConfig, "orpo", {"beta": -0.1}, "orpo.beta (-0.1) must be a finite number of at least 0."),
        (OrpoConfig, "orpo", {"beta": float("nan")}, "orpo.beta (nan) must be a finite number of at least 0."),
        (OrpoConfig, "orpo", {"beta": float("inf")}, "orpo.beta (inf) must be a finite number of at least 0."),
        (
            OrpoConfig,
            "orpo",
            {"nll_scope": "respons"},
            "orpo.nll_scope ('respons') must be one of prompt_and_response, response.",
        ),
        (OrpoConfig, "orpo", {"head": "fast"}, "orpo.head ('fast') must be one of auto, cache, recompute."),
        (
            OrpoConfig,
            "orpo",
            {"head_cache_gib": -1},
            "orpo.head_cache_gib (-1.0) must be a finite number of at least 0.",
        ),
        (OrpoConfig, "orpo", {"head_cache_gib": float("nan")}, "orpo.head_cache_gib (nan) must be a finite number"),
        (RunConfig, "run", {}, "run.dir is missing: the recipe must give it."),
        (RunConfig, "run", {"dir": 3}, "run.dir (3) must be of type str."),
        (RunConfig, "run", {"dir": "a", "export": 1}, "run.export (1) must be of type bool."),
        # YAML reads a bare `off` as a truth value; no choice may be called that.
        (
            RunConfig,
            "run",
            {"dir": "a", "progress": False},
            "run.progress (False) must be one of auto, bar, plain, none.",
        ),
        (DataConfig, "data", {}, "data.train is missing: the recipe must give it."),
        (DataConfig, "data", {"train": []}, "data.train ([]) must be of type str or list (not empty, of str)."),
        (DataConfig, "data", {"train": ["a", 1]}, "data.train (['a', 1]) must be of type str or list "),
        (
            DataConfig,
            "data",
            {"train": "a", "eval": 1},
            "data.eval (1) must be of type str or list (not empty, of str) or null.",
        ),
        (DataConfig, "data", {"train": "a", "pairs_per_step": 8.0}, "data.pairs_per_step (8.0) must be of type int."),
        (DataConfig, "data", {"train": "a", "pairs_per_step": True}, "data.pairs_per_step (True) must be of type int"),
        (DataConfig, "data", {"train": "a", "pairs_per_step": 0}, "data.pairs_per_step (0) must be at least 1."),
        (
            DataConfig,
            "data",
            {"train": "a", "pad_to_multiple_of": 0},
            "data.pad_to_multiple_of (0) must be at least 1.",
        ),
        (
            DataConfig,
            "data",
            {"train": "a", "rows_per_step": 0},
            "data.rows_per_step (0) must be at least 1, or null to have it chosen.",
        ),
        (
            DataConfig,
            "data",
            {"train": "a", "max_length": 64, "max_prompt_length": 64},
            "data.max_prompt_length (64) must be below data.max_length (64), so that a response has room. "
            "Use at most 63.",
        ),
        (
            DataConfig,
            "data",
            {"train": "a", "max_bad_rows": -1},
            "data.max_bad_rows (-1) must be a count or a fraction, at least 0.",
        ),
        (DataConfig, "data", {"train": "a", "max_bad_rows": float("nan")}, "data.max_bad_rows (nan) must be a count"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_the_rule(cls: type, section: str, values: Any, message: str) -> None:
    assert message_of(build_section, cls, values, section).startswith(message)


def test_nearest_names_one_or_all() -> None:
    assert nearest("max_lenght", ["max_length", "max_prompt_length"]) == " Did you mean 'max_length'?"
    assert nearest("?", {"b": 1, "a": 1}) == " Known: a, b."


@pytest.mark.parametrize(
    ("value", "hint"),
    [(3, int), (0, float), (None, int | None), ("b", Literal["a", "b"]), (["x"], list[str]), (2, int | float)],
)
def test_a_value_of_the_right_type_passes_unchanged(value: Any, hint: Any) -> None:
    assert checked_value(value, hint, "s.k") == value


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (1.0, int, "int"),
        (False, int, "int"),
        ("1", int | None, "int or null"),
        (1, bool, "bool"),
        ("x", list[str], r"list (not empty, of str)"),
    ],
)
def test_a_value_of_another_type_is_refused(value: Any, hint: Any, words: str) -> None:
    assert message_of(checked_value, value, hint, "s.k") == f"s.k ({value!r}) must be of type {words}."


def test_a_section_with_a_required_field_after_an_optional_one() -> None:
    @dataclass(kw_only=True)
    class Section:
        width: int = 2
        name: str

    assert message_of(build_section, Section, {"width": 3}, "s") == "s.name is missing: the recipe must give it."
    assert build_section(Section, {"name": "a"}, "s") == Section(width=2, name="a")
