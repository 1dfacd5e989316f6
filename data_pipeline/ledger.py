"""The ledger: every reply that was paid for, one row each, so that no unit of work is paid for twice.

SQLite in WAL mode. Rows are committed in batches; a committed row survives ``kill -9`` of this process. The
rows hold model, parameters and reply, never a key or a URL.
"""

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tagpr.errors import StageError

LAYOUT = 1
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
    completion_tokens INTEGER NOT NULL,
    created REAL NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered to one unit of work; token counts as the endpoint reported them (0: not reported)."""

    text: str
    reasoning: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Ledger:
    """All replies so far, by key. One process at a time: a second run on the same file would pay twice.

    Raises:
        StageError: the file is no ledger, is of another layout, is in use, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: dict[str, tuple[Any, ...]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115 - held as long as the ledger
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StageError(
                f"{path}: another run is using this ledger. Wait for it to end, or set chains.ledger to another file."
            ) from error
        try:
            self._database = sqlite3.connect(path)
            self._database.execute("PRAGMA journal_mode=WAL")
            # NORMAL: a commit outlives this process; only a power cut can take the last ones back.
            self._database.execute("PRAGMA synchronous=NORMAL")
            layout = self._database.execute("PRAGMA user_version").fetchone()[0]
            if layout not in (0, LAYOUT):
                raise StageError(
                    f"{path}: is a ledger of layout {layout}, this version reads {LAYOUT}. "
                    "Set chains.ledger to a new file."
                )
            self._database.execute(SCHEMA)
            self._database.execute(f"PRAGMA user_version={LAYOUT}")
            self._database.commit()
        except sqlite3.Error as error:
            raise self._broken(error) from error
        for suffix in ("", "-wal", "-shm"):
            # Replies to private data are nobody else's business.
            file = Path(f"{path}{suffix}")
            if file.exists():
                os.chmod(file, 0o600)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Committed rows."""
        return int(self._database.execute("SELECT COUNT(*) FROM unit").fetchone()[0])

    def get(self, key: str) -> Reply | None:
        """The reply of this unit, if it was ever paid for."""
        row = self._database.execute(
            "SELECT text, reasoning, finish_reason, prompt_tokens, completion_tokens FROM unit WHERE key = ?",
            (key,),
        ).fetchone()
        return None if row is None else Reply(*row)

    def record(self, key: str, kind: str, model: str, parameters: Mapping[str, object], reply: Reply) -> None:
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
            reply.completion_tokens,
            time.time(),
        )

    def commit(self) -> None:
        """Write what was noted since the last commit.

        Raises:
            StageError: the file cannot be written, e.g. because the disk is full.
        """
        if not self._pending:
            return
        rows, self._pending = list(self._pending.values()), {}
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO unit VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def totals(self) -> dict[str, dict[str, int]]:
        """Rows and tokens of each kind of work, over all runs that used this ledger."""
        rows = self._database.execute(
            "SELECT kind, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens) FROM unit GROUP BY kind ORDER BY kind"
        )
        return {
            kind: {"replies": count, "prompt_tokens": prompt, "completion_tokens": completion}
            for kind, count, prompt, completion in rows
        }

    def close(self) -> None:
        """Commit and let the next run in."""
        try:
            self.commit()
        finally:
            self._database.close()
            self._lock.close()

    def _broken(self, error: sqlite3.Error) -> StageError:
        return StageError(
            f"{self.path}: SQLite cannot use this file ({error}). Check the disk, or set chains.ledger to a new file."
        )
