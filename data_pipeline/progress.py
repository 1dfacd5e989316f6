"""How far a run is: a bar on a terminal, lines otherwise, and a note in the results store for ``status``."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from data_pipeline.eta import Outlook
from data_pipeline.funnel import Funnel
from data_pipeline.ledger import GROUPS
from data_pipeline.store import Store

logger = logging.getLogger(__name__)

NOTE_S = 1.0
# Lines come often at first, when one wants to see that it runs, and seldom later.
FIRST_LINE_S, LONGEST_LINE_S = 5.0, 60.0


@dataclass(frozen=True)
class Gauges:
    """What a run can say of itself at any time."""

    details: Callable[[], str]
    """A few words for each line: dollars, say."""
    seen: Callable[[], Mapping[str, int]]
    """Replies of this pass by kind of work, those from the ledger included."""
    latency: Callable[[], Mapping[str, float]]
    """Seconds that a reply takes, by role, where there was one."""
    outlook: Callable[[Mapping[str, Any]], Outlook]
    """What is left, from the note."""


class Progress:
    """Of one pass."""

    def __init__(self, store: Store, funnel: Funnel, gauges: Gauges) -> None:
        self._store = store
        self._funnel = funnel
        self._gauges = gauges
        self._label, self._what, self._done, self._total = "", "", 0, 0
        self._started = self._noted = self._said = time.monotonic()
        self._pause = FIRST_LINE_S
        self._bar: Any = None
        self._instances, self._blanks = store.instance_count(), store.blank_count()
        self._before: Mapping[str, int] = {}

    @contextmanager
    def stage(self, label: str, what: str, total: int) -> Iterator[None]:
        """Count the steps of one stage."""
        self._label, self._what, self._done, self._total = label, what, 0, total
        self._started = self._said = time.monotonic()
        self._pause = FIRST_LINE_S
        self._before = self._seen()
        self._note()
        with ExitStack() as stack:
            if sys.stderr.isatty():
                # Only here: without a terminal nothing of it is needed.
                from tqdm import tqdm
                from tqdm.contrib.logging import logging_redirect_tqdm

                stack.enter_context(logging_redirect_tqdm([logging.getLogger()]))
                self._bar = stack.enter_context(
                    tqdm(total=total, desc=label, unit=f" {what}", smoothing=0.05)
                )
            try:
                yield
            finally:
                self._bar = None
        took = time.monotonic() - self._started
        self._note()
        logger.info(
            "%s: %d %s in %.1f s (%.0f/s)%s", label, self._done, what, took, self._done / max(took, 1e-9), self._tail()
        )  # fmt: skip

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
        if now - self._said >= self._pause:
            self._said, self._pause = now, min(self._pause * 1.2, LONGEST_LINE_S)
            left = time_left(self._gauges.outlook(self._position()))
            if self._bar is not None:
                words = ", ".join(filter(None, (left, self._gauges.details())))
                self._bar.set_postfix_str(words, refresh=False)
            else:
                rate = self._done / (now - self._started)
                logger.info(
                    "%s: %d of %d %s (%.0f/s); %s%s", self._label, self._done, self._total, self._what, rate, left,
                    self._tail(),
                )  # fmt: skip
        if now - self._noted >= NOTE_S:
            self._note()

    def _note(self) -> None:
        self._noted = time.monotonic()
        self._store.note("funnel", self._funnel.as_dict())
        self._store.note("progress", self._position())

    def _position(self) -> dict[str, Any]:
        return {
            "stage": self._label,
            "what": self._what,
            "done": self._done,
            "total": self._total,
            "at": time.time(),
            "instances": self._instances,
            "blanks": self._blanks,
            "judged": self._funnel.total("judged"),
            "seen": self._seen(),
            "seen_before": self._before,
            "latency": dict(self._gauges.latency()),
        }

    def _seen(self) -> Mapping[str, int]:
        seen = self._gauges.seen()
        return {group: sum(seen.get(kind, 0) for kind in kinds) for group, kinds in GROUPS.items()}

    def _tail(self) -> str:
        details = self._gauges.details()
        return f"; {details}" if details else ""


def time_left(outlook: Outlook) -> str:
    """What is left of the whole job, in words."""
    parts = [
        f"{stage} {duration(seconds)}{' (assumed)' if stage in outlook.assumed else ''}"
        for stage, seconds in outlook.stages.items()
    ]
    words = f"about {duration(outlook.seconds)} left of the whole job" if parts else "nothing left to time"
    if len(parts) > 1 or outlook.assumed:
        words += f" ({', '.join(parts)})"
    if outlook.unknown:
        words += f", {' and '.join(sorted(outlook.unknown))} not counted: no reply yet to tell from"
    if outlook.batched:
        words += f", the waits for batches of {' and '.join(sorted(outlook.batched))} not counted"
    return words


def duration(seconds: float) -> str:
    """Two units at most: ``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    minutes, hours = divmod(round(seconds / 60), 60)[::-1]
    if seconds < 90:
        return f"{seconds:.0f} s"
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
