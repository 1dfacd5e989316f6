"""A phase that takes too long is named, its stacks are kept, the process ends; a slow but living run is left alone."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError
from tagpr.rl.stacks import RUN_DIR, dump_here, hears
from tagpr.rl.watchdog import PHASES, Watchdog, check_watchdog


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def made(clock: Clock, **limits: float | None) -> tuple[Watchdog, list[str]]:
    said: list[str] = []
    watchdog = Watchdog(limits, factor=10, floor_s=50, first_s=300, stuck=said.append, clock=clock)
    return watchdog, said


def after(watchdog: Watchdog, clock: Clock, seconds: float) -> str | None:
    clock.now += seconds
    return watchdog.look()


def test_a_stuck_phase_is_named_with_its_limit_and_what_it_waits_for() -> None:
    clock = Clock()
    watchdog, _ = made(clock, rollout=600)
    assert watchdog.look() is None
    watchdog.enter("rollout", lambda: "waiting for 3 groups of 8")
    assert after(watchdog, clock, 599) is None
    assert after(watchdog, clock, 1) == (
        "rollout has taken 600 s, limit 600 s (watchdog.rollout_s); waiting for 3 groups of 8"
    )
    watchdog.enter("update")
    assert after(watchdog, clock, 299) is None


def test_limits_follow_what_the_phase_has_taken() -> None:
    clock = Clock()
    watchdog, _ = made(clock)
    assert watchdog.limit_s("update") == 300, "nothing is known of it yet"
    for seconds in (1, 2, 30):
        watchdog.enter("update")
        clock.now += seconds
        watchdog.enter("driver")
    assert watchdog.limit_s("update") == 50, "ten times the median, but not below the floor"
    for _ in range(4):
        watchdog.enter("update")
        clock.now += 30
        watchdog.enter("driver")
    assert watchdog.limit_s("update") == 300
    assert watchdog.limit_s("save") == 300


def test_no_limit_and_an_own_one() -> None:
    clock = Clock()
    watchdog, _ = made(clock, save=0, weight_sync=7)
    watchdog.enter("save")
    assert after(watchdog, clock, 10**6) is None
    watchdog.enter("weight_sync")
    assert "weight sync has taken 7 s" in str(after(watchdog, clock, 7))


def test_a_phase_within_another_gives_it_its_time_back() -> None:
    clock = Clock()
    watchdog, _ = made(clock, validation=100, start=100)
    watchdog.enter("start")
    clock.now += 90
    with watchdog.phase("validation"):
        assert after(watchdog, clock, 99) is None
    assert after(watchdog, clock, 99) is None
    assert "starting the workers" in str(after(watchdog, clock, 1))


def test_a_question_that_fails_does_not_keep_it_from_acting() -> None:
    clock = Clock()
    watchdog, _ = made(clock, rollout=10)

    def broken() -> str:
        raise RuntimeError("the cluster is gone")

    watchdog.enter("rollout", broken)
    assert "what it waits for cannot be asked (RuntimeError)" in str(after(watchdog, clock, 10))


def test_a_phase_that_ended_while_it_was_asked_is_not_stuck() -> None:
    clock = Clock()
    watchdog, _ = made(clock, rollout=10)

    def goes_on() -> str:
        clock.now += 1
        watchdog.enter("driver")
        return "nothing"

    watchdog.enter("rollout", goes_on)
    assert after(watchdog, clock, 10) is None


def test_the_thread_says_it_once() -> None:
    said = threading.Event()
    lines: list[str] = []

    def stuck(line: str) -> None:
        lines.append(line)
        said.set()

    watchdog = Watchdog({"start": 0.01}, factor=10, floor_s=50, first_s=300, stuck=stuck)
    with watchdog.running(every_s=0.01):
        assert said.wait(60)
    assert len(lines) == 1


def test_every_phase_has_its_key() -> None:
    config = resolve(compose("guided_rl"))
    assert {f"{phase}_s" for phase in PHASES} | {"factor", "floor_s", "losses_s"} == set(config.watchdog)
    check_watchdog(config)


@pytest.mark.parametrize(
    ("key", "value"), [("rollout_s", -1), ("save_s", "long"), ("factor", 0.5), ("factor", None)]
)
def test_limits_that_cannot_be_meant(key: str, value: object) -> None:
    config = OmegaConf.create({"watchdog": {"factor": 10, "floor_s": 900, "rollout_s": None}})
    config.watchdog[key] = value
    with pytest.raises(ConfigError, match=rf"^watchdog.{key}="):
        check_watchdog(config)


WORKER = """
import sys, threading, time
sys.path[:0] = {path!r}
import tagpr.rl.stacks
print("ready", flush=True)
def hanging_here():
    time.sleep(600)
hanging_here()
"""


def test_workers_of_the_run_write_their_stacks_and_others_are_left_alone(tmp_path: Path) -> None:
    program = WORKER.format(path=sys.path)
    environment = {key: value for key, value in os.environ.items() if key != RUN_DIR}
    runs = {"ours": str(tmp_path), "another": "/elsewhere", "none": None}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment | ({RUN_DIR: run} if run else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name, run in runs.items()
    }  # fmt: skip
    deaf = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env=environment | {RUN_DIR: str(tmp_path)}
    )
    try:
        for process in processes.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        assert [hears(processes[name].pid) for name in runs] == [True, True, False]
        assert not hears(deaf.pid)
        assert dump_here(str(tmp_path)) == 1
        errors = processes["ours"].stderr
        assert errors is not None
        seen = ""
        while "hanging_here" not in seen:
            line = errors.readline()
            assert line, f"no stack came: {seen}"
            seen += line
        assert all(process.poll() is None for process in [*processes.values(), deaf])
    finally:
        for process in [*processes.values(), deaf]:
            process.kill()
            process.communicate()


STUCK = """
import sys, time
sys.path[:0] = {path!r}
from tagpr.rl import watchdog
watchdog._ask_nodes = lambda run_dir: None
def the_main_thread():
    time.sleep(600)
stuck = lambda line: watchdog.give_up(line, "run")
with watchdog.Watchdog({{"start": 0.2}}, factor=10, floor_s=0, first_s=0, stuck=stuck).running(0.05):
    the_main_thread()
"""


def test_a_stuck_process_ends_with_a_status_that_is_started_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK.format(path=sys.path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert "stuck: starting the workers has taken 0 s, limit 0 s (watchdog.start_s)" in done.stderr
    assert "the_main_thread" in done.stderr
