"""Every layout and every way in which a row can be unusable, with the rows written out."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from orpo_megatron.config import ConfigError
from orpo_megatron.data.files import find_files
from orpo_megatron.data.rows import BadRow, Message, PreferenceRow, read_rows

SYSTEM, ASK, ANSWER, MORE = "Be brief.", "2 + 2?", "4.", "And 3 + 3?"
GOOD, BAD = "6.", "Seven, I think."


def chat(*contents: str, keys: tuple[str, str] = ("role", "content"), names: str = "user assistant") -> list[dict]:
    """Returns messages of user and assistant in turn, after a system message where it comes first."""
    user, assistant = names.split()
    roles = ["system"] if contents[0] == SYSTEM else []
    roles += [user, assistant] * len(contents)
    return [dict(zip(keys, pair, strict=True)) for pair in zip(roles, contents, strict=False)]


def read_one(record: Any, tmp_path: Path, layout: str = "auto") -> PreferenceRow | BadRow:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (row,) = read_rows(str(path), "train", layout)
    return row


ONE_TURN = (Message("user", ASK),)
TWO_TURNS = (Message("user", ASK), Message("assistant", ANSWER), Message("user", MORE))
WITH_SYSTEM = (Message("system", SYSTEM), *TWO_TURNS)
SHAREGPT = {"keys": ("from", "value"), "names": "human gpt"}

LAYOUTS = [
    ("explicit_prompt", {"prompt": "Sum:", "chosen": " 6", "rejected": " 7"}, "Sum:", " 6", " 7"),
    ("explicit_prompt", {"prompt": chat(ASK), "chosen": GOOD, "rejected": BAD}, ONE_TURN, GOOD, BAD),
    (
        "explicit_prompt",
        {
            "prompt": chat(SYSTEM, ASK, ANSWER, MORE),
            "chosen": [{"role": "assistant", "content": GOOD}],
            "rejected": [{"role": "assistant", "content": BAD}],
        },
        WITH_SYSTEM,
        GOOD,
        BAD,
    ),
    (
        "explicit_prompt",
        {"prompt": ASK, "chosen": [{"role": "assistant", "content": GOOD}], "rejected": BAD},
        ONE_TURN,
        GOOD,
        BAD,
    ),
    ("prompt_beside", {"prompt": ASK, "chosen": chat(ASK, GOOD), "rejected": chat(ASK, BAD)}, ONE_TURN, GOOD, BAD),
    (
        "prompt_beside",  # the first user turn of several
        {"prompt": ASK, "chosen": chat(ASK, ANSWER, MORE, GOOD), "rejected": chat(ASK, ANSWER, MORE, BAD)},
        TWO_TURNS,
        GOOD,
        BAD,
    ),
    (
        "prompt_beside",  # the whole, as some text
        {
            "prompt": f"User: {ASK} Bot: {ANSWER} User: {MORE}",
            "chosen": chat(ASK, ANSWER, MORE, GOOD),
            "rejected": chat(ASK, ANSWER, MORE, BAD),
        },
        TWO_TURNS,
        GOOD,
        BAD,
    ),
    (
        "prompt_beside",  # the whole, as messages
        {"prompt": chat(ASK), "chosen": chat(SYSTEM, ASK, GOOD), "rejected": chat(SYSTEM, ASK, BAD)},
        (Message("system", SYSTEM), *ONE_TURN),
        GOOD,
        BAD,
    ),
    ("implicit_prompt", {"chosen": chat(ASK, GOOD), "rejected": chat(ASK, BAD)}, ONE_TURN, GOOD, BAD),
    (
        "implicit_prompt",
        {"chosen": chat(SYSTEM, ASK, ANSWER, MORE, GOOD), "rejected": chat(SYSTEM, ASK, ANSWER, MORE, BAD)},
        WITH_SYSTEM,
        GOOD,
        BAD,
    ),
    (
        "implicit_prompt",  # text: cut back to white space, not within "bl|ue" and "bl|ack"
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "The sky is",
        " blue.",
        " black.",
    ),
    (
        "implicit_prompt",
        {"chosen": "Q: 3 + 3?\n\nA: 6", "rejected": "Q: 3 + 3?\n\nB: 7"},
        "Q: 3 + 3?",
        "\n\nA: 6",
        "\n\nB: 7",
    ),
    (
        "hh",
        {
            "chosen": f"\n\nHuman: {ASK}\n\nAssistant: {ANSWER}\n\nHuman: {MORE}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {ANSWER}\n\nHuman: {MORE}\n\nAssistant: {BAD}\n",
        },
        TWO_TURNS,
        GOOD,
        BAD,
    ),
    (
        "sharegpt",
        {
            "conversations": chat(SYSTEM, ASK, ANSWER, MORE, **SHAREGPT),
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        WITH_SYSTEM,
        GOOD,
        BAD,
    ),
    (
        "sharegpt",
        {
            "system": SYSTEM,
            "conversations": chat(ASK, ANSWER, MORE, **SHAREGPT),
            "chosen": [{"role": "assistant", "content": GOOD}],
            "rejected": BAD,
        },
        WITH_SYSTEM,
        GOOD,
        BAD,
    ),
    (
        "explicit_prompt",  # the system text beside a conversation, and what says nothing
        {"system": SYSTEM, "prompt": chat(ASK, ANSWER, MORE), "chosen": GOOD, "rejected": BAD, "tools": "[]"},
        WITH_SYSTEM,
        GOOD,
        BAD,
    ),
    (
        "prompt_beside",  # the same system text twice
        {
            "system": SYSTEM,
            "prompt": ASK,
            "chosen": chat(SYSTEM, ASK, ANSWER, MORE, GOOD),
            "rejected": chat(SYSTEM, ASK, ANSWER, MORE, BAD),
        },
        WITH_SYSTEM,
        GOOD,
        BAD,
    ),
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("layout", "record", "prompt", "chosen", "rejected"), LAYOUTS)
def test_layouts(layout: str, record: dict, prompt: Any, chosen: str, rejected: str, named: bool, tmp_path: Path):
    row = read_one(record, tmp_path, layout if named else "auto")
    assert row == PreferenceRow(prompt, chosen, rejected, str(tmp_path / "rows.jsonl"), 1, layout)


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if number % 2 else 'Human'}: {turn}" for number, turn in enumerate(turns))


UNUSABLE = [
    ([1, 2], "wrong type (the row is a list, not an object with fields)"),
    ("text", "wrong type (the row is a text, not an object with fields)"),
    ({"prompt": "a", "chosen": 5, "rejected": "b"}, "wrong type ('chosen' is a number, expected a list of messages)"),
    (
        {"prompt": True, "chosen": "a", "rejected": "b"},
        "wrong type ('prompt' is a boolean, expected a list of messages)",
    ),
    ({"chosen": chat(ASK, GOOD), "rejected": BAD}, "wrong type ('rejected' is a text, expected a list of messages)"),
    ({"prompt": "a", "rejected": "b"}, "missing field 'chosen'"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "missing field 'rejected'"),
    ({"question": "a"}, "missing field 'chosen'"),
    ({"chosen": [{"role": "user"}], "rejected": []}, "missing field 'content' of a message in 'chosen'"),
    ({"prompt": "a", "chosen": " \n", "rejected": "b"}, "empty response in 'chosen'"),
    ({"chosen": hh(ASK, GOOD), "rejected": hh(ASK, "")}, "empty response in 'rejected'"),
    ({"prompt": "a", "chosen": "b ", "rejected": "b"}, "equal responses"),
    ({"prompt": ASK, "chosen": chat(ASK, GOOD), "rejected": chat(ASK, GOOD)}, "equal responses"),
    ({"chosen": chat(ASK, GOOD), "rejected": chat(ASK, GOOD)}, "tie in an implicit prompt"),
    ({"chosen": hh(ASK, GOOD), "rejected": hh(ASK, GOOD)}, "tie in an implicit prompt"),
    ({"chosen": "a b", "rejected": "a b"}, "tie in an implicit prompt ('chosen' and 'rejected' are the same)"),
    (
        {"chosen": "a b ", "rejected": "a b c"},
        "tie in an implicit prompt (nothing is left of a response after the shared beginning)",
    ),
    (
        {"chosen": "yes", "rejected": "no"},
        "no shared beginning (of 'chosen' and 'rejected', which would be the prompt)",
    ),
    (
        {"chosen": chat(ASK, ANSWER, MORE, GOOD), "rejected": chat(ASK, GOOD, MORE, BAD)},
        "no shared beginning (message 2 differs and is not the final one of both)",
    ),
    (
        {"chosen": hh(ASK, ANSWER, MORE, GOOD), "rejected": hh(ASK, BAD)},
        "no shared beginning (message 2 differs and is not the final one of both)",
    ),
    (
        {"chosen": chat(ASK, GOOD)[::-1], "rejected": chat(ASK, BAD)[::-1]},
        "roles out of order ('chosen' does not end with an assistant message)",
    ),
    (
        {"chosen": chat(ASK, GOOD)[1:], "rejected": chat(ASK, BAD)[1:]},
        "roles out of order (the prompt does not end with a user message)",
    ),
    (
        {"prompt": chat(ASK, ANSWER), "chosen": GOOD, "rejected": BAD},
        "roles out of order (the prompt does not end with a user message)",
    ),
    (
        {"prompt": [*chat(SYSTEM, ASK), {"role": "tool", "content": "4"}], "chosen": GOOD, "rejected": BAD},
        "roles out of order (message 3 is 'tool', expected 'assistant')",
    ),
    (
        {"chosen": hh(ASK, ANSWER) + "\n\nAssistant: 4!", "rejected": hh(ASK, BAD)},
        "roles out of order (the prompt does not end with a user message)",
    ),
    (
        {"prompt": ASK, "chosen": chat(MORE, GOOD), "rejected": chat(MORE, BAD)},
        "prompt differs from the conversation ('prompt' is none of its user turns)",
    ),
    ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "not UTF-8 (half a surrogate pair in 'chosen')"),
    (
        {"system": SYSTEM, "prompt": "a", "chosen": "b", "rejected": "c"},
        "field not supported ('system' beside plain text, which has no place for it)",
    ),
    (
        {"system": "Be rude.", "chosen": chat(SYSTEM, ASK, GOOD), "rejected": chat(SYSTEM, ASK, BAD)},
        "roles out of order ('system' differs from the conversation's own system message)",
    ),
    (
        {"prompt": chat(ASK), "chosen": GOOD, "rejected": BAD, "tools": [{"name": "add"}]},
        "field not supported 'tools'",
    ),
    (
        {"prompt": chat(ASK), "chosen": {"role": "assistant", "tool_calls": [{}]}, "rejected": BAD},
        "field not supported 'tool_calls' of a message in 'chosen'",
    ),
]


@pytest.mark.parametrize(("record", "reason"), UNUSABLE)
def test_unusable_rows(record: Any, reason: str, tmp_path: Path) -> None:
    row = read_one(record, tmp_path)
    assert isinstance(row, BadRow)
    assert str(row) == f"{tmp_path / 'rows.jsonl'}:1: {reason}"


def test_a_row_that_lacks_its_prompt_is_not_taken_for_an_implicit_one(tmp_path: Path) -> None:
    full = {"prompt": "Which colour?", "chosen": "The sky is blue.", "rejected": "The sky is black."}
    lacking = {key: full[key] for key in ("chosen", "rejected")}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (lacking, full, full)))
    first, *others = read_rows(str(path), "train")
    assert str(first).endswith(":1: missing field 'prompt'")
    assert [row.prompt for row in others] == ["Which colour?"] * 2


def test_a_named_layout_is_the_only_one(tmp_path: Path) -> None:
    row = read_one({"chosen": hh(ASK, GOOD), "rejected": hh(ASK, BAD)}, tmp_path, "explicit_prompt")
    assert str(row).endswith("missing field 'prompt'")
    row = read_one({"chosen": "a b", "rejected": "a c"}, tmp_path, "hh")
    assert "is no transcript" in str(row)


RECORD = {"prompt": "Sum:", "chosen": " 6", "rejected": " 7"}
OTHER = {"prompt": "Sum again:", "chosen": " 8", "rejected": " 9"}


def prompts(source: Path | str, split: str = "train") -> list[tuple[Any, int]]:
    return [(row.prompt, row.line) for row in read_rows(str(source), split) if isinstance(row, PreferenceRow)]


def test_json_files(tmp_path: Path) -> None:
    lines = (json.dumps(RECORD) + "\n\n" + json.dumps(OTHER)).encode()
    array = json.dumps([RECORD, OTHER], indent=1).encode()
    contents = {"a.jsonl": lines, "b.json": lines, "c.json": array, "d.json": b"\xef\xbb\xbf \n" + array}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
            file.write(content)
        second = 3 if content is lines else 2  # a line counts lines, also empty ones
        for path in (name, f"{name}.gz"):
            assert prompts(tmp_path / path) == [("Sum:", 1), ("Sum again:", second)]


def test_lines_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [b'{"a": }', b'{"a": "\xff"}', b"\xef\xbb\xbf" + json.dumps(RECORD).encode(), b"9" * 5000, b"[" * 200_000]
    path.write_bytes(b"\n".join(lines))
    reasons = [str(row).split(": ", 1)[1] for row in read_rows(str(path), "train")]
    assert reasons == [
        "broken JSON (Expecting value at character 7)",
        "not UTF-8 (byte 8 of the line)",
        "broken JSON (Unexpected UTF-8 BOM (decode using utf-8-sig) at character 1)",
        reasons[3],
        reasons[4],
    ]
    assert "Exceeds the limit (4300 digits)" in reasons[3] and "maximum recursion depth exceeded" in reasons[4]


def test_lines_and_rows_are_numbered_through_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    records = [{**RECORD, "prompt": f"{number}:"} for number in range(1, 300)]
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    lines[100:100] = [b"\n", b'{"prompt"\n']  # an empty line and a broken one
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines)[:-1])
    (tmp_path / "rows.json").write_text(json.dumps(records))
    Dataset.from_list(records).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    in_order = [(f"{number}:", number) for number in range(1, 300)]
    of_lines = [(prompt, number + 2 * (number > 100)) for prompt, number in in_order]
    for size in (1, 50, 1000):
        monkeypatch.setattr("orpo_megatron.data.files.BYTES_IN_BLOCK", size)
        monkeypatch.setattr("orpo_megatron.data.files.ROWS_IN_BLOCK", size)
        assert prompts(tmp_path / "rows.jsonl") == of_lines
        assert [row.line for row in read_rows(str(tmp_path / "rows.jsonl"), "train") if isinstance(row, BadRow)] == [
            102
        ]
        for name in ("rows.json", "rows.parquet", "saved"):
            assert prompts(tmp_path / name) == in_order


def test_a_block_travels_to_another_process(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "rows.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps(OTHER))
    (tmp_path / "rows.json").write_text(json.dumps([RECORD, OTHER]))
    Dataset.from_list([RECORD, OTHER]).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        (block,) = find_files(str(tmp_path / name), "train")[0].blocks()
        assert list(pickle.loads(pickle.dumps(block)).records()) == [(1, RECORD), (2, OTHER)]


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([RECORD, OTHER])
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"fit": data, "held": data.select([1])}).save_to_disk(tmp_path / "two")
    both = [("Sum:", 1), ("Sum again:", 2)]
    assert prompts(tmp_path / "rows.parquet") == prompts(tmp_path / "one") == prompts(tmp_path / "two", "fit") == both
    assert prompts(tmp_path / "two", "held") == [("Sum again:", 1)]
    with pytest.raises(ConfigError, match="no split 'train' but fit, held"):
        prompts(tmp_path / "two")


def test_parquet_conversations(tmp_path: Path) -> None:
    from datasets import Dataset

    record = {"prompt": ASK, "chosen": chat(ASK, GOOD), "rejected": chat(ASK, BAD)}
    Dataset.from_list([record]).to_parquet(tmp_path / "rows.parquet")
    (row,) = read_rows(str(tmp_path / "rows.parquet"), "train")
    assert (row.layout, row.prompt, row.chosen) == ("prompt_beside", ONE_TURN, GOOD)


def test_folder_of_files(tmp_path: Path) -> None:
    def write(name: str, record: dict) -> None:
        (tmp_path / name).write_text(json.dumps(record))

    write("b.jsonl", OTHER)
    write("a.jsonl", RECORD)
    (tmp_path / "README.md").touch()
    assert prompts(tmp_path) == [("Sum:", 1), ("Sum again:", 1)]
    write("test-00000-of-00001.jsonl", OTHER)
    assert prompts(tmp_path, "test") == [("Sum again:", 1)]  # named after the split
    with pytest.raises(ConfigError, match="no split 'train' but a, b, test"):  # never trains on a test split
        prompts(tmp_path)
    write("constraint_dev.jsonl", RECORD)  # names one split, not two
    write("my_train.jsonl", RECORD)
    assert prompts(tmp_path) == [("Sum:", 1)]
    assert prompts(tmp_path, "dev") == [("Sum:", 1)]
    write("train-00000-of-00001.jsonl", OTHER)
    assert prompts(tmp_path) == [("Sum again:", 1)]  # the split and nothing else


@pytest.mark.parametrize("name", ["none.jsonl", "none/none.json", "./none", "/none/none", "a/b/c"])
def test_missing_source(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        list(read_rows(name, "train"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    contents = {
        "array.json": b'[{"a": 1}, ',
        "latin.json": b'["\xff"]',
        "cut.jsonl.gz": gzip.compress(b'{"a": 1}\n' * 1000)[:-20],
        "plain.jsonl.gz": b'{"a": 1}\n',
        "damaged.jsonl.gz": gzip.compress(b"".join(b"%d\n" % n for n in range(5000)))[:500] + bytes(5000),
        "no.parquet": b"PAR0",
        "rows.csv": b"a,b",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            list(read_rows(str(tmp_path / name), "train"))


def test_hub_name_that_cannot_be_loaded() -> None:
    with pytest.raises(ConfigError, match="'no-such-org/no-such-data', split 'train'.*cannot be loaded from the hub"):
        list(read_rows("no-such-org/no-such-data", "train"))


@pytest.mark.parametrize(
    ("name", "layout", "rows", "bad"),
    [
        ("dpo_en_demo.sharegpt.json", "sharegpt", 200, {}),
        # 7 transcripts with two assistant turns in a row, 2 with an empty last one
        ("hh_harmless_base.jsonl.gz", "hh", 1500, {"roles out of order": 7, "empty response": 2}),
    ],
)
def test_shared_files(name: str, layout: str, rows: int, bad: dict[str, int], shared_data: Path) -> None:
    read = list(read_rows(str(shared_data / name), "train"))
    reasons = [row.reason for row in read if isinstance(row, BadRow)]
    assert len(read) == rows
    assert {reason: reasons.count(reason) for reason in reasons} == bad
    assert {row.layout for row in read if isinstance(row, PreferenceRow)} == {layout}


def test_text_that_is_not_utf8_in_parquet_is_a_row_of_its_own(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    values = pa.array([b"a", b"\xff", b"c"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, values.buffers())  # as a careless writer leaves them
    table = pa.table({"prompt": texts, "chosen": ["x"] * 3, "rejected": ["y"] * 3})
    parquet.write_table(table, tmp_path / "rows.parquet")
    first, second, third = read_rows(str(tmp_path / "rows.parquet"), "train")
    assert isinstance(second, BadRow) and (second.line, second.reason) == (2, "not UTF-8")
    assert isinstance(first, PreferenceRow) and isinstance(third, PreferenceRow) and third.line == 3
