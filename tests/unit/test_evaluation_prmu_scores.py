"""PRMU's scores of rows: over real HTTP, from a stub that scores by a formula; kept, resumed, never made up."""

import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_evaluation_score import answered, tagged

from tagpr.errors import RewardServerError, StageError
from tagpr.evaluation import prmu_scores as module
from tagpr.evaluation.prmu_scores import Answered, BackgroundServer, prmu_scores
from tagpr.evaluation.rows import Row
from tagpr.prmu.wire import Address

VERSION = "v1"


class StubServer:
    """Answers like the reward server; user ``stranger`` is unknown, and after ``survives`` requests it refuses."""

    def __init__(self) -> None:
        self.version = VERSION
        self.survives = 10**9
        self.starts = 0
        self.running = 0
        self.fails_to_start = False
        self.requests: list[list[dict]] = []
        self.lock = threading.Lock()

    @contextmanager
    def serve(self, checkpoint: str, run_dir: Path, device: str) -> Iterator[Address]:
        if self.fails_to_start:
            raise RewardServerError("reward server: exited with status 2: broken. Log: server.log")
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                items = json.loads(self.rfile.read(int(self.headers["content-length"])))["items"]
                with stub.lock:
                    stub.requests.append(items)
                    refused = len(stub.requests) > stub.survives
                body = {
                    "model_version": stub.version,
                    "scores": [
                        {
                            "id": item["id"],
                            "logit": logit(item["prompt"], item["response"]),
                            "score": 1 / (1 + math.exp(-logit(item["prompt"], item["response"]))),
                            "unknown_user": item["user_id"] == "stranger",
                        }
                        for item in items
                    ],
                }
                refusal = {"code": "too_long", "message": "too long", "item": items[0]["id"]}
                content = json.dumps(refusal if refused else body).encode()
                self.send_response(422 if refused else 200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.starts += 1
        self.running += 1
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            yield Address(url=url, model_version=self.version, pid=1)
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            self.running -= 1


def logit(prompt: str, response: str) -> float:
    return (len(prompt) - 2 * response.count("4")) / 10


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubServer:
    stub = StubServer()
    monkeypatch.setattr(module, "local_server", stub.serve)
    return stub


def rows(number: int, answer: str = "4", seeds: Sequence[int | None] = (None,), user: str = "u") -> list[Row]:
    return [
        answered(f"r{n}", tagged(answer), gold="4", seed=seed, user=user)
        for seed in seeds
        for n in range(number)
    ]


def model(tmp_path: Path, label: str, its: Sequence[Row], **settings: object) -> Answered:
    return Answered(
        label=label,
        path=tmp_path / f"{label}.prmu.jsonl",
        rows=its,
        settings={"model": label, **settings},
        prompt=lambda row: f"prompt of {row.id}",
    )


def ask(tmp_path: Path, *models: Answered, version: str = VERSION, batch_items: int = 4) -> dict:
    with BackgroundServer("prmu", tmp_path) as server:
        return prmu_scores(models, server, version, batch_items)


def test_every_row_of_every_model_from_one_server_in_bounded_batches(
    tmp_path: Path, stub: StubServer
) -> None:
    models = [model(tmp_path, "base", rows(5, "1", [None, 7])), model(tmp_path, "sft", rows(5, "4"))]
    found = ask(tmp_path, *models)
    assert (stub.starts, stub.running) == (1, 0)
    assert [len(items) for items in sorted(stub.requests, key=len)] == [3, 4, 4, 4]
    assert set(found["base"]) == {(f"r{n}", seed) for n in range(5) for seed in (None, 7)}
    for label, answer in (("base", "1"), ("sft", "4")):
        for (id_, _), score in found[label].items():
            assert score.logit == logit(f"prompt of {id_}", tagged(answer))
            assert score.score == pytest.approx(1 / (1 + math.exp(-score.logit)))
            assert (score.version, score.unknown_user) == (VERSION, False)


def test_a_second_time_nothing_is_asked_and_no_server_starts(tmp_path: Path, stub: StubServer) -> None:
    first = ask(tmp_path, model(tmp_path, "sft", rows(5)))
    assert ask(tmp_path, model(tmp_path, "sft", rows(5))) == first
    assert stub.starts == 1
    # Fewer rows this time: the others keep their scores.
    ask(tmp_path, model(tmp_path, "sft", rows(2)))
    assert ask(tmp_path, model(tmp_path, "sft", rows(5))) == first
    assert stub.starts == 1


def test_only_what_changed_is_asked_again(tmp_path: Path, stub: StubServer) -> None:
    ask(tmp_path, model(tmp_path, "sft", rows(5)))
    stub.requests.clear()
    changed = [
        *rows(3),
        answered("r3", tagged("1"), gold="4"),
        answered("r4", tagged("4"), gold="4", user="v"),
    ]
    found = ask(tmp_path, model(tmp_path, "sft", changed))
    assert sorted(item["id"] for items in stub.requests for item in items) == [
        "sft/r3/greedy",
        "sft/r4/greedy",
    ]
    assert found["sft"]["r3", None].logit == logit("prompt of r3", tagged("1"))
    lines = [json.loads(line) for line in (tmp_path / "sft.prmu.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [f"r{n}" for n in range(5)]


@pytest.mark.parametrize("what", ["version", "settings"])
def test_another_prmu_or_another_way_to_prompt_asks_everything_again(
    tmp_path: Path, stub: StubServer, what: str
) -> None:
    ask(tmp_path, model(tmp_path, "sft", rows(3)))
    stub.requests.clear()
    stub.version = "v2" if what == "version" else VERSION
    settings = {"profile_size": 2} if what == "settings" else {}
    found = ask(tmp_path, model(tmp_path, "sft", rows(3), **settings), version=stub.version)
    assert sum(map(len, stub.requests)) == 3
    assert {score.version for score in found["sft"].values()} == {stub.version}
    assert len((tmp_path / "sft.prmu.jsonl").read_text().splitlines()) == 3


def test_scores_that_came_before_a_failure_are_kept(
    tmp_path: Path, stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUESTS_IN_FLIGHT", 1)
    stub.survives = 2
    with pytest.raises(RewardServerError, match=r"refused item sft/r\d/greedy") as caught:
        ask(tmp_path, model(tmp_path, "sft", rows(9)), batch_items=3)
    assert "\n" not in str(caught.value)
    assert stub.running == 0
    assert len((tmp_path / "sft.prmu.jsonl").read_text().splitlines()) == 6
    stub.survives = 10**9
    stub.requests.clear()
    assert len(ask(tmp_path, model(tmp_path, "sft", rows(9)))["sft"]) == 9
    assert sum(map(len, stub.requests)) == 3


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_line_is_asked_again_and_swallows_none(tmp_path: Path, stub: StubServer, cut: int) -> None:
    whole = ask(tmp_path, model(tmp_path, "sft", rows(3)))
    path = tmp_path / "sft.prmu.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(ask(tmp_path, model(tmp_path, "sft", rows(4)))["sft"]) == 4
    assert ask(tmp_path, model(tmp_path, "sft", rows(3))) == whole
    assert sorted(json.loads(line)["id"] for line in path.read_text().splitlines()) == [
        "r0",
        "r1",
        "r2",
        "r3",
    ]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"x"'])
def test_a_kept_number_that_is_none_is_not_believed(tmp_path: Path, stub: StubServer, value: str) -> None:
    whole = ask(tmp_path, model(tmp_path, "sft", rows(1)))
    path = tmp_path / "sft.prmu.jsonl"
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line).replace(f'"logit": {line["logit"]}', f'"logit": {value}') + "\n")
    assert ask(tmp_path, model(tmp_path, "sft", rows(1))) == whole
    assert stub.starts == 2


def test_another_checkpoint_behind_the_server_is_refused(tmp_path: Path, stub: StubServer) -> None:
    stub.version = "other"
    with pytest.raises(RewardServerError, match="other"):
        ask(tmp_path, model(tmp_path, "sft", rows(1)))
    assert (tmp_path / "sft.prmu.jsonl").read_text() == ""


def test_strangers_are_scored_and_said_to_be_strangers(tmp_path: Path, stub: StubServer) -> None:
    found = ask(tmp_path, model(tmp_path, "sft", rows(2, user="stranger")))
    assert [score.unknown_user for score in found["sft"].values()] == [True, True]


def test_two_processes_cannot_score_the_same_rows(tmp_path: Path, stub: StubServer) -> None:
    with module.ScoreFile(model(tmp_path, "sft", rows(1)), VERSION):
        with pytest.raises(StageError, match=r"sft\.prmu\.jsonl: another evaluation"):
            ask(tmp_path, model(tmp_path, "sft", rows(1)))


def test_a_server_that_does_not_start_is_told_early_and_once(tmp_path: Path, stub: StubServer) -> None:
    stub.fails_to_start = True
    with BackgroundServer("prmu", tmp_path) as server:
        server.check()  # nobody has started it
        server.start()
        with pytest.raises(RewardServerError, match="broken"):
            server.address()
        with pytest.raises(RewardServerError, match="broken"):
            server.check()


def test_a_server_nobody_asked_is_stopped_too(tmp_path: Path, stub: StubServer) -> None:
    def fails_meanwhile() -> None:
        with BackgroundServer("prmu", tmp_path) as server:
            server.start()
            server.start()
            raise KeyError

    with pytest.raises(KeyError):
        fails_meanwhile()
    assert (stub.starts, stub.running) == (1, 0)
