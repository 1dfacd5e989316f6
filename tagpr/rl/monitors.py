"""Faults of an RL run that its metrics show, and what is done about them (S43).

A monitor is a pure function of the metrics of all steps so far: what it knows comes back from ``metrics.jsonl`` when a run
resumes. It compares the mean of the last ``window`` steps with the run's first ``reference`` steps (or says otherwise),
and speaks when ``patience`` steps in a row were faulty. A step that lacks one of its metrics it does not see: without
PRMU, nothing is said about PRMU. Thresholds are in ``tagpr/config/monitors.yaml``.

| monitor | fault |
| --- | --- |
| ``tag_collapse`` | the tags in use get fewer, every response gets the same sequence of tags, or tags stop being valid |
| ``tag_stuffing`` | segments without text, the same tags again and again, or many more segments with less in each |
| ``format_escape`` | more responses with a broken format than at the start (S27: it pays where R_v + R_rep < 0) |
| ``length_drift`` | reasoning or answers much longer or shorter than at the start, or more that the token limit cuts off |
| ``prmu_hacking`` | PRMU's score rises while the verifiable reward falls from where it was best |
| ``profile_ignored`` | responses use less of this user's profile than at the start (``tagpr.rl.profile_use``) |
| ``plateau`` | the reward has not risen for ``patience`` steps |
| ``policy_gap`` | rollout engine and actor disagree on the probabilities of tokens: the weight sync is broken |

An alert is one line in the log, a row in ``<run.dir>/alerts.jsonl`` and, in the metrics of its step and as long as the fault
lasts, ``monitor/<name>`` = 1. Its ``action`` is ``warn``: nothing else; ``stop``: the run ends after the next step, with a
checkpoint and status 3; ``switch``: likewise, but the stage counts as finished, its model is handed over, and
``<run.dir>/switched.json`` says why it is shorter; ``off``: the monitor is not asked.
"""

import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from tagpr.errors import ConfigError
from tagpr.runs import complete_lines, write_text_atomically

logger = logging.getLogger(__name__)

Action = Literal["off", "warn", "stop", "switch"]


@dataclass(frozen=True)
class Alert:
    """What a monitor saw; ``reason`` is one sentence with the figures."""

    step: int
    monitor: str
    action: Action
    reason: str


class Monitor(ABC):
    """One kind of fault.

    Args:
        window: steps whose mean is judged.
        reference: first steps of the run, which it is compared with.
        patience: faulty steps in a row before it speaks.
    """

    reads: ClassVar[tuple[str, ...]]

    def __init__(self, *, window: int, reference: int, patience: int) -> None:
        self.window, self.reference, self.patience = window, reference, patience
        self._series: dict[str, list[float]] = {name: [] for name in self.reads}
        self._streak = 0

    @property
    def active(self) -> bool:
        """Whether the fault lasts, and has lasted for ``patience`` steps."""
        return self._streak >= self.patience

    def observe(self, metrics: Mapping[str, Any]) -> str:
        """Look at the next step; returns the reason at the step where patience ends, else an empty string."""
        values = {name: metrics.get(name) for name in self.reads}
        if any(value is None or not math.isfinite(value) for value in values.values()):
            return ""
        for name, value in values.items():
            self._series[name].append(float(value))  # type: ignore[arg-type]
        fault = self._fault()
        self._streak = self._streak + 1 if fault else 0
        return fault if self._streak == self.patience else ""

    def rearm(self) -> None:
        """Speak again if the fault goes on for another ``patience`` steps."""
        self._streak = 0

    @abstractmethod
    def _fault(self) -> str:
        """What is wrong at the last step that was seen; empty if nothing is."""

    def _ready(self) -> bool:
        return self._steps() >= self.reference + self.window

    def _steps(self) -> int:
        return len(self._series[self.reads[0]])

    def _start(self, name: str) -> float:
        return float(np.mean(self._series[name][: self.reference]))

    def _now(self, name: str) -> float:
        return float(np.mean(self._series[name][-self.window :]))


