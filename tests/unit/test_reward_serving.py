"""Figures for Prometheus, and exchanging the checkpoint under load."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prmu_tiny import make_base, make_prmu

from reward_server.app import Admin, Limits, create_app
from reward_server.batching import Batcher
from reward_server.engine import EngineCounts
from reward_server.serving import Served, Serving, checkpoint_folder
from tagpr.errors import StageError
from tagpr.prmu.encoding import Encoded
from tagpr.prmu.model import Prmu, load

TOKEN, ADMIN_TOKEN = "0123456789abcdef", "fedcba9876543210"
AUTH = {"authorization": f"Bearer {TOKEN}"}
ADMIN = {"authorization": f"Bearer {ADMIN_TOKEN}"}
LIMITS = Limits(body_bytes=20_000, items=8, pending_items=200, request_timeout_s=5.0, item_characters=10_000)


@pytest.fixture(scope="module")
def prmu(tmp_path_factory: pytest.TempPathFactory) -> Prmu:
    root = tmp_path_factory.mktemp("serving")
    make_prmu(root / "model", make_base(root / "base"))
    return load(root / "model")


class Engine:
    """Gives one logit to everything."""

    name = "fake"

    def __init__(self, logit: float) -> None:
        self.logit = logit
        self.go = threading.Event()
        self.go.set()
        self.closed = False
        self.total = EngineCounts()

    def score(self, inputs: Sequence[Encoded]) -> list[float]:
        self.go.wait(10)
        assert not self.closed
        self.total = EngineCounts(
            self.total.tokens + 10 * len(inputs), self.total.cached_tokens + 6 * len(inputs)
        )
        return [self.logit] * len(inputs)

    def counts(self) -> EngineCounts:
        return self.total

    def close(self) -> None:
        self.closed = True


class Setup:
    """A server of version "old" that can load "new" from ``root/new``; ``root/bad`` holds nothing usable."""

    def __init__(self, prmu: Prmu, root: Path) -> None:
        self.prmu, self.root = prmu, root
        self.engines = {"old": Engine(1.0), "new": Engine(2.0), "bad": Engine(0.0)}
        for name in ("old", "new", "bad"):
            (root / name).mkdir()

    def served(self, name: str) -> Served:
        return Served(self.prmu.encoder, Batcher(self.engines[name], 16), name, "fake")

    def load(self, folder: Path) -> Served:
        if folder.name == "bad":
            raise StageError(f"{folder}: its weights cannot be loaded. Train it again.")
        return self.served(folder.name)

    def run(self, body: Callable[[httpx.AsyncClient, Serving], Any], admin: bool = True) -> Any:
        async def go() -> Any:
            serving = Serving(self.served("old"), self.load)
            who = Admin(ADMIN_TOKEN, self.root) if admin else None
            app = create_app(serving, token=TOKEN, limits=LIMITS, admin=who)
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app), base_url="http://server"
            ) as http:
                try:
                    return await body(http, serving)
                finally:
                    await serving.close()

        return asyncio.run(go())


@pytest.fixture
def setup(prmu: Prmu, tmp_path: Path) -> Setup:
    return Setup(prmu, tmp_path)


def post(http: httpx.AsyncClient, users: Sequence[str] = ("ann",), **more: Any) -> Any:
    items = [
        {"id": f"r{i}", "user_id": user, "prompt": "boats", "response": "rain"}
        for i, user in enumerate(users)
    ]
    return http.post("/v1/score", json={"items": items, **more}, headers=AUTH)


def swap(http: httpx.AsyncClient, name: str, headers: dict[str, str] = ADMIN) -> Any:
    return http.post("/admin/checkpoint", json={"checkpoint": name}, headers=headers)


def figure(text: str, name: str) -> float:
    return float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name)))


def test_metrics_count_what_happened(setup: Setup) -> None:
    async def body(http: httpx.AsyncClient, _: Serving) -> str:
        await post(http, ["ann", "nobody", "bob"])
        await post(http, ["ann"] * 9)
        await http.get("/secret-path", headers=AUTH)
        await http.post("/v1/score", content=b"{}")
        answer = await http.get("/metrics", headers=AUTH)
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return answer.text

    text = setup.run(body)
    for name, value in {
        "tagpr_prmu_items_total": 3,
        "tagpr_prmu_unknown_user_items_total": 1,
        "tagpr_prmu_tokens_total": 30,
        "tagpr_prmu_cached_tokens_total": 18,
        "tagpr_prmu_cached_token_share": 0.6,
        "tagpr_prmu_queue_items": 0,
        "tagpr_prmu_engine_up": 1,
        "tagpr_prmu_batch_items_sum": 3,
        'tagpr_prmu_requests_total{route="/v1/score",status="200"}': 1,
        'tagpr_prmu_requests_total{route="/v1/score",status="413"}': 1,
        'tagpr_prmu_requests_total{route="/v1/score",status="401"}': 1,
        'tagpr_prmu_requests_total{route="other",status="404"}': 1,
        'tagpr_prmu_request_seconds_count{route="/v1/score"}': 3,
        'tagpr_prmu_refused_total{code="too_many_items"}': 1,
        'tagpr_prmu_model_info{engine="fake",version="old"}': 1,
    }.items():
        assert figure(text, name) == value, name
    assert "secret-path" not in text


def test_requests_go_on_while_the_checkpoint_changes(setup: Setup) -> None:
    async def body(http: httpx.AsyncClient, serving: Serving) -> None:
        setup.engines["old"].go.clear()
        early = [asyncio.create_task(post(http)) for _ in range(20)]
        await asyncio.sleep(0.1)
        assert (await swap(http, "new")).json() == {"old_version": "old", "model_version": "new"}
        late = (await post(http)).json()
        assert (late["model_version"], late["scores"][0]["logit"]) == ("new", 2.0)
        assert not setup.engines["old"].closed
        setup.engines["old"].go.set()
        answers = [answer.json() for answer in await asyncio.gather(*early)]
        assert {(a["model_version"], a["scores"][0]["logit"]) for a in answers} == {("old", 1.0)}
        await asyncio.sleep(0.2)
        assert setup.engines["old"].closed
        assert serving.scored == 21
        text = (await http.get("/metrics", headers=AUTH)).text
        assert figure(text, "tagpr_prmu_swaps_total") == 1
        assert figure(text, "tagpr_prmu_batch_items_sum") == 21
        assert 'version="new"' in text
        assert (await http.get("/version", headers=AUTH)).json()["model_version"] == "new"

    setup.run(body)


def test_token_counts_never_fall(setup: Setup) -> None:
    async def body(http: httpx.AsyncClient, _: Serving) -> None:
        await post(http, ["ann"] * 4)
        await http.get("/metrics", headers=AUTH)
        await swap(http, "new")
        await post(http, ["ann"])
        assert figure((await http.get("/metrics", headers=AUTH)).text, "tagpr_prmu_tokens_total") == 50

    setup.run(body)


def test_who_insists_on_another_version_is_told_both(setup: Setup) -> None:
    async def body(http: httpx.AsyncClient, _: Serving) -> None:
        assert (await post(http, versions=["old"])).status_code == 200
        await swap(http, "new")
        refused = await post(http, versions=["old"])
        assert (refused.status_code, refused.json()["code"]) == (409, "other_version")
        assert refused.json()["message"] == "serves PRMU new, the request insists on old"
        assert (await post(http, versions=["old", "new"])).status_code == 200

    setup.run(body)


def test_a_checkpoint_that_cannot_be_served_changes_nothing(setup: Setup) -> None:
    async def body(http: httpx.AsyncClient, serving: Serving) -> None:
        refused = await swap(http, "bad")
        assert (refused.status_code, refused.json()["code"]) == (422, "unusable_checkpoint")
        assert (await post(http)).json()["model_version"] == "old"
        assert (await swap(http, "old")).json() == {"old_version": "old", "model_version": "old"}
        assert serving.swaps == 0

    setup.run(body)


@pytest.mark.parametrize("headers", [{}, AUTH, {"authorization": f"Bearer {ADMIN_TOKEN}x"}])
def test_only_the_administrator_exchanges_checkpoints(setup: Setup, headers: dict[str, str]) -> None:
    async def body(http: httpx.AsyncClient, serving: Serving) -> None:
        assert (await swap(http, "new", headers)).status_code == 401
        assert serving.current.version == "old"
        for path in ("/version", "/metrics"):
            assert (await http.get(path, headers=ADMIN)).status_code == 401

    setup.run(body)


def test_without_an_administrator_there_is_no_such_route(setup: Setup) -> None:
    async def body(http: httpx.AsyncClient, _: Serving) -> None:
        assert (await swap(http, "new", ADMIN)).status_code == 401
        assert (await swap(http, "new", AUTH)).status_code == 404

    setup.run(body, admin=False)


@pytest.mark.parametrize(
    "name", ["..", "../new", "a/b", "/etc", ".hidden", "", "a\0b", "%2e%2e", "link", "file", "no"]
)
def test_names_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    (root / "new").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "file").write_text("")
    with pytest.raises(StageError):
        checkpoint_folder(root, name)
    assert checkpoint_folder(root, "new") == root / "new"
