"""From a benchmark's raw row to an Example: the checks that every reader makes (S1-S3)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tagpr.benchmarks.task import Task
from tagpr.errors import DataError
from tagpr.retrieval import date_key
from tagpr.schema import Example, ProfileItem, Split

# A user id that starts so was derived from the profile (S2), not read from the file.
DERIVED_USER = "fp-"


def is_scalar(value: object) -> bool:
    """Whether a JSON value reads as one piece of text: a string or a number."""
    # Strings first: large files have tens of millions of these.
    return isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool))


def is_text(value: object) -> bool:
    """Whether a JSON value reads as one piece of text that says something."""
    return is_scalar(value) and bool(str(value).strip())


def profile_item(item: object, where: str, task: Task) -> ProfileItem:
    """Check one profile item: an object with an id, every field of the task and, where there is one, a date.

    Raises:
        DataError: it is not; the message begins with ``where``.
    """
    if not isinstance(item, dict) or not is_scalar(item.get("id")):
        raise DataError(f"{where}: a profile item is not an object with an id. Mend the row.")
    for field in task.fields:
        if not is_scalar(item.get(field)):
            raise DataError(
                f"{where}: profile item {item['id']!r} has no {field!r}. "
                f"Items of {task.title} have {', '.join(task.fields)}."
            )
    date = item.get("date")
    if date is not None:
        try:
            date_key(str(date))
        except DataError as error:
            raise DataError(f"{where}: profile item {item['id']!r}: {error}") from None
    return ProfileItem(
        id=str(item["id"]),
        fields={field: str(item[field]) for field in task.fields},
        date=None if date is None else str(date),
    )


def example(
    where: str,
    task: Task,
    split: Split,
    row_id: object,
    *,
    query: object,
    gold: object,
    profile: Sequence[ProfileItem],
    user_id: object,
) -> Example:
    """Make an Example with id ``<task>:<split>:<row_id>``; a ``user_id`` of None gets a fingerprint of the profile (S2).

    Ids carry the task, since nothing keeps the files of two tasks from sharing ids.

    Raises:
        DataError: a part is missing, is no text, or cannot be written as UTF-8; the message begins with ``where``.
    """
    if not is_text(query):
        raise DataError(f"{where}: has no 'input'. Mend the row.")
    if len({item.date is None for item in profile}) > 1:
        raise DataError(f"{where}: some profile items have a date and some have none. Mend the row.")
    if user_id is not None and not is_text(user_id):
        raise DataError(f"{where}: its 'user_id' is {user_id!r}. Mend the row.")
    if task.labels and gold not in task.labels:
        raise DataError(f"{where}: its gold is {gold!r}, not one of {', '.join(task.labels)}. Mend the row.")
    made = Example(
        id=f"{task.name}:{split}:{row_id}",
        task=task.name,
        split=split,
        user_id=fingerprint(profile) if user_id is None else str(user_id),
        query=str(query),
        profile=tuple(profile),
        gold=str(gold),
    )
    texts = [made.id, made.user_id, made.query, made.gold]
    texts += [text for item in made.profile for text in (item.id, *item.fields.values())]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        # JSON can spell such text, no UTF-8 file can hold it, and no tokenizer takes it.
        raise DataError(f"{where}: has half a surrogate pair in its text. Mend the row.") from None
    return made


def fingerprint(profile: Sequence[ProfileItem]) -> str:
    """Derive a user id from what the profile says, whatever the order of its items (S2)."""
    digest = hashlib.sha256()
    for content in sorted(json.dumps([item.date, item.fields], sort_keys=True) for item in profile):
        digest.update(content.encode())
    return f"{DERIVED_USER}{digest.hexdigest()[:16]}"


def first_scalar(row: Mapping[str, Any], names: Sequence[str]) -> object:
    """The first of several columns that is there as one piece of text, be it empty, or None."""
    return next((row[name] for name in names if is_scalar(row.get(name))), None)