class TagCollapse(Monitor):
    """Too little variety of tags, or none that are valid; of readable responses, the others are FormatEscape's.

    Args:
        entropy_fraction: fault below this part of the starting ``tags/entropy_bits``: few tags are left.
        transition_fraction: the same of ``tags/transition_entropy_bits``: every response takes the same path.
        valid_fall: fault where ``tags/readable_valid_frac`` has fallen by this much: what is not paid for is dropped.
        others: of :class:`Monitor`.
    """

    reads = ("tags/entropy_bits", "tags/transition_entropy_bits", "tags/readable_valid_frac")

    def __init__(
        self, *, entropy_fraction: float, transition_fraction: float, valid_fall: float, **others: int
    ) -> None:
        super().__init__(**others)
        self.fractions = {self.reads[0]: entropy_fraction, self.reads[1]: transition_fraction}
        self.valid_fall = valid_fall

    def _fault(self) -> str:
        if not self._ready():
            return ""
        for name, fraction in self.fractions.items():
            start, now = self._start(name), self._now(name)
            if now < fraction * start:
                return f"{name} fell from {start:.2f} to {now:.2f}, below {fraction:g} of it"
        start, now = self._start(self.reads[2]), self._now(self.reads[2])
        if start - now > self.valid_fall:
            return f"{self.reads[2]} fell from {start:.2f} to {now:.2f}, by more than {self.valid_fall:g}"
        return ""


class TagStuffing(Monitor):
    """Tags for tags' sake.

    Args:
        empty_rise: fault where the share of segments without text has risen by this much.
        repeated_rise: the same of opening tags that stood in the response before, in chains of wrong tags too: a policy that
            stuffs gets its closing tags wrong first.
        segments_ratio: fault where there are so many times more segments than at the start, with less text in each:
        segment_tokens_ratio: at most this part of the starting ``tags/segment_tokens/mean``.
        others: of :class:`Monitor`.
    """

    reads = ("tags/segments/mean", "tags/segment_tokens/mean", "tags/empty_frac", "tags/repeated_frac")

    def __init__(
        self,
        *,
        empty_rise: float,
        repeated_rise: float,
        segments_ratio: float,
        segment_tokens_ratio: float,
        **others: int,
    ) -> None:
        super().__init__(**others)
        self.rises = {"tags/empty_frac": empty_rise, "tags/repeated_frac": repeated_rise}
        self.segments_ratio, self.segment_tokens_ratio = segments_ratio, segment_tokens_ratio

    def _fault(self) -> str:
        if not self._ready():
            return ""
        for name, rise in self.rises.items():
            start, now = self._start(name), self._now(name)
            if now - start > rise:
                return f"{name} rose from {start:.2f} to {now:.2f}, by more than {rise:g}"
        many, much = self.reads[:2]
        if self._now(many) > self.segments_ratio * self._start(many) and self._now(
            much
        ) < self.segment_tokens_ratio * self._start(much):
            return (
                f"{self._now(many):.1f} segments a response instead of {self._start(many):.1f}, with "
                f"{self._now(much):.1f} tokens each instead of {self._start(much):.1f}"
            )
        return ""


class FormatEscape(Monitor):
    """Responses that cannot be read any more, though they came to their end: those that were cut off are LengthDrift's.

    Args:
        rise: fault where ``failure/format/share`` less ``length/cut_frac`` has risen by more than this.
        others: of :class:`Monitor`.
    """

    reads = ("failure/format/share", "length/cut_frac")

    def __init__(self, *, rise: float, **others: int) -> None:
        super().__init__(**others)
        self.rise = rise

    def _fault(self) -> str:
        if not self._ready():
            return ""
        broken, cut = self.reads
        start, now = self._start(broken) - self._start(cut), self._now(broken) - self._now(cut)
        if now - start > self.rise:
            return (
                f"{now:.0%} of the responses have a broken format and are whole, {start:.0%} at the start "
                f"(limit: +{self.rise:.0%})"
            )
        return ""


class LengthDrift(Monitor):
    """Responses of another length than at the start. The long ones of a batch are looked at too: the mean is the last to move.

    Args:
        shortest: fault where reasoning (mean, p90) or answers (mean) have less than this part of their starting tokens.
        longest: the same with more than so many times of them.
        cut_rise: fault where the share of responses that the token limit cut off has risen by more than this.
        others: of :class:`Monitor`.
    """

    reads = ("length/reasoning/mean", "length/answer/mean", "length/reasoning/p90", "length/cut_frac")

    def __init__(self, *, shortest: float, longest: float, cut_rise: float, **others: int) -> None:
        super().__init__(**others)
        self.shortest, self.longest, self.cut_rise = shortest, longest, cut_rise

    def _fault(self) -> str:
        if not self._ready():
            return ""
        *lengths, cut = self.reads
        for name in lengths:
            start, now = self._start(name), self._now(name)
            if not self.shortest * start <= now <= self.longest * start:
                limits = f"limits: {self.shortest:g} and {self.longest:g} times"
                return f"{name} is {now:.1f} tokens, {start:.1f} at the start ({limits})"
        start, now = self._start(cut), self._now(cut)
        if now - start > self.cut_rise:
            return f"the token limit cuts off {now:.0%} of the responses, {start:.0%} at the start (limit: +{self.cut_rise:.0%})"
        return ""


