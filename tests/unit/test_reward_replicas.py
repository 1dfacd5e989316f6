"""The client with several servers: affinity, fail-over, avoidance; and items that are gathered into requests."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from test_reward_client import TOKEN, VERSION, Answer, Fake, right

from tagpr.errors import RewardServerError
from tagpr.prmu import client as module
from tagpr.prmu.client import ItemRefused, RewardClient, best_of_n, check_server, split_urls
from tagpr.prmu.wire import ScoreItem
from tagpr.schema import PrmuScore


@pytest.fixture
def fakes() -> Iterator[list[Fake]]:
    servers = [Fake(), Fake()]
    yield servers
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def urls(fakes: list[Fake]) -> str:
    return ",".join(fake.url for fake in fakes)


def group(number: int, size: int = 5) -> list[ScoreItem]:
    return [
        ScoreItem(id=f"g{number}r{i}", user_id="u", prompt=f"p{number}", response=f"r{i}")
        for i in range(size)
    ]


def run(fakes: list[Fake], groups: list[list[ScoreItem]], one_by_one: bool = False, **settings: Any) -> Any:
    async def go() -> Any:
        options: dict[str, Any] = {"timeout_s": 60.0, "deadline_s": 120.0, **settings}
        async with RewardClient(urls(fakes), TOKEN, VERSION, **options) as client:
            if one_by_one:
                calls = [client.score_one(item) for each in groups for item in each]
            else:
                calls = [client.score(each) for each in groups]
            return await asyncio.gather(*calls, return_exceptions=True), client.pop_stats()

    return asyncio.run(go())


def test_a_group_goes_to_one_replica_and_groups_to_both(
    fakes: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_S", 60.0)  # a busy machine is no dead replica
    groups = [group(number) for number in range(40)]
    for _ in range(2):
        run(fakes, groups)
    homes = [{request["items"][0]["prompt"] for request in fake.seen} for fake in fakes]
    assert not homes[0] & homes[1]
    assert min(len(home) for home in homes) >= 8
    assert [len(fake.seen) for fake in fakes] == [2 * len(home) for home in homes]


def test_the_replica_does_not_depend_on_the_order_of_addresses(fakes: list[Fake]) -> None:
    groups = [group(number) for number in range(20)]
    run(fakes, groups)
    before = [Counter(r["items"][0]["prompt"] for r in fake.seen) for fake in fakes]
    run(fakes[::-1], groups)
    assert [Counter(r["items"][0]["prompt"] for r in fake.seen) for fake in fakes] == [b + b for b in before]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_next_replica_is_asked_at_once(fakes: list[Fake], status: int) -> None:
    fakes[0].then = (status, b"no", {"retry-after": "3"})
    results, stats = run(fakes, [group(number) for number in range(20)])
    assert all(isinstance(result, list) for result in results)
    assert stats["failovers"] >= 1
    assert stats["retries"] == 0


def test_a_dead_replica_fails_nothing_and_is_avoided(fakes: list[Fake]) -> None:
    fakes[0].server.shutdown()
    fakes[0].server.server_close()

    async def go() -> float:
        async with RewardClient(urls(fakes), TOKEN, VERSION, concurrency=1, deadline_s=10) as client:
            for number in range(30):
                assert len(await client.score(group(number))) == 5
            return client.pop_stats()["failovers"]

    assert asyncio.run(go()) == 1


def test_a_hung_replica_is_left_within_seconds(fakes: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.2)
    monkeypatch.setattr(module, "HEALTH_TIMEOUT_S", 0.2)
    # Connections are taken by the kernel, nobody answers: what a stopped process looks like.
    fakes[0].server.shutdown()
    began = time.monotonic()
    results, stats = run(fakes, [group(number) for number in range(30)], timeout_s=30.0, deadline_s=60.0)
    assert all(isinstance(result, list) for result in results)
    assert time.monotonic() - began < 25  # long before timeout_s
    assert stats["failovers"] >= 1


def test_a_slow_replica_that_is_healthy_is_waited_for(
    fakes: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.05)

    def slow(request: dict[str, Any]) -> Answer:
        time.sleep(0.5)
        return right(request)

    for fake in fakes:
        fake.queue = []
        fake.then = slow
    results, stats = run(fakes, [group(1)])
    assert isinstance(results[0], list)
    assert stats["failovers"] == 0
    assert sum(len(fake.seen) for fake in fakes) == 1


def test_a_replica_that_is_back_is_used_again(fakes: list[Fake]) -> None:
    async def go() -> None:
        async with RewardClient(urls(fakes), TOKEN, VERSION, deadline_s=10) as client:
            fakes[0].then = (503, b"", {})
            for number in range(10):
                await client.score(group(number))
            assert not client._replicas[0].up
            fakes[0].then = right
            seen = len(fakes[0].seen)
            for _ in range(100):
                await asyncio.sleep(0.05)
                if client._replicas[0].up:
                    break
            for number in range(10):
                await client.score(group(number))
            assert len(fakes[0].seen) > seen

    asyncio.run(go())


def test_another_checkpoint_at_any_replica_is_refused(fakes: list[Fake]) -> None:
    info = {"model_version": "other", "engine": "fake", "users": 2, "max_tokens": 9}
    fakes[1].then = (200, info, {})
    with pytest.raises(RewardServerError, match=rf"{fakes[1].url}: serves PRMU other, expected {VERSION}"):
        check_server(urls(fakes), TOKEN, VERSION, deadline_s=2)
    with pytest.raises(RewardServerError, match="serves PRMU other"):  # nor two that differ
        check_server(urls(fakes), TOKEN, None, deadline_s=2)
    check_server(urls(fakes), TOKEN, [VERSION, "other"], deadline_s=2)
    fakes[1].then = (
        409,
        {"code": "other_version", "message": "serves PRMU other, the request insists on x"},
        {},
    )
    results, _ = run(fakes, [group(number) for number in range(20)])
    refused = [result for result in results if not isinstance(result, list)]
    assert refused
    assert all("serves PRMU other, the request insists on x" in str(each) for each in refused)
    assert all(type(each) is RewardServerError for each in refused)


def test_a_start_does_not_wait_for_a_lost_replica(fakes: list[Fake]) -> None:
    fakes[0].server.shutdown()
    fakes[0].server.server_close()
    assert check_server(urls(fakes), TOKEN, VERSION, deadline_s=1).model_version == VERSION


def test_single_items_are_sent_together_by_group(fakes: list[Fake]) -> None:
    groups = [group(number) for number in range(32)]
    results, stats = run(fakes, groups, one_by_one=True, gather_s=0.05, request_items=40)
    assert all(isinstance(result, PrmuScore) for result in results)
    sizes = [len(request["items"]) for fake in fakes for request in fake.seen]
    assert sum(sizes) == 160
    assert max(sizes) <= 40
    assert len(sizes) <= 8
    assert stats["requests"] == len(sizes)
    seen = [request["items"] for fake in fakes for request in fake.seen]
    for number in range(32):
        assert sum(any(item["prompt"] == f"p{number}" for item in items) for items in seen) == 1


def test_a_refused_item_does_not_harm_its_company(fakes: list[Fake]) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        bad = [item["id"] for item in request["items"] if item["id"] in ("g0r1", "g2r3")]
        if bad:
            return 422, {"code": "unusable_item", "message": f"item {bad[0]}: too long", "item": bad[0]}, {}
        return right(request)

    for fake in fakes:
        fake.then = answer
    groups = [group(number) for number in range(4)]
    results, _ = run(fakes, groups, one_by_one=True, gather_s=0.05)
    for item, result in zip([item for each in groups for item in each], results, strict=True):
        if item.id in ("g0r1", "g2r3"):
            assert isinstance(result, ItemRefused)
            assert item.id in str(result)
        else:
            assert isinstance(result, PrmuScore)
    alone = [r for fake in fakes for r in fake.seen if [i["id"] for i in r["items"]] == ["g0r1"]]
    assert len(alone) == 1


def test_what_is_too_large_together_is_sent_in_halves(fakes: list[Fake]) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        if len(request["items"]) > 3:
            return 413, {"code": "body_too_large", "message": "too large"}, {}
        return right(request)

    for fake in fakes:
        fake.then = answer
    results, _ = run(fakes, [group(0, 13)], one_by_one=True)
    assert all(isinstance(result, PrmuScore) for result in results)


def test_addresses() -> None:
    assert split_urls("http://a:1/, http://b:2") == ["http://a:1", "http://b:2"]
    for bad in ("", " , ", "http://a:1,http://a:1/"):
        with pytest.raises(RewardServerError, match=r"prmu_client\.url="):
            split_urls(bad)


def test_best_of_n() -> None:
    scores = [PrmuScore(logit=x, score=0.5, unknown_user=False, version="v") for x in (1.0, 3.0, 3.0, 2.0)]
    assert best_of_n(scores) == 1
    with pytest.raises(ValueError):
        best_of_n([])
    with pytest.raises(ValueError):
        best_of_n([scores[0], scores[1].model_copy(update={"version": "w"})])
