"""Reward weights compared (S42, Table 6): ``python -m tagpr.rl.weights_grid``, or ``bash recipes/weights_grid.sh``.

Every (alpha, beta, gamma) is trained once a seed, one after the other, in folders of their own; then one evaluation answers with
all of them, where the trainings of one setting are one row of the table. A finished training is not repeated.

Words of the command line go to every training; ``grid.*`` and ``run.name`` to this, ``evaluate.*`` to the evaluation.
"""

import json
import logging
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tagpr.errors import ConfigError
from tagpr.rl.schedule import SHARED, Runner, command_line, start
from tagpr.runs import complete_lines, write_json_atomically, write_text_atomically

logger = logging.getLogger("tagpr.rl.weights_grid")

# Steps whose mean is a point of a training curve.
WINDOW = 5


@dataclass(frozen=True)
class Setting:
    """One (alpha, beta, gamma)."""

    alpha: float
    beta: float
    gamma: float

    @property
    def label(self) -> str:
        """Names its row and, with a seed, its folders."""
        return f"a{self.alpha:g}_b{self.beta:g}_g{self.gamma:g}".replace(".", "p")

    def words(self) -> list[str]:
        """Overrides of a training."""
        return [f"objective.{name}={getattr(self, name):g}" for name in ("alpha", "beta", "gamma")]


def read_settings(config: DictConfig) -> tuple[list[Setting], list[int]]:
    """Settings and seeds of the grid.

    Raises:
        ConfigError: one is not what it has to be, or is listed twice.
    """
    settings = []
    for number, entry in enumerate(config.grid.weights):
        values = list(entry) if not isinstance(entry, int | float | str) else [entry]
        numbers = [
            value
            for value in values
            if isinstance(value, int | float) and math.isfinite(value) and value >= 0
        ]
        if len(values) != 3 or len(numbers) != 3:
            raise ConfigError(
                f"grid.weights[{number}]={entry}: is no (alpha, beta, gamma). Give three numbers from 0 on."
            )
        settings.append(Setting(*map(float, numbers)))
    seeds = list(config.grid.seeds)
    if not settings or len(set(settings)) < len(settings):
        raise ConfigError("grid.weights: is empty, or names a setting twice. List each once.")
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) for seed in seeds):
        raise ConfigError(f"grid.seeds={seeds}: is empty, or names a seed twice. List each once.")
    return settings, seeds


def run(config: DictConfig, words: Sequence[str], runner: Runner = start) -> int:
    """Train and evaluate; 0, or the status of what did not end well.

    Raises:
        ConfigError: the grid cannot be meant.
    """
    settings, seeds = read_settings(config)
    outputs, name = str(config.run.outputs), str(config.run.name)
    bare = [(word, word.lstrip("+~")) for word in words]
    of_trainings = [w for w, b in bare if not b.startswith(("grid.", "run.name=", "run.seed=", "evaluate."))]
    for number, setting in enumerate(settings):
        for seed in seeds:
            folder = f"{name}-{setting.label}-s{seed}"
            if (Path(outputs) / folder / "finished.json").is_file():
                logger.info("%s: is done", folder)
                continue
            logger.info("setting %d of %d, seed %d: %s", number + 1, len(settings), seed, folder)
            status = runner(
                ["guided_rl", f"run.name={folder}", f"run.seed={seed}", *setting.words(), *of_trainings]
            )
            if status:
                return status
    figures: Mapping[str, Any] = {}
    if config.grid.evaluate:
        own = [w for w, b in bare if b.startswith(("evaluate.", "run.seed=", *SHARED))]
        models = [
            f"+evaluate.models.{setting.label}=[{','.join(f'{outputs}/{name}-{setting.label}-s{seed}/model' for seed in seeds)}]"
            for setting in settings
        ]
        only = ",".join(setting.label for setting in settings)
        status = runner(["evaluate", f"run.name={name}-evaluation", *models, f"evaluate.only=[{only}]", *own])
        if status:
            return status
        summary = Path(outputs) / f"{name}-evaluation" / "summary.json"
        figures = json.loads(summary.read_text(encoding="utf-8"))["decodings"][0]["models"]
    rows = [_row(setting, seeds, Path(outputs), name, figures.get(setting.label)) for setting in settings]
    write_json_atomically(Path(config.run.dir) / "grid.json", rows)
    table = markdown(rows, synthetic=bool(config.benchmark.synthetic))
    write_text_atomically(Path(config.run.dir) / "grid.md", table)
    sys.stdout.write(table)
    return 0


