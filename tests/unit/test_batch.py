"""Batches over real HTTP against the simulated files and batches: split, collected, never submitted twice, never overspent."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from data_pipeline.ledger import Ledger
from data_pipeline.provider_batches import BatchAddress, Batches, Progress
from data_pipeline.settings import BatchSettings, SimulatedFaults
from data_pipeline.simulated_http import Server
from tagpr.chat.asking import RequestRefusedError
from tagpr.chat.cost import Budget, BudgetReachedError, Price
from tagpr.errors import DataError, StageError

KEY = "canary-b7d1e2"
MODEL = "simulated-judge"
NO_FAULTS = {name: 0.0 for name in SimulatedFaults.model_fields if name != "teacher"}
PRICES = {MODEL: Price(1.0, 0.5, 10.0, batch=0.5)}


@dataclass
class Content:
    text: str
    finish_reason: str = "stop"


def reply(model: str, prompt: str, seed: int, changes: dict[str, float]) -> Content:
    if "unreadable" in prompt:
        raise DataError("prompt: cannot be read.")
    return Content(f"reply to {prompt}")


class Provider:
    """The simulated HTTP side in this process; ``faults`` can be changed at any time."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.calls: list[str] = []
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self.faults(**{})

    def faults(self, **changes: float) -> None:
        faults = SimulatedFaults(**{**NO_FAULTS, "teacher": {}, **changes})
        self._app = Server(KEY, (MODEL,), reply, faults, self.state).application()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls.append(f"{scope['method']} {scope['path']}")
        await self._app(scope, receive, send)

    def start(self) -> None:
        config = uvicorn.Config(self, log_level="error", access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def submitted(self) -> list[str]:
        """custom_id of every request that was ever put into a batch, in order."""
        ids = []
        for path in sorted(self.state.glob("batch_*.json")):
            lines = (self.state / f"{json.loads(path.read_text())['input_file_id']}.jsonl").read_text()
            ids += [json.loads(line)["custom_id"] for line in lines.splitlines()]
        return ids


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Provider]:
    provider = Provider(tmp_path / "provider")
    provider.start()
    yield provider
    provider.stop()


def body(prompt: str) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 50,
        "seed": 1,
    }


@dataclass
class Run:
    """One run: a fresh process's view of the ledger and the batches."""

    provider: Provider
    path: Path
    requests: int = 50_000
    megabytes: float = 100.0
    dollars: float | None = None
    retries: int = 3
    prompts: int = 30
    key: str = KEY

    def __call__(
        self, change: Callable[[Batches], None] = lambda _: None, *, submit: bool = True
    ) -> Progress:
        async def work() -> Progress:
            with Ledger(self.path) as ledger:
                spent = PRICES[MODEL].batch * sum(
                    row.prompt_tokens * 1e-6 + row.completion_tokens * 1e-5 for row in ledger.spent()
                )
                self.budget = Budget(self.dollars, PRICES, spent=spent)
                address = BatchAddress(self.provider.url, self.key, "SOME_KEY")
                settings = BatchSettings(requests=self.requests, megabytes=self.megabytes, poll_s=None)
                batches = Batches(ledger, {"judge": address}, settings, self.budget, self.retries)
                change(batches)
                self.refused = 0
                try:
                    for number in range(self.prompts):
                        if ledger.get(f"k{number}") is None:
                            try:
                                batches.add(
                                    f"k{number}",
                                    "judge",
                                    body(f"prompt {number}"),
                                    kind="judge",
                                    noted={"n": number},
                                )
                            except RequestRefusedError:
                                self.refused += 1
                    return await batches.advance(submit=submit)
                finally:
                    self.left_open = batches.open()
                    await batches.close()

        return asyncio.run(work())

    def replies(self) -> int:
        with Ledger(self.path) as ledger:
            return len(ledger)


