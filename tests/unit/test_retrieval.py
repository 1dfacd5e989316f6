import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagpr.errors import ConfigError, DataError
from tagpr.retrieval import RETRIEVERS, select
from tagpr.schema import ProfileItem


def item(name: str, date: str | None = None) -> ProfileItem:
    return ProfileItem(id=name, fields={"text": name}, date=date)


def ids(items: tuple[ProfileItem, ...]) -> str:
    return "".join(item.id for item in items)


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
    with pytest.raises(ConfigError, match=r"retriever=bm52: .*Known: recency, random"):
        select([item("a")], "", 1, "bm52")
    with pytest.raises(ConfigError, match=r"profile_size=-1"):
        select([item("a")], "", -1, "recency")
