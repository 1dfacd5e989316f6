"""LaMP's six public tasks: its files, its prompts, its answers (S1-S3, S32).

Formats and prompts are those of the official code (LaMP-Benchmark/LaMP, ``LaMP/prompts/prompts.py`` and
``LaMP/data/datasets.py``): a model sees the same characters as in everybody else's runs, odd commas and
trailing spaces included.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tagpr.benchmarks.answers import parse_label
from tagpr.benchmarks.json_objects import read_objects, refuse_html
from tagpr.benchmarks.rows import DERIVED_USER as DERIVED_USER
from tagpr.benchmarks.rows import example, is_scalar, profile_item
from tagpr.benchmarks.task import Fields, Kind, Task
from tagpr.errors import ConfigError, DataError
from tagpr.schema import Example, Split

MOVIE_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)


def _render(number: int) -> Callable[[str, Sequence[Fields]], str]:
    """The official prompt of task ``number``.

    The official code puts the items of LaMP-1 after the *first* "title" of the input, and leaves an input without that word
    alone.
    """

    def render(query: str, items: Sequence[Fields]) -> str:
        if not items:
            return query
        shown = ", and ".join(_ITEM[number](item) for item in items)
        if number == 1:
            before, title, after = query.partition("title")
            return f"{before}{title}, and {shown}{after}" if title else query
        if number == 5:
            return f"{shown}. Following the given patterns {query}"
        if number == 7:
            return f"{shown} are written by a person. Following the given patterns {query}"
        return f"{shown}. {query}"

    return render


_ITEM: dict[int, Callable[[Fields], str]] = {
    1: lambda item: f'"{item["title"]}"',
    2: lambda item: f'the tag for the movie: "{item["description"]}" is "{item["tag"]}" ',
    3: lambda item: f'{item["score"]} is the score for "{item["text"]}" ',
    4: lambda item: f'"{item["title"]}" is the title for "{item["text"]}" ',
    5: lambda item: f'"{item["title"]}" is a title for "{item["abstract"]}" ',
    7: lambda item: f'"{item["text"]}" ',
}


# What the official code's retrievers search with (after the first marker) and in: LaMP/prompts/prompts.py, utils.py.
_AFTER: dict[int, str] = {2: "description:", 3: "review:", 4: "article:", 5: "paper:", 7: ":"}
_SEARCHED: dict[int, tuple[str, ...]] = {
    1: ("title", "abstract"),
    2: ("description",),
    3: ("text",),
    4: ("title", "text"),
    5: ("title", "abstract"),
    7: ("text",),
}


def _query_text(number: int) -> Callable[[str], str]:
    """What to search with; the whole query where it lacks the marks that LaMP's own inputs have.

    LaMP-1's are the second and third of the texts between quotes, each quote either opening or closing: the two references,
    unless a title before them has quotes of its own. The official code has the same slip.
    """

    def query_text(query: str) -> str:
        if number == 1:
            quoted = query.split('"')[1:-1:2]
            return " ".join(quoted[1:3]) if len(quoted) > 2 else query
        _, marker, text = query.partition(_AFTER[number])
        return text.strip() if marker else query

    return query_text


def _item_text(number: int) -> Callable[[Fields], str]:
    return lambda item: " ".join(item[field] for field in _SEARCHED[number])


def _task(
    number: int,
    kind: Kind,
    labels: tuple[str, ...],
    fields: tuple[str, ...],
    long_field: str,
    metrics: tuple[str, ...],
) -> Task:
    return Task(
        name=f"lamp{number}",
        title=f"LaMP-{number}",
        benchmark="lamp",
        kind=kind,
        labels=labels,
        fields=fields,
        long_field=long_field,
        metrics=metrics,
        render=_render(number),
        parse=str.strip if kind == "generation" else partial(parse_label, labels=labels, kind=kind),
        query_text=_query_text(number),
        item_text=_item_text(number),
    )


_CHOICE = ("accuracy", "f1_macro")
_RATING = ("mae", "mse", "rmse")
_TEXT = ("rouge1", "rougeL")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task(1, "classification", ("[1]", "[2]"), ("title", "abstract"), "title", (*_CHOICE, "f1_positive")),
        _task(2, "classification", MOVIE_TAGS, ("description", "tag"), "description", _CHOICE),
        _task(3, "rating", ("1", "2", "3", "4", "5"), ("text", "score"), "text", _RATING),
        _task(4, "generation", (), ("text", "title"), "text", _TEXT),
        _task(5, "generation", (), ("title", "abstract"), "abstract", _TEXT),
        _task(7, "generation", (), ("text",), "text", _TEXT),
    )
}


def official_name(task: str) -> str:
    """Name in the outputs file and of the folder, ``LaMP_3``.

    Raises:
        ConfigError: no task of LaMP.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task}: no task of LaMP. Known: {', '.join(TASKS)}.")
    return TASKS[task].title.replace("-", "_")


