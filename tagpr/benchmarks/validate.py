"""Stage validate_data: everything that is wrong or suspicious about a benchmark's raw files, at once.

Written for data of one's own (``benchmark=own``), whose faults are told by file and line. Any other benchmark can be looked through
for leakage and overlap too; its reader stops at a file's first fault.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from tagpr.benchmarks import own_rows
from tagpr.benchmarks.counts import LONG_ITEM_CHARACTERS, Counts, mixed_precision, off_scale
from tagpr.benchmarks.prepare import tasks_of
from tagpr.benchmarks.sources import Own, Source, source_of
from tagpr.benchmarks.task import Task
from tagpr.benchmarks.tasks import all_tasks, get_task
from tagpr.configuration import main
from tagpr.errors import ConfigError, DataError
from tagpr.retrieval import date_key
from tagpr.runs import write_json_atomically
from tagpr.schema import Example, ProfileItem, Split

Severity = Literal["error", "warning"]

WARNINGS = frozenset(
    {
        "question asked twice",
        "row twice",
        "row of another task",
        "empty profile",
        "near-empty profile",
        "item twice in a profile",
        "item id twice in a profile",
        "profile not in date order",
        "dates of different precision",
        "profile rating off the scale",
        "very long item",
    }
)
LEAKS = frozenset(
    {
        "question in its own profile",
        "gold in its own profile",
        "answer in a training profile",
        "question in two splits",
        "row in two splits",
        "profile newer than the question",
    }
)
"""The answer can be read, or was learned: what is measured on such rows is no generalisation."""


@dataclass
class Kind:
    """All findings of one kind."""

    severity: Severity
    count: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)


class Findings:
    """Findings by kind; the first ``cap`` of each are told in full, the others counted."""

    def __init__(self, cap: int, leakage: Severity) -> None:
        self.cap = cap
        self.leakage: Severity = leakage
        self.kinds: dict[str, Kind] = {}

    def add(self, kind: str, path: Path, line: int | None, message: str) -> None:
        """Note a finding, and print it unless there were enough of its kind."""
        severity: Severity = self.leakage if kind in LEAKS else "warning" if kind in WARNINGS else "error"
        entry = self.kinds.setdefault(kind, Kind(severity))
        entry.count += 1
        if entry.count <= self.cap:
            entry.shown.append({"file": str(path), "line": line, "message": message})
            _print(f"{path}{'' if line is None else f':{line}'}: {severity}: {message}")
        elif entry.count == self.cap + 1:
            _print(f"... more of: {kind} (counted below; validate_data.show_per_kind={self.cap})")

    def total(self, severity: Severity) -> int:
        """How many findings there are of a severity."""
        return sum(kind.count for kind in self.kinds.values() if kind.severity == severity)

    def table(self) -> Iterator[str]:
        """Lines for a person, errors first."""
        if not self.kinds:
            return
        ordered = sorted(self.kinds.items(), key=lambda entry: (entry[1].severity, -entry[1].count))
        width = max(len(name) for name in self.kinds)
        yield f"{'kind':<{width}}  severity    count  first at"
        for name, kind in ordered:
            first = kind.shown[0]
            place = first["file"] if first["line"] is None else f"{first['file']}:{first['line']}"
            yield f"{name:<{width}}  {kind.severity:<8}{kind.count:>9}  {place}"


@dataclass(frozen=True)
class Row:
    """A row that can be read, and where it is; ``line`` is None where the format has no lines."""

    example: Example
    path: Path
    line: int | None
    date: str | None = None

    @property
    def where(self) -> str:
        """For a sentence about another row."""
        return f"{self.path.name}:{self.line}" if self.line is not None else self.example.id


def run(config: DictConfig) -> None:
    """Look at every row of every split, print what was found and a summary, write the report.

    Raises:
        DataError: there are errors; they have been printed.
        ConfigError: a setting that makes no sense.
    """
    settings = config.validate_data
    _check(settings)
    tasks = tasks_of(config)
    source = source_of(config)
    findings, counts = Findings(settings.show_per_kind, settings.leakage), Counts()
    audit = _Audit(findings, settings.min_profile_items, settings.leak_characters)
    for split in source.splits:
        rows = (
            _own_rows(source, tasks, split, findings)
            if isinstance(source, Own)
            else _rows(source, tasks, split, findings, counts)
        )
        for _ in counts.watch(_audited(audit, rows)):
            pass
    for task in tasks:
        if not any(counts.rows(task, split) for split in source.splits):
            findings.add(
                "task without rows", source.folder, None, f"no row of task {task} can be used. Add some."
            )
    _print("")
    for line in (*findings.table(), "", *counts.table()):
        _print(line)
    report = Path(config.run.dir) / "validation.json"
    write_json_atomically(
        report,
        {
            "folder": str(source.folder),
            "findings": {name: vars(kind) for name, kind in findings.kinds.items()},
            **counts.notes(),
        },
    )
    errors, warnings = findings.total("error"), findings.total("warning")
    _print(
        f"\n{counts.total()} rows can be used: {errors} errors, {warnings} warnings; all counts in {report}"
    )
    if errors or (settings.strict and warnings):
        found = f"{errors} errors" + (f" and {warnings} warnings" if settings.strict else "")
        raise DataError(
            f"{source.folder}: {found}, see above. Mend the files, or see what validate_data.* can tolerate."
        )


def _check(settings: DictConfig) -> None:
    for name in ("show_per_kind", "min_profile_items", "leak_characters"):
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"validate_data.{name}={value}: is not a positive whole number. Change it.")
    if settings.leakage not in ("error", "warning"):
        raise ConfigError(
            f"validate_data.leakage={settings.leakage}: is neither error nor warning. Use one of them."
        )
    if not isinstance(settings.strict, bool):
        raise ConfigError("validate_data.strict: is not true or false. Set it to one of them.")


def _print(line: str) -> None:
    """One line, in which text from the files cannot move the cursor or colour the terminal."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    sys.stdout.write(f"{shown}\n")


