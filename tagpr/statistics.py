"""How sure a difference of systems is: bootstrap over users and training runs, corrected for many comparisons (S32).

**Units.** One user's rows are not independent, so users are drawn, with all their rows (cluster bootstrap; Davison and Hinkley,
*Bootstrap Methods and their Application*, 1997, 3.8). Every system is evaluated on the same users and every resample draws the
same users for all of them: differences are paired. A system that was trained several times is resampled over its runs as well,
each system by itself: with R runs, R are drawn with replacement, crossed with the users (pigeonhole bootstrap; Owen, *Annals of
Applied Statistics* 1(2), 2007). With one run an interval says nothing of how much training again would change.

**Few users or runs.** The resamples d* of a difference d vary like a normal distribution with the variance divided by n, not
n - 1: too little where n is small (6 users, 3 runs). Let s be their standard deviation and

    v = v_users U / (U - 1) + v_runs_a + v_runs_b

the variance they should have: v_users that of d when only users are resampled, v_runs = var(values of the runs, divisor R - 1) / R.
Its degrees of freedom nu are Satterthwaite's (*Biometrics Bulletin* 2(6), 1946): v^2 / (sum of part^2 / degrees of the part), U - 1
and R - 1. A quantile c of the resamples' |d* - d| / s stands for t = T_nu^-1(Phi(c)), the point that leaves as much of Student's
distribution outside as c of the normal one, and the 95 % interval is d ± t sqrt(v) with c the 95 % quantile: for many users and one
run the basic symmetric bootstrap interval, for few users about Student's.

**p-value.** Two-sided, the same way round: (1 + #{|d* - d| / s >= z}) / (1 + B), where z = Phi^-1(T_nu(|d| / sqrt(v))); never 0.

**Many comparisons.** The corrected interval takes c from the largest |d* - d| / s of the family's differences in a resample, so
that all intervals hold at once with 95 % (single-step max-|t|; Westfall and Young, *Resampling-Based Multiple Testing*, 1993), and
the corrected p-value compares with that largest, too. This uses that comparisons share systems and users; Holm's method
(:func:`holm`), which needs p-values only, has to assume the worst.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from tagpr.errors import ConfigError, DataError

Array = NDArray[np.float64]
Combine = Callable[[Array], Array]
"""Sums [..., k] over rows -> the measure [...]."""

LEVEL = 0.95
# Below it a spread is what rounding leaves of two systems that say the same.
_NO_SPREAD = 1e-12
_CHUNK = 4_000_000  # draws at a time: some 32 MB


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of ``a - b`` over rows, with a 95 % interval over resampled users and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p_value: float
    rows: int
    users: int
    samples: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Value of ``a`` minus value of ``b``: by itself, and corrected for all comparisons made together."""

    a: str
    b: str
    mean: float
    low: float
    high: float
    p_value: float
    corrected_low: float
    corrected_high: float
    corrected_p: float

    @property
    def certain(self) -> bool:
        """Whether the corrected interval excludes 0."""
        return self.corrected_low > 0 or self.corrected_high < 0


