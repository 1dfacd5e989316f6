"""A monitor that ends a run: verl's loop takes the next step as its last, and the stage stops or hands over."""

import inspect
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from tagpr.configuration import compose, resolve
from tagpr.rl import launch
from tagpr.rl.monitors import Alert
from tagpr.rl.trainer import TagPRTrainer


@pytest.mark.parametrize(("step", "wanted", "last"), [(3, 10, 4), (10, 10, 10), (9, 10, 10)])
def test_the_step_after_an_alert_is_the_last(step: int, wanted: int, last: int) -> None:
    trainer = object.__new__(TagPRTrainer)
    trainer.total_training_steps = wanted
    trainer.watch = SimpleNamespace(ending=None)  # type: ignore[assignment]
    trainer._end_early()
    assert trainer.total_training_steps == wanted
    trainer.watch.ending = Alert(step, "plateau", "switch", "flat")
    trainer._end_early()
    assert trainer.total_training_steps == last


def test_trap_verl_looks_at_its_last_step_in_every_round_and_saves_then() -> None:
    _, _, loop = inspect.getsource(PPOTrainer.fit).partition("while current_epoch")
    assert "self.global_steps <= self.total_training_steps:" in loop.splitlines()[0]
    told = loop.index("is_last_step = self.global_steps >= self.total_training_steps")
    assert (
        told
        < loop.index("self.step(metrics")
        < loop.index("self._save_checkpoint()")
        < loop.index("self._compute_metrics(")
    )


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Alert | None) -> Path:
    """The stage with everything around its ending replaced."""
    config = resolve(compose("guided_rl", [f"run.outputs={tmp_path}", "trainer.total_training_steps=6"]))
    run_dir = tmp_path / "guided_rl"
    run_dir.mkdir()
    nothing = {
        "check", "limits_of", "check_watchdog", "check_model_folder", "check_tags_of", "check_context", "check_examples",
        "hold", "check_unchanged", "until_there",
    }  # fmt: skip
    for name in nothing:
        monkeypatch.setattr(launch, name, lambda *_, **__: None, raising=False)
    for name in ("own_server", "reward_server", "ray_cluster", "library_output_to"):
        monkeypatch.setattr(launch, name, lambda *_, **__: nullcontext(), raising=False)
    record = SimpleNamespace(inputs={}, model_dump=dict)
    given = {
        "resume": 0, "resume_from_complete_checkpoint": 0, "prepare_rows": 64, "schedule": (2, 6), "manifest": record,
        "latest_complete": (4, tmp_path / "checkpoint"), "train_or_name_the_fault": ended,
        "write_report": run_dir / "report.html",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setattr(launch, name, lambda *_, value=value, **__: value, raising=False)
    monkeypatch.setattr(launch, "export_model", lambda _, model: model.mkdir())
    launch.run(config)
    return run_dir


def test_stop_is_one_line_status_3_and_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as ended:
        run(tmp_path, monkeypatch, Alert(3, "policy_gap", "stop", "no sync"))
    assert ended.value.code == 3
    (line,) = caplog.records
    assert "stopped after step 4, checkpoint saved: monitor policy_gap: no sync" in line.getMessage()
    run_dir = tmp_path / "guided_rl"
    assert not (run_dir / "model").exists()
    assert not (run_dir / "finished.json").exists()


def test_switch_hands_the_model_over_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = run(tmp_path, monkeypatch, Alert(3, "plateau", "switch", "flat"))
    assert json.loads((run_dir / "switched.json").read_text()) == {
        "step": 4,
        "monitor": "plateau",
        "reason": "flat",
    }
    assert json.loads((run_dir / "finished.json").read_text()) == {"step": 4}
    assert (run_dir / "model").is_dir()


def test_a_run_that_nothing_ended_leaves_no_such_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run(tmp_path, monkeypatch, None)
    assert (run_dir / "finished.json").is_file()
    assert not (run_dir / "switched.json").exists()
