"""A user's own tasks, from a YAML file: prompt, answers and metrics are data, no code.

A process learns of the file by the environment variable ``TAGPR_TASKS``, an absolute path, which ``tagpr.configuration`` sets from
``benchmark.own_tasks``: child processes and Ray workers then see the same tasks. Three of them::

    support_reply:                    # the name: in rows, settings and tables of figures
      title: Support reply            # for people
      kind: generation
      fields: [question, reply]       # of a profile item
      long_field: reply               # is shortened first where a prompt gets too long
      item: "Customer: {question}\\nYou: {reply}"
      join: "\\n\\n"
      prompt: "Earlier replies of yours:\\n\\n{items}\\n\\nReply to this customer in your own way.\\n{query}"
      prompt_without_profile: "Reply to this customer.\\n{query}"
      metrics: [rouge1, rougeL, meteor]
      answer_prefix: "Reply:"         # an answer is what follows it, where a model writes it

    wine_score:
      title: Wine score
      kind: rating
      labels: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
      fields: [note, score]
      long_field: note
      item: "{score}/10 for: {note}"
      prompt: "Scores that one person gave:\\n{items}\\n\\nWhat does the same person give? Answer with the number.\\n{query}"
      query_after: "Note:"            # a retriever searches with what follows it
      search_fields: [note]           # and in these fields

    ticket_queue:
      title: Ticket queue
      kind: classification
      labels: [billing, delivery, other]
      fields: [ticket, queue]
      long_field: ticket
      item: "'{ticket}' went to {queue}"
      join: ", and "
      prompt: "{items}. {query}"

In a template ``{name}`` is a placeholder; ``{{name}}`` stands for the text ``{name}``, and any other brace for itself. Templates
are filled in one pass: a placeholder in a user's text stays as it is. Without ``metrics`` a rating reports all of its kind, a
classification accuracy and macro-F1, a generation ROUGE-1 and ROUGE-L.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tagpr.benchmarks.answers import parse_label
from tagpr.benchmarks.task import Fields, Kind, Task
from tagpr.errors import ConfigError
from tagpr.metrics import METRICS
from tagpr.vocabulary import yaml_place

VARIABLE = "TAGPR_TASKS"

_NAME = re.compile(r"[A-Za-z][\w-]{0,63}", re.ASCII)
_FIELD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PLACEHOLDER = re.compile(r"\{\{(?P<literal>[A-Za-z_]\w*)\}\}|\{(?P<name>[A-Za-z_]\w*)\}", re.ASCII)


class _Definition(BaseModel):
    """A task as the file has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    kind: Kind
    labels: tuple[str, ...] = ()
    fields: tuple[str, ...]
    long_field: str
    item: str
    join: str = "\n"
    prompt: str
    prompt_without_profile: str = "{query}"
    metrics: tuple[str, ...] = ()
    query_after: str | None = None
    search_fields: tuple[str, ...] = ()
    rouge_tokens: Literal["words", "characters"] = "words"
    answer_prefix: str | None = None


def own_tasks() -> Mapping[str, Task]:
    """The tasks of the file that ``TAGPR_TASKS`` names, in its order; none without. Read again when the file changes.

    Raises:
        ConfigError: the file cannot be used.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return MappingProxyType({})
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return _read_once(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read_once(path: str, mtime_ns: int, size: int) -> Mapping[str, Task]:
    return MappingProxyType(read_tasks(Path(path)))


def read_tasks(path: Path) -> dict[str, Task]:
    """Read and check a file of tasks.

    Raises:
        ConfigError: it cannot be read, or a task in it cannot be meant; names file, line and key.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(str(path), error) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{yaml_place(path, error)}: is no YAML. Mend the line.") from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ConfigError(f"{path}: holds no tasks. Write `name: {{title: ..., kind: ...}}`.")
    tasks: dict[str, Task] = {}
    for key, node in root.value:
        where = f"{path}:{key.start_mark.line + 1}: {key.value}"
        if not isinstance(key, yaml.ScalarNode) or not _NAME.fullmatch(key.value):
            raise ConfigError(f"{where}: cannot name a task. Use letters, digits, _ and -, a letter first.")
        if key.value in tasks:
            raise ConfigError(f"{where}: occurs twice. Give each task its own name.")
        tasks[key.value] = _task(path, where, key.value, node)
    return tasks


def _unreadable(path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"benchmark.own_tasks={path}: cannot be read ({type(error).__name__}). Point it to a YAML file of tasks."
    )


def _task(path: Path, where: str, name: str, node: yaml.Node) -> Task:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{where}: is no mapping. Write title, kind, fields and so on below it.")
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}

    def fail(key: str, problem: str) -> ConfigError:
        return ConfigError(f"{path}:{lines.get(key, node.start_mark.line + 1)}: {name}.{key}: {problem}")

    try:
        definition = _Definition.model_validate(_plain(node))
    except _RepeatedKey as error:
        raise fail(str(error), "occurs twice. Keep one of the two.") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise fail(str(first["loc"][0]), _wording(first)) from None
    for key, problem in _problems(definition):
        raise fail(key, problem)
    return _made(name, definition)


class _RepeatedKey(ValueError):
    """Its text is the key."""


