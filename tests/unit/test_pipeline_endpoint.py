"""Units of work, the ledger in front of them, and the keys."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.determinants import check_ledger
from data_pipeline.endpoint import Endpoint, PendingError, Unit, for_each, read_key, stream
from data_pipeline.ledger import Ledger
from data_pipeline.settings import ChainSettings, ModelSettings, read_settings
from tagpr.chat.asking import Asker, RequestRefusedError
from tagpr.chat.client import Outcome, Reply
from tagpr.chat.limits import AdaptiveLimit
from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, StageError

HELLO = Reply("hello", None, "stop", 3, 0, 1)
MODEL = ModelSettings(
    model="m", base_url=None, key_variable="SOME_KEY", key_file=None, revision="", temperature=0.0, top_p=1.0, max_tokens=5,
    request={}, concurrency=4, timeout_s=5.0, structured="none", mode="sync",
)  # fmt: skip


class Fake:
    """An attempt that answers by ``answer(number of the request)`` and keeps what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self.answer: Callable[[int], Outcome] = lambda _: Outcome(HELLO, status=200)

    async def attempt(self, body: Mapping[str, Any]) -> Outcome:
        self.bodies.append(body)
        number = len(self.bodies)
        await asyncio.sleep(0)
        return self.answer(number)


@pytest.fixture
def fake() -> Fake:
    return Fake()


def ask(
    fake: Fake, path: Path, *units: Unit, settings: ModelSettings = MODEL, deferred: Any = None
) -> tuple[list[Reply], Endpoint]:
    async def work() -> tuple[list[Reply], Endpoint]:
        with Ledger(path) as ledger:
            asker = Asker(
                "chains.judge", fake.attempt, base_url="url", key_variable="SOME_KEY", retries=1, limit=AdaptiveLimit(4)
            )  # fmt: skip
            endpoint = Endpoint("judge", settings, ledger, 0, asker, deferred)
            return await for_each("test", units, endpoint.ask, settings.concurrency), endpoint

    return asyncio.run(work())


def test_a_reply_is_paid_for_once_however_often_it_is_asked(fake: Fake, tmp_path: Path) -> None:
    units = [Unit("judge", "same"), Unit("judge", "same"), Unit("judge", "same", attempt=1)]
    replies, _ = ask(fake, tmp_path / "l.sqlite", *units)
    assert [reply.text for reply in replies] == ["hello"] * 3
    assert len(fake.bodies) == 2
    _, endpoint = ask(fake, tmp_path / "l.sqlite", *units)
    assert len(fake.bodies) == 2
    assert endpoint.counts == {"from_ledger": 3}


def test_what_determines_a_reply_makes_another_unit(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    unit = Unit("teacher", "p", sample="s", rollout=0)
    ask(fake, path, unit, Unit("teacher", "p", sample="s", rollout=1), Unit("teacher", "p", sample="t"))
    ask(fake, path, Unit("teacher", "p", sample="s", request={"temperature": 1.0}))
    for change in ({"model": "n"}, {"revision": "2"}, {"max_tokens": 6}, {"request": {"top_k": 20}}):
        ask(fake, path, unit, settings=MODEL.model_copy(update=change))
    assert len(fake.bodies) == 8
    ask(fake, path, unit, settings=MODEL.model_copy(update={"concurrency": 1, "timeout_s": 9.0}))
    assert len(fake.bodies) == 8
    assert len({(body["seed"]) for body in fake.bodies[:3]}) == 3


def test_what_was_answered_before_a_failure_is_kept(fake: Fake, tmp_path: Path) -> None:
    refused = Outcome(None, "refused_key", 401)
    fake.answer = lambda number: Outcome(HELLO, status=200) if number <= 10 else refused
    with pytest.raises(StageError, match="refuses the key in SOME_KEY"):
        ask(fake, tmp_path / "l.sqlite", *(Unit("judge", str(number)) for number in range(50)))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert len(ledger) == 10
    assert len(fake.bodies) <= 10 + MODEL.concurrency


def test_a_refused_request_is_told_to_all_who_asked_it_and_is_no_reply(fake: Fake, tmp_path: Path) -> None:
    fake.answer = lambda _: Outcome(None, "bad_request", 400, "context_length_exceeded")
    refusals = []

    async def one(endpoint: Endpoint) -> None:
        with pytest.raises(RequestRefusedError, match="context_length_exceeded") as caught:
            await endpoint.ask(Unit("judge", "too long"))
        refusals.append(caught.value)

    async def work() -> None:
        with Ledger(tmp_path / "l.sqlite") as ledger:
            asker = Asker(
                "chains.judge", fake.attempt, base_url="u", key_variable="K", retries=1, limit=AdaptiveLimit(4)
            )  # fmt: skip
            endpoint = Endpoint("judge", MODEL, ledger, 0, asker)
            await asyncio.gather(one(endpoint), one(endpoint))
            assert len(ledger) == 0

    asyncio.run(work())
    assert (len(refusals), len(fake.bodies)) == (2, 1)


def test_a_unit_of_a_batch_is_noted_and_not_asked(fake: Fake, tmp_path: Path) -> None:
    added = []

    class Batch:
        def add(self, key: str, role: str, body: Mapping[str, Any], **more: Any) -> None:
            added.append((role, body["messages"], more["kind"], more["noted"]["attempt"]))

    with pytest.raises(PendingError):
        ask(fake, tmp_path / "l.sqlite", Unit("judge", "p", attempt=1), deferred=Batch())
    assert added == [("judge", [{"role": "user", "content": "p"}], "judge", 1)]
    assert fake.bodies == []


def test_a_stream_draws_items_only_as_there_is_room_and_ends_at_the_first_error() -> None:
    drawn, done = [], []

    def items() -> Any:
        for number in range(1000):
            drawn.append(number)
            yield number

    async def work(number: int) -> None:
        await asyncio.sleep(0)
        if number == 100:
            raise StageError("enough")
        done.append(number)

    with pytest.raises(StageError, match=r"^enough$"):
        asyncio.run(stream(items(), work, 7))
    assert len(drawn) - len(done) <= 7
    assert len(drawn) < 120


def test_a_key_comes_from_a_file_or_a_variable_and_errors_name_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^chains.judge.key_variable=NO_SUCH_KEY: .* not set"):
        read_key("chains.judge", "NO_SUCH_KEY", None)
    monkeypatch.setenv("NO_SUCH_KEY", " sk-1 \n")
    assert read_key("chains.judge", "NO_SUCH_KEY", None) == "sk-1"
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match=r"^chains.judge.key_file=.*key: cannot be read"):
        read_key("chains.judge", "NO_SUCH_KEY", str(file))
    for bad in ("", "two words", "ключ"):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="holds no API key"):
            read_key("chains.judge", "NO_SUCH_KEY", str(file))
    file.write_text("sk-2\n")
    assert read_key("chains.judge", "NO_SUCH_KEY", str(file)) == "sk-2"


