"""vLLM's engine sends the tokens of a rollout in bunches instead of one by one.

After each step vLLM packs every request's new token and its log-probability into a message, which another process unpacks. On a
GPU machine other cores do that while the GPU computes the next step. Where the CPU is what computes, that work takes a core
from the engine again and again: 0.8 s of processor time for 80 responses of 256 tokens, 0.2 s in bunches. Nobody looks at a rollout
before it ends.

A request is held back where it said that it does not want every token (``stream_interval``) nor text (``detokenize=False``),
from its second output on and up to ``BUNCH`` of them; the content of what is sent is the same. What is aborted by the engine
comes with all its tokens; what is aborted by who asked loses those that were held back, as it does those on their way.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

BUNCH = 32


class BunchedOutputs:
    """The engine's queue of outputs, with another one before it.

    Args:
        queue: takes ``(client, EngineCoreOutputs)`` and anything else that goes through as it is.
        requests: the scheduler's unfinished requests by id.
    """

    def __init__(self, queue: Any, requests: Mapping[str, Any]) -> None:
        self._queue = queue
        self._requests = requests
        self._held: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def put_nowait(self, item: Any) -> None:
        """Pass on what is not held back, if that is anything."""
        if not isinstance(item, tuple):
            self._queue.put_nowait(item)
            return
        sent = item[1]
        if sent.outputs:
            sent.outputs = [output for each in sent.outputs if (output := self._release(each)) is not None]
            if len(self._held) > len(self._requests):
                # Given up by who asked: no output tells of it. (What has ended in this step was released above.)
                self._held = {key: held for key, held in self._held.items() if key in self._requests}
            if not sent.outputs and not any(
                (
                    sent.scheduler_stats,
                    sent.finished_requests,
                    sent.wave_complete is not None,
                    sent.start_wave is not None,
                )
            ):
                return
        self._queue.put_nowait(item)

    def _release(self, output: Any) -> Any:
        """This output with what was held back before it; None where it is held back itself."""
        if self._may_wait(output):
            held = self._held.setdefault(output.request_id, [])
            held.append(output)
            return joined(self._held.pop(output.request_id)) if len(held) >= BUNCH else None
        held = self._held.pop(output.request_id, [])
        return joined([*held, output]) if held else output

    def _may_wait(self, output: Any) -> bool:
        if output.finish_reason is not None or output.prefill_stats is not None or not output.new_token_ids:
            return False
        if any(getattr(output, name) is not None for name in _UNUSUAL) or output.num_nans_in_logits:
            return False
        parameters = getattr(self._requests.get(output.request_id), "sampling_params", None)
        return (
            parameters is not None and not parameters.detokenize and (parameters.stream_interval or 1) > BUNCH
        )


_UNUSUAL = (
    "new_prompt_logprobs_tensors",
    "pooling_output",
    "events",
    "kv_transfer_params",
    "ec_transfer_params",
    "routed_experts",
    "mm_cache_miss_hashes",
    "new_sampling_mask",
)


def joined(outputs: list[Any]) -> Any:
    """Outputs of one request, one behind the other, as one: the last with the tokens and log-probabilities of all."""
    last = outputs[-1]
    last.new_token_ids = [token for output in outputs for token in output.new_token_ids]
    parts = [output.new_logprobs for output in outputs if output.new_logprobs is not None]
    if parts:
        last.new_logprobs = type(parts[0])(
            np.concatenate([part.logprob_token_ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.sampled_token_ranks for part in parts]),
        )
    return last
