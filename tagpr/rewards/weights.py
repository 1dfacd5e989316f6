"""Reward weights of a stage (``objective``), and how they change within it, by step (S27, S42)."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tagpr.errors import ConfigError
from tagpr.rewards.composite import RewardWeights

NAMES = ("alpha", "beta", "gamma")
WAYS = ("step", "linear")


@dataclass(frozen=True)
class WeightSchedule:
    """Weights by training step: ``start`` holds at step 0, ``changes`` are (step, {name: weight}) in order of steps.

    ``way`` is ``step``: a weight holds until the step of its next change; or ``linear``: it moves there in a straight line. After
    its last change a weight stays.
    """

    start: RewardWeights
    changes: tuple[tuple[int, Mapping[str, float]], ...] = ()
    way: str = "step"

    def at(self, step: int) -> RewardWeights:
        """Weights of the responses of a training step; without changes those of ``start``, as they are."""
        if not self.changes:
            return self.start
        alpha, beta, gamma = (self._value(name, step) for name in NAMES)
        return replace(self.start, alpha=alpha, beta=beta, gamma=gamma)

    @property
    def asks_prmu(self) -> bool:
        """Whether gamma is ever anything but 0."""
        return any(value != 0 for _, value in self._points("gamma"))

    def _points(self, name: str) -> list[tuple[int, float]]:
        return [(0, getattr(self.start, name))] + [
            (step, its[name]) for step, its in self.changes if name in its
        ]

    def _value(self, name: str, step: int) -> float:
        points = self._points(name)
        if self.way == "linear":
            for (left, low), (right, high) in pairwise(points):
                if left <= step < right:
                    return low + (high - low) * (step - left) / (right - left)
        return points[max(0, bisect_right(points, step, key=lambda point: point[0]) - 1)][1]


def read_weights(objective: Mapping[str, Any]) -> WeightSchedule:
    """The schedule that ``objective`` describes.

    Raises:
        ConfigError: a weight is no number from 0 on, or the changes are not in order of their steps.
    """
    start = RewardWeights(
        **{name: _weight(f"objective.{name}", objective[name]) for name in NAMES},
        floor_core=bool(objective["floor_core"]),
        gate_all=bool(objective["gate_all"]),
    )
    way = objective["change"]
    if way not in WAYS:
        raise ConfigError(f"objective.change={way}: unknown. Use {' or '.join(WAYS)}.")
    changes: list[tuple[int, Mapping[str, float]]] = []
    for number, entry in enumerate(objective["changes"]):
        key = f"objective.changes[{number}]"
        if not isinstance(entry, Mapping) or not {"step"} < set(entry) <= {"step", *NAMES}:
            raise ConfigError(
                f"{key}: is no change. Write it as {{step: 100, gamma: 0.4}}, of alpha, beta, gamma."
            )
        step, before = entry["step"], changes[-1][0] if changes else 0
        if not isinstance(step, int) or isinstance(step, bool) or step <= before:
            raise ConfigError(
                f"{key}.step={step}: does not come after step {before}. List changes in order of steps."
            )
        changes.append(
            (step, {name: _weight(f"{key}.{name}", entry[name]) for name in NAMES if name in entry})
        )
    return WeightSchedule(start, tuple(changes), way)


def asks_prmu(objective: Mapping[str, Any]) -> bool:
    """Whether a stage with this ``objective`` ever asks the reward server; exploratory and gamma = 0 do not."""
    return objective["mode"] == "guided" and read_weights(objective).asks_prmu


def _weight(key: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (math.isfinite(value) and value >= 0)
    ):
        raise ConfigError(f"{key}={value}: reward weights are finite and not negative.")
    return float(value)
