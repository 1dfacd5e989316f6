"""The reports that say whether user rows do anything: on users whose habits decide everything, and on a model without rows."""

import html
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from minilamp_pairs import make_pairs, twins
from prmu_tiny import make_base
from test_prmu_train import habit_pairs, write

from tagpr.benchmarks.storage import write_examples
from tagpr.configuration import compose, resolve
from tagpr.errors import DataError, StageError
from tagpr.prmu import personalisation, variants
from tagpr.prmu import train as stage
from tagpr.schema import Example, PreferencePair, ProfileItem

RATES = [f"train_prmu.{name}learning_rate=5e-3" for name in ("", "embedding_", "row_")]
SMALL = ["train_prmu.epochs=6", "train_prmu.batch_size=16", "train_prmu.unseen_users=0.2", *RATES]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    pairs = [
        pair.model_copy(update={"example_id": f"{pair.user_id} {pair.prompt}"}) for pair in habit_pairs(24, 8)
    ]
    write(folder / "chains", pairs)
    make_base(folder / "base")
    examples = {
        pair.example_id: Example(
            id=pair.example_id, task="lamp4", split="train", user_id=pair.user_id, query=f"headline of {pair.prompt}",
            profile=(ProfileItem(id="1", fields={"text": f"text of {pair.user_id}", "title": "a title"}),), gold="x",
        )
        for pair in pairs
    }  # fmt: skip
    write_examples(folder / "data" / "minilamp" / "train.parquet", list(examples.values()))
    return folder


@pytest.fixture
def configure(root: Path) -> Callable[..., Any]:
    def go(name: str, *overrides: str) -> Any:
        return resolve(compose(name, [f"run.outputs={root}", f"paths.base={root}/base", *SMALL, *overrides]))

    return go


def test_report_on_users_whose_habits_decide(root: Path, configure: Callable[..., Any]) -> None:
    stage.run(configure("train_prmu"))
    personalisation.run(configure("prmu_report"))
    lines = (root / "prmu_report" / "report.md").read_text().splitlines()
    assert lines[0].startswith("Swapping user ids costs accuracy: own id minus another's +0.")
    found = json.loads((root / "prmu_report" / "report.json").read_text())
    rows = {(row["group"], row["condition"]): row for row in found["rows"]}
    assert rows["all", "own"]["accuracy"] > 0.9
    assert rows["all", "swapped id"]["accuracy"] < 0.8
    assert rows["all", "swapped id"]["flipped"] > 0.2
    assert rows["all", "others' profile"]["margin_moves"] > 0
    assert rows["all", "no profile"]["margin_moves"] > 0
    assert {"no profile", "unknown id"} <= {condition for _, condition in rows}
    curve = {row["pairs_to_fit"]: row["accuracy"] for row in found["cold_start"] if row["group"] == "all"}
    assert curve[4] > curve[0] + 0.2
    assert "| 4 pairs |" in "\n".join(lines)
    page = (root / "prmu_report" / "report.html").read_text()
    assert f"<h1>{html.escape(lines[0])}</h1>" in page
    assert page.count("<svg") == page.count("</svg>") >= 2, "conditions and cold start at least"
    assert "SYNTHETIC" in page
    assert f"<td>{rows['all', 'own']['accuracy']:.3f} [" in page, "the table's figures"


def test_a_model_without_rows_is_found_out_in_the_first_line(
    root: Path, configure: Callable[..., Any]
) -> None:
    overrides = ["train_prmu.user_rows=none", f"paths.prmu={root}/without/model", "train_prmu.epochs=1"]
    stage.run(configure("train_prmu", *overrides))
    config = configure("prmu_report", *overrides, "run.name=found_out", "prmu_report.cold_start.sizes=[]")
    personalisation.run(config)
    first = (root / "found_out" / "report.md").read_text().splitlines()[0]
    assert first == "Swapping user ids changes nothing: this PRMU does not know its users."


def test_a_prmu_of_other_settings_is_refused(root: Path, configure: Callable[..., Any]) -> None:
    stage.run(configure("train_prmu"))
    with pytest.raises(StageError, match="trained on other pairs or with other settings"):
        personalisation.run(configure("prmu_report", "train_prmu.heldout_prompts=0.3"))
    nothing = ["train_prmu.heldout_prompts=0.0", f"paths.prmu={root}/none/model", "train_prmu.epochs=1"]
    stage.run(configure("train_prmu", *nothing))
    with pytest.raises(DataError, match=r"heldout_prompts: pairs of fewer than two users"):
        personalisation.run(configure("prmu_report", *nothing))


def test_variants_differ_where_rows_matter_and_go_on_where_they_were(
    root: Path, configure: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = configure("prmu_variants", "prmu_variants.seeds=[0,1]")
    with caplog.at_level(logging.INFO):
        variants.run(config)
    assert caplog.text.count("on held-out pairs of seen users") == 8
    found = json.loads((root / "prmu_variants" / "variants.json").read_text())["rows"]
    rows = {row["variant"]: row for row in found if row["part"] == "seen_users" and row["group"] == "all"}
    assert rows["full"]["accuracy"] > 0.9
    assert rows["full"]["low"] <= rows["full"]["accuracy"] <= rows["full"]["high"]
    assert rows["without_user_rows"]["accuracy"] < 0.75
    assert rows["without_user_rows"]["full_minus_it"] > 0.2
    assert rows["without_user_rows"]["difference_low"] < rows["without_user_rows"]["full_minus_it"]
    assert len(rows["full"]["by_seed"]) == 2
    assert rows["none"]["accuracy"] == 0.5
    caplog.clear()
    with caplog.at_level(logging.INFO):
        variants.run(configure("prmu_variants", "prmu_variants.seeds=[0,1,2]"))
    assert caplog.text.count("on held-out pairs of seen users") == 4, "only the new seed is trained"


def test_twins_share_prompts_and_differ_in_what_is_right() -> None:
    people = twins(6, seed=0)
    pairs = make_pairs(people, hidden=6, visible=3, seed=0, other_closing="twin")
    by_user: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_user.setdefault(pair.user_id, []).append(pair)
    for one, other in zip(people[::2], people[1::2], strict=True):
        assert one.closing != other.closing
        for mine, yours in zip(by_user[one.user_id], by_user[other.user_id], strict=True):
            assert mine.prompt == yours.prompt
            if mine.rule == "hidden":
                assert (mine.chosen, mine.rejected) == (yours.rejected, yours.chosen)
    assert {pair.rule for pair in pairs} == {"hidden", "visible"}
