"""The ledger: every reply that was paid for, one row each, so that no unit of work is paid for twice.

SQLite in WAL mode. Rows are committed in batches; a committed row survives ``kill -9`` of this process. The
rows hold model, parameters and reply, never a key or a URL. Others may read the file while a run writes it.
"""

import fcntl
import json
import os
import sqlite3
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from data_pipeline.sqlite_file import naming
from tagpr.chat.client import Reply
from tagpr.errors import StageError

LAYOUT = 2
REMEDY = "Check the disk and run again, or set chains.ledger to a new file: what was committed is kept."
SCHEMA = """
CREATE TABLE IF NOT EXISTS unit (
    key TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    parameters TEXT NOT NULL,
    text TEXT NOT NULL,
    reasoning TEXT,
    finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    created REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unit_pace ON unit (kind, created);
CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_COLUMNS = "text, reasoning, finish_reason, prompt_tokens, cached_prompt_tokens, completion_tokens"


# The pace is that of so many seconds before the newest reply, and of so many replies at most.
RECENT_S, RECENT_REPLIES = 300.0, 2000
# With fewer replies there is no pace to speak of.
FEWEST_REPLIES = 20
# A longer pause than this, and than ten usual ones, is a run that was stopped.
PAUSE_S = 60.0

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "teacher": ("teacher", "teacher_without_profile"),
    "judge": ("judge",),
    "explorer": ("exploratory_tagger",),
    "tagger": ("tagger",),
}
"""Kinds of work in the ledger, by whose pace they have in common."""


@dataclass(frozen=True)
class Spent:
    """Replies and tokens of one kind of work by one model; ``batch``: through the Batch API."""

    kind: str
    model: str
    batch: bool
    replies: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Pace:
    """Replies of a group in the ledger, and how many a second came lately; None where they are too few to tell."""

    replies: int = 0
    per_second: float | None = None


class Ledger:
    """All replies so far, by key. One process at a time: a second run on the same file would pay twice.

    Raises:
        StageError: the file is no ledger, is of another layout, is in use, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: dict[str, tuple[Any, ...]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115 - held as long as the ledger
        except OSError as error:
            raise StageError(
                f"{path}: cannot be written ({error.strerror}). Set chains.ledger to a file in a folder of yours."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StageError(
                f"{path}: another run is using this ledger. Wait for it to end, or set chains.ledger to another file."
            ) from error
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> None:
        with naming(self.path, REMEDY):
            self._database = sqlite3.connect(self.path)
            self._database.execute("PRAGMA journal_mode=WAL")
            # NORMAL: a commit outlives this process; only a power cut can take the last ones back.
            self._database.execute("PRAGMA synchronous=NORMAL")
            layout = self._database.execute("PRAGMA user_version").fetchone()[0]
            if layout not in (0, LAYOUT):
                raise StageError(
                    f"{self.path}: is a ledger of layout {layout}, this version reads {LAYOUT}. "
                    "Set chains.ledger to a new file."
                )
            self._database.executescript(SCHEMA)
            self._database.execute(f"PRAGMA user_version={LAYOUT}")
            self._database.commit()
        for suffix in ("", "-wal", "-shm"):
            # Replies to private data are nobody else's business.
            with suppress(FileNotFoundError):
                os.chmod(f"{self.path}{suffix}", 0o600)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The run has failed already, perhaps because this very file cannot be written: that is what it says.
        with suppress(StageError):
            self.close()

    def __len__(self) -> int:
        """Committed rows."""
        return int(self._database.execute("SELECT COUNT(*) FROM unit").fetchone()[0])

    def get(self, key: str) -> Reply | None:
        """The reply of this unit, if it was ever paid for."""
        row = self._database.execute(f"SELECT {_COLUMNS} FROM unit WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(*row)

    def record(
        self,
        key: str,
        kind: str,
        model: str,
        parameters: Mapping[str, object],
        reply: Reply,
        *,
        batch: bool = False,
    ) -> None:
        """Note a reply; :meth:`commit` makes all noted ones durable at once."""
        self._pending[key] = (
            key,
            kind,
            model,
            json.dumps(parameters, sort_keys=True),
            reply.text,
            reply.reasoning,
            reply.finish_reason,
            reply.prompt_tokens,
            reply.cached_prompt_tokens,
            reply.completion_tokens,
            batch,
            time.time(),
        )

    def commit(self) -> None:
        """Write what was noted since the last commit.

        Raises:
            StageError: the file cannot be written, e.g. because the disk is full.
        """
        if not self._pending:
            return
        with naming(self.path, REMEDY), self._database:
            self._database.executemany(
                "INSERT OR REPLACE INTO unit VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", list(self._pending.values())
            )
        self._pending.clear()

    def note(self, name: str) -> str | None:
        """What was noted under this name."""
        row = self._database.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_note(self, name: str, value: str) -> None:
        """Keep a note; durable when this returns.

        Raises:
            StageError: the file cannot be written.
        """
        with naming(self.path, REMEDY), self._database:
            self._database.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, value))

    def spent(self) -> list[Spent]:
        """What was paid for, over all runs that used this ledger."""
        return spent(self._database)

    def paces(self) -> dict[str, Pace]:
        """How many replies there are, and how fast they came lately."""
        return paces(self._database)

    def totals(self) -> dict[str, dict[str, int]]:
        """Rows and tokens of each kind of work, over all runs that used this ledger."""
        found: dict[str, dict[str, int]] = {}
        for row in self.spent():
            total = found.setdefault(row.kind, {})
            for name in ("replies", "prompt_tokens", "cached_prompt_tokens", "completion_tokens"):
                total[name] = total.get(name, 0) + getattr(row, name)
        return found

    def close(self) -> None:
        """Commit and let the next run in."""
        try:
            self.commit()
        finally:
            self._database.close()
            self._lock.close()


def spent(database: sqlite3.Connection) -> list[Spent]:
    """Replies and tokens by kind and model, from an open ledger."""
    rows = database.execute(
        "SELECT kind, model, batch, COUNT(*), SUM(prompt_tokens), SUM(cached_prompt_tokens), SUM(completion_tokens) "
        "FROM unit GROUP BY kind, model, batch ORDER BY kind, model, batch"
    )
    return [Spent(kind, model, bool(batch), *numbers) for kind, model, batch, *numbers in rows]


def paces(database: sqlite3.Connection) -> dict[str, Pace]:
    """The pace of each group, from an open ledger."""
    counts = dict(database.execute("SELECT kind, COUNT(*) FROM unit GROUP BY kind"))
    found = {}
    for group, kinds in GROUPS.items():
        times: list[float] = []
        for kind in kinds:
            newest = database.execute("SELECT MAX(created) FROM unit WHERE kind = ?", (kind,)).fetchone()[0]
            rows = database.execute(
                "SELECT created FROM unit WHERE kind = ? AND created >= ? ORDER BY created DESC LIMIT ?",
                (kind, (newest or 0.0) - RECENT_S, RECENT_REPLIES),
            )
            times += [row[0] for row in rows]
        times = sorted(times)[-RECENT_REPLIES:]
        recent = [each for each in times if each >= times[-1] - RECENT_S]
        found[group] = Pace(sum(counts.get(kind, 0) for kind in kinds), _per_second(recent))
    return found


def _per_second(times: list[float]) -> float | None:
    if len(times) < FEWEST_REPLIES:
        return None
    gaps = [later - earlier for earlier, later in pairwise(times)]
    pause = max(PAUSE_S, 10.0 * statistics.median(gaps))
    gaps = [gap for gap in gaps if gap <= pause]
    return len(gaps) / max(sum(gaps), 1e-6)
