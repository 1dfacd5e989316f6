"""The processes of a run on one CPU machine start side by side; left alone, verl starts one after the other.

Each takes seconds of imports, in which other cores idle. (Ray's own workers cannot be warmed up for it: one that has run a task is
never given to an actor.) Nothing here changes what a process does once it is up. ``tests/contract/test_rollouts.py`` checks the
places in verl.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

from omegaconf import DictConfig

_rollout_worker: Any = None


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


@contextmanager
def prepared(config: DictConfig) -> Iterator[None]:
    """With Ray just started: TransferQueue's processes and the rollout worker's start while the body imports verl."""
    global _rollout_worker
    import ray

    _rollout_worker = ray.remote(EarlyRolloutWorker).remote()
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


@contextmanager
def deferred_models(on: bool) -> Iterator[None]:
    """In the body, verl's training workers are told to load their model and not waited for: rollout engines start meanwhile.

    Whatever a worker is asked next waits in its queue. Not where both want one GPU, whose memory the rollout engine measures.
    """
    if not on:
        yield
        return
    import ray
    from verl.trainer.ppo.v1 import trainer_base

    original = trainer_base.RayWorkerGroup
    loading: list[Any] = []

    def group(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        spawn = made.spawn

        def spawn_deferred(prefix_set: Any) -> dict[str, Any]:
            groups: dict[str, Any] = spawn(prefix_set=prefix_set)
            for prefix, one in groups.items():
                if hasattr(one, "init_model"):
                    one.init_model = lambda one=one, name=f"{prefix}_init_model": loading.extend(
                        one.execute_all_async(name)
                    )
            return groups

        made.spawn = spawn_deferred
        return made

    with mock.patch.object(trainer_base, "RayWorkerGroup", group):
        try:
            yield
        finally:
            # What failed to load is the reason of whatever failed after it.
            ray.get(loading)