def test_submit_in_one_process_collect_in_another(provider: Provider, tmp_path: Path) -> None:
    run = Run(provider, tmp_path / "l.sqlite")
    first = run()
    assert (first.submitted, first.batches, first.collected) == (30, 1, 0)
    assert str(first).startswith("submitted 30 units in 1 batches; 30 units wait in 1 batches. Run again")
    second = run(submit=False)
    assert (second.collected, second.open_units, second.open_batches) == (30, 0, 0)
    with Ledger(run.path) as ledger:
        known = ledger.get("k7")
        assert known is not None
        assert known.text == "reply to prompt 7"
        assert known.prompt_tokens > 0
        assert [(row.kind, row.model, row.batch, row.replies) for row in ledger.spent()] == [
            ("judge", MODEL, True, 30)
        ]
    third = run()
    assert (third.submitted, third.collected) == (0, 0)
    assert len(provider.submitted()) == 30


def test_files_are_split_by_requests_and_by_size(provider: Provider, tmp_path: Path) -> None:
    assert Run(provider, tmp_path / "a.sqlite", requests=7)().batches == 5
    one = len(json.dumps({"custom_id": "k1", "method": "POST", "url": "x" * 20, "body": body("prompt 1")}))
    by_size = Run(provider, tmp_path / "b.sqlite", megabytes=10 * one / 2**20)()
    assert by_size.batches in (3, 4)
    assert by_size.submitted == 30
    sizes = [
        (tmp_path / "provider" / f"{json.loads(path.read_text())['input_file_id']}.jsonl").stat().st_size
        for path in (tmp_path / "provider").glob("batch_*.json")
    ]
    assert len(sizes) == 5 + by_size.batches
    assert max(sizes) <= 10 * one


def test_running_again_before_it_has_ended_submits_nothing(provider: Provider, tmp_path: Path) -> None:
    provider.faults(batch_s=1000.0)
    run = Run(provider, tmp_path / "l.sqlite")
    run()
    for _ in range(3):
        again = run()
        assert (again.submitted, again.collected, again.open_units) == (0, 0, 30)
    assert len(provider.submitted()) == 30


class Killed(BaseException):
    """In place of kill -9: nothing after it is done, and what is on disk stays as it is."""


@pytest.mark.parametrize(
    "where", ["before_upload", "after_upload", "after_create", "mid_collect", "before_tick_off"]
)
def test_a_kill_anywhere_submits_nothing_twice_and_loses_nothing(
    provider: Provider, tmp_path: Path, where: str
) -> None:
    run = Run(provider, tmp_path / "l.sqlite", requests=10)

    def die(batches: Batches) -> None:
        client: Any = batches._clients["judge"]
        real_upload, real_options = client.files.create, client.with_options
        uploads = 0

        async def upload(**arguments: Any) -> Any:
            nonlocal uploads
            uploads += 1
            if where == "before_upload" and uploads == 2:
                raise Killed
            made = await real_upload(**arguments)
            if where == "after_upload" and uploads == 2:
                raise Killed
            return made

        def options(**arguments: Any) -> Any:
            quiet = real_options(**arguments)
            real_create = quiet.batches.create

            async def create(**body: Any) -> Any:
                made = await real_create(**body)
                if where == "after_create" and uploads == 2:
                    raise Killed
                return made

            quiet.batches.create = create
            return quiet

        client.files.create, client.with_options = upload, options

    def die_collecting(batches: Batches) -> None:
        def killed(*_: object, **__: object) -> None:
            raise Killed

        if where == "mid_collect":
            real, seen = batches._budget.spend, 0

            def spend(*arguments: Any, **named: Any) -> None:
                nonlocal seen
                seen += 1
                if seen == 15:
                    raise Killed
                real(*arguments, **named)

            batches._budget.spend = spend  # type: ignore[method-assign]
        else:
            batches._tick_off = killed  # type: ignore[method-assign, assignment]

    if where in ("mid_collect", "before_tick_off"):
        run()
        with pytest.raises(Killed):
            run(die_collecting)
    else:
        with pytest.raises(Killed):
            run(die)
    for _ in range(3):
        run()
    assert run.replies() == 30
    assert run.left_open == (0, 0)
    assert sorted(provider.submitted()) == sorted(f"k{number}" for number in range(30))


def test_a_batch_that_nobody_needs_any_more_is_not_created(provider: Provider, tmp_path: Path) -> None:
    run = Run(provider, tmp_path / "l.sqlite")

    def die(batches: Batches) -> None:
        async def killed(*_: object) -> None:
            raise Killed

        batches._adopted = killed  # type: ignore[method-assign, assignment]

    with pytest.raises(Killed):
        run(die)
    other = Run(provider, tmp_path / "l.sqlite", prompts=0)
    assert other().submitted == 0
    assert provider.submitted() == []


