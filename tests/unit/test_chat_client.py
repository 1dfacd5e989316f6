"""One attempt over real HTTP: every way it can end is a value, and none of them shows the key."""

import asyncio
import datetime
import email.utils
import json
import logging
import pickle
import socket

import pytest
from pydantic import BaseModel

from tagpr.chat.client import ChatClient, Outcome, Reply, read_completion, retry_after_s
from tagpr.chat.structured import schema_format, structured_request
from tagpr.errors import ConfigError
from tests.unit.chat_fake import OK, Answer, http, serving

KEY = "canary-4f1c9a"
BODY = {"model": "m", "messages": [{"role": "user", "content": "Grüße"}]}
HELLO = Reply("hello", None, "stop", 30, 20, 4)


def attempt(answer: Answer, timeout_s: float = 5.0) -> Outcome:
    async def work() -> Outcome:
        async with serving(lambda *_: answer) as fake:
            client = ChatClient(fake.url, KEY, timeout_s=timeout_s, connections=2)
            try:
                outcome = await client.attempt(BODY)
            finally:
                await client.close()
            if fake.requests:
                head, body = fake.requests[0]
                assert head.startswith("POST /v1/chat/completions HTTP/1.1")
                assert f"Bearer {KEY}" in head
                assert body == BODY
            return outcome

    return asyncio.run(work())


def error(code: object = None, message: str = "no") -> dict[str, object]:
    return {"error": {"code": code, "type": "some_type", "message": message}}


@pytest.mark.parametrize(
    ("answer", "failure", "status", "code"),
    [
        (http(error("invalid_api_key"), 401), "refused_key", 401, "invalid_api_key"),
        (http(error(), 403), "refused_key", 403, "some_type"),
        (http(error("insufficient_quota"), 429), "no_quota", 429, "insufficient_quota"),
        (http(error(), 402), "no_quota", 402, "some_type"),
        (http(error("rate_limit_exceeded"), 429), "rate_limited", 429, "rate_limit_exceeded"),
        (http(error("overloaded"), 500), "server_error", 500, "overloaded"),
        (http("<html>bad gateway</html>", 502, kind="text/html"), "server_error", 502, ""),
        (http(error(), 408), "server_error", 408, "some_type"),
        (
            http(error("context_length_exceeded"), 400),
            "bad_request",
            400,
            "context_length_exceeded",
        ),
        (http(error("model_not_found"), 404), "bad_request", 404, "model_not_found"),
        (http("", 307, {"location": "http://127.0.0.1:1/"}), "bad_request", 307, ""),
        (http("<html>login</html>", kind="text/html"), "no_completion", 200, "no_completion"),
        (http({"choices": []}), "no_completion", 200, "no_completion"),
        (http([1]), "no_completion", 200, "no_completion"),
        (http(json.dumps(OK)[:40]), "server_error", 200, "broken_json"),
        (http("[" * 100_000), "server_error", 200, "broken_json"),
        (http(error(429, "upstream")), "rate_limited", 429, "429"),
        (http(OK)[:-20], "unreachable", None, "dropped"),
        (b"HTTP/1.1 200 X\r\nconte", "unreachable", None, "dropped"),
        (b"SMTP ready\r\n\r\n", "unreachable", None, "ClientResponseError"),
        (None, "unreachable", None, "dropped"),
        (20.0, "timeout", None, "timeout"),
    ],
)
def test_every_end_has_a_name(answer: Answer, failure: str, status: int | None, code: str) -> None:
    outcome = attempt(answer, timeout_s=0.3 if answer == 20.0 else 5.0)
    assert (outcome.reply, outcome.failure, outcome.status, outcome.code) == (None, failure, status, code)
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_a_reply_with_its_tokens() -> None:
    outcome = attempt(http(OK))
    assert outcome == Outcome(HELLO, status=200)
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_a_reply_that_trickles_in_for_ever_is_a_timeout() -> None:
    async def work() -> Outcome:
        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 1000\r\n\r\n")
            try:
                for _ in range(200):
                    writer.write(b" ")
                    await asyncio.sleep(0.05)
            except ConnectionError:
                pass
            writer.close()

        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        client = ChatClient(url, KEY, timeout_s=0.3, connections=1)
        outcome = await client.attempt(BODY)
        await client.close()
        server.close()
        return outcome

    assert asyncio.run(work()).failure == "timeout"


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"

    async def work() -> Outcome:
        client = ChatClient(url, KEY, timeout_s=5.0, connections=1)
        outcome = await client.attempt(BODY)
        await client.close()
        return outcome

    outcome = asyncio.run(work())
    assert (outcome.failure, outcome.code) == ("unreachable", "ClientConnectorError")


