"""What the rewards of one training batch were made of, as metrics."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tagpr.prmu.client import LATENCY_BUCKETS_S
from tagpr.rl.reward_manager import COMPONENTS


def reward_metrics(
    infos: Sequence[Mapping[str, Any]], tasks: Sequence[str], groups: Sequence[str]
) -> dict[str, float]:
    """What the rewards of one batch were made of.

    Args:
        infos: ``reward_extra_info`` of each response (``TagPRRewardManager``).
        tasks: task of each response.
        groups: prompt of each response; the responses of one prompt form a group.

    Returns:
        ``reward/<component>/{mean,std,min,max}``; the same means by task; ``failure/<check>/share``; ``tags/valid_frac``;
        ``group/zero_spread_frac``, the share of groups whose rewards are all equal, which teach nothing (S29);
        ``prmu/unknown_user_frac``; how long the reward server took, as the response saw it: ``prmu/latency_{p50,p99,max}_s`` and
        the histogram ``prmu/latency_le_<x>s_frac``, shares of responses that had their score within x seconds.
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
    if all("prmu_seconds" in info for info in infos):
        seconds = np.array([info["prmu_seconds"] for info in infos], dtype=float)
        for name, share in (("p50", 50), ("p99", 99), ("max", 100)):
            metrics[f"prmu/latency_{name}_s"] = np.percentile(seconds, share)
        for end in LATENCY_BUCKETS_S:
            metrics[f"prmu/latency_le_{end:g}s_frac"] = float(np.mean(seconds <= end))
    return {name: float(value) for name, value in metrics.items()}
