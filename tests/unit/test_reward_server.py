"""The reward server: routes, limits, faults of the engine, start and end of the process."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prmu_tiny import USERS, make_base, make_prmu

from reward_server import __main__ as stage
from reward_server.app import Limits, create_app
from reward_server.batching import Batcher
from reward_server.engine import EngineCounts, TransformersEngine, choose_engine
from reward_server.serving import Served, Serving
from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, RewardServerError, StageError
from tagpr.prmu.client import RewardClient, check_server, sigmoid
from tagpr.prmu.encoding import Encoded, Place
from tagpr.prmu.model import Prmu, load
from tagpr.prmu.wire import NOT_FINITE, ScoreItem, read_address, read_token

TOKEN = "0123456789abcdef"
AUTH = {"authorization": f"Bearer {TOKEN}"}
LIMITS = Limits(body_bytes=20_000, items=8, pending_items=12, request_timeout_s=5.0, item_characters=10_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("server")
    make_prmu(root / "model", make_base(root / "base"))
    return root / "model"


@pytest.fixture(scope="module")
def prmu(folder: Path) -> Prmu:
    return load(folder)


class FakeEngine:
    """Logit = number of tokens, unless told otherwise."""

    name = "fake"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.answer: Callable[[Sequence[Encoded]], list[float]] = lambda s: [
            float(len(x.token_ids)) for x in s
        ]
        self.closed = False

    def score(self, inputs: Sequence[Encoded]) -> list[float]:
        self.go.wait(10)
        self.batches.append(len(inputs))
        return self.answer(inputs)

    def counts(self) -> EngineCounts:
        return EngineCounts(10 * sum(self.batches), 6 * sum(self.batches))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


Send = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
def batcher(engine: FakeEngine) -> Iterator[Batcher]:
    running = Batcher(engine, batch_items=128)
    yield running
    engine.go.set()
    running.close()


@pytest.fixture
def serve(prmu: Prmu, batcher: Batcher) -> Callable[..., Any]:
    """Runs a coroutine function with an HTTP client of the application."""

    def go(body: Callable[[httpx.AsyncClient], Awaitable[Any]], limits: Limits = LIMITS) -> Any:
        async def with_client() -> Any:
            serving = Serving(
                Served(prmu.encoder, batcher, prmu.version, "fake"), lambda _: pytest.fail("loads")
            )
            app = create_app(serving, token=TOKEN, limits=limits)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
                return await body(http)

        return asyncio.run(with_client())

    return go


def item(number: int = 0, **change: str) -> dict[str, str]:
    return {"id": f"row{number}", "user_id": "ann", "prompt": "boats", "response": "rain", **change}


def post(http: httpx.AsyncClient, *items: dict[str, str], **options: Any) -> Awaitable[httpx.Response]:
    return http.post("/v1/score", json={"items": list(items)}, headers=AUTH, **options)


def test_scores_in_order_with_version_and_unknown_users(serve: Any, prmu: Prmu) -> None:
    items = [item(i, response="rain " * (i + 1)) for i in range(3)] + [item(3, user_id="nobody")]
    answer = serve(lambda http: post(http, *items))
    assert answer.status_code == 200
    body = answer.json()
    assert body["model_version"] == prmu.version
    assert [score["id"] for score in body["scores"]] == ["row0", "row1", "row2", "row3"]
    encoded = [prmu.encoder.encode("a", i["user_id"], i["prompt"], i["response"]) for i in items]
    lengths = [len(one.token_ids) for one in encoded]
    assert [score["logit"] for score in body["scores"]] == lengths
    assert [score["score"] for score in body["scores"]] == [sigmoid(float(n)) for n in lengths]
    assert [score["unknown_user"] for score in body["scores"]] == [False, False, False, True]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/score",
        "/version",
        "/metrics",
        "/admin/checkpoint",
        "/docs",
        "/openapi.json",
        "/",
        "/health/",
        "/nope",
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"bearer {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": f"Bearer {TOKEN}x"},
        [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
    ],
)
def test_nothing_but_health_without_the_token(serve: Any, path: str, headers: Any) -> None:
    for method in ("GET", "POST"):
        answer = serve(lambda http, m=method: http.request(m, path, headers=headers))
        assert answer.status_code == 401
        assert answer.json() == {
            "code": "unauthorized",
            "message": "bearer token missing or wrong",
            "item": None,
        }


def test_open_and_closed_routes(serve: Any, prmu: Prmu) -> None:
    assert serve(lambda http: http.get("/health")).json() == {"status": "ok"}
    assert serve(lambda http: http.get("/version", headers=AUTH)).json() == {
        "model_version": prmu.version,
        "engine": "fake",
        "users": 3,
        "max_tokens": 512,
    }
    for path in ("/docs", "/redoc", "/openapi.json", "/admin/checkpoint"):
        assert serve(lambda http, p=path: http.get(p, headers=AUTH)).status_code == 404
    assert serve(lambda http: http.get("/v1/score", headers=AUTH)).status_code == 405


def test_a_large_body_is_given_up_while_it_is_read(serve: Any, engine: FakeEngine) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 1000

    declared = serve(lambda http: post(http, item(response="x" * 30_000)))
    chunked = serve(lambda http: http.post("/v1/score", content=endless(), headers=AUTH))
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["code"] == "body_too_large"
    assert sent < 90  # four times the limit is received and dropped
    assert engine.batches == []


SECRET = "my-private-review"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "body: json_invalid"),
        (b"\xff\xfe", "body: json_invalid"),
        (b"[" * 10_000, "body: json_invalid"),
        (b"[]", "body: model_type"),
        (b'{"items": []}', "items: too_short"),
        (json.dumps({"items": [item() | {"token_ids": SECRET}]}), "items.0: extra_forbidden"),
        (json.dumps({"items": [item() | {SECRET: "x"}]}), "items.0: extra_forbidden"),
        (json.dumps({"items": [item(), item() | {"response": [SECRET]}]}), "items.1.response: string_type"),
        (json.dumps({"items": [item(id="")]}), "items.0.id: string_too_short"),
        (json.dumps({"items": [item(response="\ud800")]}), "body: json_invalid"),
    ],
)
def test_malformed_bodies_are_refused_without_quoting_them(
    serve: Any, body: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = serve(lambda http: http.post("/v1/score", content=body, headers=AUTH))
    assert answer.status_code == 422
    assert answer.json()["message"] == says
    assert SECRET not in answer.text
    assert SECRET not in caplog.text


def test_too_long_and_too_many_items_are_refused(serve: Any, engine: FakeEngine) -> None:
    answer = serve(lambda http: post(http, item(0), item(1, response="\u1234 " * 600)))
    assert answer.status_code == 422
    assert answer.json()["item"] == "row1"
    assert "more than the limit of 512" in answer.json()["message"]
    assert serve(lambda http: post(http, *(item(i) for i in range(9)))).status_code == 413
    long = serve(lambda http: post(http, item(0), item(1, prompt="x" * 9_000, response="y" * 1_001)))
    assert (long.status_code, long.json()["item"]) == (422, "row1")
    assert "10001 characters, more than the limit of 10000" in long.json()["message"]
    assert engine.batches == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_names_the_item(serve: Any, engine: FakeEngine, bad: float) -> None:
    engine.answer = lambda sequences: [1.0, bad]
    answer = serve(lambda http: post(http, item(0), item(1)))
    assert answer.status_code == 500
    assert (answer.json()["code"], answer.json()["item"]) == (NOT_FINITE, "row1")
    assert "score" not in answer.json()


def test_an_engine_that_fails_is_an_error_and_the_next_request_works(serve: Any, engine: FakeEngine) -> None:
    working = engine.answer

    def fail(_: Sequence[Encoded]) -> list[float]:
        raise RuntimeError("kernel")

    for broken in (fail, lambda _: [1.0, 2.0, 3.0]):
        engine.answer = broken
        answer = serve(lambda http: post(http, item()))
        assert (answer.status_code, answer.json()["code"]) == (500, "engine_failed")
    engine.answer = working
    assert serve(lambda http: post(http, item())).status_code == 200


def test_a_full_queue_answers_429_and_takes_requests_again_later(serve: Any, engine: FakeEngine) -> None:
    async def flood(http: httpx.AsyncClient) -> None:
        engine.go.clear()
        waiting = [asyncio.create_task(post(http, *(item(i) for i in range(6)))) for _ in range(2)]
        await asyncio.sleep(0.1)
        refused = await post(http, item())
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        engine.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
        assert (await post(http, item())).status_code == 200

    serve(flood)


def test_an_engine_that_hangs_is_a_503_and_bad_health(serve: Any, engine: FakeEngine) -> None:
    async def hang(http: httpx.AsyncClient) -> None:
        engine.go.clear()
        answers = await asyncio.gather(post(http, item(0)), post(http, item(1)))
        assert [answer.status_code for answer in answers] == [503, 503]
        # The engine began a moment after the requests: its own time may be up a moment later.
        give_up = time.monotonic() + 8
        while (health := await http.get("/health")).status_code == 200 and time.monotonic() < give_up:
            await asyncio.sleep(0.02)
        assert (health.status_code, health.json()) == (503, {"status": "engine hangs"})
        engine.go.set()
        assert (await post(http, item())).status_code == 200
        assert (await http.get("/health")).status_code == 200

    serve(
        hang,
        Limits(body_bytes=20_000, items=8, pending_items=8, request_timeout_s=0.3, item_characters=10_000),
    )
    assert sum(engine.batches) <= 3


def test_requests_that_arrive_together_are_scored_together(serve: Any, engine: FakeEngine) -> None:
    async def flood(http: httpx.AsyncClient) -> None:
        engine.go.clear()
        tasks = [asyncio.create_task(post(http, item(i))) for i in range(10)]
        await asyncio.sleep(0.2)
        engine.go.set()
        await asyncio.gather(*tasks)

    serve(flood)
    assert sum(engine.batches) == 10
    assert len(engine.batches) <= 2


def test_closing_fails_what_is_queued_and_closes_the_engine(engine: FakeEngine) -> None:
    async def close() -> None:
        batcher = Batcher(engine, batch_items=1)
        engine.go.clear()
        tasks = [asyncio.create_task(batcher.score([Encoded([1], 1, False)])) for _ in range(3)]
        await asyncio.sleep(0.05)
        threading.Timer(0.1, engine.go.set).start()
        await asyncio.to_thread(batcher.close)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[0] == [1.0]
        assert [type(result) for result in results[1:]] == [RuntimeError, RuntimeError]
        with pytest.raises(RuntimeError):
            await batcher.score([Encoded([1], 1, False)])

    asyncio.run(close())
    assert engine.closed


def test_transformers_engine_alone_and_in_a_crowd(prmu: Prmu) -> None:
    texts = ["rain", "boats and rain " * 30, "", "the user likes short titles", "x" * 90] * 4
    ids = [prmu.encoder.encode("a", user, text, text) for text, user in zip(texts, USERS * 7, strict=False)]
    crowd = TransformersEngine(prmu, batch_tokens=4096).score(ids)
    small = TransformersEngine(prmu, batch_tokens=400)
    lengths = [one.token_ids for one in ids]
    assert max(len(batch) for batch in small._batches(lengths)) < len(ids)
    assert sorted(i for batch in small._batches(lengths) for i in batch) == list(range(len(ids)))
    for batch in small._batches(lengths):
        assert len(batch) == 1 or len(batch) * max(len(lengths[i]) for i in batch) <= 400
    for index, logit in enumerate(small.score(ids)):
        assert logit == pytest.approx(crowd[index], abs=1e-5)
        assert small.score([ids[index]])[0] == pytest.approx(crowd[index], abs=1e-5)
    assert len({round(logit, 3) for logit in crowd}) > 5


def test_engine_names() -> None:
    assert choose_engine("auto", "cpu") == ("transformers", "cpu")
    assert choose_engine("vllm", "cpu") == ("vllm", "cpu")
    for engine, device, key in (("sglang", "cpu", "engine"), ("auto", "tpu", "device")):
        with pytest.raises(ConfigError, match=rf"server\.{key}="):
            choose_engine(engine, device)


def config(tmp_path: Path, folder: Path, *overrides: str) -> Any:
    places = [f"run.dir={tmp_path}", f"paths.prmu={folder}"]
    return resolve(compose("serve_prmu", [*places, *overrides]))


def test_a_taken_port_is_one_line_with_the_key(tmp_path: Path, folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^server\.port={port}: is taken"):
            stage.run(config(tmp_path, folder, f"server.port={port}"))


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["server.host=0.0.0.0"], ConfigError, "there is no token"),
        (["server.port=99999"], ConfigError, "is no port"),
        (["server.host=192.0.2.1", "server.token_file=TOKEN"], ConfigError, "cannot listen there"),
        (["server.parent_pid=4194304"], ConfigError, "no such process"),
        (["server.max_pending_items=3"], ConfigError, r"less than server\.max_items"),
        (
            ["paths.prmu=nowhere"],
            StageError,
            r"paths\.prmu=nowhere: no such folder\. Run `bash recipes/train_prmu",
        ),
        (["server.max_tokens=4096"], ConfigError, r"server\.max_tokens=4096"),
        (["server.token_file=missing"], ConfigError, "cannot be read as a token file"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path,
    folder: Path,
    overrides: list[str],
    error: type,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TAGPR_PRMU_TOKEN", raising=False)
    (tmp_path / "given").write_text(TOKEN)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(error, match=says):
        stage.run(config(tmp_path, folder, *(o.replace("TOKEN", str(tmp_path / "given")) for o in overrides)))


def test_a_generated_token_is_private_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAGPR_PRMU_TOKEN", raising=False)
    token, path = stage.keep_token(None, "127.0.0.1", tmp_path / "run")
    assert path == str(tmp_path / "run" / "token")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stage.keep_token(None, "127.0.0.1", tmp_path / "run") == (token, path)
    assert stage.keep_token(None, "127.0.0.1", tmp_path / "other")[0] != token
    monkeypatch.setenv("TAGPR_PRMU_TOKEN", TOKEN)
    assert stage.keep_token(None, "0.0.0.0", tmp_path / "run") == (TOKEN, None)


def test_process_serves_and_dies_with_its_parent(tmp_path: Path, folder: Path, prmu: Prmu) -> None:
    parent = subprocess.Popen(["sleep", "300"])
    environment = {k: v for k, v in os.environ.items() if k != "TAGPR_PRMU_TOKEN"} | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [
            sys.executable, "-m", "reward_server", f"run.dir={tmp_path}", f"paths.prmu={folder}",
            f"server.parent_pid={parent.pid}",
        ],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        address_file = tmp_path / "server.json"
        deadline = time.monotonic() + 90
        while not address_file.exists():
            assert server.poll() is None, server.stderr and server.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        address = read_address(address_file)
        assert (address.pid, address.model_version) == (server.pid, prmu.version)
        assert address.token_file is not None
        token = read_token(address.token_file)
        info = check_server(address.url, token, prmu.version, deadline_s=5)
        assert (info.engine, info.users) == ("transformers", 3)
        with pytest.raises(RewardServerError, match="refused the token"):
            check_server(address.url, "x" * 20, prmu.version, deadline_s=5)

        items = [
            ScoreItem(id=f"{user}{i}", user_id=user, prompt="boats", response="rain " * i)
            for user in (*USERS, "nobody")
            for i in range(10)
        ]

        async def ask() -> list[Any]:
            async with RewardClient(address.url, token, prmu.version, deadline_s=20) as client:
                return await asyncio.gather(*(client.score([one]) for one in items))

        scores = [score for (score,) in asyncio.run(ask())]
        ids = [prmu.encoder.encode(i.id, i.user_id, i.prompt, i.response) for i in items]
        expected = TransformersEngine(prmu, 4096).score(ids)
        assert [score.logit for score in scores] == pytest.approx(expected, abs=1e-5)
        assert [score.unknown_user for score in scores] == [False] * 30 + [True] * 10
        first_responses = {round(scores[start].logit, 4) for start in (0, 10, 20, 30)}
        assert len(first_responses) == 4, "same text, other user, other score"

        parent.kill()  # not reaped yet: a zombie must count as gone
        assert server.wait(20) == 0
        assert not address_file.exists()
        assert server.stderr is not None
        log = server.stderr.read()
        assert "stopped after 41 scores" in log or "stopped after 40 scores" in log
        assert "Traceback" not in log
        assert token is not None
        assert token not in log
        assert "rain" not in log
    finally:
        parent.kill()
        parent.wait()
        server.kill()
        server.wait()


PARITY = """
import random, sys
from pathlib import Path
from reward_server.engine import TransformersEngine, VllmEngine
from tagpr.prmu.model import load

