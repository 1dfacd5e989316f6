"""Who may ask: profiles by user and task, from prepared examples or from a file of profiles."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from tagpr.benchmarks.storage import examples_file, iterate_examples
from tagpr.benchmarks.tasks import get_task
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.retrieval import date_key
from tagpr.schema import ProfileItem, Record

logger = logging.getLogger(__name__)

Profile = tuple[ProfileItem, ...]


class UserProfile(Record):
    """One line of a file of profiles: what a user wrote in the terms of one task."""

    user_id: str
    task: str
    profile: Profile


class Profiles:
    """Profiles by user and task; of several of one user and task the newest counts, of equally new ones the longest."""

    def __init__(self, profiles: Iterable[UserProfile]) -> None:
        self._of: dict[str, dict[str, Profile]] = {}
        for each in profiles:
            own = self._of.setdefault(each.user_id, {})
            if each.task not in own or _age(each.profile) >= _age(own[each.task]):
                own[each.task] = each.profile

    def __len__(self) -> int:
        return len(self._of)

    def knows(self, user: str) -> bool:
        """Whether there is any profile of this user."""
        return user in self._of

    def get(self, user: str, task: str) -> Profile | None:
        """What is known of a user in the terms of a task; None: nothing."""
        return self._of.get(user, {}).get(task)


def _age(profile: Profile) -> tuple[tuple[int, ...], int]:
    return max((date_key(item.date) for item in profile if item.date is not None), default=()), len(profile)


def read_profiles(file: str | None, examples: str, splits: Sequence[str], tasks: Sequence[str]) -> Profiles:
    """Profiles from ``file`` (JSON lines of :class:`UserProfile`), or where it is None from prepared examples.

    Raises:
        ConfigError: neither a file nor a split is named.
        StageError: the examples have not been prepared.
        DataError: a line is no profile, or a profile does not fit its task.
    """
    if file is not None:
        return Profiles(_lines(Path(file), tasks))
    if not splits:
        raise ConfigError(
            "serve.splits=[]: nobody's profile would be known. Name splits, or set serve.profiles."
        )
    paths = [examples_file(examples, split) for split in splits]
    for path in paths:
        if not path.is_file():
            raise StageError(
                f"{path}: no such file. Run `bash recipes/prepare_data.sh`, or set serve.profiles."
            )
    return Profiles(
        UserProfile(user_id=each.user_id, task=each.task, profile=each.profile)
        for path in paths
        for each in iterate_examples(path)
        if each.task in tasks
    )


def _lines(path: Path, tasks: Sequence[str]) -> Iterable[UserProfile]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(
            f"serve.profiles={path}: cannot be read ({error.strerror or error}). Point it at a file of JSON lines."
        ) from None
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                read = UserProfile.model_validate_json(line)
            except ValidationError as error:
                problem = error.errors(include_input=False, include_url=False)[0]
                place = ".".join(map(str, problem["loc"])) or "the line"
                raise DataError(f"{path}:{number}: {place}: {problem['msg']}. Mend the line.") from None
            if read.task not in tasks:
                raise DataError(
                    f"{path}:{number}: task {read.task!r} is not one of {', '.join(tasks)} (benchmark.tasks). Mend the line."
                )
            fields = set(get_task(read.task).fields)
            for item in read.profile:
                if set(item.fields) != fields:
                    raise DataError(
                        f"{path}:{number}: profile item {item.id!r} has the fields {sorted(item.fields)}, {read.task} has "
                        f"{sorted(fields)}. Mend the line."
                    )
            dated = {item.date is not None for item in read.profile}
            if len(dated) > 1:
                raise DataError(
                    f"{path}:{number}: some profile items have a date and some have none. Mend the line."
                )
            try:
                _age(read.profile)
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            yield read
