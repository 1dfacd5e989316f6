"""One model as the pipeline asks it: units of work, the ledger in front, whoever carries the requests behind."""

import asyncio
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_pipeline.ledger import Ledger
from data_pipeline.settings import ModelSettings
from tagpr.chat.asking import Asker
from tagpr.chat.client import Reply
from tagpr.errors import ConfigError, TagPRError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PROGRESS_S = 5.0


@dataclass(frozen=True)
class Unit:
    """One unit of work: a prompt, and which of several replies to it this is.

    ``sample`` separates equal prompts that are to be answered independently; ``attempt`` counts new tries after a
    malformed reply. ``request`` is sent along in the body, and overrides the model's own parameters.
    """

    kind: str
    prompt: str
    sample: str = ""
    rollout: int = 0
    attempt: int = 0
    request: Mapping[str, Any] = field(default_factory=dict)


class PendingError(TagPRError):
    """The unit waits in a batch: there is no reply yet, and nobody is to wait for it here."""


class Deferred(Protocol):
    """Collects requests for a batch that is sent, and answered, later."""

    def add(
        self, key: str, role: str, body: Mapping[str, Any], *, kind: str, noted: Mapping[str, Any]
    ) -> None:
        """Note a request for the next batch; nothing happens if it is in one already."""
        ...


class Endpoint:
    """One model. :meth:`ask` answers from the ledger where it can and pays where it must.

    With ``deferred`` nothing is asked here: a unit that is not in the ledger is noted there and raises PendingError.
    """

    def __init__(
        self,
        role: str,
        settings: ModelSettings,
        ledger: Ledger,
        seed: int,
        asker: Asker,
        deferred: Deferred | None = None,
    ) -> None:
        self.role = role
        self.settings = settings
        self.asker = asker
        self._ledger = ledger
        self._seed = seed
        self._deferred = deferred
        self.seen: Counter[str] = Counter()
        """Replies by kind of work, those from the ledger included."""
        self._in_flight: dict[str, asyncio.Future[Reply]] = {}

    @property
    def counts(self) -> Counter[str]:
        """What was asked, retried, refused, found in the ledger; and what those who read the replies add to it."""
        return self.asker.counts

    async def ask(self, unit: Unit) -> Reply:
        """The reply to one unit; equal units asked at the same time are one unit.

        Raises:
            PendingError: the unit waits in a batch.
            RequestRefusedError: the endpoint refuses this request, and may answer others.
            StageError: the endpoint cannot be used, or the ledger cannot; naming key and remedy.
        """
        parameters = self._parameters(unit)
        key = _unit_key(self.settings, unit, parameters)
        known = self._ledger.get(key)
        if known is not None:
            self.counts["from_ledger"] += 1
            self.seen[unit.kind] += 1
            return known
        if key in self._in_flight:
            return await asyncio.shield(self._in_flight[key])
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": unit.prompt}],
            **parameters,
        }
        noted = {**parameters, "sample": unit.sample, "rollout": unit.rollout, "attempt": unit.attempt}
        if self._deferred is not None:
            self._deferred.add(key, self.role, body, kind=unit.kind, noted=noted)
            raise PendingError(
                f"chains.{self.role}: a unit waits in a batch. Run the same command again later."
            )
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = future
        try:
            reply = await self.asker.ask(body)
            self._ledger.record(key, unit.kind, self.settings.model, noted, reply)
            # Everything that arrived in this round of the event loop is one commit.
            await asyncio.sleep(0)
            self._ledger.commit()
            self.seen[unit.kind] += 1
            future.set_result(reply)
            return reply
        except Exception as error:
            future.set_exception(error)
            future.exception()  # nobody else may be waiting for it
            raise
        except BaseException:
            future.cancel()
            raise
        finally:
            del self._in_flight[key]

    def _parameters(self, unit: Unit) -> dict[str, Any]:
        return {
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "max_tokens": self.settings.max_tokens,
            **self.settings.request,
            **unit.request,
            "seed": _number(self._seed, unit.sample, unit.rollout, unit.attempt),
        }


def read_key(node: str, variable: str | None, file: str | None) -> str:
    """The API key from a file, else from the environment; read where the driver runs.

    Raises:
        ConfigError: the file cannot be read or is empty, or the variable is not set.
    """
    if file is not None:
        try:
            value = Path(file).expanduser().read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{node}.key_file={file}: cannot be read ({type(error).__name__}). Write the API key into it."
            ) from None
        source = f"{node}.key_file={file}"
    else:
        value = os.environ.get(variable or "", "").strip()
        source = f"{node}.key_variable={variable}"
        if not value:
            raise ConfigError(
                f"{source}: this environment variable is not set where the driver runs. Put the API key there, or the "
                f"name of a file that holds it in {node}.key_file."
            )
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(f"{source}: holds no API key (one word of printable ASCII). Put the key there.")
    return value


async def for_each(
    label: str, items: Sequence[Item], work: Callable[[Item], Awaitable[Result]], concurrency: int
) -> list[Result]:
    """Results in the order of ``items``, at most ``concurrency`` at a time; a line of progress every few seconds.

    The first error stops all others and is raised as it is.
    """
    results: dict[int, Result] = {}
    started = reported = time.monotonic()

    async def one(place: tuple[int, Item]) -> None:
        nonlocal reported
        results[place[0]] = await work(place[1])
        now = time.monotonic()
        if now - reported > PROGRESS_S:
            reported = now
            logger.info(
                "%s: %d of %d (%.0f/s)", label, len(results), len(items), len(results) / (now - started)
            )

    await stream(enumerate(items), one, concurrency)
    took = time.monotonic() - started
    logger.info("%s: %d done in %.1f s (%.0f/s)", label, len(items), took, len(items) / max(took, 1e-9))
    return [results[index] for index in range(len(items))]


async def stream(items: Iterable[Item], work: Callable[[Item], Awaitable[None]], window: int) -> None:
    """Do ``work`` for every item, at most ``window`` at a time; items are drawn as there is room for them.

    The first error stops all others and is raised as it is.
    """
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(window):
                group.create_task(worker())
    except ExceptionGroup as errors:
        # Not `except*`: in Python 3.11.2 what is raised there comes wrapped in a group again.
        known, others = errors.split(TagPRError)
        if known is None or others is not None:
            raise
        raise _first(known) from None


def _first(errors: BaseExceptionGroup[TagPRError]) -> TagPRError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, TagPRError)
    return error


def _unit_key(settings: ModelSettings, unit: Unit, parameters: Mapping[str, Any]) -> str:
    """Hash of everything that determines a reply; the URL does not, so that a moved endpoint costs nothing."""
    determinants = [
        unit.kind,
        settings.model,
        settings.revision,
        parameters,
        unit.sample,
        unit.rollout,
        unit.attempt,
        unit.prompt,
    ]
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()


def _number(*parts: object) -> int:
    """A seed of 31 bits from anything printable."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
