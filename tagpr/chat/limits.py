"""How many requests may be under way at once, found out from what the server says (additive increase, halving)."""

import asyncio
import logging
from collections import deque
from types import TracebackType

logger = logging.getLogger(__name__)

# Nobody waits longer than this on a server's word, in seconds.
LONGEST_PAUSE_S = 300.0
LOUD_PAUSE_S = 5.0
# After halving: double per round trip up to this share of where it went wrong, then grow slowly by the other one.
NEAR_SHARE, STEP_SHARE = 0.85, 0.02


class AdaptiveLimit:
    """A semaphore for one event loop whose size follows the server's 429s.

    ``async with limit as era:`` takes a place; :meth:`throttled` halves the size, once for all the requests that were sent
    before it did (they share an era), and lets nobody in until ``Retry-After`` has passed. :meth:`succeeded` lets it grow,
    never above ``ceiling``. It starts at the ceiling: that is what the user expects the server to bear.

    ``ahead`` more are let in while the size is the ceiling: for requests that wait in a worker with as many connections
    as the ceiling, so that none of these is ever idle while replies travel to the driver and new requests back.
    """

    def __init__(self, ceiling: int, floor: int = 1, ahead: int = 0) -> None:
        if not 1 <= floor <= ceiling or ahead < 0:
            raise ValueError(
                f"ceiling={ceiling}, floor={floor}, ahead={ahead}: 1 <= floor <= ceiling, ahead >= 0"
            )
        self.ceiling = ceiling
        self.ahead = ahead
        self.floor = floor
        self.in_flight = 0
        self.throttles = 0
        self._size = float(ceiling)
        self._near = float(ceiling)
        self._era = 0
        self._open_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def size(self) -> int:
        """Requests that may be under way now."""
        return int(self._size)

    async def __aenter__(self) -> int:
        if self._waiting or not self._free():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            self._wake()
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._release()
                raise
        else:
            self.in_flight += 1
        return self._era

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def succeeded(self) -> None:
        """A reply came: grow, where the size is what holds us back."""
        if self._size >= self.ceiling or self.in_flight < 0.9 * self.size:
            return
        step = 1.0 if self._size < self._near else max(1.0, STEP_SHARE * self._size) / self._size
        self._size = min(float(self.ceiling), self._size + step)
        self._wake()

    def throttled(self, era: int, retry_after_s: float | None = None) -> None:
        """A request of this era was refused for coming too fast; nobody is let in for ``retry_after_s``."""
        self.throttles += 1
        if era == self._era:
            self._era += 1
            self._near = max(float(self.floor), NEAR_SHARE * self._size)
            self._size = max(float(self.floor), self._size / 2)
        if retry_after_s:
            self.pause(retry_after_s)

    def pause(self, seconds: float) -> None:
        """Let nobody in for so long, at most LONGEST_PAUSE_S; a shorter pause never ends a longer one."""
        seconds = min(seconds, LONGEST_PAUSE_S)
        now = asyncio.get_running_loop().time()
        if now + seconds <= self._open_at:
            return
        if seconds >= LOUD_PAUSE_S and self._open_at <= now:
            logger.info("the server asks to wait %.0f s", seconds)
        self._open_at = now + seconds
        self._wake()

    def _free(self) -> bool:
        return self._room() and asyncio.get_running_loop().time() >= self._open_at

    def _room(self) -> bool:
        return self.in_flight < self.size + (self.ahead if self._size >= self.ceiling else 0)

    def _release(self) -> None:
        self.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        loop = asyncio.get_running_loop()
        # Read once: were it closed at one look and open at the next, nobody would let in those who wait.
        if loop.time() < self._open_at:
            if self._waiting and self._timer is None:
                self._timer = loop.call_at(self._open_at, self._opened)
            return
        while self._waiting and self._room():
            future = self._waiting.popleft()
            if not future.done():
                self.in_flight += 1
                future.set_result(None)

    def _opened(self) -> None:
        self._timer = None
        self._wake()