class UserResamples:
    """Which users each resample holds: drawn once, used for every system and measure.

    Memory: one byte a user and resample. Same seed, same resamples.

    Raises:
        ConfigError: ``samples`` < 1.
        DataError: fewer than two users.
    """

    def __init__(self, users: int, samples: int, seed: int) -> None:
        if samples < 1:
            raise ConfigError(f"samples={samples}: no samples to draw. Use 1,000 or more.")
        if users < 2:
            raise DataError(f"bootstrap: {users} user(s) give no interval. Evaluate rows of more users.")
        self.users = users
        self.samples = samples
        self.seed = seed
        generator = np.random.default_rng([seed, 0])
        # 255 draws of one user of n have probability 1 / 255! at most.
        self._counts = np.empty((samples, users), dtype=np.uint8)
        step = max(1, _CHUNK // users)
        for start in range(0, samples, step):
            size = min(step, samples - start)
            drawn = generator.integers(users, size=(size, users))
            drawn += np.arange(size)[:, None] * users
            self._counts[start : start + size] = np.bincount(drawn.ravel(), minlength=size * users).reshape(
                size, users
            )

    def sums(self, by_user: Array) -> Array:
        """Sums over the users drawn, [samples, k], of sums by user [users, k]."""
        found = np.empty((self.samples, by_user.shape[1]))
        step = max(1, _CHUNK // self.users)
        for start in range(0, self.samples, step):
            found[start : start + step] = self._counts[start : start + step].astype(np.float64) @ by_user
        return found


@dataclass(frozen=True)
class Resampled:
    """One measure of one system: its value, and its values in the resamples.

    ``over_users`` [samples] with every run in each resample, ``over_both`` [samples] with runs drawn too;
    ``run_variance`` is that of the mean over ``runs`` runs, 0 for a single one.
    """

    value: float
    over_users: Array
    over_both: Array
    run_variance: float
    runs: int
    users: int


def resample(
    runs: Sequence[Array], resamples: UserResamples, combine: Combine | None = None, system: int = 0
) -> Resampled:
    """Resample one measure of one system over users and training runs.

    Args:
        runs: one per training run: sums over rows by user, [users, k] or, evaluated several times (decoding seeds),
            [times, users, k]; users in the same order for every system. Evaluations of one run are averaged.
        resamples: which users are drawn.
        combine: from sums to the measure; default: first column divided by second, a mean over rows.
        system: a number of its own for each system, so that their runs are drawn independently.

    Raises:
        DataError: a value is not finite, or a run has other users than were drawn.
    """
    measure = combine or _ratio
    stacked = [run[None] if run.ndim == 2 else run for run in runs]
    for run in stacked:
        if run.shape[1] != resamples.users:
            raise DataError(f"bootstrap: {run.shape[1]} users, {resamples.users} drawn. Align systems by id.")
    values = np.array([np.mean([measure(each.sum(axis=0)) for each in run]) for run in stacked])
    if not np.isfinite(values).all():
        raise DataError("bootstrap: a score is not finite. Score the rows again.")
    # All columns at once: most of a product's time goes into widening the counts.
    sums = iter(
        np.split(
            resamples.sums(np.concatenate([each for run in stacked for each in run], axis=1)),
            sum(len(run) for run in stacked),
            axis=1,
        )
    )
    by_run = np.stack([np.mean([measure(next(sums)) for _ in run], axis=0) for run in stacked], axis=1)
    count = len(stacked)
    over_users: Array = by_run.mean(axis=1)
    over_both = over_users
    if count > 1:
        generator = np.random.default_rng([resamples.seed, 1, system])
        drawn = generator.integers(count, size=by_run.shape)
        over_both = np.take_along_axis(by_run, drawn, axis=1).mean(axis=1)
    return Resampled(
        value=float(values.mean()),
        over_users=over_users,
        over_both=over_both,
        run_variance=float(values.var(ddof=1)) / count if count > 1 else 0.0,
        runs=count,
        users=resamples.users,
    )


def _ratio(sums: Array) -> Array:
    result: Array = sums[..., 0] / sums[..., 1]
    return result


def compare(
    systems: Mapping[str, Resampled], pairs: Sequence[tuple[str, str]] | None = None
) -> tuple[Comparison, ...]:
    """Differences of systems on one measure; the pairs are one family, whose corrected intervals hold together.

    Args:
        systems: label -> one measure of a system, all from the same :class:`UserResamples`.
        pairs: (a, b) for ``a - b``; default: every pair, in the order of ``systems``. That is the family to use where the best
            is to be found: which system is best was read off the same data.
    """
    pairs = list(combinations(systems, 2)) if pairs is None else list(pairs)
    if not pairs:
        return ()
    pick = [(systems[a], systems[b]) for a, b in pairs]
    mean = np.array([a.value - b.value for a, b in pick])
    samples = np.stack([a.over_both - b.over_both for a, b in pick], axis=1)
    spread = samples.std(axis=0)
    moves = spread > _NO_SPREAD
    scale = np.where(moves, spread, 1.0)
    deviation = np.where(moves, np.abs(samples - mean) / scale, 0.0)
    largest = deviation.max(axis=1)
    errors = [_standard_error(a, b) for a, b in pick]
    error = np.where(moves, [each for each, _ in errors], 0.0)
    degrees = np.array([each for _, each in errors])

    def reach(quantile: Array) -> Array:
        found: Array = -stdtrit(degrees, ndtr(-quantile)) * error
        return found

    # Where nothing varies, a difference is certain, or there is none.
    own = np.where(
        moves,
        -ndtri(stdtr(degrees, -np.abs(mean) / np.where(error > 0, error, 1.0))),
        np.where(np.abs(mean) > _NO_SPREAD, np.inf, 0.0),
    )
    count = len(samples)
    alone = reach(np.quantile(deviation, LEVEL, axis=0))
    together = reach(np.quantile(largest, LEVEL, keepdims=True))
    p_alone = (1 + (deviation >= own).sum(axis=0)) / (1 + count)
    p_together = (1 + (largest[:, None] >= own).sum(axis=0)) / (1 + count)
    return tuple(
        Comparison(
            a=a,
            b=b,
            mean=float(mean[number]),
            low=float(mean[number] - alone[number]),
            high=float(mean[number] + alone[number]),
            p_value=float(p_alone[number]),
            corrected_low=float(mean[number] - together[number]),
            corrected_high=float(mean[number] + together[number]),
            corrected_p=float(p_together[number]),
        )
        for number, (a, b) in enumerate(pairs)
    )


def _standard_error(a: Resampled, b: Resampled) -> tuple[float, float]:
    """sqrt(v) and nu of the module's description."""
    degrees = a.users - 1
    parts = [(float((a.over_users - b.over_users).var()) * a.users / degrees, degrees)]
    parts += [(system.run_variance, system.runs - 1) for system in (a, b) if system.runs > 1]
    variance = sum(part for part, _ in parts)
    squares = sum(part**2 / degree for part, degree in parts)
    return math.sqrt(variance), variance**2 / squares if squares > 0 else float(degrees)


def lead(
    systems: Mapping[str, Resampled], higher_is_better: bool = True, comparisons: Sequence[Comparison] = ()
) -> str | None:
    """Name the best system, or None where none is: its corrected interval against *every* other must exclude 0.

    Args:
        systems: as for :func:`compare`.
        higher_is_better: False for errors.
        comparisons: those of every pair, if they are at hand; otherwise they are made.
    """
    if len(systems) < 2:
        return None
    sign = 1 if higher_is_better else -1
    best = max(systems, key=lambda label: sign * systems[label].value)
    made = comparisons or compare(systems)
    against = {(each.a, each.b): each for each in made}
    for other in systems:
        if other == best:
            continue
        found = against.get((best, other)) or against.get((other, best))
        if found is None:
            raise DataError(f"lead: {best} and {other} were not compared. Compare every pair.")
        if not found.certain:
            return None
    return best


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for being several (Holm, *Scandinavian Journal of Statistics* 6, 1979), in the order given.

    The i-th smallest of m, from 0, becomes the largest so far of min(1, (m - i) p).
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def by_user(values: Sequence[float], users: Sequence[Hashable], order: Mapping[Hashable, int]) -> Array:
    """Sums [users, 2] of rows' values and their number, in the places that ``order`` gives: what :func:`resample` takes.

    Raises:
        DataError: not one user for each value.
    """
    if len(values) != len(users):
        raise DataError(f"bootstrap: {len(values)} scores, {len(users)} rows. Align by id.")
    place = np.array([order[user] for user in users], dtype=np.intp)
    sums = np.bincount(place, weights=np.asarray(values, dtype=np.float64), minlength=len(order))
    return np.stack([sums, np.bincount(place, minlength=len(order)).astype(np.float64)], axis=1)


def paired_bootstrap(
    per_row_a: Sequence[float],
    per_row_b: Sequence[float],
    users: Sequence[Hashable],
    samples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems on the same rows by a bootstrap over users, see the module's description.

    Raises:
        DataError: the lengths differ, a value is not finite, or there are fewer than two users.
        ConfigError: ``samples`` < 1.
    """
    if not len(per_row_a) == len(per_row_b) == len(users):
        raise DataError(
            f"paired bootstrap: {len(per_row_a)} and {len(per_row_b)} scores, {len(users)} rows. Align by id."
        )
    order: dict[Hashable, int] = {}
    for user in users:
        order.setdefault(user, len(order))
    resamples = UserResamples(len(order), samples, seed)
    systems = {
        label: resample([by_user(values, users, order)], resamples)
        for label, values in (("a", per_row_a), ("b", per_row_b))
    }
    (found,) = compare(systems)
    return PairedDifference(found.mean, found.low, found.high, found.p_value, len(users), len(order), samples)
