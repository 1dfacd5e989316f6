"""The RL schedule: who gets which words, whose weights, what is recorded, and how it goes on after whatever ended it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tagpr.errors import ConfigError, StageError
from tagpr.rl.schedule import Planned, command_line, composed, plan, run, start


def planned(*words: str) -> list[Planned]:
    return plan(composed("rl", words), words)


class Stages:
    """Does what a stage does to its folder; ``statuses`` are given in turn, then 0."""

    def __init__(self, *statuses: int, switched: bool = False) -> None:
        self.statuses = list(statuses)
        self.switched = switched
        self.asked: list[list[str]] = []

    def __call__(self, words: Sequence[str]) -> int:
        self.asked.append(list(words))
        status = self.statuses.pop(0) if self.statuses else 0
        folder = Path("outputs") / next(w for w in words if w.startswith("run.name=")).removeprefix(
            "run.name="
        )
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "weights").write_text(" ".join(words))
        if status == 0:
            (folder / "finished.json").write_text('{"step": 7}')
            if self.switched and folder.name == "guided_rl":
                (folder / "switched.json").write_text('{"step": 7, "monitor": "plateau", "reason": "flat"}')
        return status

    @property
    def names(self) -> list[str]:
        return [words[1].removeprefix("run.name=") for words in self.asked]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def go(stages: Callable[[Sequence[str]], int], *words: str) -> int:
    return run(composed("rl", words), words, stages)


def record(place: Path) -> list[dict]:
    return json.loads((place / "rl" / "schedule.json").read_text())["stages"]


def test_the_papers_schedule() -> None:
    first, second = planned("setting=paper")
    assert first.command("outputs") == ["guided_rl", "run.name=guided_rl", "setting=paper"]
    assert second.command("outputs") == [
        "exploratory_rl", "run.name=exploratory_rl", "paths.guided=outputs/guided_rl/model", "setting=paper",
    ]  # fmt: skip


def test_words_go_to_all_stages_or_to_one() -> None:
    words = [
        "trainer.logger=[wandb]", "guided_rl.objective.gamma=0.4", "+exploratory_rl.a.b=1", "run.outputs=elsewhere",
        "schedule.switch_on_plateau=true", "run.name=mine",
    ]  # fmt: skip
    first, second = planned(*words)
    assert first.overrides == (
        "monitors.plateau.action=switch", "trainer.logger=[wandb]", "run.outputs=elsewhere", "objective.gamma=0.4",
    )  # fmt: skip
    assert second.overrides == ("trainer.logger=[wandb]", "run.outputs=elsewhere", "+a.b=1")


def test_stages_are_a_list_of_ones_own() -> None:
    stages = (
        "schedule.stages=[{name: warm, stage: guided_rl, overrides: ['objective.gamma=0']},"
        "{name: full, stage: guided_rl},{name: free, stage: exploratory_rl}]"
    )
    commands = [stage.command("outputs") for stage in planned(stages, "warm.trainer.total_training_steps=5")]
    assert commands == [
        ["guided_rl", "run.name=warm", "objective.gamma=0", "trainer.total_training_steps=5"],
        ["guided_rl", "run.name=full", "paths.sft=outputs/warm/model"],
        ["exploratory_rl", "run.name=free", "paths.guided=outputs/full/model"],
    ]


@pytest.mark.parametrize(
    "stages",
    ["[]", "[guided_rl]", "[{name: a}]", "[{name: a, stage: sft}]", "[{name: a/b, stage: guided_rl}]",
     "[{name: rl, stage: guided_rl}]", "[{name: a, stage: guided_rl}, {name: a, stage: guided_rl}]",
     "[{name: a, stage: guided_rl, steps: 3}]"],
)  # fmt: skip
def test_a_schedule_that_cannot_be_meant_is_refused(stages: str) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.stages"):
        planned(f"schedule.stages={stages}")


def test_all_stages_run_once_and_are_recorded(place: Path) -> None:
    stages = Stages(switched=True)
    assert go(stages) == 0
    assert stages.names == ["guided_rl", "exploratory_rl"]
    first, second = record(place)
    assert (first["status"], first["step"], first["started_from"]) == (0, 7, None)
    assert first["switched"] == {"step": 7, "monitor": "plateau", "reason": "flat"}
    assert (second["switched"], len(second["started_from"])) == (None, 64)
    again = Stages()
    assert go(again) == 0
    assert again.asked == []


@pytest.mark.parametrize("status", [1, 2, 3, 75, 130, -9])
def test_a_stage_that_does_not_end_well_ends_the_schedule_and_is_the_next_to_run(
    place: Path, status: int
) -> None:
    stages = Stages(0, status)
    assert go(stages) == status
    assert [one["status"] for one in record(place)] == [0, status]
    again = Stages()
    assert go(again) == 0
    assert again.names == ["exploratory_rl"]
    assert [one["status"] for one in record(place)] == [0, 0]


def test_after_a_kill_the_running_stage_runs_again(place: Path) -> None:
    def killed(_: Sequence[str]) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(killed)
    assert [one["status"] for one in record(place)] == [None]
    again = Stages()
    assert go(again) == 0
    assert again.names == ["guided_rl", "exploratory_rl"]


def test_other_settings_than_those_of_a_finished_stage_are_refused(place: Path) -> None:
    assert go(Stages(0, 1)) == 1
    stages = Stages()
    with pytest.raises(ConfigError, match=r"^objective.gamma=0.4: guided_rl is done with other settings"):
        go(stages, "guided_rl.objective.gamma=0.4")
    assert stages.asked == []
    # Where and how it runs may change, and the settings of what is not done yet.
    assert go(stages, "launch.restarts=3", "exploratory_rl.trainer.total_training_steps=5") == 0
    assert stages.names == ["exploratory_rl"]


def test_a_stage_from_other_weights_is_not_passed_over(place: Path) -> None:
    assert go(Stages()) == 0
    (place / "guided_rl" / "model" / "weights").write_text("trained again")
    with pytest.raises(StageError, match="exploratory_rl: was trained from other weights"):
        go(Stages())


def test_a_stage_that_left_nothing_is_no_success(place: Path) -> None:
    def nothing(words: Sequence[str]) -> int:
        return 0

    with pytest.raises(StageError, match=r"finished\.json"):
        go(nothing)
    (place / "rl" / "schedule.json").write_text("{")
    with pytest.raises(StageError, match="cannot be read"):
        go(Stages())


def test_stages_are_processes_with_exit_statuses(capfd: pytest.CaptureFixture[str]) -> None:
    assert start(["no_such_stage"]) == 2
    assert "no such stage" in capfd.readouterr().err


def test_wrong_words_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("rl", lambda *_: 0, ["schedule.no_such_key=1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert command_line("rl", lambda *_: 0, ["--cfg"]) == 0
    assert "switch_on_plateau: false" in capsys.readouterr().out