if __name__ == "__main__":
    folder, dtype, cache, longest = sys.argv[1], sys.argv[2], sys.argv[3] == "on", int(sys.argv[4])
    prmu = load(folder)
    rng = random.Random(0)
    words = "the user likes short titles about boats and rain".split()
    text = lambda n: " ".join(rng.choices(words, k=n))

    def groups(count, prompt_words, response_words):
        found = []
        while len(found) < count:
            user, prompt = rng.choice(["ann", "bob", "cem", "nobody"]), text(rng.randint(*prompt_words))
            responses = [text(rng.randint(*response_words)) for _ in range(rng.randint(1, 8))]
            found += [prmu.encoder.encode("a", user, prompt, each) for each in responses]
        return found

    # Prompts of a few words, and of the length that profiles of the paper have.
    inputs = groups(520, (1, 250), (0, 30)) + groups(40, (1300, 1500), (150, 400))
    same = [prmu.encoder.encode("a", user, "boats", "rain") for user in ("ann", "bob", "cem", "x", "y")]
    inputs += same
    assert max(len(each.token_ids) for each in inputs) > 1600
    want = TransformersEngine(prmu, 8192).score(inputs)
    engine = VllmEngine(Path(folder), dtype, longest, 2048, 0.3, 1, cache)
    spread, bound = max(want) - min(want), 1e-4 if dtype == "float32" else 0.05 * (max(want) - min(want))
    assert spread > 1
    for order in (list(range(len(inputs))), rng.sample(range(len(inputs)), len(inputs))):
        got = engine.score([inputs[i] for i in order])
        worst = max(abs(g - want[i]) for g, i in zip(got, order))
        print(f"{dtype} cache {cache}: {len(inputs)} together, worst {worst:.2e} of spread {spread:.2f}", flush=True)
        assert worst <= bound
    alone = [*range(0, len(inputs) - 45, 50), *range(len(inputs) - 45, len(inputs), 5)]
    worst = max(abs(engine.score([inputs[i]])[0] - want[i]) for i in alone)
    print(f"{dtype} cache {cache}: {len(alone)} alone, worst {worst:.2e}", flush=True)
    assert worst <= bound
    users = engine.score(same)
    assert len({round(logit, 3) for logit in users[:4]}) == 4 and abs(users[3] - users[4]) <= bound
    assert (engine.counts().cached_tokens > 0.2 * engine.counts().tokens) == cache, engine.counts()
    print(engine.counts(), flush=True)
    engine.close()
    print("EQUAL", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "cache", "place"),
    [
        ("float32", "on", "first"),
        ("float32", "off", "first"),
        ("bfloat16", "on", "first"),
        ("float32", "on", "ends"),
    ],
)
def test_vllm_gives_the_same_logits_as_transformers(
    tmp_path: Path, dtype: str, cache: str, place: Place
) -> None:
    """In a process of its own: vLLM takes memory and patches what it imports."""
    longest = 2560
    make_prmu(tmp_path / "model", make_base(tmp_path / "base", 0, longest), max_tokens=longest, place=place)
    script = tmp_path / "parity.py"
    script.write_text(PARITY)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), dtype, cache, str(longest)],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert "EQUAL" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout)
