"""Client of the reward server: a score that can be trusted, or an error; never a default (S18, S21).

Transient faults (no connection, a time-out, 5xx, 429) are tried again, at another replica where there is one and
else with exponential back-off, until a deadline. Everything else fails at once: a refused request, a body that is not what
the server promises, a number that is not finite, a logit and a score that contradict each other, another checkpoint than
configured.

Responses of one user to one prompt go to the same replica, which has their prompt in its cache; a replica that does not answer
is avoided until its health check answers again.
"""

import asyncio
import hashlib
import logging
import math
import random
import time
from bisect import bisect_left
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import httpx
from pydantic import ValidationError

from tagpr.errors import RewardServerError
from tagpr.prmu.wire import (
    HEALTH_PATH,
    NOT_FINITE,
    OTHER_VERSION,
    SCORE_PATH,
    VERSION_PATH,
    ErrorBody,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    VersionInfo,
)
from tagpr.schema import PrmuScore

logger = logging.getLogger(__name__)

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
WAITING_LINE_EVERY_S = 10.0
# Server and client both compute sigmoid in double precision from the same decimal number.
SIGMOID_TOLERANCE = 1e-6
KEPT_LATENCIES = 10_000
# With a second replica to go to: how long an answer may take before the first one's health is asked for.
STALL_S = 2.0
HEALTH_TIMEOUT_S = 3.0
HEALTH_TRIES = 2
# How long replicas that do not answer hold up a start when another one answered.
START_GRACE_S = 10.0

LATENCY_BUCKETS_S = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Upper ends of the latency histogram's buckets; the last bucket has none."""


class ItemRefused(RewardServerError):
    """A request that was refused for good; ``item`` is the id of the item to blame, ``too_large`` says that fewer may do."""

    def __init__(self, message: str, item: str | None, too_large: bool = False) -> None:
        super().__init__(message)
        self.item = item
        self.too_large = too_large


class _Transient(Exception):
    """Worth another attempt; ``delay_s`` is what the server asked for, ``down`` says that this replica is to be avoided."""

    def __init__(self, reason: str, delay_s: float = 0.0, down: bool = True) -> None:
        super().__init__(reason)
        self.delay_s = delay_s
        self.down = down


class _Replica:
    """One server; ``up`` is what the last attempt or health check said."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.up = True
        self.reprobe: asyncio.Task[None] | None = None
        self.health: asyncio.Task[bool] | None = None


class _Waiting(NamedTuple):
    """An item whose request has not been sent yet."""

    item: ScoreItem
    score: "asyncio.Future[PrmuScore]"


def sigmoid(logit: float) -> float:
    """Eq. 3, without overflow for large negative logits."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)


