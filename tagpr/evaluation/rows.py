"""One JSONL file per model: a line for every answered row, durable, and safe to go on with after a kill.

Beside ``<label>.jsonl`` lies ``<label>.settings.json``: what determined the answers (the model's hash, the
data's hash, token limits, ...). Answers made under other settings are never mixed in. ``<label>.unanswered.jsonl`` names
the rows that have no answer, and why.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from pydantic import Field, ValidationError

from tagpr.errors import DataError, StageError
from tagpr.runs import complete_lines, write_json_atomically, write_text_atomically
from tagpr.schema import Record

logger = logging.getLogger(__name__)

Key = tuple[str, int | None]


class Generation(Record):
    """What a model said to one row, and what only its token ids can tell; ``seed`` None is greedy decoding."""

    id: str
    task: str
    user_id: str
    seed: int | None
    prompt_tokens: int
    items_used: int = Field(description="profile items in the prompt")
    items_shortened: int = Field(description="profile items that were cut to fit the prompt's budget")
    response: str
    response_tokens: int = Field(description="without the end of turn; from an endpoint as it reports them")
    reasoning_tokens: int = Field(
        description="tokens before </think>, or all of them where it never came; from an endpoint as it reports them"
    )
    repetition: float = Field(description="R_rep over the response's token ids (S25)")
    finish_reason: Literal["stop", "length", "content_filter"]
    thinking: bool = Field(
        description="the method reasons before it answers; else the whole response is the answer"
    )
    thinking_cut: bool = Field(description="the reasoning was ended at evaluate.thinking_tokens")

    @property
    def key(self) -> Key:
        """What a row is known by: the example and the seed."""
        return (self.id, self.seed)


class Row(Generation):
    """A generation with its scores; everything added here can be computed again from the generation."""

    gold: str
    history: int = Field(description="items in the user's profile, of which the prompt shows some (S40)")
    seen_user: bool | None = Field(
        description="the user has examples in the training split; None: no such file"
    )
    reasoning: str
    answer: str
    parsed: str
    verifiable: float = Field(description="R_v (S23)")
    format: float = Field(description="R_f (S24); 0 for a truncated response, as in training")
    tag: float = Field(description="R_tag (S26)")
    failure: str = Field(description="the first check that failed, by name; empty for a well-formed response")
    tags: dict[str, int] = Field(description="segments by tag, for a response whose tags parse")


class Unanswered(Record):
    """A row without an answer: ``query_too_long`` for the prompt's budget, or ``refused`` by an endpoint."""

    id: str
    seed: int | None
    reason: Literal["query_too_long", "refused"]
    detail: str

    @property
    def key(self) -> Key:
        """What a row is known by: the example and the seed."""
        return (self.id, self.seed)


