"""Asking a model: the ``openai`` client with retries, bounded concurrency, and the ledger in front of it."""

import asyncio
import hashlib
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import openai
from pydantic import BaseModel, Field, ValidationError

from data_pipeline.ledger import Ledger, Reply
from data_pipeline.settings import ModelSettings
from tagpr.errors import ConfigError, StageError, TagPRError

logger = logging.getLogger(__name__)
for _chatty in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
    # A line per request is a flood; the openai client has changed its HTTP library between versions.
    logging.getLogger(_chatty).setLevel(logging.WARNING)

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
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


class _Message(BaseModel):
    content: str | None = None
    # Servers with a reasoning parser put the chain beside the content, under one of two names.
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    """What we read of a chat completion; anything else in it is ignored."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class Endpoint:
    """One model. :meth:`ask` answers from the ledger where it can and pays where it must.

    ``key`` is the configuration node that errors name, e.g. ``chains.judge``. The API key is given to the client and
    kept nowhere else.
    """

    def __init__(
        self,
        key: str,
        settings: ModelSettings,
        ledger: Ledger,
        seed: int,
        retries: int,
        base_url: str,
        api_key: str,
    ) -> None:
        self.key = key
        self.settings = settings
        self.base_url = base_url
        self.counts: Counter[str] = Counter()
        self._ledger = ledger
        self._seed = seed
        self._retries = retries
        self._in_flight: dict[str, asyncio.Future[Reply]] = {}
        # Retries are ours: they are counted, and Retry-After has a limit.
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, max_retries=0, timeout=settings.timeout_s
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(self, unit: Unit) -> Reply:
        """The reply to one unit; equal units asked at the same time are one unit.

        Raises:
            StageError: the endpoint refuses the key, is not there, or goes on failing; naming key and remedy.
        """
        parameters = self._parameters(unit)
        key = _unit_key(self.settings, unit, parameters)
        known = self._ledger.get(key)
        if known is not None:
            self.counts["from_ledger"] += 1
            return known
        if key in self._in_flight:
            return await asyncio.shield(self._in_flight[key])
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = future
        try:
            reply = await self._request(unit.prompt, parameters)
            self.counts["asked"] += 1
            self.counts["prompt_tokens"] += reply.prompt_tokens
            self.counts["completion_tokens"] += reply.completion_tokens
            noted = {**parameters, "sample": unit.sample, "rollout": unit.rollout, "attempt": unit.attempt}
            self._ledger.record(key, unit.kind, self.settings.model, noted, reply)
            # Everything that arrived in this round of the event loop is one commit.
            await asyncio.sleep(0)
            self._ledger.commit()
            future.set_result(reply)
            return reply
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

    async def _request(self, prompt: str, parameters: dict[str, Any]) -> Reply:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}],
            **parameters,
        }
        for failures in range(self._retries + 1):
            try:
                # The client's typed call spends as long on conversions as on everything else; this one skips them.
                completion = await self._client.post("/chat/completions", cast_to=object, body=body)
                return self._read(completion)
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                self._refused(error)
            except openai.RateLimitError as error:
                if error.code == "insufficient_quota":
                    raise StageError(
                        f"{self.key}: the account's quota at {self.base_url} is used up. Raise it and run again."
                    ) from None
                what, wait = "429", _retry_after(error.response.headers)
            except openai.APIConnectionError as error:  # timeouts are among these
                what, wait = "timeout" if isinstance(error, openai.APITimeoutError) else "unreachable", None
            except openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in (408, 409):
                    raise StageError(
                        f"{self.key}: {self.base_url} refuses the request with status {error.status_code} "
                        f"({error.code or type(error).__name__}). Check model and parameters in this node."
                    ) from None
                what, wait = str(error.status_code), _retry_after(error.response.headers)
            self.counts[f"retried_{what}"] += 1
            if failures < self._retries:
                backoff = FIRST_WAIT_S * 2**failures * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(backoff if wait is None else wait, LONGEST_WAIT_S))
        raise StageError(
            f"{self.key}.base_url={self.base_url}: no answer after {self._retries + 1} tries (the last: {what}). "
            "Check that the endpoint is up and run again: what was answered is kept."
        )

    def _read(self, answer: object) -> Reply:
        try:
            completion = _Completion.model_validate(answer)
        except ValidationError as error:
            # The client hands through whatever has status 200: a proxy's HTML page, say.
            raise StageError(
                f"{self.key}.base_url={self.base_url}: its answer is no chat completion. "
                "Point it to an OpenAI-compatible endpoint (the URL often ends in /v1)."
            ) from error
        choice, usage = completion.choices[0], completion.usage or _Usage()
        return Reply(
            text=choice.message.content or "",
            reasoning=choice.message.reasoning_content or choice.message.reasoning,
            finish_reason=choice.finish_reason or "",
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )

    def _refused(self, error: openai.APIStatusError) -> NoReturn:
        raise StageError(
            f"{self.key}: {self.base_url} refuses the key in {self.settings.key_variable} "
            f"(status {error.status_code}). Put a valid key there and run again."
        ) from None


def read_key(node: str, variable: str) -> str:
    """The API key from the environment.

    Raises:
        ConfigError: the variable is not set.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"{node}.key_variable={variable}: this environment variable is not set. Put the API key there."
        )
    return value


async def for_each(
    label: str, items: Sequence[Item], work: Callable[[Item], Awaitable[Result]], concurrency: int
) -> list[Result]:
    """Results in the order of ``items``, at most ``concurrency`` at a time; a line of progress every few seconds.

    The first error stops all others and is raised as it is.
    """
    results: dict[int, Result] = {}
    queue = iter(enumerate(items))
    started = reported = time.monotonic()

    async def worker() -> None:
        nonlocal reported
        for index, item in queue:
            results[index] = await work(item)
            now = time.monotonic()
            if now - reported > PROGRESS_S:
                reported = now
                logger.info(
                    "%s: %d of %d (%.0f/s)", label, len(results), len(items), len(results) / (now - started)
                )

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(items))):
                group.create_task(worker())
    except* TagPRError as errors:
        raise errors.exceptions[0] from None
    took = time.monotonic() - started
    logger.info("%s: %d done in %.1f s (%.0f/s)", label, len(items), took, len(items) / max(took, 1e-9))
    return [results[index] for index in range(len(items))]


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


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, None if it does not say so in numbers."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * scale
        except (KeyError, ValueError):
            continue
        if 0.0 <= seconds < float("inf"):
            return seconds
    return None
