"""LongLaMP's three public tasks: abstracts, product reviews, Reddit posts (S37).

Prompts are those of the official code (LongLaMP-benchmark/LongLaMP-Benchmark at 41412fea, ``longLaMP/prompts/prompts.py``): a
model sees the same characters as in everybody else's runs. Two details: that code's second copy, ``prompts_llama.py``, differs in
one comma of the topic prompt, and the first is taken; and abstracts are shown up to their 750th word, their white space made
single, while nothing else is shortened there.

The data is the hub's dataset ``LongLaMP/LongLaMP``, one configuration per task and way of splitting: ``temporal`` (each user's
rows by time, as LaMP's) and ``user`` (no user in two splits). Its columns are ``input``, ``output``, ``profile`` and the user's,
whose name depends on the task. Items of the topic task are ``summary`` and ``content`` there, ``input`` and ``output`` in the
official code; both are read.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tagpr.benchmarks.json_objects import read_json_lines, read_objects
from tagpr.benchmarks.rows import example, first_scalar, is_text
from tagpr.benchmarks.task import Fields, Task
from tagpr.errors import ConfigError, DataError
from tagpr.schema import Example, ProfileItem, Split

Setting = Literal["temporal", "user"]
SETTINGS: tuple[Setting, ...] = ("temporal", "user")

ABSTRACT_WORDS = 750

# Profiles run to hundreds of long texts a row.
_BATCH_ROWS = 16
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("val", "validation", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class _Source:
    """Where a task's rows are, and under which names."""

    configuration: str
    user: str
    aliases: Mapping[str, str]
    """A field's name here -> its name in the official code, where that differs."""


_SOURCES = {
    "longlamp_abstract": _Source("abstract_generation", "name", {}),
    "longlamp_review": _Source("product_review", "reviewerId", {}),
    "longlamp_topic": _Source("topic_writing", "author", {"summary": "input", "content": "output"}),
}


def _render(item: Callable[[Fields], str], link: str) -> Callable[[str, Sequence[Fields]], str]:
    def render(query: str, items: Sequence[Fields]) -> str:
        return f"{', and '.join(map(item, items))}{link}{query}" if items else query

    return render


def _abstract(item: Fields) -> str:
    shown = " ".join(item["abstract"].split()[:ABSTRACT_WORDS])
    return f'"{shown}" is the abstract for the title "{item["title"]}"'


def _review(item: Fields) -> str:
    return (
        f'"{item["overall"]}" is a rating for the product with description "{item["description"]}". '
        f'"{item["summary"]}" is summary for "{item["reviewText"]}" '
    )


def _topic(item: Fields) -> str:
    return f'"{item["summary"]}" is a summary for "{item["content"]}" '


def _after_items(query: str) -> str:
    """The keywords of the abstract task's input, which follow the first ``items:``; all of another text."""
    _, marker, keywords = query.partition("items:")
    return keywords.strip() if marker else query


def _task(
    name: str,
    title: str,
    fields: tuple[str, ...],
    long_field: str,
    render: Callable[[str, Sequence[Fields]], str],
    query_text: Callable[[str], str] = str,
    shown_words: int | None = None,
) -> Task:
    return Task(
        name=name,
        title=title,
        benchmark="longlamp",
        kind="generation",
        labels=(),
        fields=fields,
        long_field=long_field,
        metrics=("rouge1", "rougeL", "meteor"),
        render=render,
        parse=str.strip,
        query_text=query_text,
        item_text=lambda item: " ".join(item[field] for field in fields),
        shown_words=shown_words,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task(
            "longlamp_abstract",
            "LongLaMP Abstract",
            ("title", "abstract"),
            "abstract",
            _render(
                _abstract,
                ". Use the above abstracts as context to understand the style and language of the user and, ",
            ),
            _after_items,
            ABSTRACT_WORDS,
        ),
        _task(
            "longlamp_review",
            "LongLaMP Review",
            ("overall", "summary", "description", "reviewText"),
            "reviewText",
            _render(_review, ". Following the given patterns "),
        ),
        _task(
            "longlamp_topic",
            "LongLaMP Topic",
            ("summary", "content"),
            "content",
            _render(_topic, ". Following the given patterns, "),
        ),
    )
}