def _plain(node: yaml.Node) -> Any:
    """Strings as they are written (``yes`` is no boolean, ``10`` no number), lists, mappings and null."""
    if isinstance(node, yaml.MappingNode):
        plain: dict[str, Any] = {}
        for key, value in node.value:
            if key.value in plain:
                raise _RepeatedKey(key.value)
            plain[key.value] = _plain(value)
        # null is the same as leaving the key out.
        return {key: value for key, value in plain.items() if value is not None}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value) for value in node.value]
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _wording(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "missing":
        return "is missing. Add it."
    if problem["type"] == "extra_forbidden":
        return f"is no key of a task. Known: {', '.join(_Definition.model_fields)}."
    return f"{str(problem['msg'])[:1].lower()}{problem['msg'][1:]}. Change it."


def _problems(task: _Definition) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it and what to do), in the order of the keys."""
    if not task.title.strip():
        yield "title", "is empty. Say in a word or two what the task is."
    yield from _label_problems(task)
    if not task.fields or len(set(task.fields)) < len(task.fields):
        yield "fields", "must name each field of a profile item once. Name them."
    for field in task.fields:
        if not _FIELD.fullmatch(field):
            yield "fields", f"{field!r} cannot name a field. Use letters, digits and _, no digit first."
    if task.long_field not in task.fields:
        yield (
            "long_field",
            f"{task.long_field!r} is not among the fields. Use one of {', '.join(task.fields)}.",
        )
    shown = set(_names(task.item))
    if not shown <= set(task.fields):
        unknown = sorted(shown - set(task.fields))[0]
        yield (
            "item",
            f"{{{unknown}}} is no field. Use {_braced(task.fields)}; {{{{x}}}} stands for the text {{x}}.",
        )
    if task.long_field not in shown:
        yield "item", f"lacks {{{task.long_field}}}, the long_field. Put it in."
    for key, wanted in (("prompt", ["items", "query"]), ("prompt_without_profile", ["query"])):
        if sorted(_names(getattr(task, key))) != wanted:
            yield key, f"must have {_braced(wanted)} once and no other placeholder. Mend it."
    for metric in task.metrics:
        if metric not in METRICS[task.kind]:
            yield (
                "metrics",
                f"{metric!r} is no metric of {task.kind}. Known: {', '.join(METRICS[task.kind])}.",
            )
        if metric == "f1_positive" and len(task.labels) != 2:
            yield "metrics", "f1_positive needs two labels, the first the positive one. Leave it out."
    if not set(task.search_fields) <= set(task.fields):
        yield "search_fields", f"are not all among the fields. Use some of {', '.join(task.fields)}."


def _label_problems(task: _Definition) -> Iterator[tuple[str, str]]:
    if task.kind == "generation":
        if task.labels:
            yield "labels", "a generation has none. Leave them out, or change kind."
        return
    if len(task.labels) < 2 or not all(label.strip() == label != "" for label in task.labels):
        yield (
            "labels",
            f"a {task.kind} needs at least two, without white space around them. List the answers.",
        )
    if len({label.casefold() for label in task.labels}) < len(task.labels):
        yield "labels", "two are equal but for capitals. Name each answer once."
    if task.kind == "rating" and not all(label.isascii() and label.isdigit() for label in task.labels):
        yield "labels", "those of a rating are whole numbers from 0. Use such, or kind: classification."
    if task.kind == "rating" and list(task.labels) != sorted(task.labels, key=int):
        yield "labels", "those of a rating go upwards. Sort them."


def _names(template: str) -> list[str]:
    return [match["name"] for match in _PLACEHOLDER.finditer(template) if match["name"]]


def _braced(names: Sequence[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in names)


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Fill placeholders in one pass: what looks like one in a value stays."""
    return _PLACEHOLDER.sub(
        lambda match: values[match["name"]] if match["name"] else f"{{{match['literal']}}}", template
    )


def _made(name: str, definition: _Definition) -> Task:
    search = definition.search_fields or definition.fields
    standard = tuple(it for it in METRICS[definition.kind] if it not in ("f1_positive", "meteor"))

    def render(query: str, items: Sequence[Fields]) -> str:
        if not items:
            return _fill(definition.prompt_without_profile, {"query": query})
        shown = definition.join.join(_fill(definition.item, item) for item in items)
        return _fill(definition.prompt, {"items": shown, "query": query})

    def query_text(query: str) -> str:
        _, marker, text = query.partition(definition.query_after or "\x00")
        return text.strip() if marker else query

    return Task(
        name=name,
        title=definition.title,
        benchmark="own",
        kind=definition.kind,
        labels=definition.labels,
        fields=definition.fields,
        long_field=definition.long_field,
        metrics=definition.metrics or standard,
        render=render,
        parse=_parse(definition),
        query_text=query_text,
        item_text=lambda item: " ".join(item[field] for field in search),
        rouge_tokens=definition.rouge_tokens,
    )


def _parse(definition: _Definition) -> Callable[[str], str]:
    def parse(answer: str) -> str:
        if definition.answer_prefix:
            _, found, rest = answer.partition(definition.answer_prefix)
            answer = rest if found else answer
        if definition.kind == "generation":
            return answer.strip()
        return parse_label(answer, definition.labels, definition.kind)

    return parse
