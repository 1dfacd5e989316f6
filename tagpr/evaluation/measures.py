"""What is compared, as sums over users, so that one bootstrap over users serves every measure (S32).

A measure is a function of sums over rows: accuracy of (right, rows), macro-F1 of (hits, said, gold) by label, RMSE of (squared
error, rows). Summed by user first, a resample of users is one matrix product, and measures that are no mean of rows, F1 and RMSE,
get honest intervals too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tagpr.benchmarks.tasks import get_task
from tagpr.evaluation.rows import Row
from tagpr.metrics import rating_error, row_metrics
from tagpr.statistics import Array, Combine, Resampled, UserResamples, resample

# Higher is better for all but these; fewer tokens are cheaper, not better.
LOWER_IS_BETTER = ("mae", "mse", "rmse")
NEUTRAL = ("reasoning_tokens",)


@dataclass(frozen=True)
class Table:
    """One measure of one replicate: rows' statistics [rows, k] with the user of each, and what their sum says."""

    statistics: Array
    users: tuple[str, ...]
    combine: Combine

    def by_user(self, order: Mapping[str, int]) -> Array:
        """Sums [users, k] in the places that ``order`` gives."""
        sums = np.zeros((len(order), self.statistics.shape[1]))
        np.add.at(sums, [order[user] for user in self.users], self.statistics)
        return sums

    @property
    def value(self) -> float:
        """The measure on all rows."""
        return float(self.combine(self.statistics.sum(axis=0)))


def _mean(sums: Array) -> Array:
    result: Array = sums[..., 0] / sums[..., 1]
    return result


def _root(sums: Array) -> Array:
    result: Array = np.sqrt(sums[..., 0] / sums[..., 1])
    return result


def _f1(sums: Array) -> Array:
    """Mean over labels of 2 hits / (said + gold), 0 for a label that occurs in neither."""
    hits, occurrences = np.split(sums, 2, axis=-1)
    result: Array = (2 * hits / np.maximum(occurrences, 1.0)).mean(axis=-1)
    return result


def tables(rows: Sequence[Row], rewards: Mapping[str, float] | None) -> dict[str, Table]:
    """Every measure of one replicate: ``task_score``, ``reward``, ``well_formed``, ``reasoning_tokens``, ``<task>/<metric>``.

    ``task_score`` and ``reward`` are means over tasks, so a row weighs N / (tasks * rows of its task). ``rewards`` are by row id.
    """
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    weight = {task: len(rows) / (len(by_task) * len(its)) for task, its in by_task.items()}
    found = {
        "task_score": _means(rows, (row.verifiable * weight[row.task] for row in rows)),
        "reasoning_tokens": _means(rows, (row.reasoning_tokens for row in rows)),
    }
    if rewards is not None:
        found["reward"] = _means(rows, (rewards[row.id] * weight[row.task] for row in rows))
    if all(row.thinking for row in rows):
        found["well_formed"] = _means(rows, (float(row.format == 1.0 and row.tag == 0.0) for row in rows))
    for task, its in sorted(by_task.items()):
        for metric, table in _of_task(task, its).items():
            found[f"{task}/{metric}"] = table
    return found


def _means(rows: Sequence[Row], values: Iterable[float]) -> Table:
    numbers = np.fromiter(values, dtype=np.float64, count=len(rows))
    return Table(np.stack([numbers, np.ones(len(rows))], axis=1), _users(rows), _mean)


def _users(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.user_id for row in rows)


def _of_task(name: str, rows: Sequence[Row]) -> dict[str, Table]:
    task = get_task(name)
    said = [row.parsed for row in rows]
    golds = [row.gold.strip() for row in rows]
    found: dict[str, Table] = {}
    if task.kind == "classification":
        found["accuracy"] = _means(rows, (float(a == b) for a, b in zip(golds, said, strict=True)))
        f1 = _label_counts(rows, golds, said, task.labels)
        found["f1_macro"] = f1
        if len(task.labels) == 2:
            columns = f1.statistics[:, [1, 3]]
            found["f1_positive"] = Table(columns, f1.users, _f1)
    elif task.kind == "rating":
        errors = [rating_error(task, gold, answer)[0] for gold, answer in zip(golds, said, strict=True)]
        found["mae"] = _means(rows, errors)
        found["mse"] = _means(rows, (error * error for error in errors))
        found["rmse"] = Table(found["mse"].statistics, _users(rows), _root)
    else:
        scores = [row_metrics(task, gold, answer) for gold, answer in zip(golds, said, strict=True)]
        for metric in scores[0]:
            found[metric] = _means(rows, (score[metric] for score in scores))
    return found


def _label_counts(
    rows: Sequence[Row], golds: Sequence[str], said: Sequence[str], labels: Sequence[str]
) -> Table:
    """Columns: hits of every label, then how often it was said or gold."""
    place = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(rows), 2 * len(labels)))
    for number, (gold, answer) in enumerate(zip(golds, said, strict=True)):
        counts[number, len(labels) + place[gold]] += 1
        if answer in place:
            counts[number, len(labels) + place[answer]] += 1
            if answer == gold:
                counts[number, place[gold]] += 1
    return Table(counts, _users(rows), _f1)


@dataclass(frozen=True)
class Measured:
    """One measure of one model; ``resampled`` is None with fewer than two users, where there is no interval."""

    value: float
    resampled: Resampled | None
    users: int
    rows: int


class Bootstrap:
    """Draws of users, one for each set of users that a measure covers, shared by all models.

    Args:
        resamples: how many.
        seed: same seed, same intervals.
    """

    def __init__(self, resamples: int, seed: int) -> None:
        self.resamples = resamples
        self.seed = seed
        self._draws: dict[tuple[str, ...], UserResamples] = {}

    def measure(self, runs: Sequence[Sequence[Table]], model: int) -> Measured:
        """Resample one measure. ``runs``: tables of every run's replicates; ``model``: a number of its own for the draw of runs.

        Raises:
            DataError: a value is not finite.
        """
        # Sorted, so that the order of rows does not matter.
        users = tuple(sorted(set(runs[0][0].users)))
        order = {user: number for number, user in enumerate(users)}
        table = runs[0][0]
        value = float(np.mean([np.mean([each.value for each in replicates]) for replicates in runs]))
        resampled = None
        if len(users) > 1:
            if users not in self._draws:
                self._draws[users] = UserResamples(len(users), self.resamples, self.seed)
            stacked = [np.stack([each.by_user(order) for each in replicates]) for replicates in runs]
            resampled = resample(stacked, self._draws[users], table.combine, model)
        return Measured(value, resampled, len(users), len(table.users))
