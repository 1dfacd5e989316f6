"""Requests that arrive together are scored together: a queue, and one thread that owns the engine."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from reward_server.engine import Engine, EngineCounts
from tagpr.prmu.encoding import Encoded

logger = logging.getLogger(__name__)

Entry = tuple[Encoded, "Future[float]"]


class Batcher:
    """Feeds an engine from its own thread with whatever has queued up while it was busy.

    Waiting for company would cost latency and win nothing: under load the next batch fills while this one
    runs.

    Args:
        engine: used by the thread only.
        batch_items: taken from the queue at once, at most.
    """

    def __init__(self, engine: Engine, batch_items: int) -> None:
        self._engine = engine
        self._batch_items = batch_items
        self._queue: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._busy_since: float | None = None
        self.scored = 0
        self.observe: Callable[[int, float], None] | None = None  # told items and seconds of every batch
        self._thread = threading.Thread(target=self._work, name="reward-engine", daemon=True)
        self._thread.start()

    async def score(self, inputs: Sequence[Encoded]) -> list[float]:
        """Logits in order. Cancelling takes what has not begun out of the queue.

        Raises:
            RuntimeError: the batcher is closed.
            Exception: whatever the engine raised.
        """
        entries: list[Entry] = [(one, Future()) for one in inputs]
        with self._changed:
            if self._closing:
                raise RuntimeError("the engine is shut down")
            self._queue.extend(entries)
            self._changed.notify()
        return await asyncio.gather(*(asyncio.wrap_future(future) for _, future in entries))

    def busy_s(self) -> float:
        """How long the batch in hand has been running; 0 when idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def counts(self) -> EngineCounts:
        """Tokens that the engine has dealt with."""
        return self._engine.counts()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def close(self, timeout_s: float = 10.0) -> None:
        """Let the batch in hand finish, fail what is queued, stop the thread and close the engine."""
        with self._changed:
            self._closing = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for _, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError("the engine is shut down"))
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._engine.close()

    def _next(self) -> list[Entry]:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            taken = [self._queue.popleft() for _ in range(min(len(self._queue), self._batch_items))]
        return [entry for entry in taken if entry[1].set_running_or_notify_cancel()]

    def _work(self) -> None:
        while not (self._closing and not self._queue):
            batch = self._next()
            if not batch:
                continue
            self._busy_since = began = time.monotonic()
            try:
                logits = self._engine.score([one for one, _ in batch])
                if len(logits) != len(batch):
                    raise RuntimeError(f"engine gave {len(logits)} logits for {len(batch)} inputs")
            except Exception as error:
                logger.exception("engine failed on a batch of %d", len(batch))
                for _, future in batch:
                    future.set_exception(error)
            else:
                self.scored += len(batch)
                if self.observe is not None:
                    self.observe(len(batch), time.monotonic() - began)
                for (_, future), logit in zip(batch, logits, strict=True):
                    future.set_result(logit)
            finally:
                self._busy_since = None
