"""The reward client against a small fake server that misbehaves on demand."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tagpr.errors import ConfigError, RewardServerError
from tagpr.prmu.client import RewardClient, check_server, sigmoid
from tagpr.prmu.wire import NOT_FINITE, ScoreItem, read_address, read_token
from tagpr.schema import PrmuScore

VERSION = "abc123"
TOKEN = "0123456789abcdef"

Answer = tuple[int, bytes | dict[str, Any], dict[str, str]]


def right(request: dict[str, Any]) -> Answer:
    scores = [
        {
            "id": item["id"],
            "logit": float(i),
            "score": sigmoid(float(i)),
            "unknown_user": item["user_id"] == "?",
        }
        for i, item in enumerate(request["items"])
    ]
    return 200, {"model_version": VERSION, "scores": scores}, {}


class Fake:
    """Answers with each queued answer once, then with ``then``."""

    def __init__(self) -> None:
        self.queue: list[Callable[[dict[str, Any]], Answer] | Answer] = []
        self.then: Callable[[dict[str, Any]], Answer] | Answer = right
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with fake.lock:
                    fake.seen.append(request)
                    fake.headers.append(dict(self.headers))
                    fake.in_flight += 1
                    fake.most_in_flight = max(fake.in_flight, fake.most_in_flight)
                    step = fake.queue.pop(0) if fake.queue else fake.then
                try:
                    self.answer(step(request) if callable(step) else step)
                except BrokenPipeError:
                    pass  # the client gave up on this attempt
                finally:
                    with fake.lock:
                        fake.in_flight -= 1

            def do_GET(self) -> None:
                with fake.lock:
                    step = fake.queue.pop(0) if fake.queue else fake.then
                info = {"model_version": VERSION, "engine": "fake", "users": 2, "max_tokens": 9}
                self.answer((200, info, {}) if callable(step) else step)

            def answer(self, answer: Answer) -> None:
                status, body, headers = answer
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # of the default 5, forty connections at once lose some for a second

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.server.shutdown()
    server.server.server_close()


def items(count: int = 2) -> list[ScoreItem]:
    return [ScoreItem(id=f"row{i}", user_id=f"u{i}", prompt="p", response="r") for i in range(count)]


def ask(url: str, count: int = 2, **settings: Any) -> list[PrmuScore]:
    options: dict[str, Any] = {"timeout_s": 2.0, "deadline_s": 5.0, **settings}

    async def once() -> list[PrmuScore]:
        async with RewardClient(url, TOKEN, options.pop("expected_version", VERSION), **options) as client:
            return await client.score(items(count))

    return asyncio.run(once())


def body(**change: Any) -> Callable[[dict[str, Any]], Answer]:
    """A right answer with its first score changed."""

    def answer(request: dict[str, Any]) -> Answer:
        _, data, _ = right(request)
        assert isinstance(data, dict)
        data["scores"][0].update(change)
        return 200, data, {}

    return answer


def test_scores_come_in_order_with_version_and_token(fake: Fake) -> None:
    got = ask(fake.url, 3)
    assert [score.logit for score in got] == [0.0, 1.0, 2.0]
    assert got[1] == PrmuScore(logit=1.0, score=sigmoid(1.0), unknown_user=False, version=VERSION)
    assert fake.headers[0]["authorization"] == f"Bearer {TOKEN}"
    assert fake.seen[0]["items"][2] == {"id": "row2", "user_id": "u2", "prompt": "p", "response": "r"}


def test_no_items_ask_nobody(fake: Fake) -> None:
    assert ask(fake.url, 0) == []
    assert fake.seen == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_transient_faults_are_tried_again(fake: Fake, status: int) -> None:
    fake.queue = [(status, b"later", {})] * 2
    assert len(ask(fake.url)) == 2
    assert len(fake.seen) == 3


def test_retry_after_is_respected(fake: Fake) -> None:
    fake.queue = [(429, b"full", {"retry-after": "1"})]
    started = time.monotonic()
    ask(fake.url)
    assert time.monotonic() - started >= 0.5  # jitter takes at most half


def test_a_server_that_comes_back_is_found_again() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    late: list[ThreadingHTTPServer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            data = json.dumps(right(request)[1]).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    def start() -> None:
        late.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
        late[0].serve_forever(poll_interval=0.01)

    timer = threading.Timer(0.4, start)
    timer.start()
    try:
        assert len(ask(f"http://127.0.0.1:{port}")) == 2
    finally:
        timer.join(0.5)
        late[0].shutdown()
        late[0].server_close()


def test_deadline_names_the_server_and_how_long(fake: Fake) -> None:
    fake.then = (503, b"{}", {})
    started = time.monotonic()
    with pytest.raises(
        RewardServerError, match=rf"{fake.url}: no score for items row0, row1 after 0\.\d s"
    ) as caught:
        ask(fake.url, deadline_s=0.7)
    assert time.monotonic() - started < 1.5
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_nobody_listening_is_a_deadline_not_a_score() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RewardServerError, match="ConnectError"):
        ask(url, deadline_s=0.4)


def test_a_hung_attempt_is_given_up_and_tried_again(fake: Fake) -> None:
    def hang(request: dict[str, Any]) -> Answer:
        time.sleep(0.8)
        return right(request)

    fake.queue = [hang]
    started = time.monotonic()
    assert len(ask(fake.url, timeout_s=0.2)) == 2
    assert time.monotonic() - started < 0.75


def test_deadline_cuts_a_hung_attempt_short(fake: Fake) -> None:
    def hang(request: dict[str, Any]) -> Answer:
        time.sleep(1.0)
        return right(request)

    fake.then = hang
    started = time.monotonic()
    with pytest.raises(RewardServerError, match="no score"):
        ask(fake.url, timeout_s=30.0, deadline_s=0.3)
    assert time.monotonic() - started < 0.9


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_refused_requests_fail_at_once_with_the_item(fake: Fake, status: int) -> None:
    fake.then = (status, {"code": "too_long", "message": "9,000 tokens", "item": "row1"}, {})
    with pytest.raises(RewardServerError, match=rf"refused item row1 \(HTTP {status}\): 9,000 tokens"):
        ask(fake.url)
    assert len(fake.seen) == 1


def test_refusal_without_reason_names_the_items_sent(fake: Fake) -> None:
    fake.then = (400, b"<html>", {})
    with pytest.raises(RewardServerError, match=r"refused items row0, row1, row2, \.\.\. "):
        ask(fake.url, 5)


def test_refused_token_says_so(fake: Fake) -> None:
    fake.then = (401, b"", {})
    with pytest.raises(RewardServerError, match="refused the token"):
        ask(fake.url)
    assert len(fake.seen) == 1


def test_a_model_that_gives_no_number_is_not_asked_again(fake: Fake) -> None:
    fake.then = (500, {"code": NOT_FINITE, "message": "logit is nan", "item": "row0"}, {})
    with pytest.raises(RewardServerError, match="item row0"):
        ask(fake.url)
    assert len(fake.seen) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, b"\x00garbage", {}), "not a valid score"),
        ((200, b"[]", {}), "not a valid score"),
        (body(logit=float("nan")), "item row0 is not a valid score"),
        (body(logit=float("inf")), "item row0 is not a valid score"),
        (body(score=1.5), "item row0 is not a valid score"),
        (body(score=None), "item row0 is not a valid score"),
        (body(logit=2.0, score=0.5), "score 0.5 is not sigmoid of logit 2"),
        (body(id="other"), "not one for each of items row0, row1"),
        ((200, {"model_version": VERSION, "scores": []}, {}), "answered 0 scores"),
        ((200, {"model_version": "zzz", "scores": []}, {}), "serves PRMU zzz, expected abc123"),
        ((302, b"", {"location": "/elsewhere"}), "HTTP 302"),
    ],
)
def test_an_answer_that_cannot_be_trusted_is_an_error_at_once(fake: Fake, answer: Any, says: str) -> None:
    fake.then = answer
    with pytest.raises(RewardServerError, match=says):
        ask(fake.url)
    assert len(fake.seen) == 1


def test_version_is_learned_once_and_then_insisted_on(fake: Fake) -> None:
    async def swap() -> None:
        async with RewardClient(fake.url, TOKEN, None, deadline_s=2.0) as client:
            await client.score(items())
            assert client.versions == (VERSION,)
            fake.then = (200, {"model_version": "new", "scores": []}, {})
            await client.score(items())

    with pytest.raises(RewardServerError, match="serves PRMU new, expected abc123"):
        asyncio.run(swap())


def test_concurrency_is_bounded_and_latencies_are_counted(fake: Fake) -> None:
    def slow(request: dict[str, Any]) -> Answer:
        time.sleep(0.02)
        return right(request)

    fake.then = slow

    async def flood() -> dict[str, float]:
        async with RewardClient(fake.url, TOKEN, VERSION, concurrency=3) as client:
            await asyncio.gather(*(client.score(items()) for _ in range(15)))
            assert len(client.latencies) == 15
            stats = client.pop_stats()
            assert set(client.pop_stats().values()) == {0.0}
            return stats

    stats = asyncio.run(flood())
    assert 1 < fake.most_in_flight <= 3
    assert stats["requests"] == 15
    assert 0.02 <= stats["latency_p50_s"] <= stats["latency_p99_s"] <= stats["latency_max_s"]


def test_a_client_moves_to_another_event_loop(fake: Fake) -> None:
    client = RewardClient(fake.url, TOKEN, VERSION)
    for _ in range(2):
        assert len(asyncio.run(client.score(items()))) == 2


def test_environment_proxies_are_ignored(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert len(ask(fake.url, deadline_s=1.0)) == 2


def test_check_server_waits_then_answers(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake.queue = [(503, b"loading", {})] * 3
    with caplog.at_level(logging.WARNING):
        info = check_server(fake.url + "/", TOKEN, VERSION, deadline_s=5.0)
    assert (info.model_version, info.users) == (VERSION, 2)
    assert [r.getMessage().split(" since")[0] for r in caplog.records] == [
        f"waiting for reward server at {fake.url}"
    ]


def test_check_server_refuses_another_checkpoint(fake: Fake) -> None:
    with pytest.raises(RewardServerError, match=rf"{fake.url}: serves PRMU abc123, expected def"):
        check_server(fake.url, TOKEN, "def", deadline_s=1.0)


def test_check_server_gives_up(fake: Fake) -> None:
    fake.then = (503, b"", {})
    with pytest.raises(
        RewardServerError, match=rf"{fake.url}: no reward server after 0\.\d s \(last: HTTP 503"
    ):
        check_server(fake.url, TOKEN, VERSION, deadline_s=0.5)


def test_check_server_refuses_what_is_no_reward_server(fake: Fake) -> None:
    fake.then = (200, b"<html>", {})
    with pytest.raises(RewardServerError, match="is not a reward server"):
        check_server(fake.url, TOKEN, VERSION, deadline_s=0.5)


def test_address_file(tmp_path: Any) -> None:
    with pytest.raises(RewardServerError, match=r"serve_prmu\.sh"):
        read_address(tmp_path / "server.json")
    (tmp_path / "server.json").write_text('{"url": 1}')
    with pytest.raises(RewardServerError, match="is not the address"):
        read_address(tmp_path / "server.json")
    (tmp_path / "server.json").write_text('{"url": "http://x", "model_version": "v", "pid": 3}')
    assert read_address(tmp_path / "server.json").url == "http://x"


def test_token_comes_from_file_before_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAGPR_PRMU_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("TAGPR_PRMU_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    (tmp_path / "token").write_text("f" * 20 + "\n")
    assert read_token(tmp_path / "token") == "f" * 20
    (tmp_path / "token").write_text("short")
    with pytest.raises(ConfigError, match="no usable token"):
        read_token(tmp_path / "token")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")