class RowFile:
    """The rows of one model under one set of settings; locked while open.

    ``rows`` has the answers by key, ``unanswered`` the rows that have none, with the reason.

    Args:
        path: ``<label>.jsonl``; created with its folder where missing.
        settings: what determines the answers, JSON-able.
        when_changed: what to do with a file made under other settings: ``redo`` moves it into
            ``superseded/`` and starts a new one, ``refuse`` stops.

    Raises:
        StageError: another process has the file open, or its settings differ and ``when_changed`` is
            ``refuse``.
        DataError: a line that is not the last one is damaged, or a row is there twice.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], when_changed: Literal["redo", "refuse"] = "redo"
    ) -> None:
        self.path = path
        self.settings_path = path.with_suffix(".settings.json")
        self.unanswered_path = path.with_suffix(".unanswered.jsonl")
        self.rows: dict[Key, Generation] = {}
        self.unanswered: dict[Key, Unanswered] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = exclusive(path)
        try:
            self._open(json.loads(json.dumps(settings)), when_changed)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, settings: dict[str, Any], when_changed: str) -> None:
        if self.path.exists():
            made_with = self._read_settings()
            changed = sorted(
                key for key in settings.keys() | made_with.keys() if settings.get(key) != made_with.get(key)
            )
            if changed and when_changed == "refuse":
                raise StageError(
                    f"{self.path}: made with another {', '.join(changed)}. "
                    "Set evaluate.when_changed=redo, or another run.name."
                )
            if changed:
                self._supersede(changed)
        if not self.path.exists():
            write_json_atomically(self.settings_path, settings)
            self.unanswered_path.unlink(missing_ok=True)
        else:
            self._read_rows()
            self._read_unanswered()
        self._file = self.path.open("ab")

    def _read_settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise DataError(
                f"{self.settings_path}: not JSON ({error}). Move it and {self.path.name} away."
            ) from None
        if not isinstance(settings, dict):
            raise DataError(
                f"{self.settings_path}: not an object of settings. Move it and {self.path.name} away."
            )
        return settings

    def _supersede(self, changed: list[str]) -> None:
        folder = self.path.parent / "superseded"
        folder.mkdir(exist_ok=True)
        stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09d}"
        for old in (self.path, self.settings_path, self.unanswered_path):
            if old.exists():
                old.rename(folder / f"{stamp}-{old.name}")
        logger.info(
            "%s: made with another %s; its rows are kept in %s and made again",
            self.path,
            ", ".join(changed),
            folder,
        )

    def _read_rows(self) -> None:
        """Read every complete line; cut off what a kill left of the last one."""
        good_bytes = 0
        with self.path.open("rb") as file:
            lines = iter(file)
            for number, line in enumerate(lines, start=1):
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("torn line")
                    data = json.loads(line)
                    row = Generation(**{key: data[key] for key in Generation.model_fields})
                except (ValueError, TypeError, KeyError, ValidationError):
                    if next(lines, None) is not None:
                        raise DataError(
                            f"{self.path}:{number}: not a row of an evaluation. "
                            "Move the file away and run the same command again."
                        ) from None
                    logger.info("%s: dropped its last line, torn by a kill", self.path)
                    break
                if row.key in self.rows:
                    raise DataError(
                        f"{self.path}:{number}: row {row.id!r} (seed {row.seed}) is there twice. "
                        "Move the file away and run the same command again."
                    )
                self.rows[row.key] = row
                good_bytes += len(line)
        if good_bytes < self.path.stat().st_size:
            os.truncate(self.path, good_bytes)

    def _read_unanswered(self) -> None:
        for number, line in enumerate(complete_lines(self.unanswered_path), start=1):
            try:
                entry = Unanswered.model_validate(json.loads(line))
            except (ValueError, ValidationError):
                raise DataError(
                    f"{self.unanswered_path}:{number}: says of no row why it has no answer. "
                    "Remove the file and run the same command again."
                ) from None
            if entry.key not in self.rows:
                self.unanswered[entry.key] = entry

    def note(self, unanswered: Iterable[Unanswered]) -> None:
        """Write down which rows have no answer."""
        before = dict(self.unanswered)
        self.unanswered.update((entry.key, entry) for entry in unanswered)
        if self.unanswered != before:
            write_text_atomically(
                self.unanswered_path,
                "".join(json.dumps(entry.model_dump()) + "\n" for entry in self.unanswered.values()),
            )

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows and return once they are on the disk."""
        batch = list(rows)
        if not batch:
            return
        for row in batch:
            assert row.key not in self.rows, row.key
            self.rows[row.key] = row
        self._file.write(b"".join(_line(row) for row in batch))
        self._file.flush()
        os.fsync(self._file.fileno())

    def rescore(self, rows: Iterable[Row]) -> None:
        """Replace the file where its scores are not these: rows made before a change of the scoring code."""
        content = b"".join(_line(row) for row in rows)
        if self.path.read_bytes() == content:
            return
        self._file.close()
        draft = self.path.with_suffix(".draft")
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)
        self._file = self.path.open("ab")

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.close()


def exclusive(path: Path) -> TextIO:
    """Lock ``path`` (by a file beside it) until the returned file is closed.

    Raises:
        StageError: another process has the lock.
    """
    lock = path.with_suffix(".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise StageError(
            f"{path}: another evaluation is writing it. Wait for it, or set another run.name."
        ) from None
    return lock


def _line(row: Row) -> bytes:
    # Half of a surrogate pair can come out of a benchmark's JSON; json.loads reads it back the same way.
    return (json.dumps(row.model_dump(), ensure_ascii=False) + "\n").encode("utf-8", errors="surrogatepass")
