"""Which responses a rollout worker waits for, and on whom: what the watchdog is told when a rollout is stuck."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

GENERATED, SCORED = "generated", "scored"


class InFlight:
    """Responses of one worker by what is done with them; asked from another thread than the one that counts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[int, tuple[str, float]] = {}
        self._numbers = count()

    @contextmanager
    def being(self, what: str) -> Iterator[None]:
        """One response more is being ``generated`` or ``scored`` during the body."""
        number = next(self._numbers)
        self._since[number] = (what, self._clock())
        try:
            yield
        finally:
            del self._since[number]

    def state(self) -> dict[str, tuple[int, float]]:
        """How many, and for how many seconds the longest, by what is done."""
        now, found = self._clock(), dict[str, tuple[int, float]]()
        for what, since in list(self._since.values()):
            number, longest = found.get(what, (0, 0.0))
            found[what] = (number + 1, max(longest, now - since))
        return found


def verdict(state: Mapping[str, tuple[int, float]], answers: bool) -> str:
    """What a worker waits for, in words.

    Args:
        state: of :class:`InFlight`.
        answers: whether its event loop takes calls; where not, something in it blocks all its responses.
    """
    scored, generated = state.get(SCORED), state.get(GENERATED)
    if not answers:
        # A response that waits for the engine gives the loop free; one that is scored need not.
        where = "in the reward" if scored else "in its own work"
        return f"hangs {where}{f' ({_few(scored, SCORED)})' if scored else ''}"
    parts = []
    if scored:
        parts.append(f"waits for the reward ({_few(scored, SCORED)})")
    if generated:
        parts.append(f"waits for the rollout engine ({_few(generated, GENERATED)})")
    return " and ".join(parts) or "waits for nothing"


def _few(each: tuple[int, float], what: str) -> str:
    number, longest = each
    return f"{number} response{'s' if number > 1 else ''} being {what}, the longest for {longest:.0f} s"
