"""What our HTTP servers share: a port taken at once, a bearer token, bounded bodies and queues, refusals that quote nobody."""

import asyncio
import errno
import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tagpr.errors import ConfigError
from tagpr.prmu.wire import HEALTH_PATH, TOKEN_VARIABLE, read_token

SHUTDOWN_S = 10
KEEP_ALIVE_S = 65
RETRY_AFTER_S = 1
# Times the size limit: a larger body is not even received.
DRAIN = 4


class BodyTooLarge(Exception):
    """A request's body is larger than its limit."""


class BearerAuth:
    """Lets nothing pass without the token but the health check; unknown paths too are refused, not
    explained. The administrator's route takes the administrator's token, and no other one.

    Args:
        app: what is protected.
        token: of everybody else.
        refusal: makes the answer (401) to a request without it.
        admin: (path, token) of the administrator.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        refusal: Callable[[], Response],
        admin: tuple[str, str] | None = None,
    ) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()
        self._refusal = refusal
        self._admin_path = None if admin is None else admin[0]
        self._admin = b"" if admin is None else f"Bearer {admin[1]}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == HEALTH_PATH):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            expected = self._admin if scope["path"] == self._admin_path else self._expected
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if len(given) == 1 and hmac.compare_digest(given[0], expected):
                await self._app(scope, receive, send)
            else:
                await self._refusal()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


async def read_body(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is known to be too large.

    What is only somewhat too large is received and dropped, as a client that is still sending would never see the answer.

    Raises:
        BodyTooLarge: it has more than ``limit`` bytes.
    """
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    if size > DRAIN * limit:
        raise BodyTooLarge
    body = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > DRAIN * limit:
            raise BodyTooLarge
        if max(received, size) <= limit:
            body += chunk
    if max(received, size) > limit:
        raise BodyTooLarge
    return bytes(body)


class Admission:
    """A bounded number of places, which requests hold from before their work begins until they are answered.

    Args:
        places: how many there are.
        refusal: makes the exception for a request that finds too few free ones, from how many are taken.
    """

    def __init__(self, places: int, refusal: Callable[[int], Exception]) -> None:
        self.taken = 0
        self._places = places
        self._refusal = refusal

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Hold ``count`` places while the body runs; for one event loop.

        Raises:
            Exception: the refusal; so many are not free.
        """
        if self.taken + count > self._places:
            raise self._refusal(self.taken)
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count


def place_of(location: Sequence[int | str], known: Container[str]) -> str:
    """Where in a body something is wrong (pydantic's ``loc``), of numbers and ``known`` names: others could quote the body."""
    return ".".join(str(part) for part in location if isinstance(part, int) or part in known)


def refusal_headers(status: int) -> dict[str, str]:
    """Headers that belong to a refusal with this status."""
    if status in (429, 503):
        return {"retry-after": str(RETRY_AFTER_S)}
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if status == 413:
        return {"connection": "close"}  # the rest of the body is not read
    return {}


class Server(uvicorn.Server):
    """Tells when it listens."""

    announce: Callable[[], None]

    # Called by uvicorn, hence its name.
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then tell."""
        await super().startup(sockets)
        if self.started:
            self.announce()


async def serve(
    app: object,
    listener: socket.socket,
    max_connections: int,
    announce: Callable[[], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or ``stop``; ``announce`` is called once the server listens."""
    server = Server(
        uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            server_header=False,
            limit_concurrency=max_connections,
            # Longer than clients keep idle connections: who closes first must not be the one that is written to.
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
            ws="none",
        )
    )
    server.announce = announce

    async def end() -> None:
        assert stop is not None
        await stop.wait()
        server.should_exit = True

    ending = asyncio.create_task(end()) if stop is not None else None
    try:
        await server.serve(sockets=[listener])
    finally:
        if ending is not None:
            ending.cancel()


def listen(host: str, port: int) -> socket.socket:
    """Bind at once, so that a taken port shows before a model loads.

    Raises:
        ConfigError: the port is taken or not ours to take (``server.host``, ``server.port``).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"server.port={port}: is taken on {host}. Set another port, or 0 for any free one."
            ) from None
        raise ConfigError(
            f"server.host={host} server.port={port}: cannot listen there ({error.strerror or error}). "
            "Set an address of this machine and a port that you may use."
        ) from None
    except OverflowError:
        listener.close()
        raise ConfigError(f"server.port={port}: is no port. Set 0 to 65535.") from None
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """Where others reach a listener."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def keep_token(
    token_file: str | None, host: str, run_dir: Path, variable: str = TOKEN_VARIABLE
) -> tuple[str, str | None]:
    """Token and the file it is in, if any; made up and kept in ``<run_dir>/token`` where none is given.

    Raises:
        ConfigError: the token is not usable, or there is none and ``host`` is open to others.
    """
    token = read_token(token_file, variable)
    if token is not None:
        return token, None if token_file is None else str(Path(token_file).resolve())
    if not _is_loopback(host):
        raise ConfigError(
            f"server.host={host}: is open to other machines, and there is no token. "
            f"Set server.token_file or {variable}."
        )
    path = run_dir / "token"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".token.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        temporary.replace(path)
    path.chmod(0o600)
    kept = read_token(path)
    assert kept is not None
    return kept, str(path.resolve())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