def _row(
    setting: Setting, seeds: Sequence[int], outputs: Path, name: str, figures: Mapping[str, Any] | None
) -> dict[str, Any]:
    curves = [_curves(outputs / f"{name}-{setting.label}-s{seed}" / "metrics.jsonl") for seed in seeds]
    row: dict[str, Any] = {
        "alpha": setting.alpha,
        "beta": setting.beta,
        "gamma": setting.gamma,
        "seeds": list(seeds),
    }
    if figures is not None:
        row["task_score"] = figures["task_score"]
        row["task_score_deviation"] = figures["task_score_deviation"]
        row["well_formed"] = figures["well_formed"]
    last = [_last(curve["reward/verifiable/mean"]) for curve in curves]
    row["trained_verifiable"] = statistics.fmean(last)
    row["trained_verifiable_deviation"] = statistics.stdev(last) if len(last) > 1 else None
    row["trained_verifiable_least"] = min(last)
    row["fall"] = max(_fall(curve["reward/verifiable/mean"]) for curve in curves)
    row["trained_tags_valid"] = statistics.fmean(_last(curve["tags/valid_frac"]) for curve in curves)
    return row


def _curves(path: Path) -> dict[str, list[float]]:
    curves: dict[str, list[float]] = {"reward/verifiable/mean": [], "tags/valid_frac": []}
    for line in complete_lines(path):
        data = json.loads(line)["data"]
        for key, values in curves.items():
            if key in data:
                values.append(data[key])
    return curves


def _last(values: Sequence[float]) -> float:
    """Mean of the last steps; NaN where there is none."""
    return statistics.fmean(values[-WINDOW:]) if values else math.nan


def _fall(values: Sequence[float]) -> float:
    """How far the end of a curve lies below its best stretch of ``WINDOW`` steps."""
    if not values:
        return math.nan
    stretches = [
        statistics.fmean(values[place : place + WINDOW]) for place in range(max(1, len(values) - WINDOW + 1))
    ]
    return max(stretches) - stretches[-1]


def markdown(rows: Sequence[Mapping[str, Any]], *, synthetic: bool) -> str:
    """The grid as a table; deviations are those over seeds, and the last line is the spread over settings."""
    head = [
        "alpha",
        "beta",
        "gamma",
        "task score",
        "R_v at the end of training",
        "its least seed",
        "fall from its best",
        "well-formed",
    ]
    lines = ["SYNTHETIC users.\n"] if synthetic else []
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for row in rows:
        formed = row.get("well_formed", row["trained_tags_valid"])
        score = (
            _with_deviation(row["task_score"], row["task_score_deviation"])
            if "task_score" in row
            else "not measured"
        )
        cells = [
            *(f"{row[name]:g}" for name in ("alpha", "beta", "gamma")), score,
            _with_deviation(row["trained_verifiable"], row["trained_verifiable_deviation"]),
            f"{row['trained_verifiable_least']:.3f}", f"{row['fall']:.3f}", f"{formed:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    name = "task_score" if "task_score" in rows[0] else "trained_verifiable"
    values = [row[name] for row in rows]
    lines.append(f"\nSpread of {name} over settings: {max(values) - min(values):.3f}")
    return "\n".join(lines) + "\n"


def _with_deviation(value: float, deviation: float | None) -> str:
    return f"{value:.3f}" if deviation is None else f"{value:.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    sys.exit(command_line("weights_grid", run, sys.argv[1:]))
