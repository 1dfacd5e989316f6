"""What vLLM's engine says of a rollout arrives whole, only in fewer messages."""

import queue
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tagpr.cpu_platform.bunched_outputs import BUNCH, BunchedOutputs

engine = pytest.importorskip("vllm.v1.engine")
outputs_of_vllm = pytest.importorskip("vllm.v1.outputs")


def parameters(interval: int | None = 2**30, detokenize: bool = False) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=SimpleNamespace(stream_interval=interval, detokenize=detokenize))


def output(request: str, token: int, finished: bool = False, first: bool = False) -> Any:
    lists = outputs_of_vllm.LogprobsLists(
        np.array([[token]]), np.array([[-token / 7]]), np.array([token % 5]), None
    )
    return engine.EngineCoreOutput(
        request_id=request,
        new_token_ids=[token],
        new_logprobs=lists,
        finish_reason=engine.FinishReason.LENGTH if finished else None,
        prefill_stats=SimpleNamespace() if first else None,
    )


def sent(inner: queue.Queue[Any]) -> list[Any]:
    made = []
    while not inner.empty():
        made.append(inner.get_nowait())
    return made


def test_every_token_and_log_probability_arrives_in_order() -> None:
    """Requests of all lengths, finished in the step in which the scheduler forgets them."""
    rng = random.Random(0)
    lengths = {f"r{n}": rng.randint(1, 3 * BUNCH) for n in range(20)}
    requests = {name: parameters() for name in lengths}
    inner: queue.Queue[Any] = queue.Queue()
    bunched = BunchedOutputs(inner, requests)
    for step in range(max(lengths.values())):
        made = [
            output(name, 1000 * int(name[1:]) + step, finished=step == length - 1, first=step == 0)
            for name, length in lengths.items()
            if step < length
        ]
        for name, length in lengths.items():
            if step == length - 1:
                del requests[name]
        bunched.put_nowait((0, engine.EngineCoreOutputs(outputs=made)))
    got: dict[str, list[int]] = {name: [] for name in lengths}
    ended, messages = set(), sent(inner)
    for client, message in messages:
        assert client == 0
        for each in message.outputs:
            assert each.request_id not in ended, "something after the end"
            got[each.request_id] += each.new_token_ids
            assert each.new_logprobs.logprob_token_ids[:, 0].tolist() == each.new_token_ids
            assert each.new_logprobs.logprobs[:, 0].tolist() == [-token / 7 for token in each.new_token_ids]
            assert each.new_logprobs.sampled_token_ranks.tolist() == [t % 5 for t in each.new_token_ids]
            if each.finish_reason is not None:
                ended.add(each.request_id)
    assert got == {
        name: [1000 * int(name[1:]) + step for step in range(length)] for name, length in lengths.items()
    }
    assert ended == set(lengths)
    assert sum(len(message.outputs) for _, message in messages) < sum(lengths.values()) / 5


@pytest.mark.parametrize("kind", [parameters(1), parameters(None), parameters(2**30, detokenize=True)])
def test_who_wants_every_token_gets_it_at_once(kind: SimpleNamespace) -> None:
    inner: queue.Queue[Any] = queue.Queue()
    bunched = BunchedOutputs(inner, {"r": kind})
    for token in range(5):
        bunched.put_nowait((0, engine.EngineCoreOutputs(outputs=[output("r", token, first=token == 0)])))
        assert [each.new_token_ids for _, message in sent(inner) for each in message.outputs] == [[token]]


def test_an_abort_by_the_engine_brings_what_was_held_back() -> None:
    inner: queue.Queue[Any] = queue.Queue()
    bunched = BunchedOutputs(inner, {"r": parameters()})
    for token in range(4):
        bunched.put_nowait((0, engine.EngineCoreOutputs(outputs=[output("r", token, first=token == 0)])))
    sent(inner)
    end = engine.EngineCoreOutput("r", [], finish_reason=engine.FinishReason.ABORT)
    bunched.put_nowait((0, engine.EngineCoreOutputs(finished_requests={"r"}, outputs=[end])))
    ((_, message),) = sent(inner)
    (last,) = message.outputs
    assert (last.new_token_ids, last.finish_reason) == ([1, 2, 3], engine.FinishReason.ABORT)
    assert message.finished_requests == {"r"}


def test_what_was_given_up_is_forgotten() -> None:
    inner: queue.Queue[Any] = queue.Queue()
    requests = {"r": parameters(), "s": parameters()}
    bunched = BunchedOutputs(inner, requests)
    both = [output("r", 1), output("s", 1)]
    bunched.put_nowait((0, engine.EngineCoreOutputs(outputs=both)))
    del requests["r"]
    bunched.put_nowait((0, engine.EngineCoreOutputs(outputs=[output("s", 2)])))
    assert set(bunched._held) == {"s"}
    # A new request of the same name begins anew.
    requests["r"] = parameters()
    bunched.put_nowait((0, engine.EngineCoreOutputs(outputs=[output("r", 7, finished=True)])))
    assert [each.new_token_ids for _, message in sent(inner) for each in message.outputs] == [[7]]


def test_everything_else_goes_through() -> None:
    inner: queue.Queue[Any] = queue.Queue()
    bunched = BunchedOutputs(inner, {})
    utility = engine.UtilityOutput(3)
    items = [
        b"ENGINE_CORE_DEAD",
        (1, engine.EngineCoreOutputs(utility_output=utility)),
        (-1, engine.EngineCoreOutputs(scheduler_stats=SimpleNamespace())),
        (0, engine.EngineCoreOutputs(wave_complete=0)),
    ]
    for item in items:
        bunched.put_nowait(item)
    assert not bunched.empty()
    assert sent(inner) == items
