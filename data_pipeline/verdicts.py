"""Verdicts of people on finished chains: read from what a reviewer sends, kept, and turned into a rate (S13).

A verdict belongs to a chain's id *and* to the hash of what was shown, so one on an older text counts for nothing.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from tagpr.errors import DataError
from tagpr.runs import complete_lines, write_text_atomically
from tagpr.schema import Record

Judgement = Literal["right", "wrong", "unsure"]
JUDGEMENTS: tuple[Judgement, ...] = get_args(Judgement)
COLUMNS = ("id", "text_hash", "verdict", "note", "reviewer")
ANONYMOUS = "(no name)"


class ReviewVerdict(Record):
    """What one reviewer said of one text."""

    id: str
    text_hash: str
    verdict: Judgement
    note: str = Field(default="", max_length=10_000)
    reviewer: str = Field(default="", max_length=200)
    recorded: str = ""

    @property
    def place(self) -> tuple[str, str, str]:
        """One verdict counts for each of these: the last."""
        return self.reviewer, self.id, self.text_hash


@dataclass(frozen=True)
class Reading:
    """Rows of a verdicts file, sorted out; ``bad`` are complete messages, one a row."""

    verdicts: list[ReviewVerdict]
    bad: list[str]
    stale: int
    open: int


def read_verdicts(path: Path, sample: Mapping[str, str], reviewer: str | None) -> Reading:
    """Read a reviewer's file: the sheet's ``.json``, a filled-in ``.csv``, or ``.jsonl``.

    ``sample`` is chain id -> hash of its text. A row without a verdict is ``open``, one on another text of a chain of the
    sample is ``stale``; every other row that cannot be used is ``bad``, among them a chain that is not in the sample: chains
    picked by hand would not be a sample. ``reviewer`` is who judged where a row does not say.

    Raises:
        DataError: the file cannot be read at all.
    """
    verdicts: dict[tuple[str, str, str], ReviewVerdict] = {}
    bad: list[str] = []
    stale = unjudged = 0
    for where, row in _rows(path):
        if not isinstance(row, dict):
            bad.append(f"{where}: is no row with {', '.join(COLUMNS[:3])}. Mend or remove it.")
            continue
        given = {name: row[name] for name in COLUMNS if row.get(name) is not None}
        if not str(given.get("verdict", "")).strip():
            unjudged += 1
            continue
        if isinstance(given["verdict"], str):
            given["verdict"] = given["verdict"].strip().lower()
        try:
            verdict = ReviewVerdict.model_validate(
                {**given, "reviewer": given.get("reviewer") or reviewer or ""}
            )
        except ValidationError as error:
            problem = error.errors()[0]
            bad.append(f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}. Mend the row.")
            continue
        if verdict.id not in sample:
            bad.append(
                f"{where}: chain {verdict.id} is not in the sample. Remove the row, or give the review.chains and "
                "run.seed that the sheet was made with."
            )
        elif verdict.text_hash != sample[verdict.id]:
            stale += 1
        elif verdict.place in verdicts:
            bad.append(f"{where}: chain {verdict.id} is judged twice. Leave one of the rows.")
        else:
            verdicts[verdict.place] = verdict
    return Reading(list(verdicts.values()), bad, stale, unjudged)


def _rows(path: Path) -> list[tuple[str, Any]]:
    """(place for messages, row) of every row of the file."""
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"review.verdicts={path}: cannot be read ({type(error).__name__}). Point it to a UTF-8 file."
        ) from error
    if path.suffix == ".csv":
        return _csv_rows(path, text)
    if path.suffix == ".jsonl":
        return [
            (f"{path}:{number}", _json(line))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    saved = _json(text)
    rows = saved.get("verdicts") if isinstance(saved, dict) else None
    if not isinstance(saved, dict) or not isinstance(rows, list):
        raise DataError(
            f'review.verdicts={path}: has no list "verdicts". Give the file that sheet.html saves, a .csv or a .jsonl.'
        )
    name = saved.get("reviewer") or None
    return [
        (f"{path}: verdicts[{number}]", {"reviewer": name, **row} if isinstance(row, dict) else row)
        for number, row in enumerate(rows)
    ]


def _csv_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    # Spreadsheets of some languages separate by semicolons.
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    missing = set(COLUMNS[:3]) - set(reader.fieldnames or ())
    if missing:
        raise DataError(
            f"review.verdicts={path}: has no column {min(missing)}. Fill in the sheet.csv that the recipe writes."
        )
    rows: list[tuple[str, Any]] = []
    try:
        for row in reader:
            if row["id"]:
                row["id"] = unguarded(row["id"])
            rows.append((f"{path}:{reader.line_num}", row))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is no CSV ({error}). Mend the row.") from error
    return rows


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")


def guarded(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: the text is a stranger's."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def unguarded(text: str) -> str:
    """The inverse of :func:`guarded`."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


def recorded_verdicts(path: Path) -> list[ReviewVerdict]:
    """All verdicts that were ever recorded in ``path``, oldest first.

    Raises:
        DataError: a complete line of the file is no verdict.
    """
    verdicts = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            verdicts.append(ReviewVerdict.model_validate_json(line))
        except ValidationError as error:
            raise DataError(f"{path}:{number}: is no verdict. Restore the line or remove it.") from error
    return verdicts