def configuration(task: str, setting: Setting) -> str:
    """Name of the hub's configuration, and of the folder: ``topic_writing_temporal``.

    Raises:
        ConfigError: no task of LongLaMP, or no such way of splitting.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task}: no task of LongLaMP. Known: {', '.join(TASKS)}.")
    if setting not in SETTINGS:
        raise ConfigError(
            f"setting={setting}: LongLaMP is split by {' or '.join(SETTINGS)}. Use one of them."
        )
    return f"{_SOURCES[task].configuration}_{setting}"


def split_files(directory: Path, task: str, split: Split, setting: Setting = "temporal") -> list[Path]:
    """Return the files of a task's split below ``directory``, in order.

    They are in the folder of the configuration, as the hub has them (``val-00000-of-00002.parquet``), or in a folder
    of the split in it; ``.jsonl`` and ``.json`` (an array) are taken too. The development split may be called ``val``,
    ``validation`` or ``dev``.

    Raises:
        DataError: there are none, or of several kinds.
        ConfigError: unknown task or way of splitting.
    """
    folder = Path(directory) / configuration(task, setting)
    for name in _SPLIT_NAMES[split]:
        for pattern in (f"{name}-*", f"{name}.*", f"{name}/*"):
            found = sorted(
                path
                for path in folder.glob(pattern)
                if path.suffix in (".parquet", ".jsonl", ".json") and not path.name.startswith(".")
            )
            if len({path.suffix for path in found}) > 1:
                raise DataError(f"{folder}: {name} is there in several formats. Keep one of them.")
            if found:
                return found
    raise DataError(
        f"{folder}: has no {split} split ({_SPLIT_NAMES[split][0]}-*.parquet, .jsonl or .json). "
        "Put the files of the hub's dataset LongLaMP/LongLaMP there."
    )


def iterate_split(
    directory: Path,
    task: str,
    split: Split,
    counts: Counter[str],
    *,
    setting: Setting = "temporal",
    share: float = 1.0,
    seed: int = 0,
) -> Iterator[Example]:
    """Yield the rows of one task's split in file order, a few in memory at a time; profiles stay in file order, undated.

    ``share`` < 1 draws that part of the rows at random (S37: 0.1 of the test split): at least one, always the same for a
    seed, and a larger share only adds to a smaller one. Ids are ``<task>:<split>:<row number from 0>`` whatever is drawn. A row
    without a user gets a fingerprint of its profile (S2).

    Rows without input or output and profile items without one of their fields occur in scraped data: they are left out and
    counted, as ``rows_without_text`` and ``items_without_fields``. ``counts`` also gets ``rows_in_file``.

    Raises:
        DataError: missing or damaged files, or rows of another shape; the message names file and row.
        ConfigError: unknown task or way of splitting, or ``share`` is not in (0, 1].
    """
    files = split_files(directory, task, split, setting)
    if not 0 < share <= 1:
        raise ConfigError(f"share={share}: is not above 0 and at most 1. Use 0.1 for a tenth.")
    total = sum(map(_row_count, files))
    counts["rows_in_file"] += total
    wanted = None if share == 1 else _draw(total, max(1, round(share * total)), f"{task}:{split}:{seed}")
    rows = chain.from_iterable(((path, row) for row in _rows(path)) for path in files)
    for number, (path, row) in enumerate(rows):
        if wanted is not None and number not in wanted:
            continue
        where = f"{path}: row {number}"
        if not (is_text(row.get("input")) and is_text(row.get("output"))):
            counts["rows_without_text"] += 1
            continue
        yield example(
            where,
            TASKS[task],
            split,
            number,
            query=row["input"],
            gold=row["output"],
            profile=_profile(row.get("profile"), where, task, counts),
            user_id=first_scalar(row, (_SOURCES[task].user, "user_id")) or None,
        )


def _draw(total: int, size: int, key: str) -> frozenset[int]:
    """``size`` of the numbers below ``total``; ranking by a hash does not depend on Python's version."""

    def rank(number: int) -> bytes:
        return hashlib.sha256(f"{key}:{number}".encode()).digest()

    return frozenset(nsmallest(size, range(total), key=rank))


def _profile(items: object, where: str, task: str, counts: Counter[str]) -> list[ProfileItem]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"{where}: its 'profile' is not an array of objects. Mend the row.")
    source, profile = _SOURCES[task], []
    for number, item in enumerate(items):
        texts = {
            field: first_scalar(item, (field, source.aliases.get(field, field)))
            for field in TASKS[task].fields
        }
        if None in texts.values():
            counts["items_without_fields"] += 1
            continue
        profile.append(
            ProfileItem(id=str(number), fields={field: str(text) for field, text in texts.items()})
        )
    return profile


def _row_count(path: Path) -> int:
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return int(file.metadata.num_rows)
    return sum(1 for _ in _rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return (
        read_objects(path)
        if path.suffix == ".json"
        else (row for _, row in read_json_lines(path, "Download it again."))
    )


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: is no parquet file ({type(error).__name__}). Download it again.") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _parquet(path) as file:
        batches: Iterable[pa.RecordBatch] = file.iter_batches(batch_size=_BATCH_ROWS)
        try:
            for batch in batches:
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: is damaged ({type(error).__name__}). Download it again.") from error
