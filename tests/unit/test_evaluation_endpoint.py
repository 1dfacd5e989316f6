"""An endpoint as an engine: whatever it does, every row is answered once, refused by name, or the run stops with one line."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_evaluation_generate import FakeRenderer, examples

from tagpr.chat.client import Outcome
from tagpr.chat.client import Reply as ChatReply
from tagpr.errors import ConfigError, StageError
from tagpr.evaluation.engines import Completion, Request, Sampling, open_engine
from tagpr.evaluation.engines.endpoint import EndpointEngine, completion_of, whole
from tagpr.evaluation.generate import answer
from tagpr.evaluation.methods import Method
from tagpr.evaluation.prompts import PromptSettings
from tagpr.evaluation.rows import RowFile
from tagpr.evaluation.score import score_row
from tests.faults.faulty_endpoint import FaultyEndpoint, Reply, completion

PROMPTS = PromptSettings(8, "recency", 100, 20, 0)
TEXT = "<think>\nfine.\n</think>\n\n5"


async def parrot(body: dict[str, Any]) -> Reply:
    """Answers with the prompt, so that mixed-up answers show."""
    return 200, completion(f"<think>\n{body['messages'][0]['content']}\n</think>\n\n5")


def requests(number: int, seed: int | None = None) -> list[Request]:
    return [Request((f"r{n}", seed), (), f"prompt r{n}.") for n in range(number)]


def method(url: str, **changes: Any) -> Method:
    return Method("gpt", "gpt-4o", **{"endpoint": url, "timeout_s": 5.0, "concurrency": 8, **changes})


def ask(method: Method, number: int = 20, sampling: Sampling | None = None) -> list[Completion]:
    with EndpointEngine(method, PROMPTS, sampling or Sampling(0.0, 1.0)) as engine:
        return [each for each in engine.complete(requests(number)) if each is not None]


def test_the_request_says_what_is_wanted_and_the_method_has_the_last_word() -> None:
    request = {"temperature": None, "max_tokens": None, "max_completion_tokens": 9, "top_k": 3}
    plain = EndpointEngine(method("http://x/v1"), PROMPTS, Sampling(0.0, 0.7))
    assert plain.body(requests(1)[0]) == {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": "prompt r0."}],
        "max_tokens": 20,
        "temperature": 0.0,
    }
    seeded = plain.body(requests(2, seed=4)[1])
    assert seeded["temperature"] == 0.7
    assert seeded["seed"] == Sampling(0.0, 0.7).of(("r1", 4))[1] != plain.body(requests(1, seed=4)[0])["seed"]
    own = EndpointEngine(method("http://x/v1", request=request), PROMPTS, Sampling(0.0, 0.7))
    assert own.body(requests(1)[0]) == {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": "prompt r0."}],
        "max_completion_tokens": 9,
        "top_k": 3,
    }


def test_a_method_s_own_temperature_holds_for_all_its_answers() -> None:
    settings: Any = None  # of the offline engine
    engine = open_engine(method("http://x/v1", temperature=0.6), settings, PROMPTS, 1.0)
    assert isinstance(engine, EndpointEngine)
    for seed in (None, 3):
        body = engine.body(requests(1, seed)[0])
        assert body["temperature"] == 0.6
        assert isinstance(body["seed"], int)


def test_every_fault_at_once_and_nothing_is_lost_or_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagpr.chat.asking.FIRST_WAIT_S", 0.02)
    with FaultyEndpoint(parrot, share=0.5, delay_s=0.8) as endpoint:
        done = ask(method(endpoint.url, retries=8), 60)
    assert {completion.key: completion.text for completion in done} == {
        (f"r{n}", None): f"<think>\nprompt r{n}.\n</think>\n\n5" for n in range(60)
    }
    assert len(done) == 60
    assert set(endpoint.met) - {""} == {"429", "500", "delay", "cut", "truncated_json", "finish_abort"}
    assert endpoint.most_at_once <= 8 + endpoint.met["delay"]


def test_a_refused_key_stops_at_once_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-wrong")
    with FaultyEndpoint(parrot, key="sk-right") as endpoint:
        with pytest.raises(
            StageError, match=r"evaluate.models.gpt: .* refuses the key in SOME_KEY"
        ) as caught:
            ask(method(endpoint.url, key_variable="SOME_KEY"), 500)
    assert "\n" not in str(caught.value)
    assert "sk-wrong" not in str(caught.value)
    assert endpoint.met["401"] <= 8
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match=r"evaluate.models.gpt.key_variable=SOME_KEY: .* not set"):
        EndpointEngine(method("http://x/v1", key_variable="SOME_KEY"), PROMPTS, Sampling(0.0, 1.0))


def test_when_one_request_fails_for_good_those_under_way_are_waited_for() -> None:
    """They are paid for."""
    failing = asyncio.Event()

    async def one_fails(body: dict[str, Any]) -> Reply:
        if "r0." in body["messages"][0]["content"]:
            while endpoint.under_way < 4:
                await asyncio.sleep(0.01)
            failing.set()
            return 500, {"error": {"message": "no"}}
        await failing.wait()
        await asyncio.sleep(0.2)
        return await parrot(body)

    with FaultyEndpoint(one_fails) as endpoint:
        with EndpointEngine(
            method(endpoint.url, retries=0, concurrency=4), PROMPTS, Sampling(0.0, 1.0)
        ) as engine:
            done: list[Completion | None] = []
            with pytest.raises(StageError, match=r"evaluate.models.gpt.endpoint=.*: no answer after 1 tries"):
                done.extend(engine.complete(requests(100)))
        assert len([each for each in done if each is not None]) == 3
        assert endpoint.under_way == 0


def test_a_consumer_that_stops_leaves_no_request_behind() -> None:
    with FaultyEndpoint(parrot) as endpoint:
        with EndpointEngine(method(endpoint.url), PROMPTS, Sampling(0.0, 1.0)) as engine:
            with closing(engine.complete(requests(500))) as completions:
                assert next(each for each in completions if each is not None)
        time.sleep(0.1)
        assert endpoint.under_way == 0
        assert sum(endpoint.asked.values()) < 100


def test_time_passes_while_nothing_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagpr.evaluation.engines.endpoint.TICK_S", 0.05)

    async def slow(body: dict[str, Any]) -> Reply:
        await asyncio.sleep(0.3)
        return await parrot(body)

    with FaultyEndpoint(slow) as endpoint:
        with EndpointEngine(method(endpoint.url), PROMPTS, Sampling(0.0, 1.0)) as engine:
            assert None in list(engine.complete(requests(1)))


class TextRenderer(FakeRenderer):
    """Characters for tokens, prompts that name their row."""

    def render(self, example: Any) -> Any:
        rendered = super().render(example)
        return type(rendered)(f"prompt {example.id}.", rendered.token_ids, 0, 0)

    def response_ids(self, text: str) -> Sequence[int]:
        return list(map(ord, text))


def evaluate(path: Path, url: str, rows: int, **changes: Any) -> tuple[int, RowFile]:
    with RowFile(path, {"model": "x"}) as file:
        done = answer(
            label="gpt",
            examples=examples(rows),
            seeds=[None],
            file=file,
            renderer=TextRenderer,  # type: ignore[arg-type]
            engine=lambda: EndpointEngine(method(url, **changes), PROMPTS, Sampling(0.0, 1.0)),
            score=lambda generation, example: score_row(generation, example, None),
            write_every_s=0.0,
        )
        return done, file


def test_refused_rows_are_named_and_the_others_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "gpt.jsonl"
    with FaultyEndpoint(parrot, refuse=("r3.", "r7.")) as endpoint:
        done, file = evaluate(path, endpoint.url, 12)
    assert done == 10
    assert {row["id"] for row in map(json.loads, path.read_text().splitlines())} == {
        f"r{n}" for n in range(12) if n not in (3, 7)
    }
    noted = [json.loads(line) for line in (tmp_path / "gpt.unanswered.jsonl").read_text().splitlines()]
    assert {(row["id"], row["reason"]) for row in noted} == {("r3", "refused"), ("r7", "refused")}
    assert noted[0]["detail"] == "400 context_length_exceeded: injected 400"
    assert "r3 is refused: 400" in caplog.text
    assert set(file.unanswered) == {("r3", None), ("r7", None)}
    # The next run asks for nothing, so that even many refused rows leave a table; without the file, for them.
    with FaultyEndpoint(parrot, refuse=("r7.",)) as endpoint:
        assert evaluate(path, endpoint.url, 12)[0] == 0
        assert endpoint.met["400"] == 0
        (tmp_path / "gpt.unanswered.jsonl").unlink()
        done, file = evaluate(path, endpoint.url, 12)
        assert done == sum(endpoint.asked.values()) == 1
    assert set(file.unanswered) == {("r7", None)}


def test_reasoning_tokens_are_the_endpoint_s_where_it_says_so_and_counted_where_not(tmp_path: Path) -> None:
    async def reports(body: dict[str, Any]) -> Reply:
        reply = completion(TEXT)
        number = {"r0.": 123, "r1.": 0}.get(body["messages"][0]["content"].split()[1])
        if number is not None:
            reply["usage"]["completion_tokens_details"] = {"reasoning_tokens": number}
        return 200, reply

    path = tmp_path / "gpt.jsonl"
    with FaultyEndpoint(reports) as endpoint:
        evaluate(path, endpoint.url, 3)
    found = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert {id_: row["reasoning_tokens"] for id_, row in found.items()} == {"r0": 123, "r1": 5, "r2": 5}
    assert {row["response_tokens"] for row in found.values()} == {5}


def test_thinking_that_the_template_opens_is_pointed_out_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def unopened(body: dict[str, Any]) -> Reply:
        return 200, completion("fine.\n</think>\n\n5")

    with FaultyEndpoint(unopened) as endpoint:
        evaluate(tmp_path / "gpt.jsonl", endpoint.url, 5)
    assert caplog.text.count("set evaluate.models.gpt.tokenizer to the model's own") == 1


def test_an_endpoint_that_refuses_everything_is_no_table_of_nothing(tmp_path: Path) -> None:
    with FaultyEndpoint(parrot, refuse=("prompt",)) as endpoint:
        with pytest.raises(StageError, match="refuses the request with status 400"):
            evaluate(tmp_path / "gpt.jsonl", endpoint.url, 200)


def test_rows_that_came_before_a_failure_are_on_the_disk(tmp_path: Path) -> None:
    async def late(body: dict[str, Any]) -> Reply:
        if "r5." in body["messages"][0]["content"]:
            return 402, {"error": {"message": "pay", "code": "billing_not_active"}}
        return await parrot(body)

    path = tmp_path / "gpt.jsonl"
    with FaultyEndpoint(late) as endpoint:
        with pytest.raises(StageError, match="quota"):
            evaluate(path, endpoint.url, 20, concurrency=2, timeout_s=60.0)
        assert sum(endpoint.asked.values()) == len(path.read_text().splitlines()) >= 4


REQUEST = Request(("r0", None), (), "x")


@pytest.mark.parametrize(
    ("text", "reasoning", "finish", "thinking", "expected"),
    [
        ("5", "why", "stop", True, "<think>\nwhy\n</think>\n\n5"),
        ("\n\n5", "\nwhy\n", "stop", True, "<think>\nwhy\n</think>\n\n5"),
        ("", "why", "length", True, "<think>\nwhy"),
        ("5", "why", "length", True, "<think>\nwhy\n</think>\n\n5"),
        ("", "why", "stop", True, "<think>\nwhy\n</think>\n\n"),
        ("<think>\nwhy\n</think>\n\n5", None, "stop", True, "<think>\nwhy\n</think>\n\n5"),
        ("<think>\nwhy\n</think>\n\n5", "why", "stop", True, "<think>\nwhy\n</think>\n\n5"),
        ("5", "why", "stop", False, "5"),
        ("5", None, "stop", False, "5"),
    ],
)
def test_reasoning_beside_the_text_goes_back_before_it(
    text: str, reasoning: str | None, finish: str, thinking: bool, expected: str
) -> None:
    reply = ChatReply(text, reasoning, finish, 10, 0, 7, 4)
    found = completion_of(REQUEST, reply, thinking)
    assert found.text == expected
    assert (found.response_tokens, found.reasoning_tokens, found.finish_reason) == (7, 4, finish)


@pytest.mark.parametrize(
    ("finish", "counts_as"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("refusal", "content_filter"),
    ],
)
def test_a_filtered_reply_is_an_answer(finish: str, counts_as: str) -> None:
    reply = ChatReply("", None, finish, 10, 0, 0)
    assert whole(Outcome(reply, status=200)).reply is reply
    assert completion_of(REQUEST, reply, False).finish_reason == counts_as


@pytest.mark.parametrize("finish", ["abort", "error", "insufficient_system_resource", ""])
def test_a_reply_that_the_server_broke_off_is_asked_again(finish: str) -> None:
    outcome = whole(Outcome(ChatReply("half an ans", None, finish, 10, 0, 3), status=200))
    assert outcome.reply is None
    assert outcome.failure == "server_error"
