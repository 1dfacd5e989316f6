"""The adaptive limit: who gets in, what a 429 does to everybody, how it grows back."""

import asyncio
import time

import pytest

from tagpr.chat.limits import AdaptiveLimit


def test_no_more_than_the_ceiling_are_in() -> None:
    async def work() -> int:
        limit, peak = AdaptiveLimit(5), 0

        async def one() -> None:
            nonlocal peak
            async with limit:
                peak = max(peak, limit.in_flight)
                await asyncio.sleep(0.001)
                limit.succeeded()

        await asyncio.gather(*(one() for _ in range(100)))
        assert limit.in_flight == 0
        return peak

    assert asyncio.run(work()) == 5


def test_a_burst_of_429s_halves_once() -> None:
    async def work() -> None:
        limit = AdaptiveLimit(64)
        eras = [await limit.__aenter__() for _ in range(64)]
        for era in eras:
            limit.throttled(era)
            await limit.__aexit__(None, None, None)
        assert limit.size == 32
        assert limit.throttles == 64
        async with limit as era:
            limit.throttled(era)
        assert limit.size == 16
        for _ in range(20):
            async with limit as era:
                limit.throttled(era)
        assert limit.size == 1

    asyncio.run(work())


def test_retry_after_holds_everybody_back_and_the_longest_wins() -> None:
    async def work() -> None:
        limit = AdaptiveLimit(8)
        async with limit as era:
            limit.throttled(era, 0.15)
            limit.throttled(era, 0.01)
        started = time.monotonic()

        async def one() -> float:
            async with limit:
                return time.monotonic() - started

        waits = await asyncio.gather(*(one() for _ in range(20)))
        assert min(waits) >= 0.14
        assert max(waits) < 2.0

    asyncio.run(work())


@pytest.mark.parametrize("looks", range(6))
def test_nobody_is_forgotten_when_the_pause_ends_between_two_looks_at_the_clock(looks: int) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        limit = AdaptiveLimit(8)
        real, left = loop.time, looks
        limit.pause(0.02)
        opens = real() + 0.02

        def clock() -> float:
            nonlocal left
            left -= 1
            return max(real(), opens) if left < 0 else min(real(), opens - 0.001)

        loop.time = clock  # type: ignore[method-assign]
        try:
            await asyncio.wait_for(limit.__aenter__(), 5.0)
        finally:
            loop.time = real  # type: ignore[method-assign]

    asyncio.run(work())


def test_it_finds_a_server_s_limit_and_stays_near_it() -> None:
    """Against a server that bears 40 at once, with a ceiling of 200: most of the 40 in use, few refusals."""

    async def work() -> tuple[int, int]:
        limit = AdaptiveLimit(200)
        inside = served = refused = 0
        left = 6000

        async def worker() -> None:
            nonlocal inside, served, refused, left
            while left > 0:
                async with limit as era:
                    if inside >= 40:
                        refused += 1
                        await asyncio.sleep(0)
                        limit.throttled(era)
                        continue
                    inside += 1
                    await asyncio.sleep(0.004)
                    inside -= 1
                    served += 1
                    left -= 1
                    limit.succeeded()

        await asyncio.gather(*(worker() for _ in range(200)))
        return served, refused

    served, refused = asyncio.run(work())
    assert served >= 6000
    assert refused < served * 0.1


def test_growth_is_quick_below_where_it_failed_and_slow_above() -> None:
    async def work() -> None:
        limit = AdaptiveLimit(1000)
        async with limit as era:
            limit.throttled(era)
        assert limit.size == 500
        for _ in range(2000):
            await limit.__aenter__()
            if limit.in_flight >= limit.size:
                break
        grown = 0
        while limit.size < 850:
            limit.in_flight = limit.size
            limit.succeeded()
            grown += 1
        assert grown == 350
        limit.in_flight = limit.size
        limit.succeeded()
        assert limit.size == 850
        before = limit.size
        limit.in_flight = 1
        for _ in range(5000):
            limit.succeeded()
        assert limit.size == before
        limit.in_flight = 1000
        for _ in range(100_000):
            limit.succeeded()
        assert limit.size == 1000

    asyncio.run(work())


def test_who_is_cancelled_while_waiting_leaves_no_place_taken() -> None:
    async def work() -> None:
        limit = AdaptiveLimit(1)
        async with limit:
            waiting = [asyncio.create_task(limit.__aenter__()) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting[1].done()
        waiting[1].cancel()
        waiting[2].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert limit.in_flight == 1  # the one that got in before it was cancelled
        await limit.__aexit__(None, None, None)
        async with asyncio.timeout(1), limit:
            assert limit.in_flight == 1

    asyncio.run(work())


def test_a_floor_above_the_ceiling_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="floor"):
        AdaptiveLimit(2, floor=3)


def test_those_ahead_are_let_in_until_the_server_objects() -> None:
    async def work() -> None:
        limit = AdaptiveLimit(10, ahead=5)
        for _ in range(15):
            async with asyncio.timeout(1):
                era = await limit.__aenter__()
        late = asyncio.create_task(limit.__aenter__())
        await asyncio.sleep(0)
        assert not late.done()
        limit.throttled(era)
        assert limit.size == 5
        for _ in range(10):
            await limit.__aexit__(None, None, None)
            await asyncio.sleep(0)
            assert not late.done()
        await limit.__aexit__(None, None, None)
        await asyncio.sleep(0)
        assert late.done()

    asyncio.run(work())
