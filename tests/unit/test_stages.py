"""What needs what: missing prerequisites come first on the embedded default, and only there."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tagpr.errors import StageError
from tagpr.stages import STAGES, Job, execute, main, passed_on, plan


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(stage: str, *overrides: str) -> list[str]:
    return [job.stage for job in plan(stage, overrides)]


def make(folder: Path, stage: str) -> None:
    place = {
        "prepare_data": "data/minilamp", "base": "base/model", "build_chains": "chains", "sft": "sft/model",
        "train_prmu": "prmu/model", "guided_rl": "guided_rl/model", "exploratory_rl": "exploratory_rl/model",
    }[stage]  # fmt: skip
    path = folder / "outputs" / place / STAGES[stage].product
    path.parent.mkdir(parents=True)
    path.touch()


# Stages that nothing else is made from.
ASIDE = {
    "serve_prmu", "review_chains", "publish_chains", "validate_data", "prmu_report", "prmu_variants", "add_prmu_users",
    "serve", "export", "report",
}  # fmt: skip


def test_a_bare_machine_makes_everything_in_order() -> None:
    order = names("evaluate")
    assert set(order) == set(STAGES) - ASIDE
    jobs = plan("evaluate", ())
    for job, needs in jobs.items():
        assert all(order.index(need.stage) < order.index(job.stage) for need in needs)
    assert {need.stage for need in jobs[Job("guided_rl", ())]} == {"prepare_data", "sft", "train_prmu"}


def test_what_is_there_is_not_made_again(empty_folder: Path) -> None:
    for stage in ("prepare_data", "base", "build_chains", "sft"):
        make(empty_folder, stage)
    assert names("guided_rl") == ["train_prmu", "guided_rl"]
    make(empty_folder, "train_prmu")
    assert names("guided_rl") == ["guided_rl"]


def test_without_its_reward_guided_rl_needs_no_prmu() -> None:
    assert "train_prmu" not in names("guided_rl", "objective.gamma=0")


def test_evaluation_needs_the_models_it_compares(empty_folder: Path) -> None:
    assert "guided_rl" not in names("evaluate", "evaluate.only=[base,sft]")
    make(empty_folder, "prepare_data")
    make(empty_folder, "base")
    assert names("evaluate", "evaluate.only=[base]", "evaluate.reward=false") == ["evaluate"]


def test_other_settings_make_nothing_by_themselves() -> None:
    assert names("guided_rl", "setting=paper") == ["guided_rl"]


def test_own_data_are_prepared_and_the_models_stay_synthetic() -> None:
    jobs = plan(
        "guided_rl",
        ["benchmark=lamp", "benchmark.dir=mine", "run.outputs=out", "trainer.total_training_steps=2"],
    )
    data = [job for job in jobs if job.stage == "prepare_data"]
    assert data == [
        Job("prepare_data", ("benchmark=lamp", "benchmark.dir=mine", "run.outputs=out")),
        Job("prepare_data", ("run.outputs=out",)),
    ]
    assert Job("sft", ("run.outputs=out",)) in jobs


def test_only_shared_overrides_are_passed_on() -> None:
    given = [
        "run.seed=3",
        "run.name=x",
        "paths.base=b",
        "optim.lr=1",
        "benchmark.tasks=[lamp1]",
        "+run.outputs=o",
    ]
    assert passed_on(given, "sft") == ["run.seed=3", "paths.base=b", "+run.outputs=o"]
    assert "benchmark.tasks=[lamp1]" in passed_on(given, "prepare_data")


def test_unknown_stage_and_key_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gided_rl"]) == 2
    assert main(["guided_rl", "no.key=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def job_of(code: str, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Job]:
    monkeypatch.setattr(Job, "command", lambda self: [sys.executable, "-c", code.format(self.stage)])
    return [Job(name, ()) for name in names]


def test_jobs_run_side_by_side_but_not_before_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; print('begin {0}', flush=True); time.sleep(0.6); print('end {0}', flush=True)"
    seen: list[str] = []
    monkeypatch.setattr("tagpr.stages.print_line", seen.append)
    a, b, c = job_of(code, monkeypatch, "a", "b", "c")
    execute({a: (), b: (), c: (a, b)})
    order = [
        line.split("] ")[1]
        for line in seen
        if "begin" in line.split("] ")[-1] or "end" in line.split("] ")[-1]
    ]
    order = [line for line in order if not line.startswith("$")]
    assert set(order[:2]) == {"begin a", "begin b"}
    assert order[-2:] == ["begin c", "end c"]


def test_a_failing_job_stops_the_others(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> None:
    code = "import sys, time, pathlib\nif '{0}' == 'bad': sys.exit(3)\ntime.sleep(30); pathlib.Path('late').touch()"
    bad, slow, after = job_of(code, monkeypatch, "bad", "slow", "after")
    with pytest.raises(StageError, match=r"bad: failed \(status 3\)"):
        execute({bad: (), slow: (), after: (bad,)})
    assert not (empty_folder / "late").exists()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("in_background", [False, True])
def test_what_was_started_ends_with_its_runner(
    sent: signal.Signals, in_background: bool, empty_folder: Path
) -> None:
    runner = (
        "import sys, tagpr.stages as s\n"
        "s.Job.command = lambda self: [sys.executable, '-c', "
        "\"import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)\"]\n"
        "s.plan = lambda stage, overrides: {s.Job('a', ()): (), s.Job('b', ()): (s.Job('a', ()),)}\n"
        "sys.exit(s.main(['evaluate']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", runner],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A script's `command &` ignores interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.SIG_DFL),
    )
    pid_file = empty_folder / "pid"
    give_up = time.monotonic() + 180
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < give_up:
        time.sleep(0.05)
    job = int(pid_file.read_text())
    process.send_signal(sent)
    process.wait(timeout=60)
    while Path(f"/proc/{job}").exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not Path(f"/proc/{job}").exists()
