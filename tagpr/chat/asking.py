"""From attempts to replies: what is tried again and for how long, what stops the run, what only drops one request."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

from tagpr.chat.client import Outcome, Reply
from tagpr.chat.cost import Budget, Reservation, most_tokens
from tagpr.chat.limits import AdaptiveLimit
from tagpr.errors import ConfigError, StageError

Attempt = Callable[[Mapping[str, Any]], Awaitable[Outcome]]

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
# So many requests refused before any was answered: the settings are wrong, not the requests.
REFUSALS_AT_START = 10
# A request that is throttled while others get through is patient, but not for ever.
THROTTLES_PER_RETRY = 10
# 4xx that speak about this one request: too long, cannot be processed.
_OF_THE_REQUEST = frozenset({400, 413, 422})
# No reply, but the server may have made one and charge for it.
_MAYBE_BILLED = frozenset({"timeout", "dropped", "broken_json", "no_completion"})


class RequestRefusedError(StageError):
    """The endpoint refuses this one request, with this status and code: an over-long prompt, say. Others may go on."""

    def __init__(self, key: str, status: int | None, code: str, message: str = "") -> None:
        super().__init__(
            f"{key}: the endpoint refuses a request with status {status} ({code or 'no code'}"
            f"{': ' + message if message else ''}). Check model and parameters in this node."
        )
        self.key, self.http_status, self.code, self.message = key, status, code, message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.http_status, self.code, self.message)


class Asker:
    """Asks one model through ``attempt``. ``key`` is the configuration node that errors name, e.g. ``chains.judge``, and
    ``url_field`` the field of it that holds ``base_url``.

    ``counts`` has what was asked, tokens, and what was retried and refused, by cause; ``answering_s`` the seconds that replies
    took, summed over them.
    """

    def __init__(
        self,
        key: str,
        attempt: Attempt,
        *,
        base_url: str,
        key_variable: str | None,
        retries: int,
        limit: AdaptiveLimit,
        budget: Budget | None = None,
        url_field: str = "base_url",
    ) -> None:
        self.key = key
        self._url_key = f"{key}.{url_field}"
        self.limit = limit
        self.budget = budget
        self.counts: Counter[str] = Counter()
        self.answering_s = 0.0
        self._attempt = attempt
        self._base_url = base_url
        self._key_variable = key_variable
        self._retries = retries
        self._stopped = ""
        self._refusals = 0

    async def ask(self, body: Mapping[str, Any], *, most_prompt_tokens: int | None = None) -> Reply:
        """The reply to one request body, after as many tries as it takes.

        ``most_prompt_tokens`` is an upper bound of the prompt's tokens for the budget, where the caller knows a better one
        than its bytes.

        Raises:
            StageError: no request can succeed (key, quota, model, URL), or this one went on failing.
            RequestRefusedError: the endpoint refuses this request; others may succeed.
            BudgetReachedError: the request does not fit into what is left.
        """
        failures = throttles = 0
        while True:
            replies_before = self.counts["asked"]
            outcome = await self._once(body, most_prompt_tokens)
            if outcome.reply is not None:
                return outcome.reply
            self._give_up_where_it_cannot_help(outcome)
            what = str(outcome.status) if (outcome.status or 200) != 200 else outcome.code or outcome.failure
            self.counts[f"retried_{what}"] += 1
            if outcome.failure == "rate_limited" and self.counts["asked"] > replies_before:
                throttles += 1
            else:
                failures += 1
            if failures > self._retries or throttles > THROTTLES_PER_RETRY * (self._retries + 1):
                self._stop(
                    f"{self._url_key}={self._base_url}: no answer after {failures + throttles} tries "
                    f"(the last: {what}). Check that the endpoint is up and run again: what was answered is kept."
                )
            if outcome.retry_after_s is None:
                backoff = FIRST_WAIT_S * 2 ** min(failures + throttles - 1, 20) * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(backoff, LONGEST_WAIT_S))

    async def _once(self, body: Mapping[str, Any], most_prompt_tokens: int | None) -> Outcome:
        """One attempt within the limit and the budget."""
        async with self.limit as era:
            if self._stopped:
                raise StageError(self._stopped)
            reservation = await self._reserve(body, most_prompt_tokens)
            began = time.monotonic()
            try:
                outcome = await self._attempt(body)
            except BaseException:
                if self.budget is not None and reservation is not None:
                    self.budget.release(reservation, maybe_billed=True)
                raise
            if outcome.reply is not None:
                self.limit.succeeded()
            elif outcome.failure == "rate_limited" or outcome.retry_after_s:
                self.limit.throttled(era, outcome.retry_after_s)
        if self.budget is not None and reservation is not None:
            if outcome.reply is not None:
                self.budget.settle(reservation, outcome.reply)
            else:
                self.budget.release(reservation, maybe_billed=outcome.code in _MAYBE_BILLED)
        if outcome.reply is not None:
            self.counts["asked"] += 1
            self.answering_s += time.monotonic() - began
            self.counts["prompt_tokens"] += outcome.reply.prompt_tokens
            self.counts["cached_prompt_tokens"] += outcome.reply.cached_prompt_tokens
            self.counts["completion_tokens"] += outcome.reply.completion_tokens
        return outcome

    async def _reserve(self, body: Mapping[str, Any], most_prompt_tokens: int | None) -> Reservation | None:
        if self.budget is None:
            return None
        prompt, completion = most_tokens(body)
        if completion is None and self.budget.limit is not None:
            raise ConfigError(
                f"{self.key}.max_tokens: a budget in dollars needs a limit on the tokens of a reply. Set it."
            )
        return await self.budget.reserve(
            str(body.get("model", "")), most_prompt_tokens or prompt, completion or 0
        )

    def _give_up_where_it_cannot_help(self, outcome: Outcome) -> None:
        """Raise for failures that another try of the same request cannot mend."""
        match outcome.failure:
            case "refused_key":
                self._stop(
                    f"{self.key}: {self._base_url} refuses the key in {self._key_variable} "
                    f"(status {outcome.status}). Put a valid key there and run again."
                )
            case "no_quota":
                self._stop(
                    f"{self.key}: the account's quota at {self._base_url} is used up. Raise it and run again."
                )
            case "no_completion" if not self.counts["asked"]:
                # Status 200 with something else in it: a proxy's HTML page, say.
                self._stop(
                    f"{self._url_key}={self._base_url}: its answer is no chat completion. "
                    "Point it to an OpenAI-compatible endpoint (the URL often ends in /v1)."
                )
            case "bad_request":
                refused = RequestRefusedError(self.key, outcome.status, outcome.code, outcome.message)
                self.counts[f"refused_{outcome.code or outcome.status}"] += 1
                self._refusals += 1
                at_start = not self.counts["asked"] and self._refusals >= REFUSALS_AT_START
                if outcome.status not in _OF_THE_REQUEST or at_start:
                    self._stop(
                        f"{self.key}: {self._base_url} refuses the request with status {outcome.status} "
                        f"({outcome.code or 'no code'}{': ' + outcome.message if outcome.message else ''}). "
                        "Check model and parameters in this node."
                    )
                raise refused

    def _stop(self, message: str) -> NoReturn:
        """No request of this asker will be sent any more."""
        self._stopped = self._stopped or message
        raise StageError(self._stopped)
