"""The results store: what the pipeline made of the replies so far, on disk, so that memory holds a window of it.

SQLite, beside the ledger. Everything in it follows from the ledger and the examples: it is made anew by every run, and a
lost one costs nothing but time. Prompts are the exception: they stay as long as nothing changes that they depend on.
Others may read the file while a run writes it (:mod:`data_pipeline.status`).
"""

import json
import os
import sqlite3
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipeline.preferences import Brief, Rollouts
from data_pipeline.sqlite_file import naming
from tagpr.schema import Chain

LAYOUT = 1
REMEDY = "Check the disk and run again: it is made anew, and nothing is paid for twice."
SCHEMA = """
CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE instance (
    number INTEGER PRIMARY KEY,
    example_id TEXT NOT NULL,
    task TEXT NOT NULL,
    user_id TEXT NOT NULL,
    gold TEXT NOT NULL,
    prompt TEXT NOT NULL,
    blank_prompt TEXT
);
CREATE TABLE chain (
    id TEXT PRIMARY KEY,
    instance INTEGER NOT NULL,
    kind TEXT NOT NULL,
    rollout INTEGER NOT NULL,
    reasoning TEXT NOT NULL,
    answer TEXT NOT NULL,
    verifiable REAL NOT NULL,
    judge_scores TEXT,
    judged INTEGER NOT NULL DEFAULT 0,
    tagged TEXT
);
CREATE INDEX chain_order ON chain (instance, kind, rollout);
"""
_CHAIN = """
SELECT chain.id, example_id, task, user_id, CASE kind WHEN 'blank' THEN blank_prompt ELSE prompt END, gold, rollout,
    reasoning, answer, verifiable, judge_scores, tagged
FROM chain JOIN instance ON instance.number = chain.instance
"""
# A change is on disk after so many chains at the latest, or when a stage ends.
_COMMIT_ROWS = 256

Kind = Literal["main", "extra", "blank"]
"""Rollouts for chains, more of them for pairs only, and those without the profile."""


@dataclass(frozen=True)
class Instance:
    """A training example that was drawn, with its prompts; ``number`` is its place in the draw."""

    number: int
    example_id: str
    task: str
    user_id: str
    gold: str
    prompt: str
    blank_prompt: str | None


@dataclass(frozen=True)
class Result:
    """A usable rollout. ``judged``: it is past the judge."""

    chain: Chain
    instance: int
    kind: Kind
    judged: bool = False


class Label(NamedTuple):
    """A chain's name, and what it is for."""

    id: str
    example_id: str
    task: str


def store_path(ledger: Path) -> Path:
    """Beside the ledger, whose lock keeps other runs away from it."""
    return ledger.with_name(f"{ledger.stem}.results.sqlite")


