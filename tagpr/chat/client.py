"""One HTTP attempt at an OpenAI-compatible endpoint, told as a value: whatever goes wrong is an :class:`Outcome`.

Retrying, pacing and spending are decided elsewhere (:mod:`tagpr.chat.asking`), possibly in another process: everything here
that is returned can be pickled, and none of it holds the key.
"""

import email.utils
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import aiohttp
from pydantic import BaseModel, Field, ValidationError

from tagpr.errors import ConfigError

LONGEST_MESSAGE = 200
CONNECT_TIMEOUT_S = 20.0
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered; token counts as the endpoint reported them (0: not reported).

    ``cached_prompt_tokens`` is the part of ``prompt_tokens`` that the provider's prompt cache served. A structured-output
    refusal is ``finish_reason="refusal"`` with an empty text.
    """

    text: str
    reasoning: str | None
    finish_reason: str
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int | None = None
    """Part of ``completion_tokens``, where the endpoint reports it: reasoning that it may not show."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one attempt: a reply, or a ``failure``.

    ``failure`` is empty, or one of rate_limited, server_error, timeout, unreachable, refused_key, no_quota, bad_request,
    no_completion. ``status`` is the HTTP status where there was one, ``code`` the server's or our own short name for what
    happened, ``message`` one short line from the server without the key in it.
    """

    reply: Reply | None
    failure: str = ""
    status: int | None = None
    code: str = ""
    retry_after_s: float | None = None
    message: str = ""


class _Message(BaseModel):
    content: str | None = None
    # Servers with a reasoning parser put the chain beside the content, under one of two names.
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None


class _CompletionDetails(BaseModel):
    reasoning_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Completion(BaseModel):
    """What we read of a chat completion; anything else in it is ignored."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def read_completion(answer: object) -> Reply | None:
    """The reply in a decoded chat completion, None where it is none."""
    try:
        completion = _Completion.model_validate(answer)
    except ValidationError:
        return None
    choice, usage = completion.choices[0], completion.usage or _Usage()
    message, details = choice.message, usage.prompt_tokens_details
    refused = message.refusal is not None and not message.content
    return Reply(
        text=message.content or "",
        reasoning=message.reasoning_content or message.reasoning,
        finish_reason="refusal" if refused else choice.finish_reason or "",
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=(details.cached_tokens or 0) if details else 0,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.completion_tokens_details.reasoning_tokens
        if usage.completion_tokens_details
        else None,
    )


class ChatClient:
    """Connections to one endpoint, for one event loop. It holds the key, shows it nowhere, and cannot be pickled.

    Requests go through aiohttp itself: per request the openai client costs three times the CPU time, and so much that it
    cannot keep 256 requests of 200 ms under way (``tests/perf/pipeline.py``). The wire format is the same.

    Raises:
        ConfigError: the key has characters that no HTTP header can carry.
    """

    def __init__(self, base_url: str, api_key: str, *, timeout_s: float, connections: int) -> None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError(
                f"{base_url}: the API key has characters that no HTTP header can carry. Look at its variable."
            )
        self.base_url = base_url
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._hidden = api_key
        self._connections = connections
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_TIMEOUT_S, timeout_s))
        self._session: aiohttp.ClientSession | None = None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ChatClient holds a key: make one where it is used instead of sending it")

    async def attempt(self, body: Mapping[str, Any]) -> Outcome:
        """POST one chat completion, once. Raises nothing that the server or the network can cause."""
        data = json.dumps(body, ensure_ascii=False).encode()
        session = self._session or self._open()
        try:
            async with session.post(self._url, data=data, allow_redirects=False) as response:
                raw = await response.read()
                return self._read(response.status, response.headers, raw)
        except aiohttp.ConnectionTimeoutError:
            return Outcome(None, "unreachable", code="connect_timeout")
        except TimeoutError:
            return Outcome(None, "timeout", code="timeout")
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, aiohttp.ClientOSError) as error:
            # Before a connection there is nothing that the server could have worked on.
            connecting = isinstance(error, aiohttp.ClientConnectorError)
            return Outcome(None, "unreachable", code=type(error).__name__ if connecting else "dropped")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Outcome(None, "unreachable", code=type(error).__name__)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        headers = {"content-type": "application/json", "accept": "application/json"}
        if self._hidden:
            headers["authorization"] = f"Bearer {self._hidden}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections),
            headers=headers,
            timeout=self._timeout,
            # Looked up once; aiohttp's own trust_env does it for every request, and doubles what one costs.
            proxy=_proxy(self._url),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self._session

    def _read(self, status: int, headers: Mapping[str, str], raw: bytes) -> Outcome:
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            answer = None
        if status != 200:
            return self._from_status(status, headers, answer)
        reply = read_completion(answer)
        if reply is not None:
            return Outcome(reply, status=200)
        if answer is None and headers.get("content-type", "").startswith("application/json"):
            # It meant to be one, and broke off.
            return Outcome(None, "server_error", 200, "broken_json")
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            # Some gateways wrap the upstream's failure in a 200.
            inside = answer["error"].get("code")
            if isinstance(inside, int) and 400 <= inside < 600:
                return self._from_status(inside, headers, answer)
        return Outcome(None, "no_completion", 200, "no_completion")

    def _from_status(self, status: int, headers: Mapping[str, str], body: object) -> Outcome:
        error = body if isinstance(body, dict) else {}
        error = error["error"] if isinstance(error.get("error"), dict) else error
        code = self._clean(error.get("code") or error.get("type") or "")
        message = self._clean(error.get("message") or "")
        wait = retry_after_s(headers)
        if status in (401, 403):
            failure = "refused_key"
        elif status == 402 or (status == 429 and code in _QUOTA_CODES):
            failure = "no_quota"
        elif status == 429:
            failure = "rate_limited"
        elif status >= 500 or status in (408, 409, 425):
            failure = "server_error"
        else:
            failure = "bad_request"
        return Outcome(None, failure, status, code, wait, message)

    def _clean(self, text: object) -> str:
        """One short line without control characters and without the key, whatever a server echoes."""
        line = _CONTROL.sub(" ", str(text)).replace(self._hidden, "***") if self._hidden else str(text)
        return line[:LONGEST_MESSAGE].strip()


def _proxy(url: str) -> str | None:
    """The proxy that the environment (``https_proxy``, ``no_proxy``, ...) sets for this URL."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait (retry-after-ms, or retry-after as seconds or as a date); None: it does not say."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * scale
        except (KeyError, ValueError):
            continue
        if 0.0 <= seconds < float("inf"):
            return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return None