class RewardClient:
    """Scores responses over HTTP from asynchronous code.

    Args:
        url: of the server, e.g. ``http://127.0.0.1:8200``; those of replicas with commas between them.
        token: bearer token; kept out of every message.
        expected_version: of the checkpoint, or several that are taken (for the time of an exchange); ``None`` accepts the
            first one seen and then insists on it.
        timeout_s: of one attempt, from sending to the last byte.
        deadline_s: of one ``score`` call, attempts, pauses and the wait for a free connection together.
        concurrency: requests in flight at most.
        gather_s: how long ``score_one`` waits for more items to send with its own.
        request_items: of one request of ``score_one``, at most.

    One client serves one event loop at a time; it moves by itself when the running loop is another one.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        expected_version: str | Sequence[str] | None,
        timeout_s: float = 60.0,
        deadline_s: float = 600.0,
        concurrency: int = 32,
        gather_s: float = 0.01,
        request_items: int = 64,
    ) -> None:
        urls = split_urls(url)
        self.url = ",".join(urls)
        self.versions = _versions(expected_version)
        self.latencies: list[float] = []
        self._replicas = [_Replica(each) for each in urls]
        self._token = token
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._concurrency = concurrency
        self._gather_s = gather_s
        self._request_items = request_items
        self._jitter = random.Random()  # not the global one: a training run's seed is not ours to use
        self._retries = 0
        self._failovers = 0
        self._requests = 0
        self._histogram = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._last_line = -math.inf
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(concurrency)
        self._waiting: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the pooled connections and end health checks; the client opens new ones if it is used again."""
        tasks: list[asyncio.Task[None] | asyncio.Task[bool]] = [*self._sending]
        for replica in self._replicas:
            tasks += [task for task in (replica.reprobe, replica.health) if task is not None]
            replica.reprobe = replica.health = None
            replica.up = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()
        self._http, self._loop = None, None

    async def score_one(self, item: ScoreItem) -> PrmuScore:
        """Score one response, in one request with what others ask for in the same ``gather_s``.

        Raises:
            RewardServerError: as :meth:`score`; a refused item does not harm those that were sent with it.
        """
        self._connections()
        loop = asyncio.get_running_loop()
        waiting = _Waiting(item, loop.create_future())
        self._waiting.append(waiting)
        if len(self._waiting) >= self._request_items * len(self._replicas):
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(self._gather_s, self._send)
        return await waiting.score

    async def score(self, items: Sequence[ScoreItem]) -> list[PrmuScore]:
        """Score responses in one request; the result is in the order of ``items``.

        Raises:
            RewardServerError: no trustworthy score within ``deadline_s``; the message names the server and
                the item to blame.
        """
        if not items:
            return []
        started = time.monotonic()
        http, slots = self._connections()
        order = self._ranked(items[0])
        tried: set[_Replica] = set()
        delay, attempts, reason = FIRST_DELAY_S, 0, "no free connection"
        while True:
            remaining = self._deadline_s - (time.monotonic() - started)
            pause = delay
            if remaining > 0:
                try:
                    async with asyncio.timeout(remaining), slots:
                        replica = _choose(order, tried)
                        attempts, reason = attempts + 1, "no answer"
                        return await self._attempt(http, replica, items)
                except _Transient as fault:
                    reason, pause = f"{replica.url}: {fault}", max(delay, fault.delay_s)
                    tried.add(replica)
                    if fault.down:
                        self._avoid(http, replica)
                    if any(other.up and other not in tried for other in order):
                        self._failovers += 1
                        continue
                    tried.clear()
                except TimeoutError:  # the deadline; one attempt's own time-out is a _Transient
                    pass
            waited = time.monotonic() - started
            # Jitter over the upper half, so that callers that failed together do not come back together.
            pause = pause * self._jitter.uniform(0.5, 1.0)
            if waited + pause >= self._deadline_s:
                raise RewardServerError(
                    f"{self.url}: no score for {_names(items)} after {waited:.1f} s and {attempts} attempts "
                    f"(last: {reason}). Start the reward server again: bash recipes/serve_prmu.sh"
                )
            self._retries += 1
            self._last_line = _say_waiting(self.url, reason, waited, self._last_line)
            await asyncio.sleep(pause)
            delay = min(delay * 2, MAX_DELAY_S)

    def pop_stats(self) -> dict[str, float]:
        """Latencies (s) of successful attempts, requests and retries since the last call; resets them.

        ``latency_le_<x>_s`` are counts of the histogram, each bucket for itself; ``inf`` is the last one.
        """
        ordered = sorted(self.latencies)
        stats = {
            "requests": float(self._requests),
            "retries": float(self._retries),
            "failovers": float(self._failovers),
        }
        if ordered:
            stats["latency_p50_s"] = ordered[len(ordered) // 2]
            stats["latency_p99_s"] = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
            stats["latency_max_s"] = ordered[-1]
        for end, count in zip((*LATENCY_BUCKETS_S, math.inf), self._histogram, strict=True):
            stats[f"latency_le_{end:g}_s"] = float(count)
        self.latencies, self._requests, self._retries, self._failovers = [], 0, 0, 0
        self._histogram = [0] * len(self._histogram)
        return stats

    def _connections(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._http is None or self._loop is not loop:
            # Connections and tasks of another loop cannot be ended from this one; they go with that loop.
            for replica in self._replicas:
                replica.up, replica.reprobe, replica.health = True, None, None
            self._waiting, self._timer, self._sending = [], None, set()
            # Health checks need connections of their own when all others wait for a server that hangs.
            most = self._concurrency + 2 * len(self._replicas)
            self._http = httpx.AsyncClient(
                headers=_headers(self._token),
                timeout=None,  # one attempt as a whole is timed in _attempt
                limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
                trust_env=False,  # a proxy from the environment must see neither profiles nor the token
            )
            self._slots = asyncio.Semaphore(self._concurrency)
            self._loop = loop
        return self._http, self._slots

    def _ranked(self, item: ScoreItem) -> list[_Replica]:
        """Replicas in the order in which this user's prompt goes to them; the loss of one moves only its own prompts."""
        if len(self._replicas) == 1:
            return self._replicas
        group = f"{item.user_id}\0{item.prompt}".encode("utf-8", "surrogatepass")
        return sorted(
            self._replicas, key=lambda each: hashlib.blake2b(group, key=each.url.encode()[-64:]).digest()
        )

    def _send(self) -> None:
        """Put what waits into requests, by replica, groups together."""
        if self._timer is not None:
            self._timer.cancel()
        waiting, self._waiting, self._timer = self._waiting, [], None
        by_replica: dict[str, dict[tuple[str, str], list[_Waiting]]] = {}
        for one in waiting:
            groups = by_replica.setdefault(self._ranked(one.item)[0].url, {})
            groups.setdefault((one.item.user_id, one.item.prompt), []).append(one)
        for groups in by_replica.values():
            request: list[_Waiting] = []
            for group in groups.values():
                if request and len(request) + len(group) > self._request_items:
                    self._start(request)
                    request = []
                request += group
            self._start(request)

    def _start(self, request: list[_Waiting]) -> None:
        task = asyncio.get_running_loop().create_task(self._deliver(request))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _deliver(self, request: Sequence[_Waiting]) -> None:
        """Score what others wait for; where one item is refused, the others are asked for again without it."""
        request = [one for one in request if not one.score.done()]
        try:
            scores = await self.score([one.item for one in request])
        except ItemRefused as refused:
            blamed = [one for one in request if one.item.id == refused.item]
            if len(request) == 1:
                request[0].score.set_exception(refused)
            elif blamed and len(blamed) < len(request):
                others = [one for one in request if one.item.id != refused.item]
                await asyncio.gather(self._deliver(others), *(self._deliver([one]) for one in blamed))
            elif blamed or refused.too_large:
                half = len(request) // 2
                await asyncio.gather(self._deliver(request[:half]), self._deliver(request[half:]))
            else:
                _fail(request, refused)
        except RewardServerError as error:
            _fail(request, error)
        except asyncio.CancelledError:
            for one in request:
                one.score.cancel()
            raise
        except Exception as error:  # a bug; those who wait must not wait for ever
            _fail(request, error)
            raise
        else:
            for one, score in zip(request, scores, strict=True):
                if not one.score.done():
                    one.score.set_result(score)

    async def _attempt(
        self, http: httpx.AsyncClient, replica: _Replica, items: Sequence[ScoreItem]
    ) -> list[PrmuScore]:
        began = time.monotonic()
        versions = None if self.versions is None else list(self.versions)
        body = ScoreRequest(items=list(items), versions=versions).model_dump_json().encode()
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._post(http, replica, body)
        except TimeoutError:
            raise _Transient(f"no answer within {self._timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise _Transient(f"{type(error).__name__}: {error}".rstrip(": ")) from None
        except httpx.HTTPError as error:
            raise RewardServerError(f"{replica.url}: {type(error).__name__}. Check the url.") from None
        _refuse(replica.url, answer, _names(items))
        scores = self._checked(replica.url, answer.content, items)
        self._requests += 1
        took = time.monotonic() - began
        self._histogram[bisect_left(LATENCY_BUCKETS_S, took)] += 1
        if len(self.latencies) < KEPT_LATENCIES:
            self.latencies.append(took)
        return scores

    async def _post(self, http: httpx.AsyncClient, replica: _Replica, body: bytes) -> httpx.Response:
        """Send; with another replica to go to, give up as soon as this one's health check stays unanswered."""
        headers = {"content-type": "application/json"}
        post = asyncio.ensure_future(http.post(replica.url + SCORE_PATH, content=body, headers=headers))
        try:
            while True:
                await asyncio.wait({post}, timeout=STALL_S if len(self._replicas) > 1 else None)
                if post.done():
                    return post.result()
                if replica.health is None or replica.health.done():
                    replica.health = asyncio.ensure_future(_healthy(http, replica.url, HEALTH_TRIES))
                if not await asyncio.shield(replica.health) and not post.done():
                    raise _Transient(f"unhealthy, no answer for {STALL_S:g} s")
        finally:
            if not post.done():
                post.cancel()
                # Its own error, should it end with one, is no news any more.
                await asyncio.gather(post, return_exceptions=True)

    def _avoid(self, http: httpx.AsyncClient, replica: _Replica) -> None:
        """Take a replica out of use until its health check answers; the only one there is stays in use."""
        if len(self._replicas) == 1 or not replica.up:
            return
        replica.up = False
        logger.warning("reward server %s does not answer, using the others", replica.url)

        async def until_healthy() -> None:
            pause = FIRST_DELAY_S
            while not await _healthy(http, replica.url, 1):
                await asyncio.sleep(pause)
                pause = min(pause * 2, MAX_DELAY_S)
            replica.up = True
            logger.warning("reward server %s answers again", replica.url)

        replica.reprobe = asyncio.ensure_future(until_healthy())

    def _checked(self, url: str, content: bytes, items: Sequence[ScoreItem]) -> list[PrmuScore]:
        try:
            answer = ScoreResponse.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = _blamed(first["loc"], items) or _names(items)
            raise RewardServerError(
                f"{url}: its answer for {place} is not a valid score ({first['msg']}). "
                "Check that a reward server of this version listens there."
            ) from None
        self.versions = _check_version(url, answer.model_version, self.versions)
        if [score.id for score in answer.scores] != [item.id for item in items]:
            raise RewardServerError(
                f"{url}: answered {len(answer.scores)} scores, not one for each of {_names(items)} "
                "in order. Check that a reward server of this version listens there."
            )
        for score in answer.scores:
            if abs(score.score - sigmoid(score.logit)) > SIGMOID_TOLERANCE:
                raise RewardServerError(
                    f"{url}: item {score.id}: score {score.score:.6g} is not sigmoid of "
                    f"logit {score.logit:.6g}. Check that a reward server of this version listens there."
                )
        return [
            PrmuScore(logit=s.logit, score=s.score, unknown_user=s.unknown_user, version=answer.model_version)
            for s in answer.scores
        ]


def split_urls(url: str) -> list[str]:
    """Addresses of replicas, given with commas between them.

    Raises:
        RewardServerError: there is none, or one twice.
    """
    urls = [part.strip().rstrip("/") for part in url.split(",") if part.strip()]
    if not urls or len(set(urls)) < len(urls):
        raise RewardServerError(
            f"prmu_client.url={url}: {'an address is in it twice' if urls else 'is empty'}. "
            "Give the address of each reward server once, with commas between them."
        )
    return urls


def check_server(
    url: str, token: str | None, expected_version: str | Sequence[str] | None, deadline_s: float = 120.0
) -> VersionInfo:
    """Wait until a reward server answers, and make sure that all replicas are the right ones (for a stage's start).

    A replica that cannot be reached is no fault as long as another one answers; clients check whatever it sends later.

    Raises:
        RewardServerError: no answer within ``deadline_s``, a refused token, or another checkpoint, at any of them.
    """
    pending, reason = split_urls(url), ""
    found: VersionInfo | None = None
    versions = _versions(expected_version)
    started, last_line, delay = time.monotonic(), -math.inf, FIRST_DELAY_S
    with httpx.Client(
        headers=_headers(token), timeout=min(10.0, max(deadline_s, 0.1)), trust_env=False
    ) as http:
        while True:
            for each in list(pending):
                try:
                    answer = http.get(each + VERSION_PATH)
                    _refuse(each, answer, "/version")
                except (_Transient, httpx.TransportError) as fault:
                    reason = str(fault) or type(fault).__name__
                    continue
                except httpx.HTTPError as error:
                    raise RewardServerError(f"{each}: {type(error).__name__}. Check the url.") from None
                info = _version_info(each, answer.content)
                versions = _check_version(each, info.model_version, versions)
                found = found or info
                pending.remove(each)
            waited = time.monotonic() - started
            if found is not None and (not pending or waited >= min(START_GRACE_S, deadline_s / 2)):
                for each in pending:
                    logger.warning("no reward server at %s (%s), going on with the others", each, reason)
                return found
            if waited + delay >= deadline_s:
                raise RewardServerError(
                    f"{','.join(pending)}: no reward server after {waited:.1f} s (last: {reason}). "
                    "Start it: bash recipes/serve_prmu.sh"
                )
            last_line = _say_waiting(",".join(pending), reason, waited, last_line)
            time.sleep(delay)
            delay = min(delay * 2, 1.0)


def best_of_n(scores: Sequence[PrmuScore]) -> int:
    """Place of the response with the highest logit, the first of equals (best-of-n sampling).

    Raises:
        ValueError: there are none, or they come from different checkpoints, whose scores cannot be compared.
    """
    if len({score.version for score in scores}) != 1:
        raise ValueError("scores of no checkpoint, or of more than one")
    return max(range(len(scores)), key=lambda place: scores[place].logit)


def _version_info(url: str, content: bytes) -> VersionInfo:
    try:
        return VersionInfo.model_validate_json(content)
    except ValidationError:
        raise RewardServerError(f"{url}: is not a reward server of this version. Check the url.") from None


async def _healthy(http: httpx.AsyncClient, url: str, tries: int) -> bool:
    for _ in range(tries):
        try:
            if (await http.get(url + HEALTH_PATH, timeout=HEALTH_TIMEOUT_S)).status_code == 200:
                return True
        except httpx.HTTPError:
            continue
    return False


def _choose(order: Sequence[_Replica], tried: set[_Replica]) -> _Replica:
    """The first that is up and not tried in this round; with none, the first not tried: it may be back."""
    return next(
        (each for each in order if each.up and each not in tried),
        next((each for each in order if each not in tried), order[0]),
    )


def _fail(request: Sequence[_Waiting], error: Exception) -> None:
    for one in request:
        if not one.score.done():
            one.score.set_exception(error)


def _versions(expected: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return None if expected is None else (expected,) if isinstance(expected, str) else tuple(expected)


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


def _refuse(url: str, answer: httpx.Response, what: str) -> None:
    """Sort an answer that is no 200: raise ``_Transient`` or ``RewardServerError``."""
    status = answer.status_code
    if status == 200:
        return
    try:
        error = ErrorBody.model_validate_json(answer.content)
    except ValidationError:
        error = ErrorBody(code="", message=answer.reason_phrase or "no reason given")
    if status == 429 or (status >= 500 and error.code != NOT_FINITE):
        raise _Transient(f"HTTP {status}: {error.message}", _retry_after_s(answer), down=status != 429)
    if status == 401:
        raise RewardServerError(
            f"{url}: refused the token (HTTP 401). Give the client the server's token file."
        )
    if error.code == OTHER_VERSION:
        raise RewardServerError(
            f"{url}: {error.message}. Serve the configured checkpoint (paths.prmu), or add the served one to "
            "prmu_client.also_versions."
        )
    blamed = what if error.item is None else f"item {error.item}"
    raise ItemRefused(
        f"{url}: refused {blamed} (HTTP {status}): {error.message}", error.item, too_large=status == 413
    )


def _retry_after_s(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "")
    return min(float(text), MAX_DELAY_S) if text.isdecimal() else 0.0


def _check_version(url: str, served: str, expected: tuple[str, ...] | None) -> tuple[str, ...]:
    """What to insist on from now on."""
    if expected is None:
        return (served,)
    if served not in expected:
        raise RewardServerError(
            f"{url}: serves PRMU {served}, expected {' or '.join(expected)}. "
            "Serve the configured checkpoint (paths.prmu)."
        )
    return expected


def _names(items: Sequence[ScoreItem]) -> str:
    shown = ", ".join(item.id for item in items[:3])
    return f"item {shown}" if len(items) == 1 else f"items {shown}" + (", ..." if len(items) > 3 else "")


def _blamed(location: tuple[int | str, ...], items: Sequence[ScoreItem]) -> str:
    """Item that a validation error in ``("scores", index, field)`` points to, or an empty string."""
    if len(location) < 2 or location[0] != "scores" or not isinstance(location[1], int):
        return ""
    return f"item {items[location[1]].id}" if location[1] < len(items) else ""


def _say_waiting(url: str, reason: str, waited_s: float, last_line: float) -> float:
    """Log at most every 10 s that the server is awaited; returns when the last line was written."""
    now = time.monotonic()
    if now - last_line < WAITING_LINE_EVERY_S:
        return last_line
    logger.warning("waiting for reward server at %s since %.0f s (%s)", url, waited_s, reason)
    return now
