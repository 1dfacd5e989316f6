"""When a run will be done, all stages counted: from the pace of the replies, and from how much came of what was asked so far.

Work is counted in replies that are not in the ledger yet, so a run that goes on after a stop, and reads most of its replies
from the ledger, tells the same as one that was never stopped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from data_pipeline.cost import ENOUGH, pair_units, tagging_reply_tokens
from data_pipeline.ledger import Pace
from data_pipeline.settings import ChainSettings, ModelSettings

ROLE_OF: Final[Mapping[str, str]] = {
    "teacher": "teacher", "judge": "judge", "explorer": "tagger", "tagger": "tagger",
}  # fmt: skip
CHAINS, EXPLORATORY, TAGGING, FOR_PAIRS = "chains", "exploratory tagging", "tagging", "tagging for pairs"
"""The stages, as progress names them; the last two count as one."""
STAGES: Final[Mapping[str, tuple[str, ...]]] = {
    CHAINS: ("teacher", "judge"), EXPLORATORY: ("explorer",), TAGGING: ("tagger",),
}  # fmt: skip


@dataclass(frozen=True)
class Outlook:
    """Seconds that each stage still takes; ``assumed`` are those without a pace of their own yet, ``unknown`` those of which
    nothing can be said, ``batched`` those that wait for the Batch API as long as the provider likes."""

    stages: Mapping[str, float]
    assumed: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    batched: frozenset[str] = frozenset()

    @property
    def seconds(self) -> float:
        """Of all stages that something can be said of."""
        return sum(self.stages.values())


def outlook(settings: ChainSettings, position: Mapping[str, Any], known: Mapping[str, Pace]) -> Outlook:
    """What is left of the whole job.

    ``position`` is the note ``progress`` of the results store (:class:`data_pipeline.progress.Progress`), ``known`` the paces of
    the ledger.
    """
    left = _replies_left(settings, position, known)
    seconds: dict[str, float] = {}
    assumed, unknown, batched = set(), set(), set()
    order = list(STAGES)
    now = order.index(TAGGING if position["stage"] == FOR_PAIRS else position["stage"])
    for stage in order[now:]:
        longest = 0.0
        for group in STAGES[stage]:
            model: ModelSettings = getattr(settings, ROLE_OF[group])
            if model.mode == "batch" and group != "explorer":
                batched.add(stage)
                continue
            if left[group] <= 0:
                continue
            rate = known[group].per_second
            if rate is None and (rate := _like_the_judge(settings, position, group)) is not None:
                assumed.add(stage)
            # Teacher and judge work at the same time.
            longest = max(longest, 0.0 if rate is None else left[group] / rate)
        if longest:
            seconds[stage] = longest
        elif stage not in batched and any(left[group] > 0 for group in STAGES[stage]):
            unknown.add(stage)
    return Outlook(seconds, frozenset(assumed), frozenset(unknown), frozenset(batched))


def _replies_left(
    settings: ChainSettings, position: Mapping[str, Any], known: Mapping[str, Pace]
) -> dict[str, float]:
    """Replies of each group that are not in the ledger yet, as far as one can tell."""
    expected, preferences = settings.expected, settings.preferences
    stage, done, steps = position["stage"], position["done"], position["total"]
    instances, blanks = position["instances"], position["blanks"]
    again = 1.0 + expected.malformed
    seen, before = position["seen"], position["seen_before"]

    def in_stage(group: str, otherwise: float) -> float:
        """Replies of this pass when the present stage is done, at so many a step if there were too few steps to tell."""
        own = seen[group] - before[group]
        per_step = own / done if done >= min(ENOUGH, steps) and done else otherwise
        return float(seen[group] + (steps - done) * per_step)

    extra = expected.unsolved * preferences.extra_rollouts if preferences.pqp_pairs else 0.0
    teacher = instances * (settings.rollouts + extra) + blanks * preferences.prp_rollouts
    judge = instances * settings.rollouts * expected.accurate * again
    total = {
        "teacher": float(seen["teacher"]),
        "judge": float(seen["judge"]),
        "explorer": float(seen["explorer"]),
    }
    judged = float(position["judged"])
    if stage == CHAINS:
        total["teacher"] = in_stage("teacher", teacher / max(1, instances))
        total["judge"] = in_stage("judge", judge / max(1, instances))
        judged = (
            judged / done * instances
            if done >= min(ENOUGH, instances) and done
            else instances * settings.rollouts * expected.accurate * expected.judged
        )
    wanted = settings.exploratory.chains
    if stage == CHAINS:
        total["explorer"] = min(judged, wanted * judged if wanted <= 1 else wanted) * again
    elif stage == EXPLORATORY:
        total["explorer"] = in_stage("explorer", again)
    pairs = pair_units(settings, instances, blanks, judged, extra) * again
    if stage == TAGGING:
        total["tagger"] = in_stage("tagger", again) + pairs
    elif stage == FOR_PAIRS:
        total["tagger"] = in_stage("tagger", again)
    else:
        total["tagger"] = judged * again + pairs
    if settings.stop_after is not None:
        total["tagger"] = 0.0
        if settings.stop_after == "judge":
            total["explorer"] = 0.0
    return {group: max(0.0, count - known[group].replies) for group, count in total.items()}


def _like_the_judge(settings: ChainSettings, position: Mapping[str, Any], group: str) -> float | None:
    """Replies a second of a tagger that was not asked yet, if it writes its tokens as fast as the judge does."""
    one = position["latency"].get("judge")
    if one is None or group not in ("explorer", "tagger"):
        return None
    expected = settings.expected
    tokens = expected.exploratory_reply_tokens if group == "explorer" else tagging_reply_tokens(settings)
    return settings.tagger.concurrency / (one * tokens / expected.judge_reply_tokens)
