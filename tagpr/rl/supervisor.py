"""Keep a run going: start it, and start it again from its last complete checkpoint when it ends as nobody meant it to.

An attempt is a child process of this one, or a job of a cluster (``launch.submit``). Statuses 0, 2, 3 and 130 are meant: done,
wrong input, ended on purpose, interrupted. After any other one the next attempt follows, after a pause that doubles for as
long as no new checkpoint comes. Nothing here imports torch, Ray or verl.
"""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from omegaconf import DictConfig

from tagpr.checkpoints import latest_complete
from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, TagPRError
from tagpr.ray_jobs import follow_job, forwarded, job_state, start_job
from tagpr.runs import append_line, last_step

logger = logging.getLogger(__name__)

MEANT = {0: "done", 2: "wrong input", 3: "ended on purpose", 130: "interrupted"}
# The number of the attempt, in the environment of its process and of its job; a first one, or none, has not got it.
ATTEMPT = "TAGPR_ATTEMPT"
# How long what is asked to end may take, before it is killed.
GRACE_S = 30.0
HISTORY = "restarts.jsonl"
# What asking a cluster raises while it is away.
FAULTS = (TagPRError, OSError, RuntimeError)
ASK_EVERY_S = 3.0
# As sysexits' EX_TEMPFAIL: another attempt may go well.
CLUSTER_LOST = 75

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Limits:
    """``restarts``: in a row without a new complete checkpoint. Pauses in seconds: the first, and what doubling ends at."""

    restarts: int
    first_pause_s: float
    longest_pause_s: float

    def pause_s(self, fruitless: int) -> float:
        """Before the next attempt, after ``fruitless`` of them in a row."""
        return float(min(self.first_pause_s * 2 ** min(max(fruitless - 1, 0), 30), self.longest_pause_s))


def limits_of(config: DictConfig) -> Limits:
    """From ``launch.restarts``, ``launch.first_pause_s`` and ``launch.longest_pause_s``.

    Raises:
        ConfigError: one of them is no number that can be meant.
    """
    launch = config.launch
    if not isinstance(launch.restarts, int) or isinstance(launch.restarts, bool) or launch.restarts < 0:
        raise ConfigError(f"launch.restarts={launch.restarts}: is no count. Use 0 (no supervision) or more.")
    if not 0 <= launch.first_pause_s <= launch.longest_pause_s:
        raise ConfigError(
            f"launch.first_pause_s={launch.first_pause_s}, launch.longest_pause_s={launch.longest_pause_s}: pauses are "
            "seconds, and the first is not the longer one. Mend one of them."
        )
    return Limits(launch.restarts, float(launch.first_pause_s), float(launch.longest_pause_s))


def attempt_number() -> int:
    """Which attempt of a supervised run this process is; 1 where nobody supervises."""
    return int(os.environ.get(ATTEMPT, "1"))


def patience_s(config: DictConfig) -> float:
    """How long to wait for nodes, Ray or a reward server that are not there: not at all in a first attempt.

    A person who has just typed the command is told at once; once a run has trained, they are most likely on their way back.
    """
    return float(config.launch.patience_s) if attempt_number() > 1 else 0.0


