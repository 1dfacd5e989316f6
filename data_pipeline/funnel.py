"""How many units each stage of the pipeline let through, by task."""

from collections import Counter
from collections.abc import Sequence

STAGES = {
    "instances": "training instances drawn",
    "rollouts": "chains asked of the teacher",
    "parsed": "complete, with reasoning and an answer",
    "distinct": "not the text of another rollout of the instance",
    "accurate": "past the accuracy filter (S7)",
    "judged": "past the judge (S8)",
    "tagged": "tagged without rewriting (S12)",
    "selected": "chosen for SFT (S14)",
    "extra_rollouts": "more rollouts, for pairs only",
    "without_profile": "rollouts without the profile",
    "prp": "pairs: with profile over without (S15)",
    "pqp": "pairs: by correctness (S16)",
    "pqp_last_word": "of these: answers differ in the last word only",
}


class Funnel:
    """Counts per stage and task, and what was dropped for which reason."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.kept: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}
        self.dropped: dict[str, Counter[str]] = {}

    def keep(self, stage: str, task: str, count: int = 1) -> None:
        """One unit got through a stage."""
        self.kept[stage][task] += count

    def drop(self, stage: str, reason: str, count: int = 1) -> None:
        """One unit did not, and why."""
        self.dropped.setdefault(stage, Counter())[reason] += count

    def total(self, stage: str) -> int:
        """Units of all tasks that got through a stage."""
        return self.kept[stage].total()

    def as_dict(self) -> dict[str, object]:
        """For funnel.json."""
        return {
            "stages": {
                stage: {"what": what, "all": self.total(stage)}
                | {task: self.kept[stage][task] for task in self.tasks}
                for stage, what in STAGES.items()
            },
            "dropped": {
                stage: dict(sorted(reasons.items())) for stage, reasons in sorted(self.dropped.items())
            },
        }

    def table(self) -> list[str]:
        """Lines of a table for the terminal."""
        wide = max(map(len, STAGES))
        lines = [f"{'':{wide}}  {'all':>7}" + "".join(f"{task:>8}" for task in self.tasks)]
        for stage, what in STAGES.items():
            counts = "".join(f"{self.kept[stage][task]:>8,}" for task in self.tasks)
            lines.append(f"{stage:{wide}}  {self.total(stage):>7,}{counts}   {what}")
        for stage, reasons in sorted(self.dropped.items()):
            named = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
            lines.append(f"dropped at {stage}: {named}")
        return lines
