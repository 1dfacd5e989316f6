"""Ray's records of nodes and actors, as the watch over a run reads them; and a rollout worker that is asked while it hangs."""

import time
from collections.abc import Callable
from typing import Any

from tagpr.local_ray import local_ray
from tagpr.rl.in_flight import GENERATED, SCORED, InFlight
from tagpr.rl.losses import Losses, ray_nodes, ray_workers
from tagpr.rl.side_by_side import WATCH
from tagpr.rl.watchdog import rollouts_say


def rollout_workers() -> type:
    """Made here, so that it travels by value: workers do not see the tests."""

    class Rollouts:
        """The shape of a rollout worker."""

        def __init__(self) -> None:
            self.flight = InFlight()

        async def in_flight(self) -> Any:
            return self.flight.state()

        async def hang(self, what: str, blocking: bool) -> None:
            import asyncio

            with self.flight.being(what):
                if blocking:
                    time.sleep(900)
                await asyncio.sleep(900)

        async def end(self) -> None:
            import os

            os._exit(1)

    return Rollouts


def until(look: Callable[[], Any], deadline_s: float = 120.0) -> Any:
    give_up = time.monotonic() + deadline_s
    while time.monotonic() < give_up:
        found = look()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError("it did not happen")


def test_with_a_real_ray() -> None:
    with local_ray(4):
        import ray

        kind = ray.remote(num_cpus=0, concurrency_groups=WATCH)(rollout_workers())
        blocked, waiting, told, dies = (kind.remote() for _ in range(4))
        ray.get([each.in_flight.remote() for each in (blocked, waiting, told, dies)])
        losses = Losses()
        assert losses.look(ray_nodes(), ray_workers()) is None
        assert len(losses._had) == 4

        # 1. Who hangs, and where
        blocked.hang.remote(SCORED, True)
        waiting.hang.remote(GENERATED, False)
        until(lambda: all(_state(each) for each in (blocked, waiting)))
        lines = rollouts_say({"worker 0": blocked, "worker 1": waiting}, deadline_s=10.0)
        assert lines[0].startswith("worker 0 hangs in the reward (1 response being scored")
        assert lines[1].startswith("worker 1 waits for the rollout engine (1 response being generated")

        # 2. Who is told to end is no loss; who ends by itself is one
        ray.kill(told)
        until(lambda: not ray_workers()[told._actor_id.hex()].alive)
        assert losses.look(ray_nodes(), ray_workers()) is None
        dies.end.remote()
        line = until(lambda: losses.look(ray_nodes(), ray_workers()))
        assert line.startswith("worker Rollouts (process ")
        assert " is dead (" in line
        assert rollouts_say({"worker 2": dies}, deadline_s=10.0) == ["worker 2 is dead"]


def _state(worker: Any) -> Any:
    import ray

    return ray.get(worker.in_flight.options(concurrency_group="watch").remote(), timeout=60)
