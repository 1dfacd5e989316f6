"""Rows of a user's own tasks: one JSON object a line, one file a split.

    {"id": "17", "task": "support_reply", "user_id": "mara", "date": "2024-05-02", "query": "Where is my parcel?", "gold": "...",
     "profile": [{"id": "3", "date": "2024-04-30", "fields": {"question": "...", "reply": "..."}}]}

``id`` is unique per task and file. ``profile`` is oldest first where its items have no ``date`` (year, year-month or
year-month-day); all items of a profile have one or none. A row's own ``date`` is optional and only checked against those. What is
wrong with a line is found here, for the reader (which stops at the first fault) and the validator (which reports all).
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from tagpr.benchmarks.rows import example, is_scalar, is_text
from tagpr.benchmarks.task import Task
from tagpr.benchmarks.tasks import all_tasks
from tagpr.errors import DataError
from tagpr.schema import Example, ProfileItem, Split

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
OPTIONAL_SPLITS: tuple[Split, ...] = ("test",)

_KEYS = ("id", "task", "user_id", "query", "gold", "profile")
_OPTIONAL_KEYS = ("date",)
_ITEM_KEYS = ("id", "fields")
_DATE = re.compile(r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2}))?)?", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line: ``kind`` groups and counts, ``message`` is one sentence and what to do."""

    kind: str
    message: str


@dataclass
class Line:
    """A line of a file, read: ``row`` is what it holds (None if that is no object), ``problems`` why it cannot be used."""

    path: Path
    number: int
    row: dict[str, Any] | None = None
    task: Task | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def where(self) -> str:
        """File and line number, from 1."""
        return f"{self.path}:{self.number}"

    def add(self, kind: str, message: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, message))


def split_file(folder: Path, split: Split) -> Path:
    """``<split>.jsonl``.

    Raises:
        DataError: it is not there.
    """
    path = Path(folder) / f"{split}.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: missing. Put the rows of this split there, one JSON object a line.")
    return path


def splits(folder: Path) -> tuple[Split, ...]:
    """Train and dev, which there must be, and test where there is a file of it."""
    return tuple(
        split
        for split in SPLITS
        if split not in OPTIONAL_SPLITS or (Path(folder) / f"{split}.jsonl").is_file()
    )


def iterate_split(folder: Path, task: str, split: Split, counts: Counter[str]) -> Iterator[Example]:
    """Yield one task's rows of a split in file order; rows of other known tasks are passed over.

    Raises:
        DataError: a line of this task, or of no known task, has a fault; the message names file and line. All faults at
            once: ``bash recipes/validate_data.sh``.
    """
    path = split_file(folder, split)
    tasks = all_tasks()
    first: dict[str, int] = {}
    for line in read_lines(path):
        name = line.row.get("task") if line.row is not None else None
        if isinstance(name, str) and name != task and name in tasks:
            continue
        check(line, tasks)
        if line.problems:
            raise DataError(f"{line.where}: {line.problems[0].message}")
        made = to_example(line, split)
        if made.id in first:
            raise DataError(f"{line.where}: {repeated_id(line, first[made.id])}")
        first[made.id] = line.number
        yield made


def repeated_id(line: Line, before: int) -> str:
    """The sentence about an id that a row before has."""
    assert line.row is not None
    return f"id {line.row['id']!r} is that of line {before} too. Give each row of a task its own id."


def read_lines(path: Path) -> Iterator[Line]:
    """Every line that is not blank, parsed; lines end at a line feed and nowhere else.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            for number, content in enumerate(stream, start=1):
                if content.strip():
                    yield _parse(Line(path, number), content)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Mend its permissions.") from error


class _RepeatedKeyError(ValueError):
    """Its text is the key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise _RepeatedKeyError(key)
        made[key] = value
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _parse(line: Line, content: bytes) -> Line:
    try:
        row = _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line.add(
            "not UTF-8", f"is not UTF-8 text (byte {error.start + 1} of the line). Save the file as UTF-8."
        )
    except _RepeatedKeyError as error:
        line.add("malformed JSON", f"key {str(error)!r} occurs twice in one object. Keep one of the two.")
    except (ValueError, RecursionError) as error:
        if content.startswith(b"\xef\xbb\xbf"):
            line.add("malformed JSON", "begins with a byte order mark. Save the file as UTF-8 without one.")
        elif content.lstrip().startswith(b"<"):
            line.add("malformed JSON", "is HTML, not JSON. Download the file again from the right address.")
        else:
            at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
            said = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            line.add("malformed JSON", f"is no JSON ({said}{at}). Mend the line.")
    else:
        if isinstance(row, dict):
            line.row = row
        else:
            line.add("malformed JSON", "is no JSON object. Write one object a line.")
    return line


