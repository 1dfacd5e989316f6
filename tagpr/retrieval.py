"""Which items of a profile a prompt shows, and in which order (S3, S36).

``recency``, ``bm25`` and ``random`` are here; ``contriever`` needs a model and joins when a stage installs it
(``tagpr.dense_retrieval``).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tagpr.errors import ConfigError, DataError
from tagpr.schema import ProfileItem

DENSE = "contriever"


def all_fields(fields: Mapping[str, str]) -> str:
    """Text of an item where no benchmark says what to search in."""
    return " ".join(fields.values())


@dataclass(frozen=True)
class Request:
    """What a retriever may look at beside the items: what to search with and in, whose profile it is, and the seed."""

    query_text: str
    item_text: Callable[[Mapping[str, str]], str]
    user_id: str
    seed: int


Retriever = Callable[[Sequence[ProfileItem], int, Request], list[ProfileItem]]


def select(
    items: Sequence[ProfileItem],
    query_text: str,
    size: int,
    retriever: str,
    *,
    item_text: Callable[[Mapping[str, str]], str] = all_fields,
    user_id: str = "",
    seed: int = 0,
) -> tuple[ProfileItem, ...]:
    """Return at most ``size`` items, best first as ``retriever`` sees it (``recency``: newest first).

    Args:
        items: the profile in file order.
        query_text: what to search with (``Task.query_text`` of the query).
        size: how many to return; all there are where there are fewer.
        retriever: a name of ``RETRIEVERS``.
        item_text: an item's fields -> what to search in (``Task.item_text``).
        user_id: for ``random``.
        seed: for ``random``.

    Raises:
        ConfigError: unknown or not installed retriever (the message lists the known ones) or negative size.
        DataError: dates that cannot be ordered.
    """
    if retriever not in RETRIEVERS:
        if retriever == DENSE:
            raise ConfigError(
                f"benchmark.retriever={DENSE}: this stage has not loaded its model. "
                "Call tagpr.dense_retrieval.install first."
            )
        raise ConfigError(
            f"benchmark.retriever={retriever}: no such retriever. Known: {', '.join(known_retrievers())}."
        )
    if size < 0:
        raise ConfigError(f"profile_size={size}: is negative. Use 0 for no profile.")
    if size == 0 or not items:
        return ()
    return tuple(RETRIEVERS[retriever](items, size, Request(query_text, item_text, user_id, seed)))


def known_retrievers() -> tuple[str, ...]:
    """Names that may stand in a configuration, installed or not."""
    return tuple(dict.fromkeys((*RETRIEVERS, DENSE)))


def best_first(items: Sequence[ProfileItem], scores: NDArray[np.float64], size: int) -> list[ProfileItem]:
    """The ``size`` items of highest score; of equal ones the later in the file, as the official code's reversed sort.

    Scores are compared to nine decimals, so that equal ones stay equal however they were summed.
    """
    rounded = np.round(scores, 9)
    return [items[place] for place in sorted(range(len(items)), key=lambda i: (-rounded[i], -i))[:size]]


def date_key(date: str) -> tuple[int, ...]:
    """Return the sort key of a LaMP date (``2013``, ``2013-05-07``), as in the official code.

    Raises:
        DataError: not numbers joined by ``-``, or more than three, or the first is no year (``05-07-2013`` would sort wrongly).
    """
    try:
        key = tuple(map(int, date.split("-")))
    except ValueError:
        key = ()
    if not 1 <= len(key) <= 3 or not 1000 <= key[0] <= 9999:
        raise DataError(f"date {date!r} is not year, year-month or year-month-day. Mend the row.")
    return key


def _recency(items: Sequence[ProfileItem], size: int, request: Request) -> list[ProfileItem]:
    """Newest first by date, then by place in the file; without dates the last in the file is the newest.

    As in the official code dates are compared number by number, so ``2013`` comes before ``2013-05-07``: of a year alone it
    takes the earliest day. Preparing data counts the rows where this matters.
    """
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


# Those of rank_bm25's BM25Okapi, which the official code uses as it comes.
_K1, _B, _EPSILON = 1.5, 0.75, 0.25


def _bm25(items: Sequence[ProfileItem], size: int, request: Request) -> list[ProfileItem]:
    """Best match first by BM25 on words between white space, scored as in the official code."""
    texts = [request.item_text(item.fields).split() for item in items]
    return best_first(items, okapi_scores(request.query_text.split(), texts), size)


def okapi_scores(query: Sequence[str], corpus: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """BM25 of each text for a query, [texts]: what ``rank_bm25.BM25Okapi(corpus).get_scores(query)`` gives.

    bm25s has no variant that gives it: rank_bm25 sets the negative weight of a word in more than half of the texts to a
    quarter of the mean weight of all words, and in a profile of thirty texts such words decide the order. On 720 questions of
    real LaMP-3 users (31 reviews each) the nearest of bm25s' own variants shares 0.82 of the best 8 and has them in the same
    order for 1 %. So bm25s builds its index with weights that are never 0, and each word's column is scaled to rank_bm25's
    weight. Then the scores agree to 2e-11, and the best 8 with ``get_top_n`` in all 601 questions without a tie among the
    best 9; rank_bm25 leaves ties to a sort that is not stable, so over all 720 it is 0.998 of the best 8 and the same order for
    92 %, and on MiniLaMP, whose short texts nearly always tie, 0.98 and 8 %.
    """
    from bm25s import BM25

    number: dict[str, int] = {}
    ids = [[number.setdefault(word, len(number)) for word in text] for text in corpus]
    if not number:
        return np.zeros(len(corpus))
    index = BM25(k1=_K1, b=_B, method="atire", idf_method="bm25+", dtype="float64")
    index.scores = index.build_index_from_ids(list(range(len(number))), ids, show_progress=False)
    texts_with = np.diff(index.scores["indptr"])
    weight = np.log(len(corpus) - texts_with + 0.5) - np.log(texts_with + 0.5)
    weight = np.where(weight < 0, _EPSILON * weight.mean(), weight)
    index.scores["data"] *= np.repeat(weight / np.log((len(corpus) + 1) / texts_with), texts_with)
    scores: NDArray[np.float64] = index.get_scores_from_ids(
        [number[word] for word in query if word in number]
    )
    return scores


RETRIEVERS: dict[str, Retriever] = {"recency": _recency, "bm25": _bm25, "random": _random}
