import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagpr.benchmarks import json_objects
from tagpr.benchmarks.json_objects import _Reader, read_objects
from tagpr.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), max_size=5)


def read_in_pieces(text: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Read ``text`` as if the file came in pieces of ``sizes`` characters, whatever is asked for."""
    position = 0
    turn = 0

    def read(_: int) -> str:
        nonlocal position, turn
        size = sizes[turn % len(sizes)]
        turn += 1
        piece = text[position : position + size]
        position += size
        return piece

    return list(_Reader(Path("file"), read).objects())


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from([None, 1]), st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_equals_json_load_wherever_the_file_is_cut_into_pieces(
    rows: list[dict[str, Any]], indent: int | None, ascii_only: bool, sizes: list[int]
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    assert read_in_pieces(text, sizes) == rows


@settings(deadline=None, max_examples=60)
@given(ROWS.filter(bool), st.data())
def test_a_file_cut_off_anywhere_is_refused(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    text = json.dumps(rows)
    end = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(DataError, match=r"ends too early|is not a JSON array"):
        read_in_pieces(text[:end], [data.draw(st.integers(1, 50))])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"  <!DOCTYPE html><html>", "HTML page"),
        (b'{"a": 1}', "not a JSON array"),
        (b"", "not a JSON array"),
        (b"[1]", "found '1'"),
        (b'[{"a": 1} {"a": 2}]', "found '{'"),
        (b'[{"a": 1},]', "found ']'"),
        (b'[{"a": 1}] more', "after the end"),
        (b'[{"a" 1, "long enough": "to be no cut at the end of a buffer"}]', "malformed JSON in element 1"),
        (b'[{"a": 1}, {"b": \xff}]', "not UTF-8"),
        (b"[" + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"]", "unreadable JSON in element 1"),
    ],
)
def test_what_is_no_array_of_objects_is_refused_in_one_line(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(problem)) as caught:
        list(read_objects(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_objects(tmp_path / "absent.json"))


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert list(read_objects(tmp_path / "rows.json")) == [{"a": 1}]


def test_memory_holds_a_buffer_not_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_objects, "_CHUNK_CHARS", 1000)
    text = json.dumps([{"id": index, "text": "x" * 300} for index in range(200)])
    largest = 0
    position = 0

    def read(size: int) -> str:
        nonlocal position
        position += size
        return text[position - size : position]

    reader = _Reader(Path("file"), read)
    for row in reader.objects():
        largest = max(largest, len(reader.buffer))
        assert len(row["text"]) == 300
    assert largest <= 2000 < len(text) / 10
