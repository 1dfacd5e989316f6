"""What is tried again, what stops everything at once, what drops one request, and that no budget is passed."""

import asyncio
import pickle
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from tagpr.chat import asking
from tagpr.chat.asking import Asker, RequestRefusedError
from tagpr.chat.client import Outcome, Reply
from tagpr.chat.cost import Budget, BudgetReachedError, Price, most_tokens
from tagpr.chat.limits import AdaptiveLimit
from tagpr.errors import ConfigError, StageError

BODY = {"model": "m", "messages": [{"role": "user", "content": "question"}], "max_tokens": 100}
HELLO = Reply("hello", None, "stop", 30, 20, 4)
FINE = Outcome(HELLO, status=200)
THROTTLED = Outcome(None, "rate_limited", 429, "rate_limit_exceeded", 0.001)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.0001)
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 0.001)


class Script:
    """An attempt whose outcomes are ``answer(number)``."""

    def __init__(self, answer: Callable[[int], Outcome], pause_s: float = 0.0) -> None:
        self.answer = answer
        self.pause_s = pause_s
        self.tries = 0

    async def __call__(self, body: Mapping[str, Any]) -> Outcome:
        self.tries += 1
        outcome = self.answer(self.tries)
        await asyncio.sleep(self.pause_s)
        return outcome


def asker(
    attempt: Callable[[Mapping[str, Any]], Awaitable[Outcome]],
    *,
    retries: int = 3,
    ceiling: int = 8,
    budget: Budget | None = None,
) -> Asker:
    return Asker(
        "chains.judge",
        attempt,
        base_url="http://there/v1",
        key_variable="SOME_KEY",
        retries=retries,
        limit=AdaptiveLimit(ceiling),
        budget=budget,
    )


def gather(asker: Asker, number: int) -> list[Reply | BaseException]:
    async def work() -> list[Reply | BaseException]:
        return await asyncio.gather(*(asker.ask(BODY) for _ in range(number)), return_exceptions=True)

    return asyncio.run(work())


def test_what_passes_is_tried_again_and_counted() -> None:
    answers = {
        1: THROTTLED,
        2: Outcome(None, "server_error", 503, "", 0.001),
        3: Outcome(None, "timeout", code="timeout"),
    }
    script = Script(lambda number: answers.get(number, FINE))
    one = asker(script)
    assert gather(one, 1) == [HELLO]
    assert one.counts == {
        "retried_429": 1, "retried_503": 1, "retried_timeout": 1, "asked": 1,
        "prompt_tokens": 30, "cached_prompt_tokens": 20, "completion_tokens": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (Outcome(None, "server_error", 500), r"no answer after 4 tries \(the last: 500\)"),
        (Outcome(None, "unreachable", code="ClientConnectorError"), "the last: ClientConnectorError"),
        (Outcome(None, "timeout", code="timeout"), "the last: timeout"),
        (Outcome(None, "server_error", 200, "broken_json"), "the last: broken_json"),
        (THROTTLED, "the last: 429"),
    ],
)
def test_what_does_not_pass_ends_after_the_retries(outcome: Outcome, says: str) -> None:
    script = Script(lambda _: outcome)
    with pytest.raises(StageError, match=says) as caught:
        asyncio.run(asker(script).ask(BODY))
    assert script.tries == 4
    assert str(caught.value).startswith("chains.judge.base_url=http://there/v1: ")


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (Outcome(None, "refused_key", 401), "refuses the key in SOME_KEY"),
        (Outcome(None, "no_quota", 429, "insufficient_quota"), "quota at http://there/v1 is used up"),
        (
            Outcome(None, "bad_request", 404, "model_not_found"),
            r"status 404 \(model_not_found\)",
        ),
        (Outcome(None, "no_completion", 200), "no chat completion"),
    ],
)
def test_what_no_try_can_mend_stops_everything_at_once(outcome: Outcome, says: str) -> None:
    script = Script(lambda _: outcome, pause_s=0.001)
    results = gather(asker(script), 1000)
    assert all(isinstance(result, StageError) for result in results)
    assert script.tries <= 8
    assert len({str(result) for result in results}) == 1
    with pytest.raises(StageError, match=says):
        raise results[0]  # type: ignore[misc]


def test_a_web_page_after_good_replies_is_a_hiccup() -> None:
    script = Script(
        lambda number: Outcome(None, "no_completion", 200, "no_completion") if number == 3 else FINE
    )
    one = asker(script)
    assert gather(one, 5) == [HELLO] * 5
    assert one.counts["retried_no_completion"] == 1


def test_an_over_long_prompt_is_this_request_s_problem() -> None:
    long = Outcome(None, "bad_request", 400, "context_length_exceeded", message="too long")
    script = Script(lambda number: long if number % 5 == 0 else FINE)
    one = asker(script)
    results = gather(one, 1000)
    refused = [result for result in results if isinstance(result, RequestRefusedError)]
    assert len(refused) == 200
    assert results.count(HELLO) == 800
    assert (refused[0].http_status, refused[0].code) == (400, "context_length_exceeded")
    assert one.counts["refused_context_length_exceeded"] == 200
    copy = pickle.loads(pickle.dumps(refused[0]))
    assert (str(copy), copy.code) == (str(refused[0]), "context_length_exceeded")


def test_nothing_but_refusals_is_a_wrong_setting() -> None:
    script = Script(lambda _: Outcome(None, "bad_request", 400, "unsupported_parameter"), pause_s=0.001)
    results = gather(asker(script), 1000)
    assert script.tries <= asking.REFUSALS_AT_START + 8
    assert sum(isinstance(result, RequestRefusedError) for result in results) == asking.REFUSALS_AT_START - 1
    stopped = [result for result in results if not isinstance(result, RequestRefusedError)]
    assert all(
        isinstance(result, StageError) and "Check model and parameters" in str(result) for result in stopped
    )


