"""Files to the cache and back: nothing lost, nothing built twice, nothing half built."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_megatron.config import ConfigError, DataConfig
from orpo_megatron.data.store import PairStore, prepare
from orpo_megatron.data.tokens import BOUNDARY_NOTE


@pytest.fixture
def build(tokenizer_folder: str, tmp_path: Path):
    """Returns a function that prepares a file with some settings."""

    def build(path: Path, split: str = "train", **settings: Any) -> PairStore:
        return prepare(
            str(path),
            split,
            config=DataConfig(train=str(path), **{"num_workers": 1, **settings}),
            tokenizer_name=tokenizer_folder,
            cache_dir=tmp_path / "cache",
        )

    return build


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def text_row(prompt: str = "3 + 3 =", chosen: str = " 6", rejected: str = " 7") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


ONE_OF_EACH = [
    (text_row(), None),
    (b'{"prompt": "a", "chosen": ', "broken JSON (Expecting value at character 28)"),
    ({"prompt": "a", "chosen": "b"}, "missing field 'rejected'"),
    (text_row(rejected=""), "empty response in 'rejected'"),
    (text_row(rejected=" 6"), "equal responses"),
    (text_row(chosen=6), "wrong type ('chosen' is a number, expected a list of messages)"),  # type: ignore[arg-type]
    (
        {"prompt": [user("a"), user("b")], "chosen": "c", "rejected": "d"},
        "roles out of order (message 2 is 'user', expected 'assistant')",
    ),
    (text_row(), None),
    (text_row(prompt=" x" * 17), "prompt too long (17 tokens, limit 16)"),
    (text_row(rejected=" x" * 99), "response too long (105 tokens with the prompt, limit 64)"),
    (b'{"prompt": "\xe9", "chosen": "a", "rejected": "b"}', "not UTF-8 (byte 13 of the line)"),
    (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
        "tie in an implicit prompt",
    ),
    (text_row(prompt="The last"), None),
]


def test_one_of_each_bad_row_is_named_and_the_good_ones_are_kept(build, tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row for row, _ in ONE_OF_EACH])
    store = build(path, max_length=64, max_prompt_length=16, max_bad_rows=10)
    named = [f"{path}:{line}: {reason}" for line, (_, reason) in enumerate(ONE_OF_EACH, start=1) if reason]
    assert list(map(str, store.report.bad_rows)) == named
    assert [store.source(i) for i in range(len(store))] == [(str(path), 1), (str(path), 8), (str(path), 13)]
    assert tokenizer.decode(store[2].prompt) == "The last"
    assert store.report.rows_read == len(ONE_OF_EACH) == 13
    assert sum(store.report.bad_row_counts.values()) == 10
    with pytest.raises(
        ConfigError, match=r"10 of 13 rows .*1 broken JSON.*max_bad_rows \(9\).*bad_rows.json"
    ) as raised:
        build(path, max_length=64, max_prompt_length=16, max_bad_rows=9)
    assert (tmp_path / "cache" / "data" / store.folder.name / "bad_rows.jsonl").exists()
    assert named[0] in str(raised.value)
    with pytest.raises(ConfigError, match=r"max_bad_rows \(0.7\)"):  # a fraction: 9.1 rows
        build(path, max_length=64, max_prompt_length=16, max_bad_rows=0.7)


def test_pairs_lengths_and_report(build, tokenizer, tmp_path: Path) -> None:
    rows = [text_row(), text_row("a b c d", " e" * 60, " f"), {"chosen": [user("a"), assistant("b")], "rejected": 1}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    store = build(path, max_length=20, max_prompt_length=2, overlong="truncate", max_bad_rows=0.5)
    assert len(store) == 2
    np.testing.assert_array_equal(store.lengths.prompt, [2, 2])
    np.testing.assert_array_equal(store.lengths.chosen, [3, 18])  # " ", "6", end; 18 of " e"
    np.testing.assert_array_equal(store.lengths.rejected, [3, 2])
    assert [tokenizer.decode(ids) for ids in (store[1].prompt, store[1].chosen, store[1].rejected)] == [
        " c d",
        " e" * 18,
        " f<|im_end|>",
    ]
    assert store[1].chosen.dtype == np.int32
    assert store.pad_token_id == 2
    report = store.report.to_dict()
    assert (report["rows_read"], report["num_pairs"], report["num_truncated"]) == (3, 2, 2)
    assert report["layouts"] == {str(path): {"explicit_prompt": 2}}
    assert report["bad_row_counts"] == {"wrong type": 1}
    assert report["bad_rows"][0]["line"] == 3
    assert report["tokens"]["chosen"] == {"mean": 10.5, "max": 18, "total": 21}
    assert (report["boundary_note"], report["eos_token"]) == (BOUNDARY_NOTE, "<|im_end|>")
    assert report["chat_template"] == tokenizer.chat_template
    json.dumps(report)
    summary = store.report.summary()
    assert "train data: 2 pairs of 3 rows, 2 of them truncated" in summary
    assert f"{path}:3: wrong type" in summary
    assert "explicit_prompt" in summary and BOUNDARY_NOTE in summary


def test_a_store_travels_to_another_process(build, tmp_path: Path) -> None:
    store = build(write_rows(tmp_path / "rows.jsonl", [text_row(), text_row("b")]))
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000  # the folder's name, not the tokens
    copy = pickle.loads(pickled)
    np.testing.assert_array_equal(copy[1].chosen, store[1].chosen)
    assert copy.source(1) == store.source(1)


def built(tmp_path: Path) -> dict[str, int]:
    """Returns when each cache folder's tokens were written."""
    folders = (tmp_path / "cache" / "data").iterdir()
    return {path.name: (path / "tokens.bin").stat().st_mtime_ns for path in folders if path.name[0] != "."}


