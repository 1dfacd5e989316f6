"""Every known task by name, whatever its benchmark."""

from collections.abc import Mapping, Sequence

from tagpr.benchmarks import dianping, lamp, longlamp, pgraphrag
from tagpr.benchmarks.own import VARIABLE, own_tasks
from tagpr.benchmarks.task import Task
from tagpr.errors import ConfigError
from tagpr.schema import ProfileItem

_PUBLIC: Mapping[str, Task] = lamp.TASKS | longlamp.TASKS | pgraphrag.TASKS | dianping.TASKS


def all_tasks() -> dict[str, Task]:
    """Name -> task, benchmark by benchmark; a user's own (:mod:`tagpr.benchmarks.own`) come last.

    Raises:
        ConfigError: the file of own tasks cannot be used, or one has the name of a benchmark's.
    """
    own = own_tasks()
    for name in own:
        if name in _PUBLIC:
            raise ConfigError(
                f"{VARIABLE}: task {name!r} has the name of a task of {_PUBLIC[name].benchmark}. Rename it."
            )
    return {**_PUBLIC, **own}


def get_task(name: str) -> Task:
    """Look a task up by name.

    Raises:
        ConfigError: no such task; the message lists the known ones.
    """
    tasks = all_tasks()
    if name not in tasks:
        raise ConfigError(f"task={name}: no such task. Known: {', '.join(tasks)}.")
    return tasks[name]


def render_prompt(task: str, query: str, items: Sequence[ProfileItem]) -> str:
    """Return the official prompt of one row: profile items (newest first) and the input.

    Nothing is escaped here: ``query`` and ``items`` come neutralised (``prompt.build_prompt``).
    """
    return get_task(task).render(query, [item.fields for item in items])


def parse_answer(task: str, answer: str) -> str:
    """Return the answer that a model's text gives, or the stripped text where it gives none or several."""
    return get_task(task).parse(answer)
