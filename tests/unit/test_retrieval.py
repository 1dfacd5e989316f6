"""Recency, BM25, dense and random retrieval (S3, S36)."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rank_bm25 import BM25Okapi

from tagpr import dense_retrieval
from tagpr.benchmarks.lamp import read_split
from tagpr.benchmarks.minilamp.generate import write
from tagpr.benchmarks.prompt import build_prompt
from tagpr.benchmarks.tasks import get_task
from tagpr.dense_retrieval import DenseRetriever, install
from tagpr.errors import ConfigError, DataError
from tagpr.retrieval import RETRIEVERS, okapi_scores, select
from tagpr.schema import Example, ProfileItem

REAL = Path(__file__).parents[3] / "shared/data/lamp3_real"


def item(name: str, date: str | None = None) -> ProfileItem:
    return ProfileItem(id=name, fields={"text": name}, date=date)


def ids(items: tuple[ProfileItem, ...]) -> str:
    return "".join(item.id for item in items)


@pytest.fixture
def registry() -> Iterator[None]:
    before, installed = dict(RETRIEVERS), dense_retrieval._installed
    RETRIEVERS.pop("contriever", None)
    dense_retrieval._installed = None
    yield
    RETRIEVERS.clear()
    RETRIEVERS.update(before)
    dense_retrieval._installed = installed


def test_recency_is_newest_first_by_number_not_by_text() -> None:
    profile = [item("a", "2016-9-30"), item("b", "2016-10-01"), item("c", "2015-12-31"), item("d", "2016")]
    assert ids(select(profile, "", 3, "recency")) == "bad"


def test_recency_puts_the_later_of_equal_dates_first() -> None:
    assert ids(select([item("a", "2016"), item("b", "2016"), item("c", "2015")], "", 2, "recency")) == "ba"


def test_without_dates_the_last_in_the_file_is_the_newest() -> None:
    assert ids(select([item(name) for name in "abcd"], "", 3, "recency")) == "dcb"


def test_dates_on_some_items_only_are_refused() -> None:
    with pytest.raises(DataError, match=r"'b': has no date"):
        select([item("a", "2016"), item("b")], "", 2, "recency")


@pytest.mark.parametrize("date", ["May 2016", "2016-05-", "2016/05", ""])
def test_a_date_that_cannot_be_ordered_is_refused(date: str) -> None:
    with pytest.raises(DataError, match="is not year"):
        select([item("a", date), item("b", "2016")], "", 2, "recency")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1990, 2030), st.integers(1, 12), st.integers(1, 28)), max_size=12),
    st.integers(0, 14),
)
def test_recency_equals_the_official_rule(days: list[tuple[int, int, int]], size: int) -> None:
    """The rule: sort by the date's numbers, take the last n, reverse."""
    profile = [item(str(index), f"{y}-{m:02d}-{d:02d}") for index, (y, m, d) in enumerate(days)]
    ranked = sorted(range(len(days)), key=lambda index: days[index])
    expected = ranked[max(0, len(ranked) - size) :][::-1]
    assert [int(one.id) for one in select(profile, "", size, "recency")] == expected


def test_random_depends_on_the_user_and_the_seed_only() -> None:
    profile = [item(name) for name in "abcdefghijklmnop"]
    shuffled = random.Random(1).sample(profile, len(profile))
    drawn = select(profile, "query", 8, "random", user_id="u", seed=3)
    assert len({one.id for one in drawn}) == 8
    assert select(shuffled, "other query", 8, "random", user_id="u", seed=3) == drawn
    assert select(profile, "query", 4, "random", user_id="u", seed=3) == drawn[:4]
    assert select(profile, "query", 8, "random", user_id="u", seed=4) != drawn
    assert select(profile, "query", 8, "random", user_id="v", seed=3) != drawn


def test_random_is_the_same_on_every_machine() -> None:
    assert ids(select([item(name) for name in "abcdefgh"], "", 4, "random", user_id="u", seed=0)) == "ghce"