def test_the_cache_is_used_again_and_a_changed_setting_makes_another(build, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [text_row(), text_row("b")])
    store = build(path)
    before = built(tmp_path)
    assert list(before) == [store.folder.name]
    assert build(path, max_bad_rows=1, pairs_per_step=4, shuffle=False).folder == store.folder
    assert built(tmp_path) == before
    changes = [
        {"max_length": 100, "max_prompt_length": 50},
        {"max_prompt_length": 50},
        {"overlong": "truncate"},
        {"layout": "explicit_prompt"},
        {"chat_template": "{{ messages[0].content }}"},
    ]
    folders = {build(path, **change).folder for change in changes}
    assert len(folders | {store.folder}) == 6
    write_rows(path, [text_row(), text_row("c")])
    assert build(path).folder not in folders | {store.folder}


def test_a_store_is_known_by_its_token_ids(build, tmp_path: Path) -> None:
    """Not by what they came from: a template may write the day's date."""
    rows = [text_row("a", " b c", " d"), text_row("e", " f", " g h")]
    store = build(write_rows(tmp_path / "rows.jsonl", rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    elsewhere = build(tmp_path / "rows.json", max_length=100, max_prompt_length=50)
    assert elsewhere.folder != store.folder and elsewhere.content_hash == store.content_hash
    others = [
        [rows[1], rows[0]],
        [rows[0], text_row("e", " f", " g i")],
        [text_row("a b", " c", " d"), rows[1]],  # the same ids, cut elsewhere
    ]
    hashes = {build(write_rows(tmp_path / f"{i}.jsonl", other)).content_hash for i, other in enumerate(others)}
    assert len(hashes | {store.content_hash}) == 4


def test_the_same_rows_under_another_name_share_the_cache(build, tmp_path: Path) -> None:
    rows = [text_row(), text_row(rejected=""), text_row("b")]
    first = build(write_rows(tmp_path / "rows.jsonl", rows), max_bad_rows=1)
    moved = tmp_path / "moved.jsonl"
    second = build(write_rows(moved, rows), max_bad_rows=1)
    assert first.folder == second.folder
    assert second.source(1) == (str(moved), 3)
    assert [row.file for row in second.report.bad_rows] == [str(moved)]
    assert list(second.report.layouts) == [str(moved)]


def test_how_a_file_is_read_is_part_of_what_the_cache_is_known_by(build, tmp_path: Path) -> None:
    """An array in a file of lines is one bad row; under a name that says array it is three good ones."""
    array = json.dumps([text_row(), text_row("b"), text_row("c")])
    (tmp_path / "rows.jsonl").write_text(array)
    with pytest.raises(ConfigError, match="Empty data set"):
        build(tmp_path / "rows.jsonl")
    assert len(build((tmp_path / "rows.jsonl").rename(tmp_path / "rows.json"))) == 3


@pytest.mark.parametrize("name", ["tokens.bin", "index.bin", "bad_rows.jsonl", "report.json"])
def test_a_torn_cache_is_built_anew(name: str, build, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [text_row(), text_row("b")])
    store = build(path)
    tokens = store[1].rejected.tolist()
    torn = store.folder / name
    if name.startswith(("report", "bad_rows")):
        torn.unlink()
    else:
        torn.write_bytes(torn.read_bytes()[:-4])
    assert build(path)[1].rejected.tolist() == tokens


def test_a_later_start_reads_neither_the_data_nor_whole_arrays(build, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [text_row(), text_row("b", rejected=""), text_row("c")])
    os.utime(path, (0, 0))
    first = build(path, max_bad_rows=1)
    path.write_bytes(bytes(path.stat().st_size))  # the same size and time: what the remembered hash cannot see
    os.utime(path, (0, 0))
    store = build(path, max_bad_rows=1)
    assert store.folder == first.folder
    assert [store.source(index)[1] for index in range(2)] == [1, 3]
    for array in (*vars(store.lengths).values(), store[1].chosen):
        assert isinstance(array, np.memmap) and array.filename is not None and not array.flags.writeable
    os.utime(path, (0, 1))
    with pytest.raises(ConfigError, match="Empty data set"):
        build(path, max_bad_rows=3)


def test_a_build_that_fails_leaves_no_cache(build, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [b'[{"prompt": '])
    with pytest.raises(ConfigError, match="cannot be read"):
        build(path)
    assert built(tmp_path) == {}


def test_empty_data(build, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Empty data set: .* holds no rows"):
        build(write_rows(tmp_path / "rows.jsonl", []))
    with pytest.raises(ConfigError, match="Empty data set: none of the 1 rows .*1 empty response"):
        build(write_rows(tmp_path / "rows.jsonl", [text_row(chosen="")]), max_bad_rows=5)


def test_several_sources_in_order(tokenizer_folder: str, tmp_path: Path) -> None:
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", [text_row(name)])) for name in "ba"]
    config = DataConfig(train=paths)
    store = prepare(paths, "train", config=config, tokenizer_name=tokenizer_folder, cache_dir=tmp_path / "cache")
    assert [store.source(i) for i in range(2)] == [(path, 1) for path in paths]


def test_worker_processes_give_the_same_in_the_same_order(build, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("orpo_megatron.data.build.BLOCKS_IN_PROCESS", 3)
    monkeypatch.setattr("orpo_megatron.data.files.BYTES_IN_BLOCK", 500)
    rows = [text_row(f"{number} + 1 =", rejected="" if number % 10 == 3 else " no") for number in range(100)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    stores = []
    for num_workers in (1, 2):
        stores.append(build(path, num_workers=num_workers, max_bad_rows=0.1))
        stores[-1].folder.rename(tmp_path / f"built_by_{num_workers}")
    one, two = ((tmp_path / f"built_by_{n}") for n in (1, 2))
    for name in ("tokens.bin", "index.bin", "bad_rows.jsonl", "report.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    monkeypatch.undo()
    copy = PairStore(two, "train", [str(path)])
    assert build(path, max_bad_rows=0.1).content_hash == copy.content_hash  # in one block
    assert [row.line for row in copy.report.bad_rows] == list(range(4, 101, 10))
    assert [copy.source(index)[1] for index in (0, 3, 89)] == [1, 5, 100]


def test_progress_is_one_line_where_there_is_no_terminal(tokenizer_folder: str, tmp_path: Path, capsys) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [text_row()]))
    settings: dict[str, Any] = {"tokenizer_name": tokenizer_folder, "cache_dir": tmp_path / "cache", "role": "eval"}
    prepare(path, "test", config=DataConfig(train=path), show_progress=True, **settings)
    assert capsys.readouterr().err == "Tokenising eval data ...\n"


@pytest.mark.parametrize(
    ("name", "pairs", "counts", "tokens"),
    [
        ("dpo_en_demo.sharegpt.json", 194, {"response too long": 6}, 205_421),
        ("hh_harmless_base.jsonl.gz", 1491, {"roles out of order": 7, "empty response": 2}, 353_382),
    ],
)
def test_shared_files_load_with_no_option(
    name: str, pairs: int, counts: dict[str, int], tokens: int, build, shared_data: Path
) -> None:
    store = build(shared_data / name)
    assert (len(store), store.report.bad_row_counts) == (pairs, counts)
    assert sum(int(part.sum()) for part in vars(store.lengths).values()) == tokens
    assert all(store[i].chosen[-1] == store[i].rejected[-1] == 2 for i in range(pairs))
