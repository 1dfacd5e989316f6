"""The bootstrap over users: against a plain loop (S32)."""

import numpy as np
import pytest

from tagpr.errors import ConfigError, DataError
from tagpr.statistics import paired_bootstrap


def test_bootstrap_equals_a_plain_loop_in_distribution() -> None:
    rng = np.random.default_rng(1)
    users = [f"u{n}" for n in rng.integers(0, 30, 200)]
    shift = {user: rng.normal(0.1, 0.5) for user in set(users)}
    a = np.array([shift[user] for user in users]) + rng.normal(0, 0.1, 200)
    b = rng.normal(0, 0.1, 200)
    result = paired_bootstrap(a.tolist(), b.tolist(), users, samples=4000, seed=3)
    rows = {user: [i for i, other in enumerate(users) if other == user] for user in set(users)}
    names = list(rows)
    loop = []
    for _ in range(4000):
        drawn = [i for n in rng.integers(0, len(names), len(names)) for i in rows[names[n]]]
        loop.append(float(np.mean(a[drawn] - b[drawn])))
    low, high = np.quantile(loop, [0.025, 0.975])
    assert result.mean == pytest.approx(float(np.mean(a - b)))
    assert (result.low, result.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert (result.rows, result.users, result.samples) == (200, len(names), 4000)
    # Rows as if independent would give an interval several times narrower: the users are what varies.
    naive = paired_bootstrap(a.tolist(), b.tolist(), range(200), samples=4000, seed=3)
    assert result.high - result.low > 1.5 * (naive.high - naive.low)


def test_bootstrap_is_seeded_and_needs_no_more_memory_for_more_users() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(9000).tolist(), rng.random(9000).tolist()
    first = paired_bootstrap(a, b, range(9000), samples=300, seed=5)
    assert first == paired_bootstrap(a, b, range(9000), samples=300, seed=5)
    assert first != paired_bootstrap(a, b, range(9000), samples=300, seed=6)
    assert first.low < first.mean < first.high
    same = paired_bootstrap(a, a, range(9000), samples=300)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


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
    with pytest.raises(error):
        paired_bootstrap(a, b, users, samples=samples)
