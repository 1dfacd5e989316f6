import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagpr.benchmarks import longlamp
from tagpr.benchmarks.longlamp import ABSTRACT_WORDS, TASKS, configuration, iterate_split, split_files
from tagpr.errors import ConfigError, DataError
from tagpr.schema import Example, Split


def topic(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "author": f"u{number % 3}",
        "input": f"Generate the content for a reddit post title {number}",
        "output": f"content {number}",
        "profile": [{"author": "u", "summary": f"s{n}", "content": f"c{n} of {number}"} for n in range(3)],
    }
    return row | changes


def place(folder: Path, rows: list[dict[str, Any]], name: str = "test-00000-of-00001.parquet") -> Path:
    path = folder / "topic_writing_temporal" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row) for row in rows]
        text = "\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]"
        path.write_text(text, encoding="utf-8")
    return folder


def read(
    folder: Path, split: Split = "test", counts: Counter[str] | None = None, **settings: Any
) -> list[Example]:
    return list(
        iterate_split(folder, "longlamp_topic", split, Counter() if counts is None else counts, **settings)
    )


@pytest.mark.parametrize(
    "name",
    [
        "test-00000-of-00001.parquet",
        "test.parquet",
        "test/0000.parquet",
        "test.jsonl",
        "test.json",
    ],
)
def test_reads_a_split_in_each_format(tmp_path: Path, name: str) -> None:
    first, second = read(place(tmp_path, [topic(0), topic(1)], name))
    assert (first.id, first.user_id, first.task, first.split) == (
        "longlamp_topic:test:0",
        "u0",
        "longlamp_topic",
        "test",
    )
    assert (second.query, second.gold) == ("Generate the content for a reddit post title 1", "content 1")
    assert [item.fields for item in second.profile] == [
        {"summary": f"s{n}", "content": f"c{n} of 1"} for n in range(3)
    ]
    assert [item.id for item in second.profile] == ["0", "1", "2"]
    assert all(item.date is None for item in second.profile)


def test_shards_follow_each_other_and_val_is_dev(tmp_path: Path) -> None:
    place(tmp_path, [topic(2)], "val-00001-of-00002.parquet")
    place(tmp_path, [topic(0), topic(1)], "val-00000-of-00002.parquet")
    counts: Counter[str] = Counter()
    assert [row.gold for row in read(tmp_path, "dev", counts)] == ["content 0", "content 1", "content 2"]
    assert counts == {"rows_in_file": 3}


def test_the_names_of_the_official_code_are_read_too(tmp_path: Path) -> None:
    (row,) = read(place(tmp_path, [topic(0, profile=[{"input": "s", "output": "c"}])]))
    assert row.profile[0].fields == {"summary": "s", "content": "c"}


@pytest.mark.parametrize(
    ("task", "user", "item"),
    [
        ("longlamp_abstract", "name", {"id": "x", "title": "T", "abstract": "A", "year": "2001"}),
        (
            "longlamp_review",
            "reviewerId",
            {"overall": 5.0, "summary": "S", "description": "", "reviewText": "R"},
        ),
    ],
)
def test_other_tasks_have_their_own_columns(
    tmp_path: Path, task: str, user: str, item: dict[str, Any]
) -> None:
    folder = tmp_path / configuration(task, "user")
    folder.mkdir()
    row = {user: "someone", "input": "i", "output": "o", "profile": [item]}
    (folder / "train.jsonl").write_text(json.dumps(row))
    (example,) = iterate_split(tmp_path, task, "train", Counter(), setting="user")
    assert example.user_id == "someone"
    assert example.profile[0].fields == {name: str(item[name]) for name in TASKS[task].fields}


def test_a_missing_user_becomes_a_fingerprint_of_the_profile(tmp_path: Path) -> None:
    rows = [topic(0, author=None), topic(0, author=""), topic(1, author=None)]
    users = [row.user_id for row in read(place(tmp_path, rows))]
    assert users[0] == users[1] != users[2]
    assert all(user.startswith("fp-") for user in users)


def test_what_scraped_rows_lack_is_left_out_and_counted(tmp_path: Path) -> None:
    odd = [
        {"summary": None, "content": "c"},
        {"summary": "", "content": "kept"},
        {"summary": "s", "content": None},
    ]
    rows = [topic(0, output=None), topic(1, input="  "), topic(2, profile=odd), topic(3, profile=[])]
    counts: Counter[str] = Counter()
    kept = read(place(tmp_path, rows), counts=counts)
    assert [row.id for row in kept] == ["longlamp_topic:test:2", "longlamp_topic:test:3"]
    assert [item.fields["content"] for item in kept[0].profile] == ["kept"]
    assert kept[1].profile == ()
    assert counts == {"rows_in_file": 4, "rows_without_text": 2, "items_without_fields": 2}


