"""Ray actors that carry requests: one call of an actor brings many requests, or many outcomes, never one.

A call of a Ray actor costs more than an HTTP request. So the driver gathers what is to be asked for a few milliseconds
and sends it in one call, and a long poll brings back whatever has been answered meanwhile. Workers keep nothing: retries,
limits, budget and ledger are the driver's. A worker that dies is replaced, and its requests come back as dropped
connections, to be asked again.
"""

import asyncio
import logging
import pickle
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from tagpr.chat.client import ChatClient, Outcome
from tagpr.errors import StageError, TagPRError

logger = logging.getLogger(__name__)

# How long requests, and outcomes, wait for company, in seconds.
GATHER_S = 0.003
# A worker that dies so often in a row without an answer will not do better the next time.
MOST_DEATHS = 5
# How many prompts are remembered with the replica that has them in its prefix cache.
REMEMBERED_PROMPTS = 65_536

DROPPED = Outcome(None, "unreachable", code="dropped", message="the worker that asked has died")

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Address:
    """Where requests of one role go. The key stays out of ``repr`` and thereby out of tracebacks and logs."""

    base_url: str
    api_key: str = field(repr=False)
    timeout_s: float
    connections: int


class Courier:
    """The side of a worker: takes requests, runs them at once, hands outcomes out in bunches. Subclasses answer."""

    def __init__(self) -> None:
        self._done: list[tuple[int, Outcome]] = []
        self._arrived = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    async def answer(self, role: str, body: Body) -> Outcome:
        """The outcome of one request; raises nothing that a request can cause."""
        raise NotImplementedError

    async def submit(self, parcel: bytes) -> None:
        """Start the requests of a parcel: pickled ``[(number, role, body)]``."""
        for number, role, body in pickle.loads(parcel):
            task = asyncio.create_task(self._run(number, role, body))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def collect(self) -> bytes:
        """Wait for outcomes and hand over all that are there: pickled ``[(number, Outcome)]``."""
        await self._arrived.wait()
        await asyncio.sleep(GATHER_S)
        self._arrived.clear()
        done, self._done = self._done, []
        return pickle.dumps(done, protocol=5)

    async def _run(self, number: int, role: str, body: Body) -> None:
        outcome = await self.answer(role, body)
        # Not in one line: the list would be looked up before the wait, and collect replaces it.
        self._done.append((number, outcome))
        self._arrived.set()


class HttpWorker(Courier):
    """Asks OpenAI-compatible endpoints."""

    def __init__(self) -> None:
        super().__init__()
        self._clients: dict[str, ChatClient] = {}

    async def open(self, addresses: Mapping[str, Address]) -> None:
        """Connect.

        The keys come here as an argument of a call and not of the constructor: Ray keeps a constructor's arguments in the
        cluster's tables for as long as the actor lives, those of a call it does not.
        """
        for role, address in addresses.items():
            self._clients[role] = ChatClient(
                address.base_url,
                address.api_key,
                timeout_s=address.timeout_s,
                connections=address.connections,
            )

    async def answer(self, role: str, body: Body) -> Outcome:
        """One attempt over HTTP."""
        return await self._clients[role].attempt(body)


class Method(Protocol):
    """A method of an actor, as far as it is used here."""

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        """Call it."""
        ...


class Handle(Protocol):
    """A handle of an actor that is a :class:`Courier`."""

    open: Method
    submit: Method
    collect: Method


class _Link:
    """The driver's end of one worker."""

    def __init__(self) -> None:
        self.outbox: list[tuple[int, str, Body]] = []
        self.in_flight: dict[int, asyncio.Future[Outcome]] = {}
        self.handle: Handle | None = None
        self.sending = False


