"""The provider's Batch API: half the price, an answer within a day, collected by whichever process comes later.

What is asked is noted in tables of the ledger's own file before it is sent, a file of requests is known to the provider by a
name that was noted before it was created, and replies go into the ledger before they are ticked off. So a run can be killed
anywhere: the next one finds the batch that is there already, submits nothing twice and collects what has ended.
"""

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import tempfile
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import openai

from data_pipeline.batch_file import URL, read_answer, request_line
from data_pipeline.ledger import Ledger
from data_pipeline.settings import BatchSettings
from data_pipeline.sqlite_file import naming
from tagpr.chat.asking import RequestRefusedError
from tagpr.chat.cost import Budget, BudgetReachedError, most_tokens
from tagpr.errors import ConfigError, StageError

logger = logging.getLogger(__name__)
for _chatty in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
    # A line per call; the openai client has changed its HTTP library between versions.
    logging.getLogger(_chatty).setLevel(logging.WARNING)

REMEDY = "Check the disk and run again: what was committed is kept."
SCHEMA = """
CREATE TABLE IF NOT EXISTS batch (
    number INTEGER PRIMARY KEY,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    requests INTEGER NOT NULL,
    remote TEXT,
    done INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS batch_unit (
    key TEXT PRIMARY KEY,
    role TEXT NOT NULL,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    noted TEXT NOT NULL,
    body BLOB NOT NULL,
    most REAL NOT NULL,
    run TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    batch INTEGER,
    refused_status INTEGER,
    refused_code TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS batch_unit_batch ON batch_unit (batch);
"""
WINDOW: Final = "24h"
_ENDED = frozenset({"completed", "expired", "cancelled", "failed"})
_NAME, _CONTENT = "tagpr_batch", "tagpr_content"
# 4xx that another try may pass.
_PASSING = frozenset({408, 409, 425, 429})
_COMMIT_ROWS = 256
_CALL_RETRIES = 5
# Clocks differ; no batch of ours is older than the moment at which we noted it.
_CLOCKS_DIFFER_S = 3600.0


@dataclass(frozen=True)
class BatchAddress:
    """Where the batches of one role go. The key stays out of ``repr``."""

    base_url: str
    api_key: str = field(repr=False)
    key_source: str


@dataclass(frozen=True)
class Progress:
    """What one :meth:`Batches.advance` has done, and what is still out."""

    collected: int
    refused: int
    failed: int
    submitted: int
    batches: int
    open_units: int
    open_batches: int
    held_back: int

    def __str__(self) -> str:
        """One line."""
        held = f"; {self.held_back} held back until others are collected" if self.held_back else ""
        return (
            f"submitted {self.submitted} units in {self.batches} batches; {self.open_units} units wait in "
            f"{self.open_batches} batches{held}. Run again to collect."
        )


