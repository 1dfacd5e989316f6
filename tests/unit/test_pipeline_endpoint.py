"""The client side against a small HTTP server on loopback: what is retried, what stops at once, what is kept."""

import asyncio
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_pipeline import endpoint as endpoint_module
from data_pipeline.endpoint import Endpoint, Unit, for_each, read_key
from data_pipeline.ledger import Ledger, Reply
from data_pipeline.settings import ModelSettings
from tagpr.errors import ConfigError, StageError

KEY = "canary-key-8d1f"
OK = {
    "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}
MODEL = ModelSettings(
    model="m", base_url=None, key_variable="SOME_KEY", revision="", temperature=0.0, top_p=1.0, max_tokens=5, request={},
    concurrency=4, timeout_s=5.0,
)  # fmt: skip


class Fake:
    """Answers by ``answer(number of the request)``: (status, headers, body)."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.answer: Callable[[int], tuple[int, dict[str, str], str]] = lambda _: (200, {}, json.dumps(OK))
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                fake.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                status, headers, text = fake.answer(len(fake.bodies))
                kind = "application/json" if text.startswith("{") else "text/html"
                self.send_response(status)
                for name, value in {
                    "content-type": kind,
                    "content-length": str(len(text)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_S", 0.001)


def ask(
    url: str, ledger_path: Path, *units: Unit, retries: int = 3, settings: ModelSettings = MODEL
) -> tuple[list[Reply], Endpoint]:
    async def work() -> tuple[list[Reply], Endpoint]:
        with Ledger(ledger_path) as ledger:
            endpoint = Endpoint("chains.judge", settings, ledger, 0, retries, url, KEY)
            try:
                return await for_each("test", units, endpoint.ask, settings.concurrency), endpoint
            finally:
                await endpoint.close()

    return asyncio.run(work())


def test_a_reply_is_paid_for_once_however_often_it_is_asked(fake: Fake, tmp_path: Path) -> None:
    units = [Unit("judge", "same"), Unit("judge", "same"), Unit("judge", "same", attempt=1)]
    replies, _ = ask(fake.url, tmp_path / "l.sqlite", *units)
    assert [reply.text for reply in replies] == ["hello"] * 3
    assert len(fake.bodies) == 2
    _, endpoint = ask(fake.url, tmp_path / "l.sqlite", *units)
    assert len(fake.bodies) == 2
    assert endpoint.counts == {"from_ledger": 3}


def test_what_determines_a_reply_makes_another_unit(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    unit = Unit("teacher", "p", sample="s", rollout=0)
    ask(fake.url, path, unit, Unit("teacher", "p", sample="s", rollout=1), Unit("teacher", "p", sample="t"))
    ask(fake.url, path, Unit("teacher", "p", sample="s", request={"temperature": 1.0}))
    for change in ({"model": "n"}, {"revision": "2"}, {"max_tokens": 6}, {"request": {"top_k": 20}}):
        ask(fake.url, path, unit, settings=MODEL.model_copy(update=change))
    assert len(fake.bodies) == 8
    ask(fake.url, path, unit, settings=MODEL.model_copy(update={"concurrency": 1, "timeout_s": 9.0}))
    assert len(fake.bodies) == 8
    assert len({(body["seed"]) for body in fake.bodies[:3]}) == 3


def test_429_and_500_are_retried_and_counted(fake: Fake, tmp_path: Path) -> None:
    answers = {
        1: (429, {"retry-after-ms": "1"}, "{}"),
        2: (500, {}, "{}"),
        3: (503, {"retry-after": "0.001"}, "{}"),
    }
    fake.answer = lambda number: answers.get(number, (200, {}, json.dumps(OK)))
    replies, endpoint = ask(fake.url, tmp_path / "l.sqlite", Unit("judge", "p"))
    assert replies[0].text == "hello"
    assert endpoint.counts == {
        "retried_429": 1, "retried_500": 1, "retried_503": 1, "asked": 1, "prompt_tokens": 3, "completion_tokens": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "refuses the key in SOME_KEY"),
        (403, {"error": {"message": KEY}}, "refuses the key in SOME_KEY"),
        (404, {"error": {"code": "model_not_found", "message": KEY}}, "model_not_found"),
        (429, {"error": {"code": "insufficient_quota", "message": KEY}}, "quota"),
        (200, {"unexpected": True}, "no chat completion"),
    ],
)
def test_what_no_retry_can_mend_stops_at_once(
    fake: Fake, tmp_path: Path, status: int, body: dict[str, object], says: str
) -> None:
    fake.answer = lambda _: (status, {}, json.dumps(body))
    units = [Unit("judge", str(number)) for number in range(200)]
    with pytest.raises(StageError, match=says) as error:
        ask(fake.url, tmp_path / "l.sqlite", *units)
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)
    assert len(fake.bodies) <= MODEL.concurrency


def test_a_web_page_is_no_completion(fake: Fake, tmp_path: Path) -> None:
    fake.answer = lambda _: (200, {}, "<html>login</html>")
    with pytest.raises(StageError, match="no chat completion"):
        ask(fake.url, tmp_path / "l.sqlite", Unit("judge", "p"))


def test_an_endpoint_that_is_down_is_named(fake: Fake, tmp_path: Path) -> None:
    fake.server.shutdown()
    fake.server.server_close()
    with pytest.raises(
        StageError, match=r"^chains.judge.base_url=http://127.0.0.1:\d+/v1: no answer after 3 tries"
    ):
        ask(fake.url, tmp_path / "l.sqlite", Unit("judge", "p"), retries=2)


def test_what_was_answered_before_a_failure_is_kept(fake: Fake, tmp_path: Path) -> None:
    fake.answer = lambda number: (200, {}, json.dumps(OK)) if number <= 10 else (401, {}, "{}")
    with pytest.raises(StageError):
        ask(fake.url, tmp_path / "l.sqlite", *(Unit("judge", str(number)) for number in range(50)))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert len(ledger) == 10


def test_the_key_is_in_no_file_and_no_log(
    fake: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ask(fake.url, tmp_path / "l.sqlite", Unit("judge", "p"))
    assert KEY not in caplog.text
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert files
    assert all(KEY.encode() not in path.read_bytes() for path in files)


def test_a_key_that_is_not_set_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^chains.judge.key_variable=NO_SUCH_KEY: .* not set"):
        read_key("chains.judge", "NO_SUCH_KEY")


# ledger

REPLY = Reply("text", None, "stop", 1, 2)


def test_only_one_run_may_use_a_ledger(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite"), pytest.raises(StageError, match="another run is using this ledger"):
        Ledger(tmp_path / "l.sqlite")
    with Ledger(tmp_path / "l.sqlite"):
        pass


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(StageError, match="SQLite cannot use this file"):
        Ledger(path)
    assert path.read_bytes().startswith(b"not a database")


def test_rows_are_durable_after_commit_and_totals_add_up(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.record("k", "judge", "m", {"seed": 1}, REPLY)
        assert ledger.get("k") is None
        ledger.commit()
        assert ledger.get("k") == REPLY
        assert ledger.totals() == {"judge": {"replies": 1, "prompt_tokens": 1, "completion_tokens": 2}}
    assert (tmp_path / "l.sqlite").stat().st_mode & 0o077 == 0
    with sqlite3.connect(tmp_path / "l.sqlite") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