def test_a_share_is_drawn_by_the_seed_and_grows(tmp_path: Path) -> None:
    place(tmp_path, [topic(number) for number in range(200)])
    ids = {share: [row.id for row in read(tmp_path, share=share, seed=3)] for share in (0.001, 0.1, 0.5, 1.0)}
    assert [len(drawn) for drawn in ids.values()] == [1, 20, 100, 200]
    assert set(ids[0.001]) < set(ids[0.1]) < set(ids[0.5])
    assert ids[0.1] == sorted(ids[0.1], key=ids[1.0].index)
    assert ids[0.1] != [row.id for row in read(tmp_path, share=0.1, seed=4)]
    # The very rows: a draw must not change with versions of anything.
    assert [int(name.rsplit(":", 1)[1]) for name in ids[0.1]][:5] == [3, 6, 15, 19, 45]


BAD: dict[str, tuple[str, str, str]] = {
    "html": ("test.jsonl", "<!doctype html><p>404", "holds an HTML page"),
    "html array": ("test.json", "<html>", "holds an HTML page"),
    "cut off": ("test.jsonl", '{"input": "a"', "test.jsonl:1: is no JSON"),
    "no object": ("test.jsonl", "[1]", "test.jsonl:1: is no JSON object"),
    "no parquet": ("test-0.parquet", "PAR1 not", "is no parquet file"),
    "profile no array": ("test.jsonl", json.dumps(topic(0, profile="x")), "row 0: its 'profile' is not an"),
    "item no object": ("test.jsonl", json.dumps(topic(0, profile=["x"])), "row 0: its 'profile' is not an"),
    "surrogate": ("test.jsonl", json.dumps(topic(0, output="\ud800")), "row 0: has half a surrogate"),
}


@pytest.mark.parametrize(("name", "content", "problem"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: str, problem: str) -> None:
    path = tmp_path / "topic_writing_temporal" / name
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    place(tmp_path, [topic(number) for number in range(50)])
    (path,) = split_files(tmp_path, "longlamp_topic", "test")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        read(tmp_path)


def test_missing_files_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"topic_writing_temporal: has no dev split \(val-\*\.parquet"):
        read(tmp_path, "dev")
    with pytest.raises(ConfigError, match=r"task=lamp3: no task of LongLaMP. Known: longlamp_abstract"):
        list(iterate_split(tmp_path, "lamp3", "test", Counter()))
    with pytest.raises(ConfigError, match="setting=time: LongLaMP is split by temporal or user"):
        read(tmp_path, setting="time")
    place(tmp_path, [topic(0)])
    for share in (0, 1.1, -1):
        with pytest.raises(ConfigError, match="is not above 0 and at most 1"):
            read(tmp_path, share=share)
    place(tmp_path, [topic(0)], "test-1.jsonl")
    with pytest.raises(DataError, match="test is there in several formats"):
        read(tmp_path)


# ---- tasks (their prompts: test_prompt.py)


def test_retrievers_see_what_the_official_ones_do() -> None:
    fields = dict.fromkeys(
        ("title", "abstract", "overall", "summary", "description", "reviewText", "content")
    )
    item = {name: name for name in fields}
    assert TASKS["longlamp_abstract"].item_text(item) == "title abstract"
    assert TASKS["longlamp_review"].item_text(item) == "overall summary description reviewText"
    assert TASKS["longlamp_topic"].item_text(item) == "summary content"
    assert (
        TASKS["longlamp_abstract"].query_text('for the title "items" using the following items: 1. a ')
        == "1. a"
    )
    assert TASKS["longlamp_abstract"].query_text("no mark") == "no mark"
    assert TASKS["longlamp_review"].query_text("items: x") == "items: x"


def test_abstracts_end_at_their_750th_word() -> None:
    item = {"title": "T", "abstract": "  a\n" * 2000}
    text = TASKS["longlamp_abstract"].render("q", [item])
    assert text.startswith(f'"{" ".join("a" * ABSTRACT_WORDS)}" is the abstract for the title "T". Use the')


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_answers_are_only_stripped(answer: str) -> None:
    for task in longlamp.TASKS.values():
        assert task.parse(answer) == answer.strip()
