"""Which metrics of an RL run stand together: one layout for TensorBoard, the Grafana dashboard and the run's report.

wandb groups by the first part of a name by itself. Names are those of ``tagpr.rl.reward_metrics.NAMES`` and verl's own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tagpr.rl.reward_metrics import FORMAT_CHECKS, TAG_CHECKS


@dataclass(frozen=True)
class Chart:
    """One chart: label -> name of a metric. A ``<part>`` in a name stands for every metric that has something there.

    ``only`` restricts what that may be; ``unit`` is Grafana's (``percentunit``, ``s``, ``short``). Of a ``rare`` chart the report
    shows those only that were ever more than 0.
    """

    title: str
    names: Mapping[str, str]
    unit: str = "short"
    only: Sequence[str] = field(default=())
    rare: bool = False


def _spread(name: str) -> dict[str, str]:
    return {each: f"{name}/{each}" for each in ("mean", "p10", "p50", "p90")}


LAYOUT: dict[str, tuple[Chart, ...]] = {
    "Reward": (
        Chart("Total reward", _spread("reward/total")),
        Chart("R_v: verifiable", _spread("reward/verifiable")),
        Chart("R_PRMU", _spread("reward/prmu")),
        Chart("R_f and valid tags", {"R_f": "reward/format/mean", "valid tags": "tags/valid_frac"}, "percentunit"),
        Chart("R_rep: repetition", {"mean": "reward/repetition/mean", "p10": "reward/repetition/p10"}),
        Chart("Total reward by task", {"<task>": "<task>/reward/total/mean"}),
        Chart("R_v by task", {"<task>": "<task>/reward/verifiable/mean"}),
        Chart("Spread of R_v by task", {"<task>": "<task>/reward/verifiable/std"}),
        Chart("R_PRMU by task", {"<task>": "<task>/reward/prmu/mean"}),
        Chart("Validation reward by task", {"<task>": "val-core/<task>/reward/mean@1"}),
    ),
    "Groups and updates": (
        Chart("Groups whose rewards are all equal", {"all": "group/zero_spread_frac"}, "percentunit"),
        Chart("All-equal groups by task", {"<task>": "<task>/group/zero_spread_frac"}, "percentunit"),
        Chart("Spread of the reward within a group", {"mean": "group/spread/mean"}),
        Chart("Entropy of the policy", {"nats a token": "actor/entropy"}),
        Chart("Clipped tokens", {"share": "actor/pg_clipfrac"}, "percentunit"),
        Chart("Gradient norm", {"norm": "actor/grad_norm"}),
        Chart("Weights of the reward", {"<name>": "objective/<name>"}),
    ),
    "Failed checks": (
        Chart("Broken format", {"share": "failure/format/share"}, "percentunit"),
        Chart("Format failures by reason", {"<check>": "failure/<check>/share"}, "percentunit", FORMAT_CHECKS, rare=True),
        Chart("Tag failures by reason", {"<check>": "failure/<check>/share"}, "percentunit", TAG_CHECKS, rare=True),
    ),
    "Tags": (
        Chart("Responses that use a tag", {"<tag>": "tags/coverage/<tag>"}, "percentunit"),
        Chart("Segments a response", {**_spread("tags/segments"), "max": "tags/segments/max"}),
        Chart("Different tags a response", {"mean": "tags/distinct/mean"}),
        Chart("Variety of tags (bits)", {"tags": "tags/entropy_bits", "transitions": "tags/transition_entropy_bits"}),
        Chart(
            "Order of tags",
            {"pairs in the usual order": "tags/order_agreement", "commonest sequence": "tags/commonest_sequence_frac"},
            "percentunit",
        ),
        Chart("Stuffing", {"repeated tags": "tags/repeated_frac", "empty segments": "tags/empty_frac"}, "percentunit"),
        Chart("Tokens a segment", {"mean": "tags/segment_tokens/mean"}),
    ),
    "Lengths": (
        Chart("Reasoning tokens", {**_spread("length/reasoning"), "max": "length/reasoning/max"}),
        Chart("Answer tokens", {**_spread("length/answer"), "max": "length/answer/max"}),
        Chart("Reasoning tokens by task", {"<task>": "<task>/length/reasoning/mean"}),
        Chart("Answer tokens by task", {"<task>": "<task>/length/answer/mean"}),
        # verl's response_length/clip_ratio counts those that are as long as the longest of the batch.
        Chart("Responses that the token limit cut off", {"share": "length/cut_frac"}, "percentunit"),
    ),
    "Use of the profile": (
        Chart("Words from a prompt", {"its own": "profile/own", "those of others": "profile/other"}, "percentunit"),
        Chart("Use of the profile", {"own - other": "profile/use"}, "percentunit"),
        Chart("Use of the profile by task", {"<task>": "<task>/profile/use"}, "percentunit"),
    ),
    "PRMU service": (
        Chart(
            "Seconds to a score",
            {"p50": "prmu/latency_p50_s", "p99": "prmu/latency_p99_s", "max": "prmu/latency_max_s"},
            "s",
        ),
        Chart("Scored as an unknown user", {"share": "prmu/unknown_user_frac"}, "percentunit"),
    ),
    "Rollout engine against actor": (
        Chart(
            "Difference of a token's probability",
            {"largest": "training/rollout_probs_diff_max", "mean": "training/rollout_probs_diff_mean"},
        ),
        Chart("Correlation of the probabilities", {"pearson": "training/rollout_actor_probs_pearson_corr"}),
    ),
    "Monitors": (Chart("Monitors that see their fault", {"<name>": "monitor/<name>"}, rare=True),),
    "Time": (
        Chart(
            "Seconds a step",
            {
                "step": "timing_s/step", "rollout": "timing_s/gen", "old log-probs": "timing_s/old_log_prob",
                "update": "timing_s/update_actor", "weight sync": "timing_s/update_weights",
            },
            "s",
        ),
        Chart("Tokens a second", {"per GPU": "perf/throughput"}),
    ),
}  # fmt: skip


def pattern(name: str, only: Sequence[str] = ()) -> str:
    """Regular expression of a name in the layout; a ``<part>`` is its one group. RE2's syntax as well as Python's."""
    allowed = "|".join(map(re.escape, only)) if only else "[^/]+"
    head, opened, rest = name.partition("<")
    if not opened:
        return _literal(name)
    return f"{_literal(head)}({allowed}){_literal(rest.partition('>')[2])}"


def _literal(text: str) -> str:
    return re.sub(r"([.+*?()\[\]{}|^$\\])", r"\\\1", text)


def found(chart: Chart, names: Iterable[str]) -> dict[str, str]:
    """label -> metric for those that are there, in the layout's order, then by name."""
    ordered = sorted(names)
    there = {}
    for label, wanted in chart.names.items():
        expression = re.compile(pattern(wanted, chart.only))
        for name in ordered:
            match = expression.fullmatch(name)
            # val-core/lamp1/... is no task's own.
            if match:
                there[match[1] if "<" in wanted else label] = name
    return there


@lru_cache(maxsize=4096)
def in_layout(name: str) -> bool:
    """Whether a metric stands in any chart."""
    return any(
        re.fullmatch(pattern(wanted, chart.only), name)
        for charts in LAYOUT.values()
        for chart in charts
        for wanted in chart.names.values()
    )


def tensorboard_layout() -> dict[str, dict[str, list[Any]]]:
    """What ``SummaryWriter.add_custom_scalars`` takes: section -> chart -> lines."""
    return {
        section: {
            chart.title: ["Multiline", [f"^{pattern(name, chart.only)}$" for name in chart.names.values()]]
            for chart in charts
        }
        for section, charts in LAYOUT.items()
    }