def check(line: Line, tasks: Mapping[str, Task]) -> None:
    """Add to ``line.problems`` all that keeps it from being an Example, and set ``line.task``."""
    row = line.row
    if row is None:
        return
    for key in _KEYS:
        if key not in row:
            line.add("missing key", f"has no {key!r}. Add it.")
    for key in row:
        if key not in _KEYS and key not in _OPTIONAL_KEYS:
            known = ", ".join((*_KEYS, *_OPTIONAL_KEYS))
            line.add("unknown key", f"{key!r} is no key of a row. Known: {known}.")
    for key in ("id", "task", "user_id", "query", "gold"):
        if key not in row:
            continue
        if not is_scalar(row[key]):
            line.add("wrong type", f"{key!r} is {_type(row[key])}, not text. Mend the row.")
        elif not is_text(row[key]):
            line.add(f"empty {key}", f"{key!r} is empty. Fill it in or take the row out.")
    if is_text(row.get("task")):
        line.task = tasks.get(str(row["task"]))
        if line.task is None:
            names = [name for name, task in tasks.items() if task.benchmark == "own"] or list(tasks)
            line.add("unknown task", f"task {_short(row['task'])} is none of {', '.join(names)}. Correct it.")
    labels = line.task.labels if line.task is not None else ()
    if labels and is_text(row.get("gold")) and str(row["gold"]) not in labels:
        line.add(
            "gold not among labels",
            f"gold {_short(row['gold'])} is not one of {', '.join(labels)}. Correct it.",
        )
    if row.get("date") is not None:
        _check_date(line, row["date"], "its")
    if "profile" in row:
        _check_profile(line, row["profile"])
    _check_text(line)


def _check_profile(line: Line, profile: object) -> None:
    if not isinstance(profile, list):
        line.add("wrong type", f"'profile' is {_type(profile)}, not an array. Write [] for an empty one.")
        return
    dated = 0
    for number, item in enumerate(profile, start=1):
        who = f"profile item {number}"
        if not isinstance(item, dict):
            line.add("wrong type", f"{who} is {_type(item)}, not an object. Mend it.")
            continue
        if is_text(item.get("id")):
            who = f"profile item {_short(item['id'])}"
        for key in _ITEM_KEYS:
            if key not in item:
                line.add("missing key", f"{who} has no {key!r}. Add it.")
        for key in item:
            if key not in (*_ITEM_KEYS, "date"):
                line.add(
                    "unknown key", f"{who}: {key!r} is no key of an item. Texts of the task go into 'fields'."
                )
        if "id" in item and not is_text(item["id"]):
            line.add("wrong type", f"{who}: its 'id' is {_type(item['id'])} or empty. Give it a text.")
        if item.get("date") is not None:
            dated += 1
            _check_date(line, item["date"], f"{who}: its")
        if "fields" in item:
            _check_fields(line, who, item["fields"])
    if 0 < dated < len(profile):
        line.add(
            "some dates missing",
            f"{dated} of {len(profile)} profile items have a date. Date all of them or none.",
        )


def _check_fields(line: Line, who: str, fields: object) -> None:
    if not isinstance(fields, dict):
        line.add("wrong type", f"{who}: 'fields' is {_type(fields)}, not an object. Mend it.")
        return
    for name, text in fields.items():
        if not is_scalar(text):
            line.add("wrong type", f"{who}: field {name!r} is {_type(text)}, not text. Mend it.")
    if line.task is None:
        return
    for name in line.task.fields:
        if name not in fields:
            line.add(
                "profile item without field",
                f"{who} has no field {name!r}. Items of {line.task.name} have {', '.join(line.task.fields)}.",
            )
    for name in fields:
        if name not in line.task.fields:
            line.add(
                "unknown field",
                f"{who}: {name!r} is no field of {line.task.name}. Take it out, or add it to the task.",
            )


def _check_date(line: Line, value: object, whose: str) -> None:
    match = _DATE.fullmatch(str(value)) if is_scalar(value) else None
    try:
        if match is None:
            raise ValueError
        year, month, day = (int(part or 1) for part in match.groups())
        date(year, month, day)
    except ValueError:
        line.add(
            "bad date",
            f"{whose} date is {_short(value)}. Write year, year-month or year-month-day (2024-05-31).",
        )


def _check_text(line: Line) -> None:
    try:
        json.dumps(line.row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # JSON can spell such text, no UTF-8 file can hold it, and no tokenizer takes it.
        line.add(
            "half a surrogate pair",
            "has half a surrogate pair (\\ud800 to \\udfff) in its text. Mend the text.",
        )


def to_example(line: Line, split: Split) -> Example:
    """The Example of a line without problems."""
    assert line.row is not None
    assert line.task is not None
    row = line.row
    profile = [
        ProfileItem(
            id=str(item["id"]),
            fields={name: str(item["fields"][name]) for name in line.task.fields},
            date=None if item.get("date") is None else str(item["date"]),
        )
        for item in row["profile"]
    ]
    return example(
        line.where,
        line.task,
        split,
        row["id"],
        query=row["query"],
        gold=str(row["gold"]),
        profile=profile,
        user_id=row["user_id"],
    )


def _type(value: object) -> str:
    names = {dict: "an object", list: "an array", bool: "true or false", type(None): "null", str: "text"}
    return names.get(type(value), "a number")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
