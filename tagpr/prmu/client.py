"""Client of the reward server: a score that can be trusted, or an error; never a default (S18, S21).

Transient faults (no connection, a time-out, 5xx, 429) are tried again with exponential back-off until a
deadline. Everything else fails at once: a refused request, a body that is not what the server promises, a
number that is not finite, a logit and a score that contradict each other, another checkpoint than configured.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx
from pydantic import ValidationError

from tagpr.errors import RewardServerError
from tagpr.prmu.wire import (
    NOT_FINITE,
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


class _Transient(Exception):
    """Worth another attempt; ``delay_s`` is what the server asked for."""

    def __init__(self, reason: str, delay_s: float = 0.0) -> None:
        super().__init__(reason)
        self.delay_s = delay_s


def sigmoid(logit: float) -> float:
    """Eq. 3, without overflow for large negative logits."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)


class RewardClient:
    """Scores responses over HTTP from asynchronous code.

    Args:
        url: of the server, e.g. ``http://127.0.0.1:8200``.
        token: bearer token; kept out of every message.
        expected_version: of the checkpoint; ``None`` accepts the first one seen and then insists on it.
        timeout_s: of one attempt, from sending to the last byte.
        deadline_s: of one ``score`` call, attempts, pauses and the wait for a free connection together.
        concurrency: requests in flight at most.

    One client serves one event loop at a time; it moves by itself when the running loop is another one.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        expected_version: str | None,
        timeout_s: float = 60.0,
        deadline_s: float = 600.0,
        concurrency: int = 32,
    ) -> None:
        self.url = url.rstrip("/")
        self.expected_version = expected_version
        self.latencies: list[float] = []
        self._token = token
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._concurrency = concurrency
        self._jitter = random.Random()  # not the global one: a training run's seed is not ours to use
        self._retries = 0
        self._requests = 0
        self._last_line = -math.inf
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(concurrency)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the pooled connections; the client opens new ones if it is used again."""
        if self._http is not None:
            await self._http.aclose()
        self._http, self._loop = None, None

    async def score(self, items: Sequence[ScoreItem]) -> list[PrmuScore]:
        """Score responses in one request; the result is in the order of ``items``.

        Raises:
            RewardServerError: no trustworthy score within ``deadline_s``; the message names the server and
                the item to blame.
        """
        if not items:
            return []
        started = time.monotonic()
        body = ScoreRequest(items=list(items)).model_dump_json().encode()
        http, slots = self._connections()
        delay, attempts, reason = FIRST_DELAY_S, 0, "no free connection"
        while True:
            remaining = self._deadline_s - (time.monotonic() - started)
            if remaining > 0:
                pause = delay
                try:
                    async with asyncio.timeout(remaining), slots:
                        attempts, reason = attempts + 1, "no answer"
                        return await self._attempt(http, items, body)
                except _Transient as fault:
                    reason, pause = str(fault), max(delay, fault.delay_s)
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
        """Latencies (s) of successful attempts, requests and retries since the last call; resets them."""
        ordered = sorted(self.latencies)
        stats = {"requests": float(self._requests), "retries": float(self._retries)}
        if ordered:
            stats["latency_p50_s"] = ordered[len(ordered) // 2]
            stats["latency_p99_s"] = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
            stats["latency_max_s"] = ordered[-1]
        self.latencies, self._requests, self._retries = [], 0, 0
        return stats

    def _connections(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._http is None or self._loop is not loop:
            # Connections of another loop cannot be closed from this one; they go with that loop.
            self._http = httpx.AsyncClient(
                headers=_headers(self._token),
                timeout=None,  # one attempt as a whole is timed in _attempt
                limits=httpx.Limits(
                    max_connections=self._concurrency, max_keepalive_connections=self._concurrency
                ),
                trust_env=False,  # a proxy from the environment must see neither profiles nor the token
            )
            self._slots = asyncio.Semaphore(self._concurrency)
            self._loop = loop
        return self._http, self._slots

    async def _attempt(
        self, http: httpx.AsyncClient, items: Sequence[ScoreItem], body: bytes
    ) -> list[PrmuScore]:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await http.post(
                    self.url + SCORE_PATH, content=body, headers={"content-type": "application/json"}
                )
        except TimeoutError:
            raise _Transient(f"no answer within {self._timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise _Transient(f"{type(error).__name__}: {error}".rstrip(": ")) from None
        except httpx.HTTPError as error:
            raise RewardServerError(f"{self.url}: {type(error).__name__}. Check the url.") from None
        _refuse(self.url, answer, _names(items))
        scores = self._checked(answer.content, items)
        self._requests += 1
        if len(self.latencies) < KEPT_LATENCIES:
            self.latencies.append(time.monotonic() - began)
        return scores

    def _checked(self, content: bytes, items: Sequence[ScoreItem]) -> list[PrmuScore]:
        try:
            answer = ScoreResponse.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = _blamed(first["loc"], items) or _names(items)
            raise RewardServerError(
                f"{self.url}: its answer for {place} is not a valid score ({first['msg']}). "
                "Check that a reward server of this version listens there."
            ) from None
        self.expected_version = _check_version(self.url, answer.model_version, self.expected_version)
        if [score.id for score in answer.scores] != [item.id for item in items]:
            raise RewardServerError(
                f"{self.url}: answered {len(answer.scores)} scores, not one for each of {_names(items)} "
                "in order. Check that a reward server of this version listens there."
            )
        for score in answer.scores:
            if abs(score.score - sigmoid(score.logit)) > SIGMOID_TOLERANCE:
                raise RewardServerError(
                    f"{self.url}: item {score.id}: score {score.score:.6g} is not sigmoid of "
                    f"logit {score.logit:.6g}. Check that a reward server of this version listens there."
                )
        return [
            PrmuScore(logit=s.logit, score=s.score, unknown_user=s.unknown_user, version=answer.model_version)
            for s in answer.scores
        ]


def check_server(
    url: str, token: str | None, expected_version: str | None, deadline_s: float = 120.0
) -> VersionInfo:
    """Wait until a reward server answers, and make sure that it is the right one (for a stage's start).

    Raises:
        RewardServerError: no answer within ``deadline_s``, a refused token, or another checkpoint.
    """
    url = url.rstrip("/")
    started, last_line, delay = time.monotonic(), -math.inf, FIRST_DELAY_S
    with httpx.Client(
        headers=_headers(token), timeout=min(10.0, max(deadline_s, 0.1)), trust_env=False
    ) as http:
        while True:
            try:
                answer = http.get(url + VERSION_PATH)
                _refuse(url, answer, "/version")
                break
            except (_Transient, httpx.TransportError) as fault:
                reason = str(fault) or type(fault).__name__
            except httpx.HTTPError as error:
                raise RewardServerError(f"{url}: {type(error).__name__}. Check the url.") from None
            waited = time.monotonic() - started
            if waited + delay >= deadline_s:
                raise RewardServerError(
                    f"{url}: no reward server after {waited:.1f} s (last: {reason}). "
                    "Start it: bash recipes/serve_prmu.sh"
                )
            last_line = _say_waiting(url, reason, waited, last_line)
            time.sleep(delay)
            delay = min(delay * 2, 1.0)
    try:
        info = VersionInfo.model_validate_json(answer.content)
    except ValidationError:
        raise RewardServerError(f"{url}: is not a reward server of this version. Check the url.") from None
    _check_version(url, info.model_version, expected_version)
    return info


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
        raise _Transient(f"HTTP {status}: {error.message}", _retry_after_s(answer))
    if status == 401:
        raise RewardServerError(
            f"{url}: refused the token (HTTP 401). Give the client the server's token file."
        )
    blamed = what if error.item is None else f"item {error.item}"
    raise RewardServerError(f"{url}: refused {blamed} (HTTP {status}): {error.message}")


def _retry_after_s(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "")
    return min(float(text), MAX_DELAY_S) if text.isdecimal() else 0.0


def _check_version(url: str, served: str, expected: str | None) -> str:
    if expected is not None and served != expected:
        raise RewardServerError(
            f"{url}: serves PRMU {served}, expected {expected}. Serve the configured checkpoint (paths.prmu)."
        )
    return served


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