class PrmuHacking(Monitor):
    """PRMU is pleased while answers get worse, compared with the ``window`` steps where R_v was best.

    Args:
        fall: R_v must have fallen by this much since, and by ``sigmas`` standard errors,
        rise: and PRMU's score have risen by this much, and by one standard error.
        sigmas: standard errors of a difference of two window means, from the scatter of steps within the windows.
        others: of :class:`Monitor`.
    """

    reads = ("reward/verifiable/mean", "reward/prmu/mean")

    def __init__(self, *, fall: float, rise: float, sigmas: float, **others: int) -> None:
        super().__init__(**others)
        self.fall, self.rise, self.sigmas = fall, rise, sigmas

    def _fault(self) -> str:
        steps, window = self._steps(), self.window
        if steps < 2 * window or not self._ready():
            return ""
        verifiable, prmu = (np.array(self._series[name]) for name in self.reads)
        means = np.convolve(verifiable[: steps - window], np.ones(window) / window, mode="valid")
        best = int(means.argmax())
        then, now = slice(best, best + window), slice(steps - window, steps)
        fallen = verifiable[then].mean() - verifiable[now].mean()
        risen = prmu[now].mean() - prmu[then].mean()
        if fallen > max(
            self.fall, self.sigmas * _standard_error(verifiable[then], verifiable[now])
        ) and risen > max(self.rise, _standard_error(prmu[then], prmu[now])):
            return (
                f"PRMU rose from {prmu[then].mean():.3f} to {prmu[now].mean():.3f} while the verifiable reward fell from its "
                f"best, {verifiable[then].mean():.3f}, to {verifiable[now].mean():.3f}"
            )
        return ""


class ProfileIgnored(Monitor):
    """Responses that could have been written for anybody.

    Args:
        fraction: fault where ``profile/use`` is below this part of what it was at the start, and lower by
        sigmas: standard errors. Where even the starting value does not differ from 0 by so many, nothing can be judged.
        others: of :class:`Monitor`.
    """

    reads = ("profile/use",)

    def __init__(self, *, fraction: float, sigmas: float, **others: int) -> None:
        super().__init__(**others)
        self.fraction, self.sigmas = fraction, sigmas

    def _fault(self) -> str:
        if not self._ready():
            return ""
        every = np.array(self._series[self.reads[0]])
        start, now = every[: self.reference], every[-self.window :]
        if start.mean() <= self.sigmas * start.std(ddof=1) / math.sqrt(len(start)):
            return ""
        fallen = start.mean() - now.mean()
        if now.mean() < self.fraction * start.mean() and fallen > self.sigmas * _standard_error(start, now):
            return (
                f"profile/use fell from {start.mean():.3f} to {now.mean():.3f}, below {self.fraction:g} of it"
            )
        return ""


class Plateau(Monitor):
    """No gain for ``patience`` steps: the best window among them is no better than the best before.

    Args:
        metric: what should rise.
        gain: a rise of less than this is none.
        window, patience: of :class:`Monitor`; there is no reference.
    """

    def __init__(self, *, metric: str, gain: float, window: int, patience: int) -> None:
        self.reads = (metric,)  # type: ignore[misc]
        # Patience is in the comparison already.
        super().__init__(window=window, reference=0, patience=1)
        self.gain, self.steps = gain, patience

    def _fault(self) -> str:
        values = np.array(self._series[self.reads[0]])
        if len(values) < self.steps + self.window:
            return ""
        means = np.convolve(values, np.ones(self.window) / self.window, mode="valid")
        before, lately = means[: -self.steps].max(), means[-self.steps :].max()
        if lately < before + self.gain:
            return (
                f"{self.reads[0]} was {before:.3f} at its best and at most {lately:.3f} in the {self.steps} steps since "
                f"(means of {self.window})"
            )
        return ""


class PolicyGap(Monitor):
    """Rollouts do not come from the policy that is trained.

    Args:
        largest: fault above this mean difference of a token's probability between rollout engine and actor.
        others: of :class:`Monitor`.
    """

    reads = ("training/rollout_probs_diff_mean",)

    def __init__(self, *, largest: float, window: int, patience: int) -> None:
        super().__init__(window=window, reference=0, patience=patience)
        self.largest = largest

    def _fault(self) -> str:
        if not self._ready() or self._now(self.reads[0]) <= self.largest:
            return ""
        return (
            f"rollout and actor differ by {self._now(self.reads[0]):.3g} in a token's probability on average "
            f"(limit {self.largest:g}): weights do not reach the rollout engine, or it computes something else"
        )


