"""The metrics of a run for Prometheus: gauges on the endpoints that Ray's nodes have anyway.

One gauge, ``tagpr_training`` (Ray exports it as ``ray_tagpr_training``), with the labels ``run`` and ``metric``; the value is
that of the last step. What stands in ``tagpr.rl.layout`` is exported, and ``training/global_step``. Ray's head writes where
Prometheus finds the nodes (``/tmp/ray/prom_metrics_service_discovery.json``); the dashboard is
``recipes/cluster/grafana_dashboard.json``.
"""

import math
from collections.abc import Mapping, MutableMapping
from numbers import Real
from typing import Any

from tagpr.rl.layout import in_layout, tensorboard_layout

GAUGE = "tagpr_training"
STEP = "training/global_step"


class Gauges:
    """Sets the gauges of one run; Ray must be up. The interface of a verl logger."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauge = Gauge(
            GAUGE, "A metric of an RL run at its last step (tagpr.rl.reward_metrics.NAMES)", ("run", "metric")
        )
        self._run = run

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Set what stands in the layout; numbers that are not finite keep their last value."""
        for name, value in {**data, STEP: step}.items():
            if (name == STEP or in_layout(name)) and isinstance(value, Real) and math.isfinite(value):
                self._gauge.set(float(value), {"run": self._run, "metric": name})


def show(trackers: MutableMapping[str, Any], run: str) -> None:
    """Add Prometheus to verl's trackers (name -> logger), and the layout to TensorBoard where that is one of them."""
    trackers["prometheus"] = Gauges(run)
    if "tensorboard" in trackers:
        trackers["tensorboard"].writer.add_custom_scalars(tensorboard_layout())
