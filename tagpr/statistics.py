"""How sure a difference of two systems is: bootstrap over users (S32)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tagpr.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of ``a - b`` over rows, with a 95 % percentile interval over resampled users."""

    mean: float
    low: float
    high: float
    rows: int
    users: int
    samples: int


def paired_bootstrap(
    per_row_a: Sequence[float],
    per_row_b: Sequence[float],
    users: Sequence[Hashable],
    samples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems on the same rows by a bootstrap over *users*: one user's rows are not independent.

    Each sample draws as many users as there are, with replacement, with all their rows; its value is the
    mean of ``a - b`` over the drawn rows. Same seed, same interval.

    Raises:
        DataError: the lengths differ, a value is not finite, or there are fewer than two users.
        ConfigError: ``samples`` < 1.
    """
    if samples < 1:
        raise ConfigError(f"samples={samples}: no samples to draw. Use 1,000 or more.")
    if not len(per_row_a) == len(per_row_b) == len(users):
        raise DataError(
            f"paired bootstrap: {len(per_row_a)} and {len(per_row_b)} scores, {len(users)} rows. Align by id."
        )
    difference = np.asarray(per_row_a, dtype=np.float64) - np.asarray(per_row_b, dtype=np.float64)
    if not np.isfinite(difference).all():
        raise DataError("paired bootstrap: a score is not finite. Score the rows again.")
    order: dict[Hashable, int] = {}
    user_of_row = np.array([order.setdefault(user, len(order)) for user in users], dtype=np.intp)
    count = len(order)
    if count < 2:
        raise DataError(f"paired bootstrap: {count} user(s) give no interval. Evaluate rows of more users.")
    sums = np.bincount(user_of_row, weights=difference, minlength=count)
    rows = np.bincount(user_of_row, minlength=count).astype(np.float64)

    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    chunk = max(1, 1_000_000 // count)  # about 8 MB of drawn indices at a time
    for start in range(0, samples, chunk):
        drawn = generator.integers(count, size=(min(chunk, samples - start), count))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / rows[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedDifference(
        float(difference.mean()), float(low), float(high), len(difference), count, samples
    )