class Batches:
    """The batches of one ledger. ``retries``: how often a request may fail in batches before the run stops.

    Raises:
        StageError: the ledger's file cannot be used.
    """

    def __init__(
        self,
        ledger: Ledger,
        addresses: Mapping[str, BatchAddress],
        settings: BatchSettings,
        budget: Budget,
        retries: int,
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._budget = budget
        self._retries = retries
        self._addresses = addresses
        self._clients = {
            role: openai.AsyncOpenAI(
                base_url=address.base_url, api_key=address.api_key, max_retries=_CALL_RETRIES
            )
            for role, address in addresses.items()
        }
        self._run = uuid.uuid4().hex
        # Not in the file yet: an open transaction here would keep the ledger from writing.
        self._added: dict[str, tuple[Any, ...]] = {}
        with naming(ledger.path, REMEDY):
            # The ledger's lock is ours; this is a second connection of the same process.
            self._database = sqlite3.connect(ledger.path, timeout=60.0)
            self._database.executescript(SCHEMA)
        name = ledger.note("batches")
        if name is None:
            name = uuid.uuid4().hex
            ledger.set_note("batches", name)
        self._name = name
        budget.held += self._one("SELECT TOTAL(most) FROM batch_unit WHERE batch IS NOT NULL")

    def add(
        self, key: str, role: str, body: Mapping[str, Any], *, kind: str, noted: Mapping[str, Any]
    ) -> None:
        """Note a request for the next batch; nothing happens if it waits or is in one already.

        Raises:
            RequestRefusedError: a batch came back with a refusal of this request.
            ConfigError: a budget is set, and the model has no price or the request no limit on its reply.
        """
        if key in self._added:
            return
        row = self._database.execute(
            "SELECT run, refused_status, refused_code FROM batch_unit WHERE key = ?", (key,)
        ).fetchone()
        if row is not None and row[1] is not None:
            raise RequestRefusedError(f"chains.{role}", row[1], row[2])
        if row is not None and row[0] == self._run:
            return
        prompt, completion = most_tokens(body)
        if completion is None and self._budget.limit is not None:
            raise ConfigError(
                f"chains.{role}.max_tokens: a budget in dollars needs a limit on a reply. Set it."
            )
        model = str(body["model"])
        most = self._budget.price(model).dollars(prompt, completion or 0, batch=True)
        data = zlib.compress(json.dumps(body, sort_keys=True, ensure_ascii=False).encode(), 1)
        self._added[key] = (key, role, kind, model, json.dumps(noted, sort_keys=True), data, most, self._run)
        if len(self._added) >= _COMMIT_ROWS:
            self._commit()

    async def advance(self, *, submit: bool = True) -> Progress:
        """Collect what has ended, then submit what was added in this run.

        Raises:
            StageError: the endpoint refuses, cannot be reached, or requests went on failing; naming key and remedy.
            BudgetReachedError: nothing more fits into the budget, and nothing is out that could make room.
        """
        self._commit()
        collected = refused = failed = submitted = batches = held_back = 0
        full = set()
        out = self._rows(
            "SELECT number, role, remote FROM batch WHERE NOT done AND remote IS NOT NULL ORDER BY number"
        )
        for number, role, remote in list(out):
            if role not in self._clients:
                continue
            counts = await self._collect(number, role, remote)
            if counts is None:
                full.add(role)
                continue
            collected, refused, failed = collected + counts[0], refused + counts[1], failed + counts[2]
        if submit:
            for role in self._clients:
                for number in self._unfinished(role):
                    if await self._send(number, role):
                        batches += 1
                        submitted += self._one("SELECT requests FROM batch WHERE number = ?", (number,))
                while role not in full and (packed := self._pack(role)) is not None:
                    await self._send(packed, role)
                    batches += 1
                    submitted += self._one("SELECT requests FROM batch WHERE number = ?", (packed,))
                held_back += self._waiting(role)
        open_units, open_batches = self.open()
        if held_back and not (open_units or collected):
            raise BudgetReachedError(self._budget.reached())
        return Progress(collected, refused, failed, submitted, batches, open_units, open_batches, held_back)

    def open(self) -> tuple[int, int]:
        """Units and batches that are out."""
        units = self._one("SELECT COUNT(*) FROM batch_unit WHERE batch IS NOT NULL")
        return units, self._one("SELECT COUNT(*) FROM batch WHERE NOT done")

    async def statuses(self) -> list[str]:
        """A line for every batch that is out."""
        lines = []
        for number, role, remote, requests, created in self._rows(
            "SELECT number, role, remote, requests, created FROM batch WHERE NOT done ORDER BY number"
        ):
            hours = (time.time() - created) / 3600
            state = "not yet created"
            if remote is not None and role in self._clients:
                async with self._calling(role):
                    found = await self._clients[role].batches.retrieve(remote)
                counts = found.request_counts
                state = f"{found.status}, {counts.completed if counts else 0} done, {counts.failed if counts else 0} failed"
            lines.append(f"{number} {role} {remote or '-'}: {requests} requests, {state}, {hours:.1f} h ago")
        return lines

    async def close(self) -> None:
        """Close file and connections; what was added is kept."""
        self._commit()
        self._database.close()
        for client in self._clients.values():
            await client.close()

    # submitting

    def _pack(self, role: str) -> int | None:
        """Assign waiting units to a new batch within the file's limits and the budget; None if there are none that fit."""
        most_bytes = self._settings.megabytes * 2**20
        chosen: list[str] = []
        size, held, digest = 0, 0.0, hashlib.sha256()
        for key, body, most in self._rows(
            "SELECT key, body, most FROM batch_unit WHERE role = ? AND run = ? AND batch IS NULL AND refused_status IS NULL "
            "ORDER BY model, key",
            (role, self._run),
        ):
            line = request_line(key, body)
            if chosen and (len(chosen) >= self._settings.requests or size + len(line) > most_bytes):
                break
            if most > self._budget.left - held:
                break
            chosen.append(key)
            size, held = size + len(line), held + most
            digest.update(line)
        if not chosen:
            return None
        with naming(self._ledger.path, REMEDY), self._database:
            cursor = self._database.execute(
                "INSERT INTO batch (role, content, requests, created) VALUES (?, ?, ?, ?)",
                (role, digest.hexdigest(), len(chosen), time.time()),
            )
            number = cursor.lastrowid
            self._database.executemany(
                "UPDATE batch_unit SET batch = ? WHERE key = ?", ((number, key) for key in chosen)
            )
        self._budget.held += held
        assert number is not None
        return number

    def _waiting(self, role: str) -> int:
        return self._one(
            "SELECT COUNT(*) FROM batch_unit WHERE role = ? AND run = ? AND batch IS NULL AND refused_status IS NULL",
            (role, self._run),
        )

    def _unfinished(self, role: str) -> list[int]:
        """Batches that a killed run had noted, and perhaps created."""
        rows = self._rows(
            "SELECT number FROM batch WHERE role = ? AND NOT done AND remote IS NULL ORDER BY number",
            (role,),
        )
        return [row[0] for row in rows]

    async def _send(self, number: int, role: str) -> bool:
        """Have this batch at the provider: the one that is there already, or a new one.

        A batch of an earlier run that was never created, and that this run does not need, is dissolved (False).
        """
        content, created = self._database.execute(
            "SELECT content, created FROM batch WHERE number = ?", (number,)
        ).fetchone()
        client = self._clients[role]
        remote = await self._adopted(role, number, content, created)
        if remote is None:
            needed = "SELECT COUNT(*) FROM batch_unit WHERE batch = ? AND run = ?"
            if not self._one(needed, (number, self._run)):
                self._tick_off(number, role, [], [], "dissolved", tried=False)
                return False
            with self._file(number, content) as path:
                async with self._calling(role):
                    uploaded = await client.files.create(file=path, purpose="batch")
            async with self._calling(role):
                # Not tried again by the client: a lost answer is no proof that there is no batch.
                made = await client.with_options(max_retries=0).batches.create(
                    input_file_id=uploaded.id,
                    endpoint=URL,
                    completion_window=WINDOW,
                    metadata={_NAME: f"{self._name}-{number}", _CONTENT: content},
                )
            remote = made.id
        with naming(self._ledger.path, REMEDY), self._database:
            self._database.execute("UPDATE batch SET remote = ? WHERE number = ?", (remote, number))
        return True

    async def _adopted(self, role: str, number: int, content: str, created: float) -> str | None:
        """The provider's id of this batch, if it is there."""
        async with self._calling(role):
            async for found in self._clients[role].batches.list(limit=100):
                if found.created_at < created - _CLOCKS_DIFFER_S:
                    break
                notes = found.metadata or {}
                if notes.get(_NAME) == f"{self._name}-{number}" and notes.get(_CONTENT) == content:
                    logger.info("batch %s was submitted before and is taken up", found.id)
                    return found.id
        return None

    @contextlib.contextmanager
    def _file(self, number: int, content: str) -> Iterator[Path]:
        """The batch's JSONL file, for as long as it takes to send it."""
        descriptor, name = tempfile.mkstemp(dir=self._ledger.path.parent, prefix=".batch-", suffix=".jsonl")
        digest = hashlib.sha256()
        try:
            with os.fdopen(descriptor, "wb") as file:
                for key, body in self._rows(
                    "SELECT key, body FROM batch_unit WHERE batch = ? ORDER BY model, key", (number,)
                ):
                    line = request_line(key, body)
                    digest.update(line)
                    file.write(line)
            if digest.hexdigest() != content:
                raise StageError(
                    f"{self._ledger.path}: batch {number} is not what was noted. Restore the file from a backup, or set "
                    "chains.ledger to a new one."
                )
            yield Path(name)
        except OSError as error:
            raise StageError(
                f"{self._ledger.path.parent}: cannot write there ({error.strerror}). Free some space and run again."
            ) from error
        finally:
            Path(name).unlink(missing_ok=True)

    # collecting

    async def _collect(self, number: int, role: str, remote: str) -> tuple[int, int, int] | None:
        """Replies, refusals and failures of a batch that has ended; None if the provider's queue was too full for it."""
        client = self._clients[role]
        try:
            async with self._calling(role):
                batch = await client.batches.retrieve(remote)
        except _GoneError:
            logger.warning(
                "batch %s is not known to the provider any more; its requests go out again", remote
            )
            return self._tick_off(number, role, [], [], "gone")
        if batch.status not in _ENDED:
            return 0, 0, 0
        kinds = {
            key: (kind, model, noted)
            for key, kind, model, noted in self._rows(
                "SELECT key, kind, model, noted FROM batch_unit WHERE batch = ?", (number,)
            )
        }
        answered: list[str] = []
        refused: list[tuple[str, int, str]] = []
        last: str = batch.status
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is None:
                continue
            async for line in self._lines(role, file_id):
                key, reply, status, code = read_answer(line)
                if key not in kinds:
                    continue
                if reply is not None:
                    kind, model, noted = kinds.pop(key)
                    self._ledger.record(key, kind, model, json.loads(noted), reply, batch=True)
                    self._budget.spend(model, reply, batch=True)
                    answered.append(key)
                    if len(answered) % _COMMIT_ROWS == 0:
                        self._ledger.commit()
                elif 400 <= status < 500 and status not in _PASSING:
                    if status in (401, 403):
                        self._tick_off(number, role, answered, refused, "refused_key")
                        raise StageError(self._refused_key(role, status))
                    kinds.pop(key)
                    refused.append((key, status, code))
                else:
                    last = code or str(status)
        self._ledger.commit()
        if batch.status == "failed":
            problems = batch.errors.data if batch.errors and batch.errors.data else []
            code = (problems[0].code if problems else None) or "no code"
            self._tick_off(number, role, answered, refused, code, tried=False)
            if code == "token_limit_exceeded" and self.open()[1]:
                return None
            raise StageError(
                f"chains.{role}: the provider refuses a batch of {len(kinds)} requests ({code}). "
                + (
                    "Lower chains.batch.requests: it is more than the account may have in the queue."
                    if code == "token_limit_exceeded"
                    else "Check model and parameters in this node."
                )
            )
        return self._tick_off(number, role, answered, refused, last)

    def _tick_off(
        self,
        number: int,
        role: str,
        answered: list[str],
        refused: list[tuple[str, int, str]],
        last: str,
        *,
        tried: bool = True,
    ) -> tuple[int, int, int]:
        """The batch is done: answered units leave, refused ones stay as such, all others may go out again."""
        with naming(self._ledger.path, REMEDY), self._database:
            self._budget.held -= self._one("SELECT TOTAL(most) FROM batch_unit WHERE batch = ?", (number,))
            self._database.executemany("DELETE FROM batch_unit WHERE key = ?", ((key,) for key in answered))
            self._database.executemany(
                "UPDATE batch_unit SET batch = NULL, body = x'', refused_status = ?, refused_code = ? WHERE key = ?",
                ((status, code, key) for key, status, code in refused),
            )
            again = self._database.execute(
                "UPDATE batch_unit SET batch = NULL, tries = tries + ? WHERE batch = ?",
                (int(tried), number),
            ).rowcount
            self._database.execute("UPDATE batch SET done = 1 WHERE number = ?", (number,))
        if again and tried:
            logger.warning(
                "chains.%s: %d requests of a batch got no answer (the last: %s)", role, again, last
            )
        worst = self._one("SELECT COALESCE(MAX(tries), 0) FROM batch_unit WHERE role = ?", (role,))
        if worst > self._retries:
            with naming(self._ledger.path, REMEDY), self._database:
                # The next run may try as often again.
                self._database.execute("UPDATE batch_unit SET tries = 0 WHERE role = ?", (role,))
            raise StageError(
                f"chains.{role}: a request got no answer in {worst} batches (the last: {last}). "
                "Look at the endpoint and run again: what was answered is kept."
            )
        return len(answered), len(refused), again

    async def _lines(self, role: str, file_id: str) -> AsyncIterator[str]:
        async with self._calling(role):
            async with self._clients[role].files.with_streaming_response.content(file_id) as response:
                async for line in response.iter_lines():
                    if line:
                        yield line

    # what can go wrong

    @contextlib.asynccontextmanager
    async def _calling(self, role: str) -> AsyncIterator[None]:
        """Errors of the provider as one line each; ``from None``, since the client's errors hold the request's headers."""
        address = self._addresses[role]
        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise StageError(self._refused_key(role, error.status_code)) from None
        except openai.NotFoundError:
            raise _GoneError(
                f"chains.{role}.base_url={address.base_url}: knows no such batch or file, or has no Batch API. "
                f"Set chains.{role}.mode=sync if it has none."
            ) from None
        except openai.RateLimitError as error:
            raise StageError(
                f"chains.{role}: {address.base_url} refuses for now with status 429 ({error.code or 'no code'}). "
                "Run again later: nothing is submitted twice."
            ) from None
        except openai.APIStatusError as error:
            raise StageError(
                f"chains.{role}: {address.base_url} refuses a call of its Batch API with status {error.status_code} "
                f"({error.code or 'no code'}). Run again later, or set chains.{role}.mode=sync."
            ) from None
        except openai.APIConnectionError:
            raise StageError(
                f"chains.{role}.base_url={address.base_url}: no answer. Check that the endpoint is up and run again: "
                "nothing is submitted twice."
            ) from None

    def _refused_key(self, role: str, status: int) -> str:
        address = self._addresses[role]
        return (
            f"chains.{role}: {address.base_url} refuses the key in {address.key_source} (status {status}). "
            "Put a valid key there and run again."
        )

    def _commit(self) -> None:
        with naming(self._ledger.path, REMEDY), self._database:
            self._database.executemany(
                "INSERT INTO batch_unit (key, role, kind, model, noted, body, most, run) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET run = excluded.run",
                self._added.values(),
            )
        self._added.clear()

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        return iter(self._database.execute(query, values))

    def _one(self, query: str, values: tuple[Any, ...] = ()) -> Any:
        return self._database.execute(query, values).fetchone()[0]


class _GoneError(StageError):
    """The provider does not know what was asked for."""
