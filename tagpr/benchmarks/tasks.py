"""Every known task by name, whatever its benchmark."""

from collections.abc import Sequence

from tagpr.benchmarks import dianping, lamp, longlamp, pgraphrag
from tagpr.benchmarks.task import Task
from tagpr.errors import ConfigError
from tagpr.schema import ProfileItem


def all_tasks() -> dict[str, Task]:
    """Name -> task, benchmark by benchmark."""
    return lamp.TASKS | longlamp.TASKS | pgraphrag.TASKS | dianping.TASKS


def get_task(name: str) -> Task:
    """Look a task up by name.

    Raises:
        ConfigError: no such task; the message lists the known ones.
    """
    task = all_tasks().get(name)
    if task is None:
        raise ConfigError(f"task={name}: no such task. Known: {', '.join(all_tasks())}.")
    return task


def render_prompt(task: str, query: str, items: Sequence[ProfileItem]) -> str:
    """Return the official prompt of one row: profile items (newest first) and the input.

    Nothing is escaped here: ``query`` and ``items`` come neutralised (``prompt.build_prompt``).
    """
    return get_task(task).render(query, [item.fields for item in items])


def parse_answer(task: str, answer: str) -> str:
    """Return the answer that a model's text gives, or the stripped text where it gives none or several."""
    return get_task(task).parse(answer)