def _own_rows(source: Own, tasks: list[str], split: Split, findings: Findings) -> Iterator[Row]:
    """Rows of one's own that can be used; what keeps the others from it is noted, all of a line."""
    try:
        path = own_rows.split_file(source.folder, split)
        lines = own_rows.read_lines(path)
        known = all_tasks()
        seen: dict[tuple[str, str], int] = {}
        rows = 0
        for line in lines:
            rows += 1
            own_rows.check(line, known)
            row, id_ = line.row, None
            if row is not None and isinstance(row.get("id"), str | int) and isinstance(row.get("task"), str):
                id_ = row["task"], str(row["id"])
                if id_ in seen:
                    line.add("id twice", own_rows.repeated_id(line, seen[id_]))
                else:
                    seen[id_] = line.number
            for problem in line.problems:
                findings.add(problem.kind, path, line.number, problem.message)
            if line.problems:
                continue
            if line.task is not None and line.task.name not in tasks:
                findings.add(
                    "row of another task",
                    path,
                    line.number,
                    f"task {line.task.name} is not in benchmark.tasks.",
                )
                continue
            assert row is not None
            date = None if row.get("date") is None else str(row["date"])
            yield Row(own_rows.to_example(line, split), path, line.number, date)
        if not rows:
            findings.add("file without rows", path, None, "holds no row. Put some there.")
    except DataError as error:
        findings.add("file missing or unreadable", source.folder / f"{split}.jsonl", None, str(error))


def _rows(
    source: Source, tasks: list[str], split: Split, findings: Findings, counts: Counts
) -> Iterator[Row]:
    """Rows of a public benchmark; a task's split ends at its first fault."""
    for task in tasks:
        try:
            path = source.files(task, split)[0]
            for example in source.rows(task, split, counts.reader(task, split)):
                yield Row(example, path, None)
        except DataError as error:
            findings.add("file missing or unreadable", source.folder, None, str(error))


def _audited(audit: "_Audit", rows: Iterator[Row]) -> Iterator[Example]:
    for row in rows:
        audit.look_at(row)
        yield row.example


