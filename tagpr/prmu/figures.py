"""What held-out pairs say of a PRMU, by group: accuracy, margin, calibration (S19)."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tagpr.benchmarks.tasks import all_tasks
from tagpr.schema import PreferencePair

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence: how sure the model was on average, and how often it was right."""

    confidence: float
    accuracy: float
    pairs: int


@dataclass(frozen=True)
class Figures:
    """Of one group of pairs.

    ``accuracy``: share whose chosen response has the higher logit; a tie is no success. ``margin``: mean of logit(chosen) -
    logit(rejected). ``ece``: expected calibration error; Bradley-Terry's probability of the response that the model prefers,
    sigmoid(|margin|), is its confidence, and the error is the mean distance of confidence and accuracy over ten bins of equal
    width from 0.5 to 1, weighted by their pairs (Guo et al., ICML 2017).
    """

    accuracy: float
    margin: float
    ece: float
    pairs: int
    bins: tuple[Bin, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def figures(margins: Sequence[float]) -> Figures:
    """Of some margins, at least one."""
    binned: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for margin in margins:
        confidence = 1.0 / (1.0 + math.exp(-min(abs(margin), 700.0)))
        binned[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append((confidence, margin > 0))
    bins = tuple(
        Bin(
            sum(sure for sure, _ in found) / len(found), sum(hit for _, hit in found) / len(found), len(found)
        )
        for _, found in sorted(binned.items())
    )
    count = len(margins)
    return Figures(
        accuracy=sum(margin > 0 for margin in margins) / count,
        margin=sum(margins) / count,
        ece=sum(abs(each.confidence - each.accuracy) * each.pairs for each in bins) / count,
        pairs=count,
        bins=bins,
    )


def groups_of(pair: PreferencePair) -> tuple[str, ...]:
    """Groups a pair belongs to: all, its kind, its task and the task's kind, kind and kind of task, its rule."""
    tasks = all_tasks()
    kind = tasks[pair.task].kind if pair.task in tasks else pair.task
    groups = ["all", pair.kind, kind, f"{pair.kind}/{kind}", pair.task]
    if pair.rule:
        groups.append(f"rule {pair.rule}")
    return tuple(dict.fromkeys(groups))


def figures_by_group(pairs: Sequence[PreferencePair], margins: Sequence[float]) -> dict[str, Figures]:
    """Figures of each group that occurs, by :func:`groups_of`."""
    found: dict[str, list[float]] = defaultdict(list)
    for pair, margin in zip(pairs, margins, strict=True):
        for group in groups_of(pair):
            found[group].append(margin)
    return {group: figures(values) for group, values in sorted(found.items())}


def places_by_group(pairs: Sequence[PreferencePair]) -> dict[str, list[int]]:
    """Where the pairs of each group (:func:`groups_of`) stand, "all" first."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        for group in groups_of(pair):
            found[group].append(place)
    return dict(sorted(found.items(), key=lambda each: (each[0] != "all", each[0])))


def table(found: Mapping[str, Figures]) -> list[str]:
    """Lines of a table: a row for each group of pairs, with and without the user's row, and for unseen users."""

    def cell(name: str) -> str:
        if name not in found:
            return f"{'-':>16}"
        return f"{found[name].accuracy:>8.3f} ({found[name].pairs:>5})"

    groups = dict.fromkeys(name.split("/", 1)[1] for name in found)
    width = max([25, *(len(group) + 2 for group in groups)])
    columns = ("seen_users", "unknown_row", "unseen_users")
    lines = ["held-out accuracy (pairs)".ljust(width) + "".join(f"{column:>16}" for column in columns)]
    for group in groups:
        cells = "".join(cell(f"{column}/{group}") for column in columns)
        lines.append("  " + group.ljust(width - 2) + cells)
    return lines