def split_files(directory: Path, task: str, split: Split) -> tuple[Path, Path]:
    """Return where the questions and the outputs of a task lie below ``directory``.

    ``LaMP_<n>/<split>/``, ``LaMP_<n>/``, and ``directory`` itself are tried in this order (for LaMP-2 also
    ``LaMP_2/new/<split>/``, its place on LaMP's server).

    Raises:
        DataError: one of the two files is nowhere; the message says where it was looked for.
        ConfigError: unknown task.
    """
    name = official_name(task)
    folder = directory / name
    places = [folder / split, folder, directory]
    if name == "LaMP_2":
        places.insert(1, folder / "new" / split)
    questions, outputs = f"{split}_questions.json", f"{split}_outputs.json"
    for place in places:
        if (place / questions).is_file():
            if not (place / outputs).is_file():
                raise DataError(f"{place / outputs}: missing beside {questions}. {_REMEDY}")
            return place / questions, place / outputs
    raise DataError(
        f"{places[0] / questions}: missing (looked in {', '.join(str(place) for place in places)}). {_REMEDY}"
    )


_REMEDY = (
    "`bash recipes/prepare_data.sh` makes the synthetic files and says where LaMP's go; "
    "set benchmark.dir and benchmark.tasks to what you have."
)


def read_split(directory: Path, task: str, split: Split) -> list[Example]:
    """Read one task's split into memory, see :func:`iterate_split`."""
    return list(iterate_split(directory, task, split))


def iterate_split(directory: Path, task: str, split: Split) -> Iterator[Example]:
    """Yield the checked rows of one task's split in file order, one question in memory at a time.

    Ids become ``<task>:<split>:<id in the file>``, since nothing keeps the files of two tasks from sharing
    ids. A row without ``user_id`` gets a fingerprint of its profile (S2). ``profile`` stays in file order.

    Raises:
        DataError: missing, unreadable or inconsistent files; the message names the file and the row.
        ConfigError: unknown task.
    """
    questions, outputs = split_files(Path(directory), task, split)
    spec = TASKS[task]
    golds = _read_golds(outputs, spec)
    seen: set[str] = set()
    for position, row in enumerate(read_objects(questions), start=1):
        where = f"{questions}: question {row.get('id', f'number {position}')!r}"
        if not is_scalar(row.get("id")):
            raise DataError(f"{where}: has no 'id'. Mend the row.")
        row_id = str(row["id"])
        if row_id in seen:
            raise DataError(f"{where}: occurs twice. Remove one of the two.")
        seen.add(row_id)
        if row_id not in golds:
            raise DataError(f"{where}: has no gold in {outputs.name}. Use matching files.")
        yield _example(row, where, spec, split, golds[row_id])
    left = [row_id for row_id in golds if row_id not in seen]
    if left:
        raise DataError(
            f"{outputs}: {len(left)} golds without a question in {questions.name}, first {left[0]!r}. "
            "Use matching files."
        )
    if not seen:
        raise DataError(f"{questions}: holds no question. Put LaMP's own file there.")


def _read_golds(path: Path, spec: Task) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}). Download it again.") from error
    refuse_html(path, text[:100])
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: malformed or cut-off JSON ({error}). Download it again.") from None
    if not isinstance(content, dict) or not isinstance(content.get("golds"), list):
        raise DataError(
            f'{path}: is not {{"task": ..., "golds": [...]}}. Put LaMP\'s own outputs file there.'
        )
    if content.get("task") != official_name(spec.name):
        raise DataError(
            f"{path}: its task is {content.get('task')!r}, not {official_name(spec.name)!r}. "
            "Put the file of the right task there."
        )
    golds: dict[str, str] = {}
    for position, row in enumerate(content["golds"], start=1):
        if not isinstance(row, dict) or not is_scalar(row.get("id")) or not is_scalar(row.get("output")):
            raise DataError(
                f'{path}: gold number {position} is not {{"id": ..., "output": ...}}. Mend the row.'
            )
        row_id, gold = str(row["id"]), str(row["output"])
        if row_id in golds:
            raise DataError(f"{path}: gold {row_id!r} occurs twice. Remove one of the two.")
        if spec.labels and gold not in spec.labels:
            raise DataError(
                f"{path}: gold {row_id!r} is {gold!r}, not one of {', '.join(spec.labels)}. Mend the row."
            )
        if not gold.strip():
            raise DataError(f"{path}: gold {row_id!r} is empty. Mend the row or remove it from both files.")
        golds[row_id] = gold
    return golds


def _example(row: dict[str, Any], where: str, task: Task, split: Split, gold: str) -> Example:
    if not isinstance(row.get("profile"), list):
        raise DataError(f"{where}: its 'profile' is not an array. Mend the row.")
    return example(
        where,
        task,
        split,
        row["id"],
        query=row.get("input"),
        gold=gold,
        profile=[profile_item(item, where, task) for item in row["profile"]],
        user_id=row.get("user_id"),
    )
