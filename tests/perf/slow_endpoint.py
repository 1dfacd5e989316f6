"""An OpenAI-compatible endpoint that does nothing but wait: ``python tests/perf/slow_endpoint.py [latency_s] [concurrency]``.

A raw asyncio protocol, so that what is measured is the client and not this. Every request is answered after ``latency_s``
with a completion of realistic size, or at once with 429 where more than ``concurrency`` are under way. ``GET /stats`` tells what
it has seen. It prints its port and ends when its standard input does.
"""

import asyncio
import json
import sys
import threading
import time
from collections import deque

REPLY_CHARACTERS = 1600


def completion() -> bytes:
    """One chat completion: a judge's verdict in length, 400 tokens or so."""
    text = "The reviewer weighs each of the listed items before settling on a rating. " * 30
    body = {
        "id": "chatcmpl-slow",
        "object": "chat.completion",
        "created": 1,
        "model": "slow",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text[:REPLY_CHARACTERS]},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 1000,
            "completion_tokens": 400,
            "total_tokens": 1400,
            "prompt_tokens_details": {"cached_tokens": 600},
        },
    }
    return json.dumps(body).encode()


def answer(status: str, body: bytes, extra: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    )
    return head.encode() + body


class Endpoint:
    """Counters and the queue of replies that are due; they become due in the order in which they came."""

    def __init__(self, latency_s: float, concurrency: int) -> None:
        self.latency_s, self.concurrency = latency_s, concurrency
        self.reply = answer("200 OK", completion())
        error = {
            "error": {"message": "Slow down.", "type": "rate_limit_exceeded", "code": "rate_limit_exceeded"}
        }
        self.refusal = answer("429 Too Many Requests", json.dumps(error).encode(), "retry-after-ms: 200\r\n")
        self.due: deque[tuple[float, Connection]] = deque()
        self.served = self.refused = self.in_flight = self.peak = 0
        self.first = self.last = 0.0
        self.ticking = False

    def enter(self, connection: "Connection") -> None:
        if self.in_flight >= self.concurrency:
            self.refused += 1
            connection.send(self.refusal)
            return
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        now = asyncio.get_running_loop().time()
        if not self.served and not self.first:
            self.first = now
        self.due.append((now + self.latency_s, connection))
        if not self.ticking:
            self.ticking = True
            asyncio.get_running_loop().call_at(self.due[0][0], self.tick)

    def tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self.due and self.due[0][0] <= now:
            _, connection = self.due.popleft()
            self.in_flight -= 1
            self.served += 1
            self.last = now
            connection.send(self.reply)
        if self.due:
            loop.call_at(self.due[0][0], self.tick)
        else:
            self.ticking = False

    def stats(self) -> bytes:
        values = {
            "served": self.served,
            "refused": self.refused,
            "peak": self.peak,
            "in_flight": self.in_flight,
            "seconds": self.last - self.first,
            "cpu_s": time.process_time(),
        }
        self.served = self.refused = self.peak = 0
        self.first = self.last = 0.0
        return answer("200 OK", json.dumps(values).encode())


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, just enough of it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.buffer = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            lower = head.lower()
            at = lower.find(b"content-length:")
            length = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            if head.startswith(b"GET"):
                self.send(self.endpoint.stats())
            else:
                self.endpoint.enter(self)

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)


async def serve(latency_s: float, concurrency: int) -> None:
    endpoint = Endpoint(latency_s, concurrency)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(endpoint), "127.0.0.1", 0, backlog=4096)
    ended = asyncio.Event()

    def wait_for_parent() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait_for_parent, daemon=True).start()
    print(server.sockets[0].getsockname()[1], flush=True)
    await ended.wait()


if __name__ == "__main__":
    try:
        import uvloop

        new_loop = uvloop.new_event_loop
    except ImportError:
        new_loop = None
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(
            serve(
                float(sys.argv[1]) if len(sys.argv) > 1 else 0.2,
                int(sys.argv[2]) if len(sys.argv) > 2 else 256,
            )
        )
