"""PGraphRAG's tasks on Amazon reviews: a title, a text or a rating from the rest of a review and the user's others (S37).

Prompts, their wording for a user without history included, and the reading of answers are those of the official code
(PGraphRAG-benchmark/PGraphRAG at 722a71e0, ``master_generation.py`` and ``master_eval.py``) in its mode ``user``: no reviews of
other users. The paper reports the title task.

A file ``amazon_<split>.json`` is an array of ``{id, profile: [{rating, title, text, pid}]}``: the first review of a profile is
what to write, the others are the history. Users without history cannot be personalised and are left out (S37): 126 users stay in
``dev``, 119 in ``test``. Of these, 17 and 16 have reviews of the very product in their history, mostly the same review again, so
that the answer stands in the prompt; the official ranking leaves such reviews out (110 and 103 users then have a history). The
paper does not say which it did: ``same_product`` chooses, and such users are counted either way.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tagpr.benchmarks.answers import parse_label
from tagpr.benchmarks.json_objects import read_objects
from tagpr.benchmarks.rows import example, is_scalar, is_text
from tagpr.benchmarks.task import Fields, Kind, Task
from tagpr.errors import ConfigError, DataError
from tagpr.schema import Example, ProfileItem, Split

_FIELDS = ("title", "text", "rating")
_LABELS = ("1", "2", "3", "4", "5")
# How Amazon's reviews embed a film.
_VIDEO = re.compile(r"\[\[VIDEOID:[^\]]*\]\]")
# Where a history's review lacks its title or text, the official ranking writes this.
_NOTHING = "None"

_WITH_HISTORY = "Given the following reviews from the user on different products:\nUser's Own Reviews:\n"
_WITHOUT_HISTORY = "Given only information on this review:\n"


def _title_query(review: Mapping[str, str]) -> str:
    return (
        "Generate a title for the following product review from this user without any explanation: "
        f"Review text: '{review['text']}'\n"
        "Generate the review title in 10 words or less using the format: 'Review title:'."
    )


def _text_query(review: Mapping[str, str]) -> str:
    return (
        "Generate a review for the following product from this user given the review title, without any explanation: "
        f"Review title: '{review['title']}'\n"
        "Generate the review text using the format: 'Review text:'."
    )


def _rating_query(review: Mapping[str, str]) -> str:
    return (
        "Generate an integer rating from 1-5 for the following product from this user given the review title and text, "
        f"without any explanation: Review title: '{review['title']}', Review text: '{review['text']}'\n"
        "Generate the integer review rating using the format: 'Rating:'."
    )


def _render(shows_rating: bool) -> Callable[[str, Sequence[Fields]], str]:
    def line(item: Fields) -> str:
        rating = f", Review rating: {item['rating']}" if shows_rating else ""
        return f'Review title: "{item["title"]}", Review text: "{item["text"]}"{rating}\n'

    def render(query: str, items: Sequence[Fields]) -> str:
        beginning = _WITH_HISTORY if items else _WITHOUT_HISTORY
        return f"{beginning}{''.join(map(line, items))}\n{query}"

    return render


def _parse_title(answer: str) -> str:
    """Text after the first ``Review title: `` and before the next."""
    if '**Review title:** ""' in answer:
        return answer.split('**Review title:** "')[1].rsplit('"', 1)[0].strip()
    return _after(answer, "Review title: ")


def _parse_text(answer: str) -> str:
    """Text after the mark that the answer should have, or one of those that models write instead, without its quotes."""
    answer = _VIDEO.sub("", answer)
    for mark in ('**Review text:** "', 'Review text: "'):
        if mark in answer:
            return _quoted(answer, mark)
    if "Review text: " in answer:
        return _after(answer, "Review text: ")
    mark = 'The review text is: "'
    return _quoted(answer, mark) if mark in answer else _after(answer, "The review text is: ")


def _parse_rating(answer: str) -> str:
    """The official code stops at the text after the mark; ``**4**`` and ``4 out of 5`` there are read as 4."""
    for mark in ("Review rating: ", "Rating: "):
        if mark in answer:
            return parse_label(_after(answer, mark), _LABELS, "rating")
    return parse_label(answer, _LABELS, "rating")


def _after(answer: str, mark: str) -> str:
    return (answer.split(mark)[1] if mark in answer else answer).strip()


def _quoted(answer: str, mark: str) -> str:
    return answer.split(mark)[1].rsplit('"', 1)[0].strip()


def _query_text(query: str, *, mark: str) -> str:
    """What the official ranking searches with: the review's own part that the task gives."""
    _, found, rest = query.partition(f"{mark}: '")
    return rest.rpartition("'\n")[0] if found else query


def _rating_query_text(query: str) -> str:
    return _query_text(query, mark="Review title").replace("', Review text: '", " ", 1)


