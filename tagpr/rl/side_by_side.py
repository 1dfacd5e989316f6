"""The processes of a run on one CPU machine start side by side; left alone, verl starts one after the other.

Each takes seconds of imports, in which other cores idle. (Ray's own workers cannot be warmed up for it: one that has run a task is
never given to an actor.) Nothing here changes what a process does once it is up. ``tests/contract/test_rollouts.py`` checks the
places in verl.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

_rollout_worker: Any = None
# Of a rollout worker: a thread with an event loop of its own, which answers the watchdog while the other one is blocked.
WATCH = {"watch": 1}


class EarlyRolloutWorker:
    """A Ray actor that imports what :class:`tagpr.rl.rollouts.RolloutWorker` needs, and is one from :meth:`begin` on."""

    def __init__(self) -> None:
        import tagpr.rl.rollouts  # noqa: F401

        self._worker: Any = None

    async def begin(self, *args: Any) -> None:
        """Arguments as of verl's agent loop worker."""
        from tagpr.rl.rollouts import RolloutWorker

        self._worker = RolloutWorker(*args)

    async def generate_sequences(self, batch: Any) -> None:
        """Begin to answer a batch of prompts; the answers go to TransferQueue."""
        await self._worker.generate_sequences(batch)

    async def in_flight(self) -> Any:
        """As of :class:`tagpr.rl.rollouts.RolloutWorker`."""
        return await self._worker.in_flight() if self._worker is not None else {}


@contextmanager
def prepared(config: DictConfig) -> Iterator[None]:
    """With Ray just started: TransferQueue's processes and the rollout worker's start while the body imports verl."""
    global _rollout_worker
    import ray

    _rollout_worker = ray.remote(concurrency_groups=WATCH)(EarlyRolloutWorker).remote()
    # Imported here and not by the thread: two threads that import torch may each wait for the other.
    import transfer_queue as tq

    with ThreadPoolExecutor(1) as thread:
        queue = thread.submit(tq.init, config.transfer_queue)
        yield
        queue.result()


def take_rollout_worker() -> Any:
    """The actor that :func:`prepared` started, once; None where it did not."""
    global _rollout_worker
    taken, _rollout_worker = _rollout_worker, None
    return taken