def supervise(
    attempt: Callable[[int], int],
    run_dir: Path,
    checkpoints: Path,
    limits: Limits,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Run ``attempt(1)``, ``attempt(2)``, ... until one ends with a status that is meant; returns its status.

    Args:
        attempt: starts attempt n, waits for its end, returns its exit status; a signal's is 128 + its number.
        run_dir: gets a line of ``restarts.jsonl`` for each attempt that ended.
        checkpoints: folder whose newest complete checkpoint is the run's progress.

    Returns:
        0, 2, 3 or 130 as the last attempt ended; its own status where ``limits.restarts`` is used up.
    """
    fruitless, number = 0, 1
    while True:
        before, began = _saved(checkpoints), time.monotonic()
        status = attempt(number)
        took, saved, reached = (
            time.monotonic() - began,
            _saved(checkpoints),
            last_step(run_dir / "metrics.jsonl"),
        )
        fruitless = 0 if saved > before else fruitless + 1
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "attempt": number, "status": status,
            "meaning": meaning(status), "seconds": round(took, 1), "from_step": before, "reached_step": reached,
            "saved_step": saved, "without_progress": fruitless,
        }  # fmt: skip
        if status in MEANT or fruitless > limits.restarts:
            append_line(run_dir / HISTORY, json.dumps(record))
            if status in MEANT:
                if number > 1:
                    logger.info("attempt %d: %s after %.0f s", number, MEANT[status], took)
                return status
            logger.error(
                "attempt %d ended with %s after %.0f s, the %s in a row without a new checkpoint, at step %d. That is all of "
                "launch.restarts=%d. See the lines above and %s; the same command goes on after step %d.",
                number, meaning(status), took, ordinal(fruitless), reached, limits.restarts, run_dir / "driver.log", saved,
            )  # fmt: skip
            return status
        wait = limits.pause_s(fruitless)
        append_line(run_dir / HISTORY, json.dumps({**record, "pause_s": wait}))
        logger.warning(
            "attempt %d ended with %s after %.0f s, at step %d. Attempt %d goes on after step %d in %.0f s (%s).",
            number, meaning(status), took, reached, number + 1, saved, wait,
            f"restart {fruitless} of {limits.restarts} without a new checkpoint" if fruitless else "it has saved a new checkpoint",
        )  # fmt: skip
        pause(wait)
        number += 1


def meaning(status: int) -> str:
    """``status 137 (SIGKILL)``."""
    if status in MEANT:
        return f"status {status} ({MEANT[status]})"
    try:
        return (
            f"status {status} ({signal.Signals(status - 128).name})" if status > 128 else f"status {status}"
        )
    except ValueError:
        return f"status {status}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"


def _saved(checkpoints: Path) -> int:
    found = latest_complete(checkpoints)
    return 0 if found is None else found[0]


class Child:
    """Attempts as child processes. What one leaves behind, in whatever session, is ended before the next starts."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        # Orphans of an attempt become children of this process: exactly they are ended, and nobody else's (Linux).
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

    def __call__(self, number: int) -> int:
        """Run one attempt to its end, and sweep up behind it."""
        self._process = subprocess.Popen(
            self.command,
            env={**os.environ, ATTEMPT: str(number)},
            start_new_session=True,
            preexec_fn=_as_a_child,
        )
        try:
            code = self._process.wait()
        except BaseException:
            self._end()
            raise
        finally:
            sweep()
            self._process = None
        return code if code >= 0 else 128 - code

    def _end(self) -> None:
        assert self._process is not None
        for number in (signal.SIGINT, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            self._process.send_signal(number)
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                continue


def _as_a_child() -> None:
    """Before the attempt's program starts: end with the supervisor, even by ``kill -9``; and hear Ctrl-C in any case."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def sweep(grace_s: float = 5.0) -> int:
    """End all descendants of this process; returns how many would not end by themselves within ``grace_s``."""
    left = psutil.Process().children(recursive=True)
    # Ray's own processes notice that their driver is gone, and leave in order.
    _, alive = psutil.wait_procs(left, timeout=grace_s)
    killed = 0
    while alive:
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
            killed += 1
        psutil.wait_procs(alive, timeout=GRACE_S)
        # Killed ones leave their own children to this process.
        alive = psutil.Process().children(recursive=True)
    return killed


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM and Ctrl-C both raise KeyboardInterrupt in the body, also where a shell has made its background jobs deaf."""
    kept = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)


def supervise_stage(stage: str, overrides: Sequence[str], config: DictConfig) -> int:
    """Supervise ``python -m tagpr.rl <stage> <overrides>`` on this machine, whichever Ray it uses; its final status."""
    limits = limits_of(config)
    command = [sys.executable, "-m", "tagpr.rl", stage, *overrides]
    return _until_it_ends(Child(command), config, limits)


def supervise_jobs(stage: str, overrides: Sequence[str], config: DictConfig, gpus: float) -> int:
    """Supervise a stage that runs as jobs of the cluster at ``launch.submit``; the last job's status.

    Raises:
        ConfigError: what would travel carries a secret, or a setting is wrong.
        StageError: the cluster cannot be used for the first attempt.
    """
    limits, url = limits_of(config), config.launch.submit
    client: Any = None

    def start(number: int) -> str:
        nonlocal client
        environment = {**forwarded(config.launch.environment), ATTEMPT: str(number)}
        client, job = start_job(url, stage, overrides, environment=environment, gpus=gpus)
        return job

    def end(job: str) -> None:
        client.stop_job(job)
        give_up = time.monotonic() + GRACE_S
        while job_state(client, job) in ("PENDING", "RUNNING", "STOPPING") and time.monotonic() < give_up:
            time.sleep(0.5)

    attempt = ClusterJob(
        start,
        lambda job: follow_job(client, job),
        lambda job: job_state(client, job),
        end,
        float(config.launch.patience_s),
    )
    return _until_it_ends(attempt, config, limits)


def _until_it_ends(attempt: Callable[[int], int], config: Any, limits: Limits) -> int:
    run_dir, checkpoints = Path(config.run.dir).resolve(), Path(config.trainer.default_local_dir).resolve()
    try:
        with told_to_end():
            return supervise(attempt, run_dir, checkpoints, limits)
    except KeyboardInterrupt:
        logger.info("interrupted; the same command goes on after step %d", _saved(checkpoints))
        return 130


class ClusterJob:
    """Attempts as jobs of a cluster, which may be away between them.

    Args:
        start: submits attempt n, returns the job's name.
        follow: passes the job's log on until it ends, returns (what Ray calls its end, exit status).
        state: what Ray calls a job's state; None where the cluster does not know it.
        end: ends a job.
        patience_s: how long the cluster may be away.

    All of them raise TagPRError, OSError or RuntimeError where the cluster does not answer.
    """

    def __init__(
        self,
        start: Callable[[int], str],
        follow: Callable[[str], tuple[str, int]],
        state: Callable[[str], str | None],
        end: Callable[[str], None],
        patience_s: float,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._start, self._follow, self._state, self._stop = start, follow, state, end
        self._patience_s, self._pause = patience_s, pause
        self.job: str | None = None

    def __call__(self, number: int) -> int:
        """Submit an attempt and follow it; the same one again where only the connection was lost."""
        try:
            if number == 1:
                self.job = self._start(1)
            else:
                self._when_it_answers(lambda: self._begin(number))
            while True:
                assert self.job is not None
                try:
                    name, status = self._follow(self.job)
                    break
                except FAULTS as fault:
                    logger.warning("%s", fault)
                state = self._when_it_answers(self._ask)
                if state is None:
                    logger.warning("job %s: is lost with its cluster", self.job)
                    return CLUSTER_LOST
                logger.info("job %s: the cluster is back, and has it as %s", self.job, state.lower())
            # Somebody ended it on purpose: `ray job stop`.
            return 130 if name == "STOPPED" else status
        except _Away as away:
            logger.error("the cluster stayed away for %.0f s (launch.patience_s): %s", self._patience_s, away)
            return CLUSTER_LOST
        except KeyboardInterrupt:
            if self.job is not None:
                logger.info("ending job %s", self.job)
                self._stop(self.job)
            raise

    def _begin(self, number: int) -> None:
        self.job = self._start(number)

    def _ask(self) -> str | None:
        assert self.job is not None
        return self._state(self.job)

    def _when_it_answers(self, ask: Callable[[], Answer]) -> Answer:
        give_up, said = time.monotonic() + self._patience_s, False
        while True:
            try:
                return ask()
            except FAULTS as fault:
                if time.monotonic() >= give_up:
                    raise _Away(str(fault)) from fault
                if not said:
                    logger.warning("waiting for the cluster, up to %.0f s (%s)", self._patience_s, fault)
                    said = True
            self._pause(ASK_EVERY_S)


class _Away(Exception):
    """The cluster did not come back in time."""


def main(stage: str, overrides: Sequence[str]) -> int:
    """``python -m tagpr.rl.supervisor <stage> [key=value ...]``: what ``tagpr.rl`` becomes where ``launch.restarts`` is not 0."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    try:
        return supervise_stage(stage, overrides, resolve(compose(stage, overrides)))
    except TagPRError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return error.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
