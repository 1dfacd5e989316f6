"""``metrics.jsonl`` of a run: one line per step, going on in the same file when a run resumes."""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tagpr.rl.reward_manager import COMPONENTS


class MetricsLog:
    """Appends ``{"step": int, "data": {name: number}}`` lines.

    verl's own file logger truncates its file when a run resumes. Opening this one at step s keeps the lines up to s, drops a
    torn last line and the lines of steps that will be done again, and appends.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= resumed_step]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Write the numbers of one step (the interface of a verl logger)."""
        numbers = {name: float(value) for name, value in data.items() if _is_number(value)}
        self._file.write(json.dumps({"step": step, "data": numbers}) + "\n")

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def reward_metrics(infos: Sequence[Mapping[str, Any]], tasks: Sequence[str], groups: Sequence[str]) -> dict[str, float]:
    """What the rewards of one batch were made of.

    Args:
        infos: ``reward_extra_info`` of each response (``TagPRRewardManager``).
        tasks: task of each response.
        groups: prompt of each response; the responses of one prompt form a group.

    Returns:
        ``reward/<component>/{mean,std,min,max}``; the same means by task; ``failure/<check>/share``; ``tags/valid_frac``;
        ``group/zero_spread_frac``, the share of groups whose rewards are all equal, which teach nothing (S29);
        ``prmu/unknown_user_frac``.
    """
    metrics: dict[str, float] = {}
    for component in COMPONENTS:
        if any(component not in info for info in infos):
            continue
        values = np.array([info[component] for info in infos], dtype=float)
        metrics |= {
            f"reward/{component}/mean": values.mean(),
            f"reward/{component}/std": values.std(),
            f"reward/{component}/min": values.min(),
            f"reward/{component}/max": values.max(),
        }
        by_task = defaultdict(list)
        for task, value in zip(tasks, values, strict=True):
            by_task[task].append(value)
        metrics |= {f"{task}/reward/{component}/mean": float(np.mean(own)) for task, own in by_task.items()}
    for failure, count in Counter(info["failure"] for info in infos).items():
        if failure:
            metrics[f"failure/{failure}/share"] = count / len(infos)
    metrics["tags/valid_frac"] = float(np.mean([info["tag"] == 0 for info in infos]))
    by_group = defaultdict(set)
    for group, info in zip(groups, infos, strict=True):
        by_group[group].add(info["total"])
    metrics["group/zero_spread_frac"] = float(np.mean([len(rewards) == 1 for rewards in by_group.values()]))
    if all("prmu_unknown_user" in info for info in infos):
        metrics["prmu/unknown_user_frac"] = float(np.mean([info["prmu_unknown_user"] for info in infos]))
    return {name: float(value) for name, value in metrics.items()}
