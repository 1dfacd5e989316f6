"""Any OpenAI-compatible endpoint as an engine: GPT-4o, Gemini, DeepSeek, a served Qwen3-235B (S34)."""

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from tagpr.chat.asking import Asker, RequestRefusedError
from tagpr.chat.client import ChatClient, Outcome, Reply
from tagpr.chat.limits import AdaptiveLimit
from tagpr.errors import ConfigError, StageError
from tagpr.evaluation.engines import Completion, Completions, Request, Sampling
from tagpr.evaluation.methods import Method
from tagpr.evaluation.prompts import PromptSettings
from tagpr.tags import THINK_CLOSE, THINK_OPEN

logger = logging.getLogger(__name__)

TICK_S = 1.0
# Why a reply can end; anything else means that the server broke off, and is asked again.
_ENDS = {"stop": "stop", "length": "length", "content_filter": "content_filter", "refusal": "content_filter"}


class EndpointEngine:
    """Chat completions of ``method.model`` at ``method.endpoint``; as a context manager it closes its connections.

    Every row is one request, asked again after 429, 5xx, a timeout, a lost connection or a reply that breaks off, up to
    ``method.retries`` times, with as many under way as the endpoint bears (at most ``method.concurrency``). A row that the
    endpoint refuses (400, 413, 422: over-long, say) comes back as a completion with ``refused``.

    Raises:
        ConfigError: the key is not in its variable, or no HTTP header can carry it.
    """

    def __init__(self, method: Method, prompts: PromptSettings, sampling: Sampling) -> None:
        assert method.endpoint is not None
        self._method = method
        self._endpoint: str = method.endpoint
        self._max_tokens = prompts.max_response_tokens
        self._sampling = sampling
        self._key = _read_key(method)
        if method.thinking and prompts.thinking_tokens is not None:
            logger.warning(
                "%s: evaluate.thinking_tokens ends the thinking of vLLM's offline engine only; "
                "an endpoint's own limit goes into evaluate.models.%s.request",
                method.label,
                method.label,
            )

    def complete(self, requests: Iterable[Request]) -> Completions:
        """See :class:`tagpr.evaluation.engines.Engine`.

        Raises:
            StageError: no request can succeed (key, quota, model, URL), or one went on failing. What was under way then is
                still waited for and yielded first: it is paid for.
        """
        done: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        stopped = threading.Event()

        def serve() -> None:
            try:
                loop.run_until_complete(self._ask_all(iter(requests), done, stopped))
            except BaseException as error:  # noqa: BLE001 told to the caller's thread
                done.put(error)
            finally:
                loop.close()
                done.put(None)

        thread = threading.Thread(target=serve, name=f"ask {self._method.label}", daemon=True)
        thread.start()
        try:
            while True:
                try:
                    item = done.get(timeout=TICK_S)
                except queue.Empty:
                    yield None
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    async def _ask_all(
        self,
        requests: Iterator[Request],
        done: "queue.SimpleQueue[Completion | BaseException | None]",
        stopped: threading.Event,
    ) -> None:
        client = ChatClient(
            self._endpoint, self._key, timeout_s=self._method.timeout_s, connections=self._method.concurrency
        )
        limit = AdaptiveLimit(self._method.concurrency)

        async def attempt(body: Mapping[str, Any]) -> Outcome:
            return whole(await client.attempt(body))

        asker = Asker(
            f"evaluate.models.{self._method.label}",
            attempt,
            base_url=self._endpoint,
            key_variable=self._method.key_variable,
            retries=self._method.retries,
            limit=limit,
            url_field="endpoint",
        )
        failed: list[BaseException] = []
        running: set[asyncio.Task[None]] = set()

        async def one(request: Request) -> None:
            try:
                reply = await asker.ask(self.body(request))
                done.put(completion_of(request, reply, self._method.thinking))
            except RequestRefusedError as error:
                reason = f"{error.http_status} {error.code}".strip()
                why = f"{reason}: {error.message}" if error.message else reason
                done.put(Completion(request.key, (), "stop", refused=why))
            except StageError as error:
                failed.append(error)

        try:
            # Twice what may be under way: a reply's place is taken at once, and prompts do not pile up.
            while not failed and not stopped.is_set():
                if len(running) < 2 * self._method.concurrency:
                    try:
                        request = await asyncio.to_thread(next, requests, None)
                    except Exception as error:  # noqa: BLE001 raised below, once what is under way is there
                        failed.append(error)
                        break
                    if request is None:
                        break
                    task = asyncio.create_task(one(request))
                    running.add(task)
                    task.add_done_callback(running.discard)
                else:
                    await asyncio.wait(running, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            while running and not failed and not stopped.is_set():
                await asyncio.wait(running, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            # What is under way when one fails is paid for; what waits for its turn is not.
            while failed and limit.in_flight and not stopped.is_set():
                await asyncio.sleep(0.02)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await client.close()
        retried = {name.removeprefix("retried_"): n for name, n in asker.counts.items() if "retried_" in name}
        if retried:
            told = ", ".join(f"{name} {number}" for name, number in sorted(retried.items()))
            logger.info("%s: %d requests asked again (%s)", self._method.label, sum(retried.values()), told)
        if failed:
            raise failed[0]

    def body(self, request: Request) -> dict[str, Any]:
        """The request's body; ``method.request`` overrides it, and takes out what it sets to null."""
        temperature, seed = self._sampling.of(request.key)
        body: dict[str, Any] = {
            "model": self._method.model,
            "messages": [{"role": "user", "content": request.text}],
            "max_tokens": self._max_tokens,
            "temperature": temperature,
            "seed": seed,
            **self._method.request,
        }
        return {name: value for name, value in body.items() if value is not None}

    def __enter__(self) -> "EndpointEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Connections belong to the event loop of one call of complete, which closes them.
        self._key = ""


def whole(outcome: Outcome) -> Outcome:
    """The outcome, or a failure to try again where a reply ended for a reason that is none of the model's."""
    if outcome.reply is None or outcome.reply.finish_reason in _ENDS:
        return outcome
    why = outcome.reply.finish_reason or "missing"
    return Outcome(None, "server_error", outcome.status, f"finish_reason_{why}", outcome.retry_after_s)


def completion_of(request: Request, reply: Reply, thinking: bool) -> Completion:
    """A reply as a completion; with ``thinking``, reasoning that came beside the text goes back before it."""
    text = reply.text
    if thinking and reply.reasoning is not None and THINK_OPEN not in text:
        thought = f"{THINK_OPEN}\n{reply.reasoning.strip()}"
        # No text and the limit reached: the reasoning never ended.
        unended = reply.finish_reason == "length" and not text.strip()
        text = thought if unended else f"{thought}\n{THINK_CLOSE}\n\n{text.strip()}"
    return Completion(
        request.key,
        (),
        _ENDS[reply.finish_reason],
        text=text,
        response_tokens=reply.completion_tokens or None,
        reasoning_tokens=reply.reasoning_tokens,
    )


def _read_key(method: Method) -> str:
    if method.key_variable is None:
        return ""
    key = os.environ.get(method.key_variable, "").strip()
    if not key:
        raise ConfigError(
            f"evaluate.models.{method.label}.key_variable={method.key_variable}: this environment variable is not set. "
            "Put the API key there."
        )
    return key
