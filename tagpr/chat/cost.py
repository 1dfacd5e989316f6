"""What requests cost, and a limit in dollars that is never passed."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tagpr.chat.client import Reply
from tagpr.errors import ConfigError, StageError

MILLION = 1_000_000
# What a chat template adds to the text of a message, generously.
MESSAGE_TOKENS = 16


class BudgetReachedError(StageError):
    """The next request could pass the limit. Everything that was answered is kept."""


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars per million tokens; ``batch`` is the factor for requests through the Batch API."""

    prompt: float
    cached_prompt: float
    completion: float
    batch: float = 0.5

    def dollars(self, prompt: int, completion: int, cached: int = 0, *, batch: bool = False) -> float:
        """Price of so many tokens; ``cached`` of the prompt tokens came from the provider's cache."""
        full = (prompt - cached) * self.prompt + cached * self.cached_prompt + completion * self.completion
        return full / MILLION * (self.batch if batch else 1.0)


FREE = Price(0.0, 0.0, 0.0, 1.0)


@dataclass(slots=True)
class Reservation:
    """Dollars set aside for one request that is under way."""

    model: str
    dollars: float


class Budget:
    """Spending of one event loop, over all models. ``spent`` starts at what earlier runs of the same ledger cost.

    :meth:`reserve` sets the most aside that a request can cost; :meth:`settle` replaces that by what it did cost. Spent and
    set aside together never exceed ``dollars`` (None: no limit).
    """

    def __init__(
        self,
        dollars: float | None,
        prices: Mapping[str, Price],
        *,
        spent: float = 0.0,
        key: str = "chains.budget.dollars",
    ) -> None:
        self.limit = dollars
        self.prices = prices
        self.spent = spent
        self.uncertain = 0.0
        self.reserved = 0.0
        self.held = 0.0
        """Set aside for batches that are out: they may take a day."""
        self._key = key
        self._under_way = 0
        self._settled = asyncio.Event()

    def price(self, model: str) -> Price:
        """Price of this model.

        Raises:
            ConfigError: there is a limit, but no price.
        """
        price = self.prices.get(model)
        if price is None and self.limit is not None:
            raise ConfigError(
                f"{self._key}={self.limit}: {model} has no price. Set it in chains.prices, 0 where it costs nothing."
            )
        return price or FREE

    @property
    def left(self) -> float:
        """Dollars that are neither spent nor set aside; infinite without a limit."""
        if self.limit is None:
            return float("inf")
        return self.limit - self.spent - self.uncertain - self.reserved - self.held

    async def reserve(self, model: str, prompt_tokens: int, completion_tokens: int) -> Reservation:
        """Set aside what the request can cost at most; waits while requests under way may still turn out cheaper.

        Raises:
            BudgetReachedError: it does not fit, and nothing is under way that could make room.
        """
        dollars = self.price(model).dollars(prompt_tokens, completion_tokens)
        while dollars > self.left:
            if not self._under_way:
                raise BudgetReachedError(self.reached(dollars))
            self._settled.clear()
            await self._settled.wait()
        self.reserved += dollars
        self._under_way += 1
        return Reservation(model, dollars)

    def settle(self, reservation: Reservation, reply: Reply) -> float:
        """The reply came: what it cost, in dollars. Tokens that were not reported cost what was set aside."""
        if reply.prompt_tokens or reply.completion_tokens:
            cost = self.price(reservation.model).dollars(
                reply.prompt_tokens, reply.completion_tokens, reply.cached_prompt_tokens
            )
        else:
            cost = reservation.dollars
        self._give_back(reservation)
        self.spent += cost
        return cost

    def spend(self, model: str, reply: Reply, *, batch: bool) -> None:
        """Count a reply for which nothing was reserved here."""
        tokens = reply.prompt_tokens, reply.completion_tokens, reply.cached_prompt_tokens
        self.spent += self.price(model).dollars(*tokens, batch=batch)

    def release(self, reservation: Reservation, *, maybe_billed: bool = False) -> None:
        """No reply came. ``maybe_billed``: the server may have done the work all the same; counted in full."""
        if maybe_billed:
            self.uncertain += reservation.dollars
        self._give_back(reservation)

    def _give_back(self, reservation: Reservation) -> None:
        self._under_way -= 1
        # Differences of floats do not end at zero by themselves.
        self.reserved = self.reserved - reservation.dollars if self._under_way else 0.0
        reservation.dollars = 0.0
        self._settled.set()

    def reached(self, dollars: float | None = None) -> str:
        """The line that says so; ``dollars`` is what the next request may cost."""
        parts = [f"${self.spent:.2f} is spent"]
        if self.uncertain:
            parts.append(f"up to ${self.uncertain:.2f} went to requests without a reply")
        if self.held:
            parts.append(f"up to ${self.held:.2f} is held for batches that are out")
        parts.append(f"${max(0.0, self.left):.2f} is left")
        if dollars is not None:
            parts.append(f"the next request may cost ${dollars:.4f}")
        return (
            f"{self._key}={self.limit:g}: reached ({', '.join(parts)}). Raise it and run again: what was answered is kept "
            "and costs nothing."
        )


def most_tokens(body: Mapping[str, Any]) -> tuple[int, int | None]:
    """Upper bounds of a request's prompt and completion tokens; None: the request sets no limit on its completion.

    No byte-level tokenizer makes more tokens than there are bytes; what the request carries besides the messages (a JSON
    schema) is counted as well.
    """
    texts = [message.get("content") for message in body["messages"]]
    size = sum(len(text.encode()) + MESSAGE_TOKENS for text in texts if isinstance(text, str))
    if "response_format" in body:
        size += len(json.dumps(body["response_format"]))
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    return size, None if most is None else int(most) * int(body.get("n") or 1)