def _task(
    field: str,
    kind: Kind,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    parse: Callable[[str], str],
    query_text: Callable[[str], str],
) -> Task:
    return Task(
        name=f"pgraphrag_{field}",
        title=f"PGraphRAG Amazon {field.capitalize()}",
        benchmark="pgraphrag",
        kind=kind,
        labels=labels,
        fields=_FIELDS,
        long_field="text",
        metrics=metrics,
        render=_render(shows_rating=field == "rating"),
        parse=parse,
        query_text=query_text,
        item_text=lambda item: f"{item['title']} {item['text']}",
    )


_TEXT = ("rouge1", "rougeL", "meteor")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("title", "generation", (), _TEXT, _parse_title, partial(_query_text, mark="Review text")),
        _task("text", "generation", (), _TEXT, _parse_text, partial(_query_text, mark="Review title")),
        _task("rating", "rating", _LABELS, ("mae", "mse", "rmse"), _parse_rating, _rating_query_text),
    )
}
_QUERIES = {"title": _title_query, "text": _text_query, "rating": _rating_query}


def split_file(directory: Path, split: Split) -> Path:
    """Return the file of a split: ``amazon_<split>.json`` in ``directory``, or in ``data_splits`` below as in the repository.

    Raises:
        DataError: it is in neither.
    """
    name = f"amazon_{split}.json"
    places = [Path(directory), Path(directory) / "data_splits"]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise DataError(
        f"{places[0] / name}: missing (looked in {places[1]} too). Put the file of the repository "
        "PGraphRAG-benchmark/PGraphRAG, folder data_splits, there."
    )


def iterate_split(
    directory: Path, task: str, split: Split, counts: Counter[str], *, same_product: bool = True
) -> Iterator[Example]:
    """Yield the users of a split that have a history, in file order; a history is in file order and has no dates.

    ``same_product=False`` takes reviews of the product in question out of the history. A review of the history without title or
    text shows ``None`` there, as in the official code. ``counts`` gets ``users_in_file``, ``users_without_history``,
    ``users_with_same_product_in_history``, ``rows_without_text`` (nothing to write or nothing to go by; left out) and
    ``items_without_fields``.

    Raises:
        DataError: missing or damaged file, or a row of another shape; the message names file and row.
        ConfigError: unknown task.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task}: no task of PGraphRAG. Known: {', '.join(TASKS)}.")
    path = split_file(directory, split)
    seen: set[str] = set()
    for position, row in enumerate(read_objects(path), start=1):
        where = f"{path}: user {row.get('id', f'number {position}')!r}"
        if not is_text(row.get("id")):
            raise DataError(f"{where}: has no 'id'. Mend the row.")
        user = str(row["id"])
        if user in seen:
            raise DataError(f"{where}: occurs twice. Remove one of the two.")
        seen.add(user)
        counts["users_in_file"] += 1
        review, *history = _reviews(row.get("profile"), where)
        same = [item for item in history if item.get("pid") == review.get("pid")]
        counts["users_with_same_product_in_history"] += bool(same)
        if not same_product:
            history = [item for item in history if item.get("pid") != review.get("pid")]
        if not history:
            counts["users_without_history"] += 1
            continue
        made = _example(where, TASKS[task], split, user, review, history, counts)
        if made is not None:
            yield made
    if not seen:
        raise DataError(f"{path}: holds no user. Put PGraphRAG's own file there.")


def _reviews(profile: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(profile, list) or not profile or not all(isinstance(item, dict) for item in profile):
        raise DataError(f"{where}: its 'profile' is not an array of reviews, at least one. Mend the row.")
    return profile


def _example(
    where: str,
    task: Task,
    split: Split,
    user: str,
    review: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    counts: Counter[str],
) -> Example | None:
    field = task.name.removeprefix("pgraphrag_")
    given = {name: _field(review, name) for name in _FIELDS}
    if (
        not given[field].strip()
        or not "".join(given[name] for name in ("title", "text") if name != field).strip()
    ):
        counts["rows_without_text"] += 1
        return None
    profile = []
    for number, item in enumerate(history, start=1):
        fields = {name: _field(item, name) for name in _FIELDS}
        counts["items_without_fields"] += not all(text.strip() for text in fields.values())
        profile.append(
            ProfileItem(id=str(number), fields={name: text or _NOTHING for name, text in fields.items()})
        )
    return example(
        where,
        task,
        split,
        user,
        query=_QUERIES[field](given),
        gold=given[field].strip(),
        profile=profile,
        user_id=user,
    )


def _field(review: Mapping[str, Any], name: str) -> str:
    """A review's field as text, "" where it has none; ratings are whole numbers, be they written 5 or 5.0."""
    value = review.get(name)
    if not is_scalar(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
