"""The grid of reward weights: every setting and seed once, one evaluation of all, and a table that says how stable each is."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError
from tagpr.evaluation.methods import read_methods
from tagpr.rl.schedule import composed
from tagpr.rl.weights_grid import run

TWO = ("grid.weights=[[0.8,0.8,0.2],[1,0.5,0]]", "grid.seeds=[0,1]")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


class Stages:
    """Trainings whose R_v rises and falls, more with one setting; an evaluation that has seen them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[list[str]] = []
        self.fails_at = fails_at

    def __call__(self, words: Sequence[str]) -> int:
        self.asked.append(list(words))
        if len(self.asked) == self.fails_at:
            return 75
        folder = Path("outputs") / next(w for w in words if w.startswith("run.name=")).removeprefix(
            "run.name="
        )
        folder.mkdir(parents=True)
        if words[0] == "guided_rl":
            seed = int(next(w for w in words if w.startswith("run.seed=")).removeprefix("run.seed="))
            fall = 0.2 if "objective.gamma=0" in words else 0.0
            values = [0.5] * 5 + [0.7 + seed / 10] * 5 + [0.7 + seed / 10 - fall] * 5
            lines = [
                {"step": step, "data": {"reward/verifiable/mean": value, "tags/valid_frac": 1.0}}
                for step, value in enumerate(values)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / "finished.json").write_text('{"step": 15}')
        else:
            only = next(w for w in words if w.startswith("evaluate.only=[")).removeprefix("evaluate.only=[")
            models = {
                label: {"task_score": 0.9 - number / 10, "task_score_deviation": 0.01, "well_formed": 1.0}
                for number, label in enumerate(only.removesuffix("]").split(","))
            }
            (folder / "summary.json").write_text(json.dumps({"decodings": [{"models": models}]}))
        return 0


def go(stages: Stages, *words: str) -> int:
    return run(composed("weights_grid", words), words, stages)


def test_the_default_is_the_papers_table() -> None:
    weights = composed("weights_grid", []).grid.weights
    assert len(weights) == 6
    assert list(weights[-1]) == [0.8, 0.8, 0.2]


def test_every_setting_and_seed_is_trained_once_and_all_are_compared(place: Path) -> None:
    stages = Stages()
    words = [*TWO, "trainer.total_training_steps=15", "evaluate.limit=60", "run.name=grid"]
    assert go(stages, *words) == 0
    trainings, evaluation = stages.asked[:-1], stages.asked[-1]
    assert [words[1] for words in trainings] == [
        f"run.name=grid-{label}-s{seed}" for label in ("a0p8_b0p8_g0p2", "a1_b0p5_g0") for seed in (0, 1)
    ]
    assert trainings[0][2:] == [
        "run.seed=0", "objective.alpha=0.8", "objective.beta=0.8", "objective.gamma=0.2", "trainer.total_training_steps=15",
    ]  # fmt: skip
    assert evaluation[-1] == "evaluate.limit=60"
    rows = json.loads((place / "grid" / "grid.json").read_text())
    assert [row["task_score"] for row in rows] == [0.9, 0.8]
    assert [row["fall"] for row in rows] == pytest.approx([0, 0.2])
    assert [row["trained_verifiable_least"] for row in rows] == pytest.approx([0.7, 0.5])
    assert rows[0]["trained_verifiable_deviation"] == pytest.approx(0.1 / 2**0.5)
    table = (place / "grid" / "grid.md").read_text()
    assert "| 0.8 | 0.8 | 0.2 | 0.900 ± 0.010 |" in table
    assert "Spread of task_score over settings: 0.100" in table
    assert table.startswith("SYNTHETIC")


def test_the_evaluation_takes_what_it_is_told(place: Path) -> None:
    stages = Stages()
    assert go(stages, *TWO) == 0
    for folder in place.glob("weights_grid-*-s*"):
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    methods = read_methods(resolve(compose("evaluate", stages.asked[-1][1:])))
    assert [len(method.runs) for method in methods.values()] == [2, 2]


def test_it_goes_on_where_it_stopped(place: Path) -> None:
    assert go(Stages(fails_at=3), *TWO) == 75
    stages = Stages()
    assert go(stages, *TWO, "grid.evaluate=false") == 0
    assert [words[1] for words in stages.asked] == [
        f"run.name=weights_grid-a1_b0p5_g0-s{seed}" for seed in (0, 1)
    ]
    assert "not measured" in (place / "weights_grid" / "grid.md").read_text()


@pytest.mark.parametrize(
    "word",
    ["grid.weights=[]", "grid.weights=[[1,2]]", "grid.weights=[[1,2,-3]]", "grid.weights=[[1,2,x]]", "grid.weights=[1]",
     "grid.weights=[[1,2,3],[1,2,3]]", "grid.seeds=[]", "grid.seeds=[0,0]", "grid.seeds=[x]"],
)  # fmt: skip
def test_a_grid_that_cannot_be_meant_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        go(Stages(), word)