@pytest.mark.parametrize(
    ("message", "extra", "text", "reasoning", "finish"),
    [
        ({"content": "a", "reasoning_content": "r"}, "stop", "a", "r", "stop"),
        ({"content": "a", "reasoning": "r"}, "length", "a", "r", "length"),
        ({"content": None, "refusal": "I cannot."}, "stop", "", None, "refusal"),
        ({"content": "a", "refusal": None}, None, "a", None, ""),
    ],
)
def test_forms_of_a_reply(
    message: dict[str, object], extra: str | None, text: str, reasoning: str | None, finish: str
) -> None:
    reply = read_completion({"choices": [{"message": message, "finish_reason": extra}]})
    assert reply == Reply(text, reasoning, finish, 0, 0, 0)


def test_retry_after_in_its_three_forms() -> None:
    assert retry_after_s({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after_s({"retry-after": "9"}) == 9.0
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    wait = retry_after_s({"retry-after": email.utils.format_datetime(soon, usegmt=True)})
    assert wait is not None
    assert 27.0 < wait <= 30.0
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    for nonsense in ("", "soon", "-3", "nan", "inf"):
        assert retry_after_s({"retry-after": nonsense}) is None
    assert attempt(http(error(), 429, {"Retry-After": "7"})).retry_after_s == 7.0


def test_what_a_server_echoes_is_one_short_line_without_the_key() -> None:
    outcome = attempt(http(error(KEY, f"wrong key\n{KEY}\x1b[31m\u2028 " + "x" * 900), 400))
    assert KEY not in repr(outcome)
    assert outcome.code == "***"
    assert outcome.message.startswith("wrong key ***")
    assert len(outcome.message) <= 200
    assert outcome.message.isprintable()


def test_the_key_is_in_no_log_and_no_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for answer in (http(OK), None, http(error(message=KEY), 401)):
        outcome = attempt(answer)
        assert KEY not in repr(outcome)
    client = ChatClient("http://127.0.0.1:1/v1", KEY, timeout_s=1.0, connections=1)
    assert KEY not in repr(client) + str(client)
    with pytest.raises(TypeError, match="holds a key"):
        pickle.dumps(client)
    assert KEY not in caplog.text


def test_a_key_that_no_header_can_carry() -> None:
    with pytest.raises(ConfigError, match="no HTTP header can carry") as caught:
        ChatClient("http://127.0.0.1:1/v1", f"{KEY}\nx: y", timeout_s=1.0, connections=1)
    assert KEY not in str(caught.value)


def test_the_environment_s_proxy_is_used_except_where_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert attempt(http(OK)).failure == "unreachable"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert attempt(http(OK)).reply == HELLO


class Score(BaseModel):
    """One dimension."""

    dimension: str
    score: int


class Verdict(BaseModel):
    """All of them."""

    scores: list[Score]


def test_schemas_are_strict() -> None:
    sent = schema_format(Verdict, "verdict")
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["strict"] is True
    assert sent["json_schema"]["name"] == "verdict"
    schema = sent["json_schema"]["schema"]
    for part in (schema, schema["$defs"]["Score"]):
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])
    assert structured_request("json_schema", Verdict, "verdict") == {"response_format": sent}
    assert structured_request("json_object", Verdict, "v") == {"response_format": {"type": "json_object"}}
    assert structured_request("none", Verdict, "v") == {}
