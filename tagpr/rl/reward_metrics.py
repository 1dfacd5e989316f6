"""What the responses of one training batch were like, as metrics. ``NAMES`` is the list of all of them.

The same names go to ``metrics.jsonl``, TensorBoard, wandb, Prometheus and the run's report, beside verl's own.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from tagpr.prmu.client import LATENCY_BUCKETS_S
from tagpr.rewards.composite import SAME
from tagpr.vocabulary import vocabulary

# Of one reward, as the reward manager reports them. Not from there: it imports verl, and verl Ray.
COMPONENTS = ("total", "verifiable", "repetition", "format", "tag", "prmu")
FORMAT_CHECKS = (
    "empty_response", "no_think", "several_thinks", "think_unopened", "think_unclosed", "think_not_first",
    "control_token", "empty_reasoning", "empty_answer", "tag_in_answer", "truncated",
)  # fmt: skip
TAG_CHECKS = (
    "tag_unknown", "tag_nested", "tag_mismatch", "tag_unopened", "tag_unclosed", "text_outside_tags",
    "too_few_segments",
)  # fmt: skip

STATISTICS = ("mean", "std", "min", "max", "p10", "p25", "p50", "p75", "p90")
TASK_STATISTICS = ("mean", "std", "p10", "p50", "p90")

# name -> what it says. <component>: those of the reward manager; <statistic>: STATISTICS, by task TASK_STATISTICS.
NAMES: dict[str, str] = {
    "reward/<component>/<statistic>": "total, verifiable (R_v), repetition (R_rep), format (R_f), tag, prmu; all responses",
    "<task>/reward/<component>/<statistic>": "the same, over the responses of one task",
    "failure/<check>/share": "share of responses whose first failed check this is (tagpr.tags, truncated)",
    "failure/format/share": "share of responses with a broken format, for whatever reason (R_f = 0)",
    "group/zero_spread_frac": "share of prompts whose responses all got the same reward, which teach nothing (S29)",
    "group/spread/mean": "standard deviation of the reward within a prompt's responses, mean over prompts",
    "<task>/group/zero_spread_frac": "share of all-equal groups, by task",
    "tags/valid_frac": "share of responses with R_tag = 0",
    "tags/readable_valid_frac": "the same, among responses with a whole format (R_f = 1)",
    "tags/coverage/<tag>": "share of responses that use this tag",
    "tags/segments/<statistic>": "segments of a response",
    "tags/distinct/mean": "different tags of a response",
    "tags/empty_frac": "share of segments that say nothing",
    "tags/repeated_frac": "share of a readable response's opening tags that it had before, in chains of wrong tags too",
    "tags/segment_tokens/mean": "reasoning tokens for each segment, over responses with segments",
    "tags/order_agreement": "share of pairs of segments with different tags that stand in the vocabulary's order",
    "tags/entropy_bits": "entropy of the tags of readable responses (R_f = 1): 0 if one only is used",
    "tags/transition_entropy_bits": "entropy of which tag follows a tag, start and end included, in readable responses",
    "tags/commonest_sequence_frac": "share of readable responses with the commonest whole sequence of tags",
    "length/reasoning/<statistic>": "tokens between <think> and </think>; 0 without both marks",
    "length/answer/<statistic>": "tokens of the rest, marks left out",
    "length/cut_frac": "share of responses that the token limit cut off; their format is broken too (R_f = 0)",
    "<task>/length/reasoning/mean": "the same, by task",
    "<task>/length/answer/mean": "the same, by task",
    "prmu/unknown_user_frac": "share of responses that PRMU scored with the row of unknown users",
    "prmu/latency_p50_s": "seconds from asking for a response's PRMU score to having it",
    "prmu/latency_p99_s": "the same, 99th percentile",
    "prmu/latency_max_s": "the same, largest",
    "prmu/latency_le_<seconds>s_frac": "share of responses that had their score within so many seconds",
    "profile/own": "share of a response's words (those of its query left out) that stand in its own prompt",
    "profile/other": "the same share in the prompts of other users with the same task",
    "profile/use": "own - other, mean over prompts: 0 if responses would fit any user (tagpr.rl.profile_use)",
    "profile/use_sem": "standard error of that mean",
    "<task>/profile/use": "the same, by task",
    "monitor/<name>": "1 while a monitor sees its fault, else 0 (tagpr.rl.monitors)",
}  # fmt: skip


def reward_metrics(
    infos: Sequence[Mapping[str, Any]], tasks: Sequence[str], groups: Sequence[str]
) -> dict[str, float]:
    """What the rewards, tags and lengths of one batch were: all of ``NAMES`` but ``profile/`` and ``monitor/``.

    Args:
        infos: ``reward_extra_info`` of each response (``TagPRRewardManager``).
        tasks: task of each response.
        groups: prompt of each response; the responses of one prompt form a group.

    Returns:
        Finite numbers. What this objective does not have (PRMU, in exploratory RL) is left out.
    """
    places = _places(tasks)
    metrics: dict[str, float] = {}
    for component in COMPONENTS:
        if any(component not in info for info in infos):
            continue
        values = np.array([info[component] for info in infos], dtype=float)
        metrics |= _statistics(f"reward/{component}", values, STATISTICS)
        for task, own in places.items():
            metrics |= _statistics(f"{task}/reward/{component}", values[own], TASK_STATISTICS)
    metrics |= _failures(infos) | _spreads(infos, tasks, groups) | _tags(infos) | _prmu(infos)
    for part in ("reasoning", "answer"):
        values = np.array([info[f"{part}_tokens"] for info in infos], dtype=float)
        metrics |= _statistics(f"length/{part}", values, STATISTICS)
        for task, own in places.items():
            metrics |= _statistics(f"{task}/length/{part}", values[own], ("mean",))
    metrics["length/cut_frac"] = float(np.mean([not info["finished"] for info in infos]))
    return {name: float(value) for name, value in metrics.items()}


def _places(tasks: Sequence[str]) -> dict[str, np.ndarray]:
    every = np.array(tasks)
    return {str(task): np.flatnonzero(every == task) for task in np.unique(every)}


def _statistics(name: str, values: np.ndarray, wanted: Iterable[str]) -> dict[str, float]:
    wanted = list(wanted)
    shares = [each for each in wanted if each[1:].isdigit()]
    cuts = np.percentile(values, [int(each[1:]) for each in shares]) if shares else ()
    found = dict(zip(shares, cuts, strict=True))
    return {f"{name}/{each}": found[each] if each in found else getattr(values, each)() for each in wanted}


def _failures(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    counts = Counter(info["failure"] for info in infos)
    # Zeros too: a curve with holes reads as if the failure had never gone away.
    names = [*FORMAT_CHECKS, *TAG_CHECKS, *(name for name in counts if name)]
    shares = {f"failure/{name}/share": counts[name] / len(infos) for name in names}
    return shares | {"failure/format/share": float(np.mean([info["format"] == 0 for info in infos]))}


def _spreads(
    infos: Sequence[Mapping[str, Any]], tasks: Sequence[str], groups: Sequence[str]
) -> dict[str, float]:
    rewards, task_of = defaultdict(list), {}
    for info, task, group in zip(infos, tasks, groups, strict=True):
        rewards[group].append(info["total"])
        task_of[group] = task
    equal = {group: max(own) - min(own) <= SAME for group, own in rewards.items()}
    by_task = defaultdict(list)
    for group, task in task_of.items():
        by_task[task].append(equal[group])
    return {
        "group/zero_spread_frac": float(np.mean(list(equal.values()))),
        "group/spread/mean": float(np.mean([np.std(own) for own in rewards.values()])),
        **{f"{task}/group/zero_spread_frac": float(np.mean(own)) for task, own in by_task.items()},
    }


def _tags(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    known = list(vocabulary())
    rank = {tag: number for number, tag in enumerate(known)}
    sequences = [tuple(info["tags"].split()) for info in infos]
    segments = sum(map(len, sequences))
    metrics = {
        "tags/valid_frac": float(np.mean([info["tag"] == 0 for info in infos])),
        "tags/distinct/mean": float(np.mean([len(set(sequence)) for sequence in sequences])),
    }
    readable = [sequence for info, sequence in zip(infos, sequences, strict=True) if info["format"]]
    if readable:
        metrics |= {
            "tags/entropy_bits": _entropy(Counter(tag for sequence in readable for tag in sequence)),
            "tags/transition_entropy_bits": _transition_entropy(readable),
            "tags/commonest_sequence_frac": Counter(readable).most_common(1)[0][1] / len(readable),
            "tags/readable_valid_frac": float(
                np.mean([info["tag"] == 0 for info in infos if info["format"]])
            ),
        }
    metrics |= _statistics("tags/segments", np.array([len(each) for each in sequences], float), STATISTICS)
    for tag in known:
        metrics[f"tags/coverage/{tag}"] = sum(tag in sequence for sequence in sequences) / len(sequences)
    if segments:
        metrics["tags/empty_frac"] = sum(info["empty_segments"] for info in infos) / segments
        tagged = sum(info["reasoning_tokens"] for info, each in zip(infos, sequences, strict=True) if each)
        metrics["tags/segment_tokens/mean"] = tagged / segments
    opened = sum(info["opened_tags"] for info in infos if info["format"])
    if opened:
        metrics["tags/repeated_frac"] = (
            sum(info["reopened_tags"] for info in infos if info["format"]) / opened
        )
    # Responses share few sequences: each pair is looked at once.
    ordered = pairs = 0
    for sequence, times in Counter(sequences).items():
        for first, second in combinations(sequence, 2):
            pairs += times * (first != second)
            ordered += times * (rank[first] < rank[second])
    if pairs:
        metrics["tags/order_agreement"] = ordered / pairs
    return metrics


def _transition_entropy(sequences: Iterable[Sequence[str]]) -> float:
    """Bits that say which tag comes next, knowing the one before; mean over transitions."""
    steps: dict[str, Counter[str]] = defaultdict(Counter)
    for sequence in sequences:
        for before, after in pairwise(("", *sequence, "")):
            steps[before][after] += 1
    weight = sum(sum(following.values()) for following in steps.values())
    return sum(sum(following.values()) * _entropy(following) for following in steps.values()) / weight


def _entropy(counts: Counter[str]) -> float:
    shares = np.array([count for count in counts.values() if count], dtype=float)
    shares /= shares.sum() if len(shares) else 1.0
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # never -0.0


def _prmu(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if all("prmu_unknown_user" in info for info in infos):
        metrics["prmu/unknown_user_frac"] = float(np.mean([info["prmu_unknown_user"] for info in infos]))
    if all("prmu_seconds" in info for info in infos):
        seconds = np.array([info["prmu_seconds"] for info in infos], dtype=float)
        for name, share in (("p50", 50), ("p99", 99), ("max", 100)):
            metrics[f"prmu/latency_{name}_s"] = np.percentile(seconds, share)
        for end in LATENCY_BUCKETS_S:
            metrics[f"prmu/latency_le_{end:g}s_frac"] = float(np.mean(seconds <= end))
    return metrics


def documented(name: str) -> str | None:
    """The entry of ``NAMES`` that a metric's name is an instance of; None for verl's own and for unknown ones."""
    if name in NAMES:
        return name
    parts = name.split("/")
    for pattern in NAMES:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(_fits, wanted, parts)):
            return pattern
    return None


def _fits(wanted: str, part: str) -> bool:
    head, opened, rest = wanted.partition("<")
    if not opened:
        return wanted == part
    kind, _, tail = rest.partition(">")
    allowed = {"component": COMPONENTS, "statistic": STATISTICS}.get(kind)
    return (
        part in allowed
        if allowed
        else len(part) > len(head + tail) and part.startswith(head) and part.endswith(tail)
    )
