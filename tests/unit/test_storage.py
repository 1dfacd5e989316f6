import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagpr.benchmarks.storage import read_examples, read_users, write_examples
from tagpr.errors import DataError
from tagpr.schema import Example, ProfileItem


def example(**changes: Any) -> Example:
    row = {
        "id": "x",
        "task": "lamp3",
        "split": "dev",
        "user_id": "u",
        "query": "a query",
        "profile": (ProfileItem(id="p0", fields={"text": "fine", "score": "4"}, date="2016-01-01"),),
        "gold": "1",
    }
    return Example(**(row | changes))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ITEMS = st.builds(
    ProfileItem, id=TEXTS, fields=st.dictionaries(TEXTS, TEXTS, max_size=2), date=st.none() | st.just("2016")
)
EXAMPLES = st.builds(
    Example,
    id=TEXTS,
    task=TEXTS,
    split=st.sampled_from(["train", "dev", "test"]),
    user_id=TEXTS,
    query=TEXTS,
    profile=st.lists(ITEMS, max_size=3).map(tuple),
    gold=TEXTS,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(EXAMPLES, max_size=4, unique_by=lambda one: one.id))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Example]) -> None:
    for name in ("train.jsonl", "train.parquet"):
        path = tmp_path_factory.mktemp("examples") / "new" / name
        assert write_examples(path, rows) == len(rows)
        assert read_examples(path) == rows
        assert [entry.name for entry in path.parent.iterdir()] == [name]
    assert read_users(path) == {row.user_id for row in rows}


def test_a_failing_source_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write_examples(path, [example()])

    def failing() -> Iterator[Example]:
        yield example(id="y")
        raise DataError("row 2: bad. Mend it.")

    with pytest.raises(DataError, match="row 2"):
        write_examples(path, failing())
    assert [row.id for row in read_examples(path)] == ["x"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.parquet"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Invalid JSON"),
        ('"text"', "object"),
        (json.dumps(json.loads(example().model_dump_json()) | {"golden": "1"}), "golden: Extra inputs"),
        (json.dumps(json.loads(example().model_dump_json()) | {"split": "validation"}), "split: "),
        (json.dumps({"id": "y"}), "task: Field required"),
        (example().model_dump_json(), "id 'x' is that of row 1 too"),
        ("\xff", "Invalid JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(f"{example().model_dump_json()}\n\n{line}\n".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_recipe(tmp_path: Path) -> None:
    for read in (read_examples, read_users):
        with pytest.raises(DataError, match=r"dev.parquet: .*prepare_data.sh"):
            read(tmp_path / "dev.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 no more", b'{"id": 1}'])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dev.parquet"
    path.write_bytes(content)
    for read in (read_examples, read_users):
        with pytest.raises(DataError, match=r"dev.parquet: .*prepare_data.sh"):
            read(path)


def test_large_rows_end_a_row_group_early(tmp_path: Path) -> None:
    rows = [example(id=str(number), query="x" * 3_000_000) for number in range(7)]
    write_examples(tmp_path / "train.parquet", rows)
    assert pq.ParquetFile(tmp_path / "train.parquet").num_row_groups == 3
    assert read_examples(tmp_path / "train.parquet") == rows
