"""An OpenAI-compatible endpoint on loopback that misbehaves on purpose, in front of a real one or of a function.

Every fault is planned by the request's own content and how often it came, so a run meets the same faults whatever the order.
"""

import asyncio
import json
import random
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web

Reply = tuple[int, dict[str, Any]]
Answer = Callable[[dict[str, Any]], Awaitable[Reply]]

FAULTS = ("429", "500", "delay", "cut", "truncated_json", "finish_abort")
# A request that met so many faults is left in peace: clients give up at some point, and should not here.
MOST_FAULTS = 4


def completion(text: str, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as a server makes it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def forward_to(base_url: str, key: str) -> Answer:
    """Answers of the real endpoint behind this one."""

    async def answer(body: dict[str, Any]) -> Reply:
        async with ClientSession(timeout=ClientTimeout(total=300)) as session:
            headers = {"authorization": f"Bearer {key}"}
            async with session.post(f"{base_url}/chat/completions", json=body, headers=headers) as response:
                return response.status, await response.json(content_type=None)

    return answer


class FaultyEndpoint:
    """Serves ``url`` from a thread while it is open.

    ``share`` of the requests meet a fault; a delayed one is held for ``delay_s``, which should be beyond the client's timeout.
    Requests without ``key`` get 401, those of a row in ``refuse`` (by a piece of the prompt) get 400. ``met`` counts faults,
    ``asked`` completions by prompt that went out whole, ``most_at_once`` requests that were under way together.
    """

    def __init__(
        self,
        answer: Answer,
        key: str = "",
        share: float = 0.0,
        delay_s: float = 1.0,
        refuse: tuple[str, ...] = (),
    ) -> None:
        self._answer = answer
        self._key = key
        self._share = share
        self._delay_s = delay_s
        self._refuse = refuse
        self.met: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.under_way = self.most_at_once = 0
        self._tries: Counter[int] = Counter()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.url = ""

    def __enter__(self) -> "FaultyEndpoint":
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _serve(self) -> None:
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        application = web.Application(client_max_size=2**26)
        application.router.add_post("/v1/chat/completions", self._post)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/v1"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            return await self._reply(request)
        except ConnectionResetError:
            # The client was killed meanwhile.
            return web.Response(status=499)
        finally:
            self.under_way -= 1

    async def _reply(self, request: web.Request) -> web.StreamResponse:
        if self._key and request.headers.get("authorization") != f"Bearer {self._key}":
            self.met["401"] += 1
            return _error(401, "invalid_api_key")
        body = await request.json()
        prompt = body["messages"][0]["content"]
        if any(piece in prompt for piece in self._refuse):
            self.met["400"] += 1
            return _error(400, "context_length_exceeded")
        fault = self._fault(body)
        self.met[fault] += bool(fault)
        if fault == "429":
            return _error(429, "rate_limit_exceeded", {"retry-after": "0.2"})
        if fault == "500":
            return _error(500, "internal")
        if fault == "delay":
            await asyncio.sleep(self._delay_s)
        status, answer = await self._answer(body)
        if fault == "finish_abort":
            answer["choices"][0]["finish_reason"] = "abort"
        data = json.dumps(answer).encode()
        if fault == "truncated_json":
            # A whole response as HTTP sees it.
            return web.Response(body=data[: len(data) // 2], content_type="application/json")
        if fault == "cut":
            response = web.StreamResponse(headers={"content-length": str(len(data))})
            response.content_type = "application/json"
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            assert request.transport is not None
            request.transport.abort()
            return response
        if status == 200 and not fault:
            self.bodies.append(body)
            self.asked[f"{body.get('seed')}:{prompt}"] += 1
        return web.Response(status=status, body=data, content_type="application/json")

    def _fault(self, body: dict[str, Any]) -> str:
        request = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        self._tries[request] += 1
        draw = random.Random(f"{request}:{self._tries[request]}")
        if self._tries[request] > MOST_FAULTS or draw.random() >= self._share:
            return ""
        return draw.choice(FAULTS)


def _error(status: int, code: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"error": {"message": f"injected {status}", "type": code, "code": code}}
    return web.json_response(body, status=status, headers=headers)