def test_random_draws_every_item_about_equally_often() -> None:
    profile = [item(name) for name in "abcd"]
    first = [ids(select(profile, "", 1, "random", user_id=str(user))) for user in range(400)]
    assert all(60 < first.count(name) < 140 for name in "abcd")


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_size_zero_and_an_empty_profile_give_nothing(retriever: str) -> None:
    assert select([item("a")], "", 0, retriever) == ()
    assert select([], "", 8, retriever) == ()


def test_unknown_retriever_and_negative_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"retriever=bm52: .*Known: recency, bm25, random, contriever"):
        select([item("a")], "", 1, "bm52")
    with pytest.raises(ConfigError, match=r"profile_size=-1"):
        select([item("a")], "", -1, "recency")


@pytest.mark.parametrize("retriever", ["recency", "bm25", "random"])
@pytest.mark.parametrize("size", [0, 2, 4, 8, 16, 32])
def test_as_many_as_asked_for_or_as_there_are(retriever: str, size: int) -> None:
    profile = [item(f"item {number}", f"20{number:02d}") for number in range(12)]
    found = select(profile, "item 3", size, retriever)
    assert len({one.id for one in found}) == len(found) == min(size, 12)
    smaller = select(profile, "item 3", size // 2, retriever)
    assert found[: size // 2] == smaller


def test_a_year_alone_is_before_any_day_of_it() -> None:
    profile = [item("a", "2013-05-07"), item("b", "2013"), item("c", "2012-12-31"), item("d", "2013-1")]
    assert ids(select(profile, "", 4, "recency")) == "adbc"


# ---- BM25 against rank_bm25


def official_best(scores: NDArray[np.float64], size: int = 8) -> list[int]:
    """The rule of ``select`` on scores from elsewhere: best first, of equal ones the later."""
    rounded = np.round(scores, 9)
    return sorted(range(len(scores)), key=lambda place: (-rounded[place], -place))[:size]


tokens = st.lists(st.sampled_from(["the", "a", "film", "good", "bad", "Film", "é", "<b>"]), max_size=12)


@settings(deadline=None, max_examples=150)
@given(tokens, st.lists(tokens, min_size=1, max_size=9))
def test_bm25_scores_are_those_of_rank_bm25(query: list[str], corpus: list[list[str]]) -> None:
    found = okapi_scores(query, corpus)
    if any(corpus):  # otherwise rank_bm25 divides by zero
        assert found == pytest.approx(BM25Okapi(corpus).get_scores(query), abs=1e-9)
    assert found.shape == (len(corpus),)
    assert np.isfinite(found).all()


def agreement(examples: Sequence[Example]) -> tuple[float, float, float]:
    """Against rank_bm25: share of the best 8, share of questions with the same order, and that with our rule for ties."""
    shared, same, same_by_rule = [], [], []
    for example in examples:
        task = get_task(example.task)
        query = task.query_text(example.query).split()
        official = BM25Okapi([task.item_text(each.fields).split() for each in example.profile])
        best = official.get_top_n(query, list(example.profile), n=8)
        found = select(example.profile, task.query_text(example.query), 8, "bm25", item_text=task.item_text)
        shared.append(len({each.id for each in best} & {each.id for each in found}) / len(best))
        same.append(best == list(found))
        by_rule = [example.profile[place] for place in official_best(official.get_scores(query))]
        same_by_rule.append(by_rule == list(found))
    return float(np.mean(shared)), float(np.mean(same)), float(np.mean(same_by_rule))


@pytest.mark.skipif(not REAL.is_dir(), reason="no real LaMP-3 rows here")
def test_bm25_on_real_reviews_is_rank_bm25_but_for_ties() -> None:
    shared, same, same_by_rule = agreement(read_split(REAL, "lamp3", "dev"))
    assert same_by_rule == 1.0
    assert shared > 0.99
    assert same > 0.97


def test_bm25_on_minilamp_is_rank_bm25_but_for_ties(tmp_path: Path) -> None:
    write(tmp_path, seed=1, train_rows_per_task=8, dev_rows_per_task=8)
    examples = [
        row
        for name in ("lamp1", "lamp2", "lamp3", "lamp4", "lamp5", "lamp7")
        for row in read_split(tmp_path, name, "dev")
    ]
    shared, _, same_by_rule = agreement(examples)
    assert same_by_rule == 1.0
    assert shared > 0.9


def test_bm25_searches_with_the_task_and_prefers_the_later_of_equals(
    capfd: pytest.CaptureFixture[str],
) -> None:
    profile = [item(text) for text in ("x y", "film noir", "film noir", "z", "v", "w")]
    profile = [one.model_copy(update={"id": str(place)}) for place, one in enumerate(profile)]
    assert ids(select(profile, "a film", 3, "bm25")) == "215"
    assert ids(select(profile, "", 4, "bm25")) == "5432"
    upside_down = select(profile, "mlif", 1, "bm25", item_text=lambda fields: fields["text"][::-1])
    assert ids(upside_down) == "2"
    assert capfd.readouterr() == ("", "")  # no progress bars


@pytest.mark.parametrize("retriever", ["bm25", "contriever"])
def test_a_prompt_is_searched_with_the_task_s_texts(retriever: str, registry: None) -> None:
    install("contriever", "offline")
    texts = [
        "the score of the following review on a scale of 1 to 5",
        "plain",
        "a splendid thriller",
        "dull",
        "odd",
    ]
    example = Example(
        id="lamp3:dev:1", task="lamp3", split="dev", user_id="u", gold="4",
        query="What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: splendid thriller",
        profile=tuple(
            ProfileItem(id=str(n), fields={"text": text, "score": "5"}) for n, text in enumerate(texts)
        ),
    )  # fmt: skip
    prompt = build_prompt(example, 1, retriever, None, None)
    assert 'is the score for "a splendid thriller"' in prompt.text
    for size, shown in ((0, 0), (2, 2), (4, 4), (8, 5), (16, 5), (32, 5)):
        assert build_prompt(example, size, retriever, None, None).items_used == shown


# ---- dense retrieval


class Counting:
    """Embeds a number written in a text; remembers what it was asked."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += texts
        return np.array([[float(text), 1.0] for text in texts], dtype=np.float32)


def test_dense_is_by_dot_product_and_embeds_an_item_once(registry: None) -> None:
    embedder = Counting()
    RETRIEVERS["contriever"] = DenseRetriever(embedder, kept=3)
    profile = [item("1"), item("3"), item("2"), item("3")]
    profile = [one.model_copy(update={"id": place}) for place, one in zip("abcd", profile, strict=True)]
    # A dot product: the longest, not the nearest in angle.
    assert ids(select(profile, "10", 3, "contriever")) == "dbc"
    assert embedder.asked == ["10", "1", "3", "2"]
    assert ids(select(profile, "-1", 4, "contriever")) == "acdb"
    assert embedder.asked[4:] == ["-1"]
    select([item("1")], "0", 1, "contriever")
    select([item("7")], "0", 1, "contriever")  # one too many: "3" is the longest unused
    assert embedder.asked[5:] == ["0", "0", "7"]
    select([item("1"), item("2"), item("3")], "0", 1, "contriever")
    assert embedder.asked[8:] == ["0", "3"]


def test_dense_with_the_offline_embedder_finds_what_is_said_alike(registry: None) -> None:
    install("contriever", "offline")
    first = RETRIEVERS["contriever"]
    install("contriever", "offline")
    assert RETRIEVERS["contriever"] is first
    profile = [item("a tragedy at sea"), item("romantic comedies in Paris"), item("cooking for two")]
    assert select(profile, "a romantic comedy", 1, "contriever")[0].id == "romantic comedies in Paris"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: select([item("a")], "", 1, "contriever"),
            "benchmark.retriever=contriever: this stage has not loaded",
        ),
        (lambda: install("contriever", None), "benchmark.retriever_model: is not set"),
        (
            lambda: install("contriever", "/nowhere/at/all"),
            "benchmark.retriever_model=/nowhere/at/all: no such folder",
        ),
    ],
)
def test_dense_without_a_model_is_refused_in_one_line(
    registry: None, call: Callable[[], object], told: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        call()
    assert str(raised.value).startswith(told)
    assert "\n" not in str(raised.value)
    install("recency", None)
