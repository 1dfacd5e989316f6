"""An HTTP server on loopback whose answers are written out by the test, byte by byte where that matters."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

OK: dict[str, Any] = {
    "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 30,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 20},
    },
}

Answer = bytes | float | None
"""Raw bytes to send and then close; seconds to stay silent; None: close without a word."""


def http(
    body: object, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
) -> bytes:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    lines = {
        "content-type": kind,
        "content-length": str(len(data)),
        "connection": "close",
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + data


class Fake:
    """``answer(number of the request, its body)`` says what happens; ``requests`` has head and body of each."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                int(line.split(":")[1])
                for line in head.splitlines()
                if line.lower().startswith("content-length")
            )
            body = json.loads(await reader.readexactly(length))
            self.requests.append((head, body))
            answer = self.answer(len(self.requests), body)
            if isinstance(answer, float):
                await asyncio.sleep(answer)
            elif answer is not None:
                writer.write(answer)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def serving(answer: Callable[[int, dict[str, Any]], Answer]) -> AsyncIterator[Fake]:
    fake = Fake(answer)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield fake
    finally:
        server.close()