class Pool:
    """Workers of one sort, as an ``Attempt`` for :class:`tagpr.chat.asking.Asker`. Use it in one event loop.

    ``start`` makes an actor, ``opening`` is the argument of its ``open``. With ``sticky``, requests with the same prompt go to
    the same worker, which has the prompt in its prefix cache.
    """

    def __init__(
        self, name: str, start: Callable[[], Handle], size: int, opening: Any, *, sticky: bool = False
    ) -> None:
        self.name = name
        self.deaths = 0
        self._start = start
        self._opening = opening
        self._sticky: OrderedDict[int, int] | None = OrderedDict() if sticky else None
        self._links = [_Link() for _ in range(size)]
        self._tasks: list[asyncio.Task[None]] = []
        self._number = 0
        self._failure: BaseException | None = None

    async def __aenter__(self) -> "Pool":
        self._tasks = [asyncio.create_task(self._serve(link)) for link in self._links]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links:
            _kill(link.handle)

    def attempt(self, role: str) -> Callable[[Body], Coroutine[Any, Any, Outcome]]:
        """One attempt at a request of this role."""

        async def attempt(body: Body) -> Outcome:
            if self._failure is not None:
                self._raise()
            index = self._choose(body)
            link = self._links[index]
            self._number += 1
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            link.in_flight[self._number] = future
            link.outbox.append((self._number, role, body))
            if not link.sending:
                link.sending = True
                asyncio.get_running_loop().call_later(GATHER_S, self._send, link)
            return await future

        return attempt

    @property
    def in_flight(self) -> int:
        """Requests that are with a worker, or on their way."""
        return sum(len(link.in_flight) for link in self._links)

    def _choose(self, body: Body) -> int:
        least = min(range(len(self._links)), key=lambda index: len(self._links[index].in_flight))
        if self._sticky is None:
            return least
        prompt = hash(body["messages"][-1]["content"])
        chosen = self._sticky.pop(prompt, least)
        self._sticky[prompt] = chosen
        if len(self._sticky) > REMEMBERED_PROMPTS:
            self._sticky.popitem(last=False)
        return chosen

    def _send(self, link: _Link) -> None:
        if link.handle is None:
            # The new worker sends what is waiting as soon as it is open.
            return
        link.sending = False
        waiting = [entry for entry in link.outbox if entry[0] in link.in_flight]
        link.outbox.clear()
        if waiting:
            link.handle.submit.remote(pickle.dumps(waiting, protocol=5))

    async def _serve(self, link: _Link) -> None:
        """Keep a worker behind this link and bring its outcomes home."""
        from ray.exceptions import RayActorError, RayTaskError

        deaths = 0
        try:
            while True:
                handle = self._start()
                try:
                    await handle.open.remote(self._opening)
                    link.handle = handle
                    self._send(link)
                    while True:
                        for number, outcome in pickle.loads(await handle.collect.remote()):
                            deaths = 0
                            future = link.in_flight.pop(number, None)
                            if future is not None and not future.done():
                                future.set_result(outcome)
                except RayActorError:
                    deaths += 1
                    self.deaths += 1
                    link.handle = None
                    link.sending = True
                    _kill(handle)
                    lost = self._drop(link)
                    if deaths >= MOST_DEATHS:
                        raise StageError(
                            f"{self.name}: a worker has died {deaths} times in a row. See its log in Ray's session folder "
                            "(memory is the usual reason) and run again: what was answered is kept."
                        ) from None
                    logger.warning("a worker died with %d requests; another one takes over", lost)
                finally:
                    if link.handle is not handle:
                        _kill(handle)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - whoever waits for an outcome gets it
            # What a worker says on purpose is one line; Ray wraps it into its traceback.
            if isinstance(error, RayTaskError) and isinstance(error.cause, TagPRError):
                error = error.cause
            self._failure = error
            for each in self._links:
                for future in each.in_flight.values():
                    if not future.done():
                        future.set_exception(error)
                each.in_flight.clear()

    def _drop(self, link: _Link) -> int:
        """What the dead worker had is dropped; what was never sent waits for the next one."""
        unsent = {number for number, _, _ in link.outbox}
        lost = [number for number in link.in_flight if number not in unsent]
        for number in lost:
            future = link.in_flight.pop(number)
            if not future.done():
                future.set_result(DROPPED)
        return len(lost)

    def _raise(self) -> NoReturn:
        assert self._failure is not None
        raise self._failure


def _kill(handle: Any) -> None:
    import ray

    if handle is not None and ray.is_initialized():
        ray.kill(handle, no_restart=True)


def http_pool(name: str, size: int, addresses: Mapping[str, Address]) -> Pool:
    """Workers that ask over HTTP, spread over the cluster's nodes; each has its share of the connections."""
    import ray

    actor = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy="SPREAD")(HttpWorker)
    shares = {
        role: Address(
            address.base_url, address.api_key, address.timeout_s, max(1, -(-address.connections // size))
        )
        for role, address in addresses.items()
    }
    return Pool(name, actor.remote, size, shares)