def test_failed_and_expired_lines_go_out_again(provider: Provider, tmp_path: Path) -> None:
    provider.faults(batch_failed=0.3, batch_expired=0.3)
    run = Run(provider, tmp_path / "l.sqlite", retries=30)
    for _ in range(20):
        run()
    assert run.replies() == 30
    sent = provider.submitted()
    assert set(sent) == {f"k{number}" for number in range(30)}
    assert len(sent) > 30


def test_what_always_fails_stops_the_run_after_its_retries(provider: Provider, tmp_path: Path) -> None:
    provider.faults(batch_failed=1.0)
    run = Run(provider, tmp_path / "l.sqlite", retries=2)
    for _ in range(3):
        run()
    with pytest.raises(StageError, match=r"no answer in 3 batches \(the last: server_error\)"):
        run()
    provider.faults()
    run()
    run()
    assert run.replies() == 30


def test_a_refused_request_is_remembered_and_not_sent_again(provider: Provider, tmp_path: Path) -> None:
    run = Run(provider, tmp_path / "l.sqlite", prompts=3)

    def add(batches: Batches) -> None:
        batches.add("bad", "judge", body("unreadable"), kind="judge", noted={})

    run(add)
    assert run().refused == 1
    assert run.replies() == 3
    with pytest.raises(RequestRefusedError, match="400") as caught:
        run(add)
    assert caught.value.code == "unreadable_prompt"
    assert provider.submitted().count("bad") == 1


def test_the_budget_holds_units_back_until_others_turn_out_cheaper(
    provider: Provider, tmp_path: Path
) -> None:
    most = Run(provider, tmp_path / "x.sqlite", prompts=1, dollars=1.0)
    most()
    one = most.budget.held
    assert one > 0
    run = Run(provider, tmp_path / "l.sqlite", dollars=10.5 * one)
    first = run()
    assert 9 <= first.submitted <= 10
    assert first.held_back == 30 - first.submitted
    assert run.budget.held <= 10.5 * one
    assert "held back" in str(first)
    for _ in range(20):
        progress = run()
        assert run.budget.spent + run.budget.held <= 10.5 * one
        if not (progress.open_units or progress.held_back):
            break
    assert run.replies() == 30
    with pytest.raises(BudgetReachedError, match=r"^chains\.budget\.dollars="):
        Run(provider, tmp_path / "y.sqlite", dollars=0.5 * one)()


@pytest.mark.parametrize(
    ("key", "says"),
    [("wrong", r"^chains.judge: .* refuses the key in SOME_KEY \(status 401\)")],
)
def test_a_wrong_key_is_one_line(provider: Provider, tmp_path: Path, key: str, says: str) -> None:
    with pytest.raises(StageError, match=says):
        Run(provider, tmp_path / "l.sqlite", key=key)()
    assert Run(provider, tmp_path / "l.sqlite")().submitted == 30


def test_a_provider_without_batches_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    down = Provider(tmp_path / "p")
    down.url = f"http://127.0.0.1:{port}/v1"

    def hasty(batches: Batches) -> None:
        batches._clients = {
            role: client.with_options(max_retries=0) for role, client in batches._clients.items()
        }

    with pytest.raises(StageError, match=r"no answer\. Check that the endpoint is up"):
        Run(down, tmp_path / "l.sqlite")(hasty)


def test_the_key_is_in_no_file_no_log_and_no_error(
    provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    run = Run(provider, tmp_path / "l.sqlite")
    run()
    run()
    with pytest.raises(StageError) as caught:
        Run(provider, tmp_path / "m.sqlite", key=f"{KEY}x")()
    texts = [caplog.text, str(caught.value), repr(caught.value), repr(BatchAddress("u", KEY, "s"))]
    chain: BaseException | None = caught.value
    while chain is not None:
        texts.append(repr(chain))
        chain = chain.__cause__
    assert all(KEY not in text for text in texts)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert all(KEY.encode() not in path.read_bytes() for path in files)
