"""The bootstrap over users and runs: against a plain loop, on data whose truth is known, and by hand (S32)."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tagpr.errors import ConfigError, DataError
from tagpr.statistics import (
    Comparison,
    Resampled,
    UserResamples,
    by_user,
    compare,
    holm,
    lead,
    paired_bootstrap,
    resample,
)

Array = NDArray[np.float64]


def user_data(seed: int) -> tuple[Array, Array, list[str]]:
    """200 rows of 30 users who differ in how much better ``a`` is for them."""
    rng = np.random.default_rng(seed)
    users = [f"u{n}" for n in rng.integers(0, 30, 200)]
    shift = {user: rng.normal(0.1, 0.5) for user in sorted(set(users))}
    a = np.array([shift[user] for user in users]) + rng.normal(0, 0.1, 200)
    return a, rng.normal(0, 0.1, 200), users


def test_resamples_equal_a_plain_loop_in_distribution() -> None:
    a, b, users = user_data(1)
    rng = np.random.default_rng(2)
    rows = {user: [i for i, other in enumerate(users) if other == user] for user in dict.fromkeys(users)}
    names = list(rows)
    loop = []
    for _ in range(4000):
        drawn = [i for n in rng.integers(0, len(names), len(names)) for i in rows[names[n]]]
        loop.append(float(np.mean(a[drawn] - b[drawn])))
    order = {user: place for place, user in enumerate(names)}
    resamples = UserResamples(len(names), 4000, seed=3)
    systems = [resample([by_user(values.tolist(), users, order)], resamples) for values in (a, b)]
    difference = systems[0].over_both - systems[1].over_both
    for share in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert np.quantile(difference, share) == pytest.approx(np.quantile(loop, share), abs=0.02)
    result = paired_bootstrap(a.tolist(), b.tolist(), users, samples=4000, seed=3)
    assert result.mean == pytest.approx(float(np.mean(a - b)))
    assert (result.rows, result.users, result.samples) == (200, len(names), 4000)
    # Student's quantile of 29 degrees on the loop's standard deviation, with n - 1.
    half = 2.045 * float(np.std(loop)) * (30 / 29) ** 0.5
    assert (result.low, result.high) == (
        pytest.approx(result.mean - half, abs=0.02),
        pytest.approx(result.mean + half, abs=0.02),
    )


def test_bootstrap_is_seeded() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(9000).tolist(), rng.random(9000).tolist()
    first = paired_bootstrap(a, b, range(9000), samples=300, seed=5)
    assert first == paired_bootstrap(a, b, range(9000), samples=300, seed=5)
    assert first != paired_bootstrap(a, b, range(9000), samples=300, seed=6)
    assert first.low < first.mean < first.high
    same = paired_bootstrap(a, a, range(9000), samples=300)
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    always = paired_bootstrap([1.0] * 9, [0.0] * 9, range(9), samples=300)
    assert (always.low, always.high) == (1.0, 1.0)
    assert always.p_value == pytest.approx(1 / 301)


def test_resamples_are_counts_of_users_one_byte_each() -> None:
    resamples = UserResamples(7, 500, seed=1)
    assert resamples.sums(np.ones((7, 1))) == pytest.approx(7.0)
    each = resamples.sums(np.eye(7))
    assert each.mean(axis=0) == pytest.approx(1.0, abs=0.15)
    assert each.var(axis=0) == pytest.approx(6 / 7, abs=0.2)
    assert resamples._counts.nbytes == 3500


@pytest.mark.parametrize(
    ("a", "b", "users", "samples", "error"),
    [
        ([1.0, 0.0], [1.0], ["u", "v"], 10, DataError),
        ([1.0, 0.0], [1.0, 1.0], ["u"], 10, DataError),
        ([1.0, float("nan")], [1.0, 1.0], ["u", "v"], 10, DataError),
        ([1.0, 0.0], [1.0, 1.0], ["u", "u"], 10, DataError),
        ([], [], [], 10, DataError),
        ([1.0, 0.0], [1.0, 1.0], ["u", "v"], 0, ConfigError),
    ],
)
def test_bootstrap_refuses(
    a: list[float], b: list[float], users: list[str], samples: int, error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        paired_bootstrap(a, b, users, samples=samples)
    assert "\n" not in str(raised.value)


# ---- does the truth lie in 95 of 100 intervals?


def simulated(
    seed: int, users: int, systems: int = 2, runs: int = 1, run_deviation: float = 0.0, clustered: bool = True
) -> dict[str, Resampled]:
    """Systems that are equally good for users at large: rows of a user are alike, and so are systems on one row.

    ``clustered=False`` draws rows as if each were a user of its own.
    """
    rng = np.random.default_rng(seed)
    rows_of = rng.integers(1, 8, users)
    user = np.repeat(np.arange(users), rows_of)
    names = user if clustered else np.arange(len(user))
    order = {name: name for name in np.unique(names).tolist()}
    resamples = UserResamples(len(order), 400, seed)
    difficulty = rng.normal(0, 1, users)[user]
    found = {}
    for number in range(systems):
        taste = rng.normal(0, 0.5, users)[user]
        its = [
            by_user(
                (difficulty + taste + rng.normal(0, run_deviation) + rng.normal(0, 0.3, len(user))).tolist(),
                names.tolist(),
                order,
            )
            for _ in range(runs)
        ]
        found[f"system {number}"] = resample(its, resamples, system=number)
    return found


def share_that_holds(comparisons: Sequence[Sequence[Comparison]], corrected: bool = False) -> float:
    """Share of families all of whose intervals hold 0."""
    return float(
        np.mean(
            [
                all(
                    each.corrected_low <= 0 <= each.corrected_high
                    if corrected
                    else each.low <= 0 <= each.high
                    for each in family
                )
                for family in comparisons
            ]
        )
    )


# 300 simulations: the standard error of a share of 0.95 is 0.013.
@pytest.mark.parametrize("users", [6, 40])
def test_intervals_over_users_hold_the_truth_and_over_rows_do_not(users: int) -> None:
    found = [compare(simulated(seed, users)) for seed in range(300)]
    assert share_that_holds(found) == pytest.approx(0.95, abs=0.04)
    assert np.mean([family[0].p_value > 0.05 for family in found]) == pytest.approx(0.95, abs=0.04)
    over_rows = [compare(simulated(seed, users, clustered=False)) for seed in range(300)]
    assert share_that_holds(over_rows) < 0.88


def test_intervals_over_runs_hold_the_truth_and_of_one_run_do_not() -> None:
    found = [compare(simulated(seed, 60, runs=3, run_deviation=0.2)) for seed in range(300)]
    assert share_that_holds(found) == pytest.approx(0.95, abs=0.04)
    one_run = [compare(simulated(seed, 60, runs=1, run_deviation=0.2)) for seed in range(300)]
    assert share_that_holds(one_run) < 0.85


def test_corrected_intervals_hold_together_and_equal_systems_have_no_best() -> None:
    found = [simulated(seed, 40, systems=5) for seed in range(300)]
    comparisons = [compare(systems) for systems in found]
    assert len(comparisons[0]) == 10
    assert share_that_holds(comparisons) < 0.8
    assert share_that_holds(comparisons, corrected=True) == pytest.approx(0.95, abs=0.04)
    assert np.mean(
        [min(each.corrected_p for each in family) > 0.05 for family in comparisons]
    ) == pytest.approx(0.95, abs=0.04)
    best = [lead(systems, comparisons=family) for systems, family in zip(found, comparisons, strict=True)]
    assert sum(each is not None for each in best) <= 6


@pytest.mark.parametrize("seed", range(20))
def test_intervals_and_p_values_say_the_same(seed: int) -> None:
    for each in compare(simulated(seed, 12, systems=3, runs=2, run_deviation=0.3)):
        # At the very edge a quantile lies between two resamples.
        if abs(each.p_value - 0.05) > 0.005:
            assert (each.low > 0 or each.high < 0) == (each.p_value < 0.05)
        if abs(each.corrected_p - 0.05) > 0.005:
            assert each.certain == (each.corrected_p < 0.05)
        assert each.corrected_p >= each.p_value
        assert each.corrected_high - each.corrected_low >= each.high - each.low


def test_intervals_of_few_users_are_about_students() -> None:
    ratios = []
    for seed in range(20):
        values = np.random.default_rng(seed).normal(0, 1, 5)
        found = paired_bootstrap(values.tolist(), [0.0] * 5, range(5), samples=4000, seed=seed)
        students = 2.776 * float(values.std(ddof=1)) / 5**0.5
        ratios.append((found.high - found.low) / 2 / students)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)


# ---- measures, runs, the best


def test_a_measure_that_is_no_mean_and_several_evaluations_of_a_run() -> None:
    rng = np.random.default_rng(0)
    order = {user: user for user in range(30)}
    users = np.repeat(np.arange(30), 4)
    errors = rng.normal(0, 1, (3, 120)) ** 2
    resamples = UserResamples(30, 2000, seed=1)
    sums = [by_user(each.tolist(), users.tolist(), order) for each in errors]

    def rmse(totals: Array) -> Array:
        found: Array = np.sqrt(totals[..., 0] / totals[..., 1])
        return found

    one = resample([sums[0]], resamples, rmse)
    assert one.value == pytest.approx(np.sqrt(errors[0].mean()))
    assert one.over_both.std() == pytest.approx(
        np.std([np.sqrt(rng.choice(errors[0].reshape(30, 4), 30).mean()) for _ in range(2000)]), rel=0.1
    )
    averaged = resample([np.stack(sums)], resamples, rmse)
    assert averaged.value == pytest.approx(np.mean([np.sqrt(each.mean()) for each in errors]))
    assert averaged.runs == 1
    assert averaged.run_variance == 0.0
    as_runs = resample(sums, resamples, rmse)
    assert as_runs.value == averaged.value
    assert as_runs.run_variance == pytest.approx(
        np.var([np.sqrt(each.mean()) for each in errors], ddof=1) / 3
    )
    assert as_runs.over_both.std() > averaged.over_both.std()
    assert np.array_equal(as_runs.over_users, averaged.over_both)
    with pytest.raises(DataError, match="7 users, 30 drawn"):
        resample([sums[0][:7]], resamples)


def systems_of(*means: float) -> dict[str, Resampled]:
    rng = np.random.default_rng(4)
    order = {user: user for user in range(50)}
    resamples = UserResamples(50, 1000, seed=0)
    noise = rng.normal(0, 0.05, (len(means), 50))
    return {
        f"m{number}": resample([by_user((mean + noise[number]).tolist(), range(50), order)], resamples)
        for number, mean in enumerate(means)
    }


def test_best_is_only_who_is_ahead_of_every_other() -> None:
    assert lead(systems_of(0.5, 0.9, 0.6)) == "m1"
    assert lead(systems_of(0.5, 0.9, 0.6), higher_is_better=False) == "m0"
    # Ahead of the runner-up it must be, not of the last alone; and the runner-up is not the only one that counts.
    assert lead(systems_of(0.1, 0.9, 0.899)) is None
    assert lead(systems_of(0.9)) is None
    identical = systems_of(0.7)["m0"]
    assert lead({"a": identical, "b": identical}) is None
    assert lead({"a": identical, "b": identical, **systems_of(0.1)}) is None
    (same,) = compare({"a": identical, "b": identical})
    assert (same.corrected_low, same.corrected_high, same.corrected_p) == (0.0, 0.0, 1.0)
    some = systems_of(0.5, 0.9, 0.6)
    with pytest.raises(DataError, match="were not compared"):
        lead(some, comparisons=compare(some, [("m0", "m1")]))


def test_a_wide_interval_against_any_other_forbids_a_best() -> None:
    # m1 is surely above the runner-up, but not above the third, who is lower on average and all over the place.
    order = {user: user for user in range(20)}
    resamples = UserResamples(20, 1000, seed=0)
    rng = np.random.default_rng(0)
    values = {
        "first": np.full(20, 0.60) + rng.normal(0, 0.001, 20),
        "second": np.full(20, 0.58) + rng.normal(0, 0.001, 20),
        "third": np.where(np.arange(20) % 2 == 0, 1.0, 0.1),
    }
    systems = {
        name: resample([by_user(each.tolist(), range(20), order)], resamples) for name, each in values.items()
    }
    first_second, first_third, _ = compare(systems)
    assert first_second.certain
    assert not first_third.certain
    assert lead(systems) is None
    assert lead({name: systems[name] for name in ("first", "second")}) == "first"


def test_pairs_are_the_family() -> None:
    systems = systems_of(0.5, 0.51, 0.52, 0.53)
    (alone,) = compare(systems, [("m1", "m0")])
    assert (alone.a, alone.b) == ("m1", "m0")
    assert alone.mean == pytest.approx(systems["m1"].value - systems["m0"].value)
    assert (alone.corrected_low, alone.corrected_high) == (
        pytest.approx(alone.low),
        pytest.approx(alone.high),
    )
    among_all = next(each for each in compare(systems) if (each.a, each.b) == ("m0", "m1"))
    assert among_all.high - among_all.low == pytest.approx(alone.high - alone.low)
    assert among_all.corrected_high - among_all.corrected_low > alone.high - alone.low
    assert compare(systems, []) == ()


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, then 0.04, which may not fall below 0.06.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for raw, held in zip(p_values, corrected, strict=True):
        assert raw <= held <= min(1.0, len(p_values) * raw) + 1e-15 or held == max(
            other for other, least in zip(corrected, p_values, strict=True) if least <= raw
        )
    ranked = [held for _, held in sorted(zip(p_values, corrected, strict=True))]
    assert ranked == sorted(ranked)
