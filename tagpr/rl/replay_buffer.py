"""verl's synchronous replay buffer, quick and fail-closed (``trainer.v1.sampler.custom_sampler``)."""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from tagpr.errors import TagPRError


class RolloutFailure(TagPRError, RuntimeError):
    """A response was not generated or not scored, so its group cannot be trained on."""


class FailClosed:
    """Of a replay buffer: stops the run as soon as one group failed.

    verl's own buffer goes on with what is left: missing rows become padding, and the advantage of a lone survivor is its raw
    score (trainer/ppo/v1/replay_buffer.py). Polls every 20 ms instead of 2 s, which would round every step up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("poll_interval", 0.02)
        super().__init__(*args, **kwargs)

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()  # type: ignore[misc]
        for partition_id, keys in self.failure_keys.items():  # type: ignore[attr-defined]
            if keys:
                raise RolloutFailure(
                    f"{len(keys)} prompt group(s) of the {partition_id} batch failed to be generated or scored"
                )


class FailClosedReplayBuffer(FailClosed, ReplayBuffer):
    """For synchronous training."""


class FailClosedReplayBufferAsync(FailClosed, ReplayBufferAsync):
    """For asynchronous training."""


def fail_closed_replay_buffer(trainer_mode: str, **kwargs: Any) -> ReplayBuffer:
    """The one for ``trainer.v1.trainer_mode``; what verl calls (``trainer.v1.sampler.custom_sampler``)."""
    kind = FailClosedReplayBuffer if trainer_mode == "sync" else FailClosedReplayBufferAsync
    return kind(trainer_mode=trainer_mode, **kwargs)
