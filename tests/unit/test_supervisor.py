"""Who starts a run again, when, how often; what it leaves behind; what a lost cluster does."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from tagpr.checkpoints import mark_complete
from tagpr.errors import ConfigError, RunFault, StageError
from tagpr.rl import supervisor
from tagpr.rl.supervisor import ATTEMPT, ClusterJob, Limits, limits_of, meaning, supervise
from tagpr.rl.waiting import until_there

LIMITS = Limits(restarts=2, first_pause_s=1.0, longest_pause_s=6.0)


def save(run: Path, step: int) -> None:
    (run / "checkpoints" / f"global_step_{step}" / "actor").mkdir(parents=True)
    mark_complete(run / "checkpoints", step)


def supervised(run: Path, script: list[tuple[int, int | None]]) -> tuple[int, list[float], list[dict]]:
    """Attempts that end with (status, step saved before); returns (status, pauses, history)."""
    pauses: list[float] = []
    left = iter(script)

    def attempt(number: int) -> int:
        status, step = next(left)
        if step is not None:
            save(run, step)
        return status

    status = supervise(attempt, run, run / "checkpoints", LIMITS, pauses.append)
    assert next(left, None) is None, "not all attempts were made"
    return status, pauses, [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("status", [0, 2, 3, 130])
def test_an_end_that_is_meant_is_the_end(tmp_path: Path, status: int) -> None:
    ended, pauses, history = supervised(tmp_path, [(status, None)])
    assert (ended, pauses, len(history)) == (status, [], 1)


def test_it_goes_on_until_it_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tagpr")
    ended, pauses, history = supervised(tmp_path, [(137, 4), (1, None), (75, None), (1, 8), (0, 12)])
    # The pause doubles while nothing new comes, and begins anew with a new checkpoint.
    assert (ended, pauses) == (0, [1.0, 1.0, 2.0, 1.0])
    assert [(row["from_step"], row["saved_step"], row["without_progress"]) for row in history] == [
        (0, 4, 0), (4, 4, 1), (4, 4, 2), (4, 8, 0), (8, 12, 0),
    ]  # fmt: skip
    assert "attempt 1 ended with status 137 (SIGKILL)" in caplog.messages[0]
    assert "goes on after step 4" in caplog.messages[0]
    assert "restart 2 of 2 without a new checkpoint" in caplog.messages[2]


def test_only_restarts_without_progress_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended, pauses, history = supervised(tmp_path, [(1, 1), (1, 2), (1, 3), (1, None), (1, None), (1, None)])
    assert (ended, len(pauses), len(history)) == (1, 5, 6)
    assert "the 3rd in a row without a new checkpoint" in caplog.messages[-1]
    assert "the same command goes on after step 3" in caplog.messages[-1]


def test_pauses_double_up_to_the_longest() -> None:
    assert [LIMITS.pause_s(n) for n in (0, 1, 2, 3, 4, 9999)] == [1, 1, 2, 4, 6, 6]


def test_statuses_are_named() -> None:
    assert [meaning(status) for status in (0, 1, 137, 143, 255)] == [
        "status 0 (done)", "status 1", "status 137 (SIGKILL)", "status 143 (SIGTERM)", "status 255",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("launch.restarts", (-1, 10, 600)), ("launch.restarts", (True, 10, 600)), ("launch.restarts", ("many", 10, 600)),
        ("launch.first_pause_s", (3, 900, 600)), ("launch.first_pause_s", (3, -1, 600)),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_meant(key: str, values: tuple[object, float, float]) -> None:
    names = ("restarts", "first_pause_s", "longest_pause_s")
    with pytest.raises(ConfigError, match=f"^{key}="):
        limits_of(OmegaConf.create({"launch": dict(zip(names, values, strict=True))}))


PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from tagpr.rl.supervisor import Child, Limits, supervise, told_to_end
run = Path({run!r})
run.mkdir(exist_ok=True)
attempt = Child([sys.executable, "-c", {child!r}])
try:
    with told_to_end():
        sys.exit(supervise(attempt, run, run / "checkpoints", Limits(5, 0.1, 0.1)))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_child_is_started_again_and_nothing_of_it_stays(tmp_path: Path) -> None:
    """The first attempt leaves a process in a session of its own, and is killed; the second ends well."""
    child = (
        "import os, signal, subprocess, sys\n"
        "stray = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"open(r'{tmp_path}/stray', 'a').write(str(stray.pid) + '\\n')\n"
        f"number = int(os.environ['{ATTEMPT}'])\n"
        "os.kill(os.getpid(), signal.SIGKILL) if number == 1 else sys.exit(0)\n"
    )
    program = PROGRAM.format(path=sys.path, run=str(tmp_path / "run"), child=child)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    history = [json.loads(line) for line in (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()]
    assert [row["status"] for row in history] == [137, 0]
    pids = [int(line) for line in (tmp_path / "stray").read_text().split()]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_supervisor_ends_the_whole(tmp_path: Path, number: signal.Signals) -> None:
    child = (
        "import os, time\n"
        f"open(r'{tmp_path}/pid.tmp', 'w').write(str(os.getpid()))\n"
        f"os.replace(r'{tmp_path}/pid.tmp', r'{tmp_path}/pid')\n"
        "time.sleep(600)\n"
    )
    program = PROGRAM.format(path=sys.path, run=str(tmp_path / "run"), child=child)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.DEVNULL, start_new_session=True
    )
    pid = int(_when((tmp_path / "pid").read_text))
    process.send_signal(number)
    assert process.wait(120) == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    _when(lambda: None if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" else True)


def _when(look: Callable[[], object], deadline_s: float = 120.0) -> object:
    give_up = time.monotonic() + deadline_s
    while time.monotonic() < give_up:
        try:
            found = look()
        except FileNotFoundError:
            found = None
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_a_child_is_no_supervisor_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ATTEMPT, raising=False)
    assert supervisor.attempt_number() == 1
    monkeypatch.setenv(ATTEMPT, "3")
    assert supervisor.attempt_number() == 3


def in_a_process(code: str) -> None:
    """Where sweeping up ends nothing of the tests around."""
    program = f"import sys\nsys.path[:0] = {sys.path!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


def test_sweep_ends_descendants_and_nobody_else() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        in_a_process(
            "import subprocess\n"
            "from tagpr.rl.supervisor import sweep\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            "assert sweep(grace_s=0.1) == 1\n"
            "import psutil\n"
            "assert not psutil.pid_exists(child.pid)\n"
        )
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


class Jobs:
    """A cluster: what happens to each job it is given; ``away``: how many questions it leaves unanswered first."""

    def __init__(self, *ends: tuple[str, int] | Exception, away: int = 0, state: str | None = None) -> None:
        self.ends: Iterator = iter(ends)
        self.away, self.known, self.started, self.stopped = away, state, [], []

    def start(self, number: int) -> str:
        if number > 1:
            self._answer()
        self.started.append(number)
        return f"job{number}"

    def follow(self, job: str) -> tuple[str, int]:
        end = next(self.ends)
        if isinstance(end, BaseException):
            raise end
        return end

    def state(self, job: str) -> str | None:
        self._answer()
        return self.known

    def _answer(self) -> None:
        self.away -= 1
        if self.away >= 0:
            raise ConnectionError("away")

    def attempt(self, patience_s: float = 1e6) -> ClusterJob:
        return ClusterJob(
            self.start, self.follow, self.state, self.stopped.append, patience_s, pause=lambda s: None
        )


def test_a_job_that_ended_is_not_followed_again() -> None:
    jobs = Jobs(("FAILED", 137), ("SUCCEEDED", 0))
    attempt = jobs.attempt()
    assert (attempt(1), attempt(2), jobs.started) == (137, 0, [1, 2])


def test_a_job_that_somebody_stopped_is_not_started_again() -> None:
    assert Jobs(("STOPPED", 1)).attempt()(1) == 130


def test_a_lost_connection_is_no_second_job() -> None:
    jobs = Jobs(StageError("no answer for 60 s"), ("SUCCEEDED", 0), away=5, state="RUNNING")
    assert (jobs.attempt()(1), jobs.started) == (0, [1])


def test_a_cluster_started_anew_gets_a_new_job() -> None:
    jobs = Jobs(StageError("no answer for 60 s"), ("SUCCEEDED", 0), away=5, state=None)
    attempt = jobs.attempt()
    assert (attempt(1), attempt(2), jobs.started) == (75, 0, [1, 2])


def test_patience_with_a_cluster_ends() -> None:
    jobs = Jobs(("FAILED", 1), away=10**9)
    attempt = jobs.attempt(patience_s=0.0)
    assert (attempt(1), attempt(2), jobs.started) == (1, 75, [1])


def test_the_first_job_is_not_waited_for() -> None:
    def refuse(number: int) -> str:
        raise StageError("no cluster there")

    attempt = ClusterJob(refuse, lambda job: ("SUCCEEDED", 0), lambda job: None, lambda job: None, 1e6)
    with pytest.raises(StageError, match="no cluster there"):
        attempt(1)


def test_ctrl_c_ends_the_job() -> None:
    jobs = Jobs(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        jobs.attempt()(1)
    assert jobs.stopped == ["job1"]


def test_a_first_start_is_told_at_once_and_a_later_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create({"launch": {"patience_s": 1000.0}})
    answers = iter([StageError("1 of 2 nodes"), StageError("1 of 2 nodes"), "there"])

    def look() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.delenv(ATTEMPT, raising=False)
    with pytest.raises(StageError, match="1 of 2 nodes"):
        until_there(config, look)
    monkeypatch.setenv(ATTEMPT, "2")
    assert until_there(config, look, pause=lambda s: None) == "there"
    config.launch.patience_s = 1e-9

    def never() -> str:
        raise StageError("1 of 2 nodes.")

    with pytest.raises(RunFault, match="patience_s"):
        until_there(config, never, pause=lambda s: None)


def test_a_child_hears_what_the_shell_made_it_deaf_to() -> None:
    heard = "import signal, sys; sys.exit(7 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 1)"
    in_a_process(
        "import signal\n"
        "from tagpr.rl.supervisor import Child\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"assert Child([sys.executable, '-c', {heard!r}])(1) == 7\n"
    )