class Store:
    """What a run has made so far.

    Raises:
        StageError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._uncommitted = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path, REMEDY):
            try:
                self._database = self._open()
            except sqlite3.DatabaseError:
                # Of another layout, or damaged by a power cut: it is only a copy.
                self.remove()
                self._database = self._open()
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.chmod(f"{path}{suffix}", 0o600)

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=OFF")
            layout = database.execute("PRAGMA user_version").fetchone()[0]
            if layout == 0:
                database.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={LAYOUT}; COMMIT;")
            elif layout != LAYOUT:
                raise sqlite3.DatabaseError("of another layout")
        except BaseException:
            database.close()
            raise
        return database

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(sqlite3.Error):
            self._database.commit()
        self._database.close()

    def remove(self) -> None:
        """Delete the files."""
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    # notes

    def note(self, name: str, value: object) -> None:
        """Keep a small value for whoever reads this file meanwhile."""
        with naming(self.path, REMEDY), self._database:
            self._database.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, json.dumps(value)))

    def noted(self, name: str) -> Any:
        """What was noted, or None."""
        row = self._database.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    # instances

    def fill(
        self,
        determinants: str,
        make: Callable[[], Iterable[Instance]],
        blank: Callable[[], Container[str]],
        notes: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Have the instances that ``make`` yields, and no chains; those of the same ``determinants`` are kept as they are.

        When ``make`` has ended, ``blank`` names the examples that keep their blank prompt, and ``notes`` is kept beside them as
        note ``instances``.
        """
        with naming(self.path, REMEDY), self._database:
            self._database.execute("DELETE FROM chain")
            if self.noted("determinants") == determinants:
                return
            self._database.execute("DELETE FROM instance")
            self._database.execute("DELETE FROM note")
            made = []
            for instance in make():
                made.append((instance.number, instance.example_id))
                self._database.execute(
                    "INSERT INTO instance VALUES (?, ?, ?, ?, ?, ?, ?)", tuple(instance.__dict__.values())
                )
            kept = blank()
            self._database.executemany(
                "UPDATE instance SET blank_prompt = NULL WHERE number = ?",
                [(number,) for number, example_id in made if example_id not in kept],
            )
            for name, value in (("instances", notes()), ("determinants", determinants)):
                self._database.execute("INSERT INTO note VALUES (?, ?)", (name, json.dumps(value)))

    def instances(self) -> Iterator[Instance]:
        """All instances in the order of the draw, read as they are asked for."""
        number = -1
        while True:
            rows = self._database.execute(
                "SELECT * FROM instance WHERE number > ? ORDER BY number LIMIT 64", (number,)
            ).fetchall()
            if not rows:
                return
            for row in rows:
                yield Instance(*row)
            number = rows[-1][0]

    def instance_count(self) -> int:
        """How many there are."""
        return int(self._database.execute("SELECT COUNT(*) FROM instance").fetchone()[0])

    def blank_count(self) -> int:
        """How many of them are answered without the profile as well."""
        return int(self._database.execute("SELECT COUNT(blank_prompt) FROM instance").fetchone()[0])

    # chains

    def clear(self) -> None:
        """Forget all chains."""
        with naming(self.path, REMEDY), self._database:
            self._database.execute("DELETE FROM chain")

    def add(self, results: Sequence[Result]) -> None:
        """Keep rollouts."""
        rows = [
            (
                result.chain.id,
                result.instance,
                result.kind,
                result.chain.rollout,
                result.chain.reasoning,
                result.chain.answer,
                result.chain.verifiable,
                json.dumps(result.chain.judge_scores) if result.chain.judge_scores else None,
                result.judged,
                None,
            )
            for result in results
        ]
        with self._batched(len(rows)):
            self._database.executemany("INSERT INTO chain VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def set_tagged(self, chain_id: str, tagged: str) -> None:
        """Keep the tagged reasoning of a chain."""
        with self._batched(1):
            self._database.execute("UPDATE chain SET tagged = ? WHERE id = ?", (tagged, chain_id))

    def labels(self, kind: Kind, *, judged: bool | None = None, tagged: bool | None = None) -> list[Label]:
        """All chains of a kind by name, in the order of the draw; only those judged, tagged, where asked for."""
        where = ["kind = ?"]
        if judged is not None:
            where.append("judged" if judged else "NOT judged")
        if tagged is not None:
            where.append("tagged IS NOT NULL" if tagged else "tagged IS NULL")
        rows = self._database.execute(
            "SELECT chain.id, example_id, task FROM chain JOIN instance ON instance.number = chain.instance "
            f"WHERE {' AND '.join(where)} ORDER BY chain.instance, rollout",
            (kind,),
        )
        same: dict[str, str] = {}
        # Equal strings are one object: there are a hundred thousand of these.
        return [
            Label(id_, same.setdefault(example, example), same.setdefault(task, task))
            for id_, example, task in rows
        ]

    def rollouts(self) -> Iterator[Rollouts]:
        """What each instance has to make pairs of, in the order of the draw. Nothing may be written meanwhile."""
        rows = self._database.execute(
            "SELECT chain.instance, kind, judged, chain.id, example_id, task, user_id, answer, verifiable, reasoning "
            "FROM chain JOIN instance ON instance.number = chain.instance ORDER BY chain.instance, kind, rollout"
        )
        for _, own in groupby(rows, key=itemgetter(0)):
            briefs: dict[Kind, list[Brief]] = {"main": [], "extra": [], "blank": []}
            kept = []
            for _, kind, judged, *values in own:
                brief = Brief.of(*values)
                briefs[kind].append(brief)
                if kind == "main" and judged:
                    kept.append(brief)
            yield Rollouts(kept, [*briefs["main"], *briefs["extra"]], briefs["blank"])

    def chain(self, chain_id: str) -> Chain:
        """One chain with all that is known of it."""
        return _chain(self._database.execute(f"{_CHAIN} WHERE chain.id = ?", (chain_id,)).fetchone())

    def chains(self, ids: Iterable[str]) -> Iterator[Chain]:
        """These chains, read as they are asked for."""
        return map(self.chain, ids)

    def all_chains(self, kind: Kind) -> Iterator[Chain]:
        """All chains of a kind in the order of the draw. Nothing may be written meanwhile."""
        cursor = self._database.execute(f"{_CHAIN} WHERE kind = ? ORDER BY chain.instance, rollout", (kind,))
        return map(_chain, cursor)

    def commit(self) -> None:
        """Let readers see everything."""
        with naming(self.path, REMEDY), self._database:
            self._database.commit()
        self._uncommitted = 0

    @contextmanager
    def _batched(self, rows: int) -> Iterator[None]:
        with naming(self.path, REMEDY):
            yield
        self._uncommitted += rows
        if self._uncommitted >= _COMMIT_ROWS:
            self.commit()


def _chain(row: Sequence[Any]) -> Chain:
    (id_, example_id, task, user_id, prompt, gold, rollout, reasoning, answer, verifiable, scores, tagged) = (
        row
    )
    return Chain(
        id=id_,
        example_id=example_id,
        task=task,
        user_id=user_id,
        prompt=prompt,
        gold=gold,
        rollout=rollout,
        reasoning=reasoning,
        answer=answer,
        verifiable=verifiable,
        judge_scores=None if scores is None else tuple(json.loads(scores)),
        tagged=tagged,
    )
