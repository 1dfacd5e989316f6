"""One HTTP attempt at an OpenAI-compatible endpoint, told as a value: whatever goes wrong is an :class:`Outcome`.

Retrying, pacing and spending are decided elsewhere (:mod:`tagpr.chat.asking`), possibly in another process: everything here
that is returned can be pickled, and none of it holds the key.
"""

import asyncio
import email.utils
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import aiohttp
import openai
from pydantic import BaseModel, Field, ValidationError

for _chatty in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
    # A line per request is a flood; the openai client has changed its HTTP library between versions.
    logging.getLogger(_chatty).setLevel(logging.WARNING)

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


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


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
    )


class ChatClient:
    """Connections to one endpoint. The key goes into the openai client and nowhere else; this object is not picklable."""

    def __init__(self, base_url: str, api_key: str, *, timeout_s: float, connections: int) -> None:
        self.base_url = base_url
        self._timeout_s = timeout_s
        self._hidden = api_key
        # Retries are not ours: the caller counts them, paces them and may have to pay for them.
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key,
            max_retries=0,
            http_client=openai.DefaultAioHttpClient(
                # The whole attempt has one clock (see `attempt`); a connection that cannot be made fails sooner.
                timeout=openai.Timeout(None, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
                limits=_limits(connections),
            ),
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ChatClient holds a key: make one where it is used instead of sending it")

    async def attempt(self, body: Mapping[str, Any]) -> Outcome:
        """POST one chat completion, once. Raises nothing that the server or the network can cause."""
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.post("/chat/completions", cast_to=object, body=body)
        except TimeoutError:
            return Outcome(None, "timeout", code="timeout")
        except openai.APIStatusError as error:
            return self._from_status(error.status_code, error.response.headers, error.body)
        except openai.APIConnectionError as error:
            return _from_connection(error)
        except (aiohttp.ClientError, OSError) as error:  # what the transport does not translate
            return Outcome(None, "unreachable", code=type(error).__name__)
        except ValueError:  # JSON that ends too early, or is none
            return Outcome(None, "server_error", 200, "broken_json")
        reply = read_completion(response)
        if reply is not None:
            return Outcome(reply, status=200)
        if isinstance(response, dict) and isinstance(response.get("error"), dict):
            # Some gateways wrap the upstream's failure in a 200.
            status = response["error"].get("code")
            if isinstance(status, int) and 400 <= status < 600:
                return self._from_status(status, {}, response["error"])
        return Outcome(None, "no_completion", 200, "no_completion")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

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


def _limits(connections: int) -> Any:
    import httpx2

    return httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)


def _from_connection(error: openai.APIConnectionError) -> Outcome:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    # The transport calls a connection that the server dropped a timeout.
    if any(
        isinstance(cause, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError) for cause in causes
    ):
        return Outcome(None, "unreachable", code="dropped")
    if isinstance(error, openai.APITimeoutError):
        return Outcome(None, "timeout", code="timeout")
    return Outcome(None, "unreachable", code=type(causes[-1]).__name__)


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
