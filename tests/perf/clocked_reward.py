"""Our reward manager with a clock, for ``rl_metrics.py --run``: verl's workers load this file by its path."""

import time
from collections.abc import Coroutine, Generator, Sequence
from typing import Any

from verl import DataProto

from tagpr.rl.reward_manager import TagPRRewardManager as Honest


class Clocked:
    """Awaits a coroutine; ``seconds`` of processor time are its own, without what others do while it waits."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self.work, self.seconds = work, 0.0

    def __await__(self) -> Generator[Any, Any, Any]:
        send, given = self.work.send, None
        while True:
            began = time.thread_time()
            try:
                waits_for = send(given)
            except StopIteration as end:
                return end.value
            finally:
                self.seconds += time.thread_time() - began
            try:
                send, given = self.work.send, (yield waits_for)
            except BaseException as error:  # noqa: BLE001 - the coroutine's to handle
                send, given = self.work.throw, error


class TagPRRewardManager(Honest):
    """Adds ``own_cpu_s`` to what is known of a response: what its reward took, with its share of the requests to PRMU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests = 0.0
        if self.client is not None:
            deliver = self.client._deliver

            async def clocked(request: Sequence[Any]) -> None:
                clock = Clocked(deliver(request))
                try:
                    await clock
                finally:
                    self._requests += clock.seconds

            self.client._deliver = clocked  # type: ignore[method-assign]

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """verl's hook."""
        clock = Clocked(super().run_single(data))
        result: dict[str, Any] = await clock
        result["reward_extra_info"]["own_cpu_s"] = clock.seconds + self._requests
        self._requests = 0.0
        return result
