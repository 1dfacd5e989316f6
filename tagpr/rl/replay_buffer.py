"""verl's replay buffers: quick, fail-closed, and with the rows in their order (``trainer.v1.sampler.custom_sampler``)."""

import time
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from tagpr.errors import TagPRError

# A batch is found late by at most this share of the time that it took; each poll takes milliseconds from those who work on it.
POLL_SHARE, SHORTEST_POLL_S, LONGEST_POLL_S = 0.02, 0.01, 1.0


class RolloutFailure(TagPRError, RuntimeError):
    """A response was not generated or not scored, so its group cannot be trained on."""


class FailClosed:
    """Of a replay buffer: stops the run as soon as one group failed, and hands out whole groups in the order of their prompts.

    verl's own buffer (trainer/ppo/v1/replay_buffer.py) goes on with what is left of a group: missing rows become padding, and the
    advantage of a lone survivor is its raw score. And it hands rows out as they were finished, so that the first mini-batch of a
    step would learn from the shortest responses and the last from the longest, and groups would be torn apart. It polls the longer
    it has waited the less often, instead of every 2 s, which would round every step up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waits_since: float | None = None

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()  # type: ignore[misc]
        for partition_id, keys in self.failure_keys.items():  # type: ignore[attr-defined]
            if keys:
                raise RolloutFailure(
                    f"{len(keys)} prompt group(s) of the {partition_id} batch failed to be generated or scored"
                )

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        now = time.monotonic()
        self._waits_since = self._waits_since or now
        self.poll_interval = min(LONGEST_POLL_S, max(SHORTEST_POLL_S, POLL_SHARE * (now - self._waits_since)))
        waited: float = super()._wait_for_next_poll(partition_id, last_debug_time)  # type: ignore[misc]
        return waited

    def _materialize_batch(
        self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict[str, dict]
    ) -> KVBatchMeta:
        self._waits_since = None
        prompts: dict[str, int] = self.prompt_global_steps[partition_id]  # type: ignore[attr-defined]
        place = {uid: number for number, uid in enumerate(prompts)}

        def order(key: str) -> tuple[int, ...]:
            uid, *numbers = key.split("_")
            return place.get(uid, len(place)), *map(int, numbers)

        snapshot = {key: partition_snapshot[key] for key in sorted(partition_snapshot, key=order)}
        return super()._materialize_batch(partition_id, selected_prompt_uids, snapshot)  # type: ignore[misc]


class FailClosedReplayBuffer(FailClosed, ReplayBuffer):
    """For synchronous training."""


class FailClosedReplayBufferAsync(FailClosed, ReplayBufferAsync):
    """For asynchronous training."""


def fail_closed_replay_buffer(trainer_mode: str, **kwargs: Any) -> ReplayBuffer:
    """The one for ``trainer.v1.trainer_mode``; what verl calls (``trainer.v1.sampler.custom_sampler``)."""
    kind = FailClosedReplayBuffer if trainer_mode == "sync" else FailClosedReplayBufferAsync
    return kind(trainer_mode=trainer_mode, **kwargs)