MONITORS: dict[str, type[Monitor]] = {
    "tag_collapse": TagCollapse,
    "tag_stuffing": TagStuffing,
    "format_escape": FormatEscape,
    "length_drift": LengthDrift,
    "prmu_hacking": PrmuHacking,
    "profile_ignored": ProfileIgnored,
    "plateau": Plateau,
    "policy_gap": PolicyGap,
}


def _standard_error(first: np.ndarray, second: np.ndarray) -> float:
    """Of the difference of two means; scatter pooled, since windows are short."""
    free = len(first) + len(second) - 2
    if free < 1:
        return 0.0
    pooled = (first.var() * len(first) + second.var() * len(second)) / free
    return math.sqrt(pooled * (1 / len(first) + 1 / len(second)))


def build(config: Mapping[str, Any]) -> dict[str, tuple[Monitor, Action]]:
    """Monitors that are on, from ``monitors.*``, with their actions.

    Raises:
        ConfigError: an action, a number of steps or a threshold cannot be meant.
    """
    built: dict[str, tuple[Monitor, Action]] = {}
    for name, kind in MONITORS.items():
        settings = dict(config[name])
        action: Any = settings.pop("action")
        # YAML reads a bare off as false.
        action = "off" if action is False else action
        if action not in get_args(Action):
            raise ConfigError(
                f"monitors.{name}.action={action}: unknown. Use one of {', '.join(get_args(Action))}."
            )
        for key, value in settings.items():
            steps = key in ("window", "reference", "patience")
            if steps and (not isinstance(value, int) or value < 1 + (key == "reference")):
                least = 2 if key == "reference" else 1
                raise ConfigError(
                    f"monitors.{name}.{key}={value}: a number of steps, {least} or more. Set one."
                )
            if not steps and key != "metric" and not (isinstance(value, int | float) and value >= 0):
                raise ConfigError(f"monitors.{name}.{key}={value}: not a threshold. Set a number, 0 or more.")
        if action != "off":
            built[name] = (kind(**settings), action)
    return built


class Watch:
    """All monitors of one run, with their alerts on the disk.

    Args:
        monitors: as :func:`build` makes them.
        run_dir: where ``metrics.jsonl`` is and ``alerts.jsonl`` will be.
        resumed_step: steps up to here are in ``metrics.jsonl`` and will not be done again.
    """

    def __init__(
        self, monitors: Mapping[str, tuple[Monitor, Action]], run_dir: Path, resumed_step: int = 0
    ) -> None:
        self.monitors = dict(monitors)
        self.path = run_dir / "alerts.jsonl"
        self.ending: Alert | None = None
        """The alert that ends this run; the first one whose action is ``stop`` or ``switch``."""
        kept = [line for line in complete_lines(self.path) if json.loads(line)["step"] <= resumed_step]
        if self.path.exists():
            write_text_atomically(self.path, "".join(kept))
        self._replay(run_dir / "metrics.jsonl", resumed_step)

    def _replay(self, metrics: Path, resumed_step: int) -> None:
        for line in complete_lines(metrics):
            entry = json.loads(line)
            if entry["step"] <= resumed_step:
                for alert in self._judge(entry["step"], entry["data"]):
                    self._note(alert)
        if self.ending is not None and self.ending.action == "stop":
            # It has stopped the run; who starts it again has read why.
            self.ending = None
            for monitor, action in self.monitors.values():
                if action == "stop" and monitor.active:
                    monitor.rearm()

    def observe(self, step: int, metrics: dict[str, Any]) -> list[Alert]:
        """Judge the next step, tell of alerts, and add ``monitor/<name>`` to its metrics."""
        alerts = self._judge(step, metrics)
        for alert in alerts:
            logger.warning("step %d: monitor %s (%s): %s", step, alert.monitor, alert.action, alert.reason)
            self._note(alert)
        if alerts:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(alert), ensure_ascii=False) + "\n" for alert in alerts)
                file.flush()
                os.fsync(file.fileno())
        metrics.update({f"monitor/{name}": float(own.active) for name, (own, _) in self.monitors.items()})
        return alerts

    def _judge(self, step: int, metrics: Mapping[str, Any]) -> list[Alert]:
        alerts = []
        for name, (monitor, action) in self.monitors.items():
            reason = monitor.observe(metrics)
            if reason:
                alerts.append(Alert(step, name, action, reason))
        return alerts

    def _note(self, alert: Alert) -> None:
        if self.ending is None and alert.action in ("stop", "switch"):
            self.ending = alert


def read_alerts(path: Path) -> list[Alert]:
    """Alerts of a run, oldest first; none where there is no file."""
    return [Alert(**json.loads(line)) for line in complete_lines(path)]