def record(path: Path, verdicts: Iterable[ReviewVerdict]) -> int:
    """Append the verdicts that say something new and return their number; on the disk when this returns."""
    latest = {verdict.place: verdict for verdict in recorded_verdicts(path)}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = [
        verdict.model_copy(update={"recorded": now})
        for verdict in verdicts
        if verdict.place not in latest
        or (latest[verdict.place].verdict, latest[verdict.place].note) != (verdict.verdict, verdict.note)
    ]
    if not new:
        return 0
    whole = "".join(complete_lines(path))
    if path.exists() and path.read_bytes() != whole.encode():
        write_text_atomically(path, whole)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("".join(f"{verdict.model_dump_json()}\n" for verdict in new))
        stream.flush()
        os.fsync(stream.fileno())
    return len(new)


class Rate(Record):
    """Share of chains that are right, with its Wilson score interval. ``unsure`` counts as not right."""

    judged: int
    right: int
    wrong: int
    unsure: int
    rate: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.rate is None:
            return "none judged"
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.right} of {self.judged})"


class Agreement(Record):
    """Two reviewers on the chains that both judged. ``kappa`` is Cohen's, None where chance alone explains all."""

    reviewers: tuple[str, str]
    chains: int
    agreed: float
    kappa: float | None


class Report(Record):
    """What the verdicts say of the sample. ``all`` counts each chain once, as right only if nobody doubted it."""

    sample: int
    confidence: float
    stale: int
    all: Rate
    by_task: dict[str, Rate]
    by_reviewer: dict[str, Rate]
    agreements: list[Agreement]
    doubted: list[ReviewVerdict]


def rate(judgements: Sequence[Judgement], confidence: float) -> Rate:
    """The share of ``right`` and its interval (Wilson, which holds its level for 50 chains and shares near 1)."""
    counts = Counter(judgements)
    share = low = high = None
    if judgements:
        from scipy.stats import binomtest

        share = counts["right"] / len(judgements)
        interval = binomtest(counts["right"], len(judgements)).proportion_ci(confidence, method="wilson")
        low, high = float(interval.low), float(interval.high)
    return Rate(
        judged=len(judgements), right=counts["right"], wrong=counts["wrong"], unsure=counts["unsure"],
        rate=share, low=low, high=high,
    )  # fmt: skip


def report(
    verdicts: Iterable[ReviewVerdict], sample: Mapping[str, str], tasks: Mapping[str, str], confidence: float
) -> Report:
    """Rates over the sample, by task and by reviewer, and how far each two reviewers agree.

    ``sample`` is chain id -> hash, ``tasks`` chain id -> task. Of several verdicts of a reviewer on a chain the last
    counts. Verdicts on other chains or older texts are ``stale``.
    """
    latest = {verdict.place: verdict for verdict in verdicts}
    current = [verdict for verdict in latest.values() if sample.get(verdict.id) == verdict.text_hash]
    said: dict[str, dict[str, Judgement]] = {}
    of_chain: dict[str, list[Judgement]] = {}
    for verdict in current:
        said.setdefault(verdict.reviewer or ANONYMOUS, {})[verdict.id] = verdict.verdict
        of_chain.setdefault(verdict.id, []).append(verdict.verdict)
    settled = {chain: _settle(given) for chain, given in of_chain.items()}
    names = list(dict.fromkeys(tasks[chain] for chain in sample))
    order = {chain: number for number, chain in enumerate(sample)}
    return Report(
        sample=len(sample),
        confidence=confidence,
        stale=len(latest) - len(current),
        all=rate(list(settled.values()), confidence),
        by_task={
            task: rate([said for chain, said in settled.items() if tasks[chain] == task], confidence)
            for task in sorted(names)
        },
        by_reviewer={name: rate(list(own.values()), confidence) for name, own in sorted(said.items())},
        agreements=[
            agreement((one, other), said[one], said[other])
            for one, other in combinations(sorted(said), 2)
            if said[one].keys() & said[other].keys()
        ],
        doubted=sorted(
            (verdict for verdict in current if verdict.verdict != "right"),
            key=lambda verdict: (order[verdict.id], verdict.reviewer),
        ),
    )


def _settle(given: Sequence[Judgement]) -> Judgement:
    """One verdict out of several: the worst."""
    return max(given, key=("right", "unsure", "wrong").index)


def agreement(
    reviewers: tuple[str, str], one: Mapping[str, Judgement], other: Mapping[str, Judgement]
) -> Agreement:
    """How far two reviewers agree on the chains that both judged (at least one)."""
    shared = sorted(one.keys() & other.keys())
    first, second = [one[chain] for chain in shared], [other[chain] for chain in shared]
    same = sum(a == b for a, b in zip(first, second, strict=True)) / len(shared)
    expected = sum(Counter(first)[name] * Counter(second)[name] for name in JUDGEMENTS) / len(shared) ** 2
    kappa = None if expected == 1.0 else (same - expected) / (1.0 - expected)
    return Agreement(reviewers=reviewers, chains=len(shared), agreed=same, kappa=kappa)
