"""Names the phase that a run is stuck in, leaves everybody's stacks, and ends the process so that it can be started again.

verl waits for ever, on rollouts as on workers (``ReplayBuffer.sample`` polls without an end; every worker call is a ``ray.get``).
"""

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from tagpr.errors import ConfigError, RunFault
from tagpr.rl.in_flight import verdict
from tagpr.rl.stacks import dump_here

logger = logging.getLogger(__name__)

PHASES = ("start", "rollout", "old_log_prob", "update", "weight_sync", "save", "validation", "driver")
TITLES = {
    "old_log_prob": "computing old log-probabilities",
    "weight_sync": "weight sync",
    "save": "saving a checkpoint",
}
TITLES |= {"update": "the update", "driver": "the driver's own work", "start": "starting the workers"}
# How long the nodes may take to have their workers write stacks, and Ray to bring them here.
STACKS_S = 20.0


class Watchdog:
    """One phase at a time; a thread compares how long it has taken with its limit.

    Args:
        limits: seconds by phase; None: adaptive; 0: none.
        factor, floor_s: adaptive limit = max(floor_s, factor x median of the phase's earlier durations).
        first_s: limit of a phase that has no earlier durations and no limit of its own.
        stuck: called in the thread, once, with the line that names the phase.
    """

    def __init__(
        self,
        limits: Mapping[str, float | None],
        *,
        factor: float,
        floor_s: float,
        first_s: float,
        stuck: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._factor, self._floor_s, self._first_s = dict(limits), factor, floor_s, first_s
        self._stuck, self._clock = stuck, clock
        self._durations: dict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()
        self._phase: tuple[str, float, Callable[[], str]] | None = None
        self._over = threading.Event()

    def enter(self, phase: str, waits_for: Callable[[], str] = lambda: "") -> None:
        """The run is in ``phase`` from now on; ``waits_for`` is asked for a few words when it is stuck."""
        with self._lock:
            now = self._clock()
            if self._phase is not None:
                name, since, _ = self._phase
                self._durations[name].append(now - since)
            self._phase = (phase, now, waits_for)

    @contextmanager
    def phase(self, name: str, waits_for: Callable[[], str] = lambda: "") -> Iterator[None]:
        """The run is in ``name`` during the body; then in what it was in before, whose time starts anew."""
        before = self._phase
        self.enter(name, waits_for)
        try:
            yield
        finally:
            if before is not None:
                self.enter(before[0], before[2])

    def limit_s(self, phase: str) -> float | None:
        """Of a phase, now; None for none."""
        own = self._limits.get(phase)
        if own is not None:
            return float(own) or None
        durations = self._durations[phase]
        if not durations or phase == "start":
            return max(self._first_s, self._floor_s)
        return max(self._floor_s, self._factor * statistics.median(durations[-100:]))

    def look(self) -> str | None:
        """The line that names the stuck phase; None where none is."""
        with self._lock:
            if self._phase is None:
                return None
            name, since, waits_for = self._phase
            took, limit = self._clock() - since, self.limit_s(name)
        if limit is None or took < limit:
            return None
        try:
            reason = waits_for()
        except Exception as error:  # noqa: BLE001 - whatever is wrong there must not keep the watchdog from acting
            reason = f"what it waits for cannot be asked ({type(error).__name__})"
        with self._lock:
            if self._phase is None or self._phase[1] != since:
                return None  # it has gone on meanwhile
        key = f"watchdog.{name}_s"
        title = TITLES.get(name, name)
        return f"{title} has taken {took:.0f} s, limit {limit:.0f} s ({key}){f'; {reason}' if reason else ''}"

    @contextmanager
    def running(self, every_s: float = 1.0) -> Iterator["Watchdog"]:
        """Watch during the body, from phase ``start`` on."""
        self.enter("start")

        def watch() -> None:
            while not self._over.wait(every_s):
                line = self.look()
                if line is not None:
                    self._stuck(line)
                    return

        thread = threading.Thread(target=watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()


def watchdog_of(config: DictConfig) -> Watchdog:
    """The watchdog of a run: where it is stuck, the process ends with :class:`RunFault`'s status."""
    settings = config.watchdog
    return Watchdog(
        {phase: settings.get(f"{phase}_s") for phase in PHASES if phase != "start"}
        | {"start": settings.start_s},
        factor=settings.factor,
        floor_s=settings.floor_s,
        first_s=settings.start_s,
        stuck=lambda line: give_up(line, config.run.dir),
    )


def check_watchdog(config: DictConfig) -> None:
    """Refuse limits that cannot be meant.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in config.watchdog.items():
        if value is not None and (isinstance(value, (str, bool)) or value < 0):
            raise ConfigError(f"watchdog.{key}={value}: is no time or factor. Use a number, 0 or null.")
    if config.watchdog.factor is None or config.watchdog.factor < 1:
        raise ConfigError(f"watchdog.factor={config.watchdog.factor}: would end healthy runs. Use 3 or more.")


def give_up(line: str, run_dir: str) -> None:
    """Say it, have every process of the run write its stacks, end this process at once: the main thread hangs."""
    logger.error(
        "stuck: %s. All stacks are in %s/driver.log; ending with status %d.", line, run_dir, RunFault.status
    )
    sys.stderr.write("stuck; stacks of the driver:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(file=2, all_threads=True)
    asking = threading.Thread(target=_ask_nodes, args=(run_dir,), daemon=True)
    asking.start()
    asking.join(STACKS_S)
    logging.shutdown()
    os._exit(RunFault.status)


def _ask_nodes(run_dir: str) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        task = ray.remote(num_cpus=0, max_retries=0)(dump_here)
        asked = [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(run_dir)
            for node in ray.nodes()
            if node["Alive"]
        ]
        done, late = ray.wait(asked, num_returns=len(asked), timeout=STACKS_S / 2)
        told = sum(ray.get(each) for each in done)
        logger.info(
            "stacks of %d workers asked for%s", told, f"; {len(late)} nodes do not answer" if late else ""
        )
    except Exception as error:  # noqa: BLE001 - the cluster may be what is broken; the process ends anyway
        logger.warning("stacks of the workers cannot be had: %s", str(error).splitlines()[0])
    # Ray's log monitors bring them to this process's standard error.
    time.sleep(4.0)


def unanswering(actors: Mapping[str, Any], deadline_s: float = 5.0) -> list[str]:
    """``<name> hangs`` or ``<name> is dead`` for each of the Ray actors that does not answer an empty call in time."""
    import ray

    calls = {actor.__ray_ready__.remote(): name for name, actor in actors.items()}
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=deadline_s) if calls else ([], [])
    silent = [f"{calls[each]} hangs" for each in late]
    for each in done:
        try:
            ray.get(each)
        except ray.exceptions.RayError:
            silent.append(f"{calls[each]} is dead")
    return sorted(silent)


def rollouts_say(workers: Mapping[str, Any], deadline_s: float = 5.0) -> list[str]:
    """``<name> waits for the reward (...)`` or whatever else is true, for each of the rollout workers."""
    import ray

    # Ray answers ``__ray_ready__`` past a blocked event loop; a method of the worker's own waits for it.
    plain = {worker.in_flight.remote(): name for name, worker in workers.items()}
    _, late = ray.wait(list(plain), num_returns=len(plain), timeout=deadline_s) if plain else ([], [])
    blocked = {plain[each] for each in late}
    calls = {
        name: worker.in_flight.options(concurrency_group="watch").remote() for name, worker in workers.items()
    }
    lines = []
    for name, call in calls.items():
        try:
            lines.append(f"{name} {verdict(ray.get(call, timeout=deadline_s), name not in blocked)}")
        except ray.exceptions.GetTimeoutError:
            lines.append(f"{name} hangs")  # stopped, or its interpreter is held
        except ray.exceptions.RayError:
            lines.append(f"{name} is dead")
    return lines