def test_a_rate_limit_that_lets_others_through_is_waited_for() -> None:
    """Each reply comes after nine refusals: more than the retries, and yet nobody gives up."""
    script = Script(lambda number: FINE if number % 10 == 0 else THROTTLED)
    one = asker(script, retries=2, ceiling=40)
    results = gather(one, 60)
    assert results.count(HELLO) >= 55


def test_a_429_halves_the_limit_and_a_500_does_not() -> None:
    async def size(outcome: Outcome) -> int:
        script = Script(lambda number: outcome if number == 1 else FINE)
        one = asker(script, ceiling=64)
        one.limit.in_flight = -1000  # too idle to grow back
        await one.ask(BODY)
        return one.limit.size

    assert asyncio.run(size(THROTTLED)) == 32
    assert asyncio.run(size(Outcome(None, "server_error", 503, "", 0.001))) == 32
    assert asyncio.run(size(Outcome(None, "server_error", 500))) == 64


# money

PRICES = {"m": Price(prompt=2.5, cached_prompt=1.25, completion=10.0)}


def test_prices() -> None:
    assert PRICES["m"].dollars(1_000_000, 0) == 2.5
    assert PRICES["m"].dollars(1_000_000, 100_000, 400_000) == pytest.approx(0.6 * 2.5 + 0.4 * 1.25 + 1.0)
    assert PRICES["m"].dollars(1_000_000, 0, batch=True) == 1.25


def test_the_most_a_request_can_take() -> None:
    prompt, completion = most_tokens(BODY)
    assert prompt >= len("question")
    assert completion == 100
    assert most_tokens({"messages": [{"content": "日本"}], "max_completion_tokens": 7, "n": 3})[1] == 21
    assert most_tokens({"messages": [{"content": "日本"}]}) == (6 + 16, None)
    assert most_tokens({**BODY, "response_format": {"x": "y" * 100}})[0] > prompt + 100


@pytest.mark.parametrize("seed", range(5))
def test_what_is_spent_never_passes_the_limit(seed: int) -> None:
    """Whatever comes back, and in whatever order: real cost <= limit, and hardly anything stays unspent."""
    rng = random.Random(seed)
    billed = 0.0
    budget = Budget(0.05, PRICES)

    async def attempt(body: Mapping[str, Any]) -> Outcome:
        nonlocal billed
        await asyncio.sleep(rng.uniform(0.0, 0.002))
        draw = rng.random()
        if draw < 0.1:
            return THROTTLED
        if draw < 0.2:
            return Outcome(None, "server_error", 500)
        used = Reply("x", None, "stop", rng.randint(1, 20), 0, rng.randint(1, 100))
        billed += PRICES["m"].dollars(used.prompt_tokens, used.completion_tokens)
        if draw < 0.25:
            return Outcome(None, "timeout", code="timeout")
        return Outcome(used, status=200)

    results = gather(asker(attempt, retries=50, ceiling=32, budget=budget), 500)
    stopped = [result for result in results if isinstance(result, BaseException)]
    assert stopped
    assert all(isinstance(result, BudgetReachedError) for result in stopped)
    assert billed <= 0.05
    assert budget.spent + budget.uncertain <= 0.05
    assert budget.spent + budget.uncertain > 0.045
    assert budget.reserved == pytest.approx(0.0, abs=1e-12)
    assert str(stopped[-1]).startswith("chains.budget.dollars=0.05: reached ($0.0")
    assert "\n" not in str(stopped[-1])


def test_earlier_runs_count_and_a_bigger_limit_goes_on() -> None:
    with pytest.raises(BudgetReachedError, match=r"\$1.00 is spent, \$0.00 is left, "):
        asyncio.run(asker(Script(lambda _: FINE), budget=Budget(1.0, PRICES, spent=1.0)).ask(BODY))
    assert (
        asyncio.run(asker(Script(lambda _: FINE), budget=Budget(2.0, PRICES, spent=1.0)).ask(BODY)) == HELLO
    )


def test_a_request_that_is_cancelled_may_have_been_billed() -> None:
    async def work() -> Budget:
        budget = Budget(1.0, PRICES)
        task = asyncio.create_task(asker(Script(lambda _: FINE, pause_s=5.0), budget=budget).ask(BODY))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return budget

    budget = asyncio.run(work())
    assert budget.uncertain > 0
    assert budget.reserved == 0


def test_what_a_budget_needs_to_know() -> None:
    limited = asker(Script(lambda _: FINE), budget=Budget(1.0, PRICES))
    with pytest.raises(ConfigError, match="unpriced has no price"):
        asyncio.run(limited.ask({**BODY, "model": "unpriced"}))
    with pytest.raises(ConfigError, match=r"chains\.judge\.max_tokens"):
        asyncio.run(limited.ask({"model": "m", "messages": BODY["messages"]}))
    budget = Budget(None, PRICES)
    assert asyncio.run(asker(Script(lambda _: FINE), budget=budget).ask(BODY)) == HELLO
    assert budget.spent == pytest.approx(PRICES["m"].dollars(30, 4, 20))


def test_a_refusal_that_nobody_catches_ends_a_stage_as_wrong_input_does() -> None:
    refused = RequestRefusedError("chains.judge", 400, "context_length_exceeded")
    assert (refused.status, refused.http_status) == (2, 400)
    assert pickle.loads(pickle.dumps(refused)).http_status == 400
