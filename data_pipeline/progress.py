"""How far a run is: a bar on a terminal, lines otherwise, and a note in the results store for ``status``."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from data_pipeline.funnel import Funnel
from data_pipeline.store import Store

logger = logging.getLogger(__name__)

NOTE_S = 1.0
# Lines come often at first, when one wants to see that it runs, and seldom later.
FIRST_LINE_S, LONGEST_LINE_S = 5.0, 60.0


class Progress:
    """``details`` adds a few words to each line: dollars, say."""

    def __init__(self, store: Store, funnel: Funnel, details: Callable[[], str] = lambda: "") -> None:
        self._store = store
        self._funnel = funnel
        self._details = details
        self._label, self._what, self._done, self._total = "", "", 0, 0
        self._started = self._noted = self._said = time.monotonic()
        self._pause = FIRST_LINE_S
        self._bar: Any = None

    @contextmanager
    def stage(self, label: str, what: str, total: int) -> Iterator[None]:
        """Count the steps of one stage."""
        self._label, self._what, self._done, self._total = label, what, 0, total
        self._started = self._said = time.monotonic()
        self._pause = FIRST_LINE_S
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
        elif now - self._said >= self._pause:
            self._said, self._pause = now, min(self._pause * 1.2, LONGEST_LINE_S)
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            logger.info(
                "%s: %d of %d %s (%.0f/s, %s left)%s", self._label, self._done, self._total, self._what, rate,
                duration(left), self._tail(),
            )  # fmt: skip
        if now - self._noted >= NOTE_S:
            self._note()

    def _note(self) -> None:
        self._noted = time.monotonic()
        if self._bar is not None and self._details():
            self._bar.set_postfix_str(self._details(), refresh=False)
        self._store.note("funnel", self._funnel.as_dict())
        self._store.note(
            "progress",
            {
                "stage": self._label,
                "what": self._what,
                "done": self._done,
                "total": self._total,
                "seconds": self._noted - self._started,
                "at": time.time(),
            },
        )

    def _tail(self) -> str:
        details = self._details()
        return f"; {details}" if details else ""


def duration(seconds: float) -> str:
    """Two units at most: ``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    minutes, hours = divmod(round(seconds / 60), 60)[::-1]
    if seconds < 90:
        return f"{seconds:.0f} s"
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