# ledger


def test_only_one_run_may_use_a_ledger(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite"), pytest.raises(StageError, match="another run is using this ledger"):
        Ledger(tmp_path / "l.sqlite")
    with Ledger(tmp_path / "l.sqlite"):
        pass


def test_a_file_that_is_no_ledger_or_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(StageError, match="SQLite cannot use this file"):
        Ledger(path)
    assert path.read_bytes().startswith(b"not a database")
    old = tmp_path / "old.sqlite"
    with sqlite3.connect(old) as database:
        database.execute("PRAGMA user_version=1")
    for _ in range(2):
        with pytest.raises(
            StageError, match=r"is a ledger of layout 1, this version reads 2. Set chains.ledger"
        ):
            Ledger(old)


def test_rows_are_durable_after_commit_and_totals_add_up(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.record("k", "judge", "m", {"seed": 1}, HELLO)
        assert ledger.get("k") is None
        ledger.commit()
        assert ledger.get("k") == HELLO
        ledger.record("l", "judge", "m", {"seed": 2}, HELLO, batch=True)
        ledger.commit()
        assert ledger.totals() == {
            "judge": {"replies": 2, "prompt_tokens": 6, "cached_prompt_tokens": 0, "completion_tokens": 2}
        }
        assert [row.batch for row in ledger.spent()] == [False, True]
    assert (tmp_path / "l.sqlite").stat().st_mode & 0o077 == 0
    with sqlite3.connect(tmp_path / "l.sqlite") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_full_disk_is_one_line_and_what_was_committed_is_kept(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    fake.answer = lambda _: Outcome(Reply("x" * 20_000, None, "stop", 3, 0, 1), status=200)

    async def work() -> None:
        with Ledger(path) as ledger:
            ledger._database.execute("PRAGMA max_page_count=60")
            asker = Asker(
                "chains.judge", fake.attempt, base_url="u", key_variable="K", retries=1, limit=AdaptiveLimit(4)
            )  # fmt: skip
            endpoint = Endpoint("judge", MODEL, ledger, 0, asker)
            await for_each("test", [Unit("judge", str(number)) for number in range(50)], endpoint.ask, 4)

    with pytest.raises(
        StageError, match=r"l.sqlite: SQLite cannot use this file \(database or disk is full\)"
    ):
        asyncio.run(work())
    with Ledger(path) as ledger:
        kept = len(ledger)
        assert 0 < kept < 50
    asked = len(fake.bodies)
    assert asked - kept <= 2 * MODEL.concurrency
    ask(fake, path, *(Unit("judge", str(number)) for number in range(50)))
    assert len(fake.bodies) - asked == 50 - kept


def settings(*overrides: str) -> ChainSettings:
    return read_settings(resolve(compose("build_chains", ["setting=paper", *overrides])))


def test_a_ledger_of_other_settings_is_refused_before_it_is_paid_for_again(tmp_path: Path) -> None:
    before = {"judge": {"chains.judge.model": "gpt-4o"}, "teacher": {}, "tagger": {}}
    now = {**before, "judge": {"chains.judge.model": "gpt-5"}}
    with Ledger(tmp_path / "l.sqlite") as ledger:
        check_ledger(ledger, before, settings())
        check_ledger(ledger, now, settings())  # nothing was paid for yet
        check_ledger(ledger, before, settings())
        ledger.record("k", "judge", "gpt-4o", {}, HELLO)
        ledger.commit()
        with pytest.raises(
            StageError,
            match=r"its 1 judge replies were paid for with chains.judge.model=gpt-4o, this run has gpt-5",
        ):
            check_ledger(ledger, now, settings())
        check_ledger(ledger, before, settings())
        check_ledger(ledger, now, settings("chains.extend_ledger=true"))
        assert json.loads(ledger.note("paid_for") or "")["judge"] == now["judge"]