class _Audit:
    """What each row by itself is fine with and is suspicious all the same, alone or beside others."""

    def __init__(self, findings: Findings, min_profile_items: int, leak_characters: int) -> None:
        self.findings = findings
        self.min_profile_items = min_profile_items
        self.leak_characters = leak_characters
        self.rows: dict[int, Row] = {}
        self.questions: dict[int, Row] = {}
        self.training_texts: dict[int, str] = {}

    def look_at(self, row: Row) -> None:
        """Check one row against itself and those before; training rows come first."""
        task = get_task(row.example.task)
        self.repeated(row)
        self.profile(row, task)
        self.dates(row)
        self.leaks(row, task)

    def note(self, kind: str, row: Row, message: str) -> None:
        place = "" if row.line is not None else f"{row.example.id}: "
        self.findings.add(kind, row.path, row.line, f"{place}{message}")

    def repeated(self, row: Row) -> None:
        one = row.example
        items = [[item.fields, item.date] for item in one.profile]
        whole = _digest(json.dumps([one.task, one.user_id, one.query, one.gold, items], sort_keys=True))
        question = _digest("\x00".join((one.task, one.user_id, _plain(one.query))))
        # References to a place only: rows are not kept.
        place = Row(one.model_copy(update={"profile": (), "query": "", "gold": ""}), row.path, row.line)
        if (before := self.rows.setdefault(whole, place)) is not place:
            if before.example.split == one.split:
                self.note("row twice", row, f"is the same as {before.where} but for its id.")
            else:
                self.note("row in two splits", row, f"is the same as {before.where}. Keep it in one split.")
        elif (before := self.questions.setdefault(question, place)) is not place:
            if before.example.split == one.split:
                self.note("question asked twice", row, f"its user has this query at {before.where} too.")
            else:
                self.note(
                    "question in two splits",
                    row,
                    f"its user has this query at {before.where} too. Keep it in one split.",
                )

    def profile(self, row: Row, task: Task) -> None:
        items = row.example.profile
        if not items:
            self.note("empty profile", row, "its profile is empty: the prompt will be the query alone.")
        elif len(items) < self.min_profile_items:
            self.note(
                "near-empty profile",
                row,
                f"its profile has {len(items)} items, fewer than {self.min_profile_items}.",
            )
        twice = _first_twice(item.id for item in items)
        if twice is not None:
            self.note("item id twice in a profile", row, f"profile items share the id {twice!r}.")
        same = _first_twice(json.dumps([item.fields, item.date], sort_keys=True) for item in items)
        if same is not None:
            item = next(it for it in items if json.dumps([it.fields, it.date], sort_keys=True) == same)
            self.note(
                "item twice in a profile",
                row,
                f"profile item {item.id!r} occurs twice in it.",
            )
        for item in items:
            longest = max(map(len, item.fields.values()), default=0)
            if longest > LONG_ITEM_CHARACTERS:
                self.note(
                    "very long item",
                    row,
                    f"profile item {item.id!r} has {longest:,} characters; a prompt shows its beginning.",
                )
            if task.kind == "rating" and off_scale(item, task.labels):
                self.note(
                    "profile rating off the scale",
                    row,
                    f"profile item {item.id!r} has a rating that is none of {', '.join(task.labels)}.",
                )

    def dates(self, row: Row) -> None:
        items = row.example.profile
        dated = [(date_key(item.date), item) for item in items if item.date is not None]
        if mixed_precision(items):
            self.note(
                "dates of different precision",
                row,
                "some dates are years and others days, say; years sort before their days.",
            )
        keys = [key for key, _ in dated]
        if keys not in (sorted(keys), sorted(keys, reverse=True)):
            self.note(
                "profile not in date order",
                row,
                "its profile is neither oldest nor newest first; recency sorts it.",
            )
        if row.date is not None:
            asked = date_key(row.date)
            for key, item in dated:
                shared = min(len(key), len(asked))
                if key[:shared] > asked[:shared]:
                    self.note(
                        "profile newer than the question",
                        row,
                        f"profile item {item.id!r} is of {item.date}, the question of {row.date}. Take later items out.",
                    )
                    break

    def leaks(self, row: Row, task: Task) -> None:
        one = row.example
        question = _plain(task.query_text(one.query))
        gold = _plain(one.gold) if task.kind == "generation" else ""
        long_gold = len(gold) >= self.leak_characters
        found_question = found_gold = False
        for item in one.profile:
            texts = {name: _plain(text) for name, text in item.fields.items()}
            found_question = found_question or self.shares(question, texts, task.long_field, row, item)
            if long_gold and not found_gold:
                name = next((name for name, text in texts.items() if gold in text), None)
                found_gold = name is not None
                if found_gold:
                    self.note(
                        "gold in its own profile",
                        row,
                        f"the gold stands in {name!r} of profile item {item.id!r}.",
                    )
            if one.split == "train":
                for text in texts.values():
                    if len(text) >= self.leak_characters:
                        self.training_texts.setdefault(_digest(text), row.where)
        if one.split != "train":
            for what, text in (("question", question), ("gold", gold)):
                where = self.training_texts.get(_digest(text)) if len(text) >= self.leak_characters else None
                if where is not None:
                    self.note(
                        "answer in a training profile",
                        row,
                        f"its {what} is an item of the profile of {where}, training data.",
                    )
                    break

    def shares(
        self, question: str, texts: Mapping[str, str], long_field: str, row: Row, item: ProfileItem
    ) -> bool:
        """Whether an item is what the question is about, which then gives its answer away."""
        for name, text in texts.items():
            if min(len(text), len(question)) < self.leak_characters:
                continue
            # Short fields may be part of a question rightly (the same product's description in two reviews, say).
            if text == question or (name == long_field and (text in question or question in text)):
                self.note(
                    "question in its own profile",
                    row,
                    f"what it asks about is {name!r} of profile item {item.id!r}. Take the item out.",
                )
                return True
        return False


def _first_twice(values: Iterator[str]) -> str | None:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


if __name__ == "__main__":
    main("validate_data", run)
