"""Trackers go on in the run that they began."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tagpr.rl.trackers import after_tracking, before_tracking, flush, new_id

VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME", "SWANLAB_RUN_ID", "SWANLAB_RESUME", "MLFLOW_RUN_ID")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_the_id_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import os

    before_tracking(tmp_path, ["tensorboard", name])
    first = os.environ[f"{name.upper()}_RUN_ID"]
    assert os.environ[f"{name.upper()}_RESUME"] == "allow"
    monkeypatch.delenv(f"{name.upper()}_RUN_ID")
    before_tracking(tmp_path, [name])
    assert os.environ[f"{name.upper()}_RUN_ID"] == first
    assert not any(variable in os.environ for variable in VARIABLES if not variable.startswith(name.upper()))


def test_a_persons_own_id_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    before_tracking(tmp_path, ["wandb"])
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "mine"}


def test_ids_are_what_the_strictest_takes() -> None:
    assert len({new_id() for _ in range(20)}) == 20
    assert all(len(each) == 21 and each.isalnum() and each == each.lower() for each in [new_id()])


def test_mlflow_goes_on_without_its_parameters_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from verl.utils import tracking

    monkeypatch.setattr(
        tracking, "_compute_mlflow_params_from_objects", tracking._compute_mlflow_params_from_objects
    )
    mlflow = ModuleType("mlflow")
    mlflow.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id="r1"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    before_tracking(tmp_path, ["mlflow"])
    assert "MLFLOW_RUN_ID" not in os.environ
    assert tracking._compute_mlflow_params_from_objects({"a": 1})
    after_tracking(tmp_path, {"mlflow": object()}, resumed=0)
    before_tracking(tmp_path, ["mlflow"])
    assert os.environ["MLFLOW_RUN_ID"] == "r1"
    assert tracking._compute_mlflow_params_from_objects({"a": 1}) == {}


def test_a_torn_file_begins_a_new_run_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trackers.json").write_text('{"wandb": "x')
    before_tracking(tmp_path, ["wandb"])
    assert "trackers begin new runs" in caplog.text
    assert len(json.loads((tmp_path / "trackers.json").read_text())["wandb"]) == 21


def test_tensorboard_forgets_the_steps_that_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from verl.utils.tracking import _TensorboardAdapter

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tensorboard"))

    def start(resumed: int, steps: range, value: float) -> None:
        adapter = _TensorboardAdapter("tagpr", "run")
        after_tracking(tmp_path, {"tensorboard": adapter}, resumed)
        for step in steps:
            adapter.log({"reward": value}, step)
        adapter.finish()

    start(0, range(5), 1.0)
    start(2, range(3, 7), 2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [
        (0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2),
    ]  # fmt: skip


def test_tensorboard_gets_a_step_in_one_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from verl.utils.tracking import _TensorboardAdapter

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tensorboard"))
    data = {f"part/{n}": n / 3 for n in range(300)} | {"integer": 4, "numpy": np.float64(0.5)}
    adapter = _TensorboardAdapter("tagpr", "run")
    after_tracking(tmp_path, {"tensorboard": adapter}, 0)
    events = []
    file = adapter.writer._get_file_writer()
    write = file.event_writer.add_event
    monkeypatch.setattr(file.event_writer, "add_event", lambda event: (events.append(event), write(event)))
    adapter.log(data, 7)
    adapter.finish()
    assert len(events) == 1
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    assert {name: read.Scalars(name)[0].step for name in read.Tags()["scalars"]} == dict.fromkeys(data, 7)
    for name, value in data.items():
        assert read.Scalars(name)[0].value == pytest.approx(float(value))


def test_a_kill_after_a_checkpoint_takes_nothing_from_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from verl.utils.tracking import _TensorboardAdapter

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tensorboard"))
    adapter = _TensorboardAdapter("tagpr", "run")
    adapter.log({"reward": 1.0}, 1)
    flush({"tensorboard": adapter, "console": object()})
    # Never finished, as after a kill.
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1]
    adapter.finish()
    flush({"console": object()})
