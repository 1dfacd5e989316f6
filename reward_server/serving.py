"""Which checkpoint is served, and its exchange for another one without dropping a request (S21)."""

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reward_server.batching import Batcher
from tagpr.errors import StageError
from tagpr.prmu.encoding import Encoder

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(eq=False)
class Served:
    """A loaded checkpoint: what turns text into tokens, what turns tokens into logits, and its version."""

    encoder: Encoder
    batcher: Batcher
    version: str
    engine: str
    requests: int = 0
    retired: bool = False


class Serving:
    """The checkpoint that new requests get; earlier requests keep the one they began with.

    Args:
        first: served from the start.
        load: makes a checkpoint folder ready, and raises ``StageError`` or ``ConfigError`` where it cannot be served.
        swapped: told of every checkpoint that takes the place of another one.
    """

    def __init__(
        self,
        first: Served,
        load: Callable[[Path], Served],
        swapped: Callable[[Served], None] = lambda _: None,
    ) -> None:
        self._swapped = swapped
        self._scored_before = 0
        self.current = first
        self.swaps = 0
        self._load = load
        self._swapping = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    @contextmanager
    def lease(self) -> Iterator[Served]:
        """The current checkpoint, which stays loaded until the body ends. For the event loop's thread only."""
        served = self.current
        served.requests += 1
        try:
            yield served
        finally:
            served.requests -= 1
            self._close_if_drained(served)

    async def swap(self, folder: Path) -> tuple[str, str]:
        """Load ``folder`` beside the current checkpoint, then let new requests have it; the old one is closed once drained.

        Returns:
            The old and the new version; nothing is loaded twice where ``folder`` already is what is served.

        Raises:
            StageError: ``folder`` holds no PRMU, or one that gives no number; the current one is served on.
        """
        async with self._swapping:
            fresh = await asyncio.to_thread(self._load, folder)
            old = self.current
            if fresh.version == old.version:
                await asyncio.to_thread(fresh.batcher.close)
                return old.version, old.version
            fresh.batcher.observe = old.batcher.observe
            self.current = fresh
            self.swaps += 1
            self._swapped(fresh)
            old.retired = True
            self._close_if_drained(old)
            logger.info(
                "PRMU %s instead of %s, which %d requests still use", fresh.version, old.version, old.requests
            )
            return old.version, fresh.version

    @property
    def scored(self) -> int:
        """Items scored by all checkpoints that were served."""
        return self._scored_before + self.current.batcher.scored

    async def close(self) -> None:
        """Close the current checkpoint and wait for the retired ones."""
        await asyncio.to_thread(self.current.batcher.close)
        await asyncio.gather(*self._closing)

    def _close_if_drained(self, served: Served) -> None:
        if served.retired and served.requests == 0:
            served.retired = False
            self._scored_before += served.batcher.scored
            task = asyncio.get_running_loop().create_task(asyncio.to_thread(served.batcher.close))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def checkpoint_folder(root: Path, name: str) -> Path:
    """Folder of a checkpoint by its name; never one outside ``root``.

    Raises:
        StageError: no plain name, or there is no such folder directly in ``root``.
    """
    if not NAME.fullmatch(name):
        raise StageError("checkpoint: is no plain name. Give the name of a folder in server.checkpoints.")
    folder = (root / name).resolve()
    if folder.parent != root.resolve() or not folder.is_dir():
        raise StageError(f"checkpoint {name}: no such folder in server.checkpoints. Put it there first.")
    return folder
