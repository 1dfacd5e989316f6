"""Which items of a profile a prompt shows, and in which order (S3, S36)."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tagpr.errors import ConfigError, DataError
from tagpr.schema import ProfileItem


@dataclass(frozen=True)
class Request:
    """What a retriever may look at beside the items: the query's text, whose profile it is, and the seed."""

    query_text: str
    user_id: str
    seed: int


Retriever = Callable[[Sequence[ProfileItem], int, Request], list[ProfileItem]]


def select(
    items: Sequence[ProfileItem],
    query_text: str,
    size: int,
    retriever: str,
    *,
    user_id: str = "",
    seed: int = 0,
) -> tuple[ProfileItem, ...]:
    """Return at most ``size`` items, best first as ``retriever`` sees it (``recency``: newest first).

    Raises:
        ConfigError: unknown retriever (the message lists the known ones) or negative size.
        DataError: dates that cannot be ordered.
    """
    if retriever not in RETRIEVERS:
        raise ConfigError(f"retriever={retriever}: no such retriever. Known: {', '.join(RETRIEVERS)}.")
    if size < 0:
        raise ConfigError(f"profile_size={size}: is negative. Use 0 for no profile.")
    if size == 0 or not items:
        return ()
    return tuple(RETRIEVERS[retriever](items, size, Request(query_text, user_id, seed)))


def date_key(date: str) -> tuple[int, ...]:
    """Return the sort key of a LaMP date (``2013``, ``2013-05-07``), as in the official code.

    Raises:
        DataError: not numbers joined by ``-``.
    """
    try:
        return tuple(map(int, date.split("-")))
    except ValueError:
        raise DataError(f"date {date!r} is not year, year-month or year-month-day. Mend the row.") from None


def _recency(items: Sequence[ProfileItem], size: int, request: Request) -> list[ProfileItem]:
    """Newest first by date, then by place in the file; without dates the last in the file is the newest."""
    dates = [item.date for item in items if item.date is not None]
    if not dates:
        return list(items[-size:])[::-1]
    if len(dates) < len(items):
        undated = next(item.id for item in items if item.date is None)
        raise DataError(f"profile item {undated!r}: has no date while others have. Date all items or none.")
    return sorted(items, key=lambda item: date_key(item.date or ""))[-size:][::-1]


def _random(items: Sequence[ProfileItem], size: int, request: Request) -> list[ProfileItem]:
    """Draw without replacement, always the same for a user and a seed; a smaller draw begins a larger one.

    Ranking by a hash, unlike a generator's state, depends on neither Python's version nor the items' order.
    The official code draws with replacement, which can show an item twice.
    """

    def rank(item: ProfileItem) -> bytes:
        return hashlib.sha256("\x00".join((str(request.seed), request.user_id, item.id)).encode()).digest()

    return sorted(items, key=rank)[:size]


RETRIEVERS: dict[str, Retriever] = {"recency": _recency, "random": _random}
