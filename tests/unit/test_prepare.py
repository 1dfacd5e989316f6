import json
import logging
from pathlib import Path

import pytest

from tagpr.benchmarks import prepare
from tagpr.benchmarks.prepare import run
from tagpr.benchmarks.storage import read_examples
from tagpr.configuration import compose, main, resolve
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.schema import Manifest

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "lamp3_real"
SMALL = [f"prepare_data.minilamp.{key}=4" for key in ("train_users", "dev_seen_users", "dev_unseen_users")]
SMALL += ["prepare_data.minilamp.train_rows_per_task=8", "prepare_data.minilamp.dev_rows_per_task=8"]


def prepared(outputs: Path, *overrides: str) -> None:
    run(resolve(compose("prepare_data", [f"run.outputs={outputs}", *SMALL, *overrides])))


def manifest(outputs: Path, name: str = "minilamp") -> Manifest:
    return Manifest.model_validate_json((outputs / "data" / name / "manifest.json").read_text())


def lamp3_files(directory: Path, users: dict[str, list[str]]) -> Path:
    """Write LaMP-3 files of two splits; ``users`` gives the user of each row by split ('' for none)."""
    directory.mkdir(parents=True)
    for split, names in users.items():
        rows = []
        for index, user in enumerate(names):
            profile = [{"id": "p", "text": f"about {index}", "score": "2"}]
            row = {"id": str(index), "input": "review: x", "profile": profile}
            rows.append(row | ({"user_id": user} if user else {}))
        golds = [{"id": row["id"], "output": "3"} for row in rows]
        (directory / f"{split}_questions.json").write_text(json.dumps(rows))
        (directory / f"{split}_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    return directory


def lamp3(directory: Path) -> list[str]:
    return ["benchmark=lamp", f"benchmark.dir={directory}", "benchmark.tasks=[lamp3]"]


def test_minilamp_is_made_read_and_labelled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        prepared(tmp_path)
    assert "SYNTHETIC" in caplog.text
    for split in ("train", "dev"):
        rows = read_examples(tmp_path / "data" / "minilamp" / f"{split}.parquet")
        assert [row.task for row in rows[::8]] == ["lamp1", "lamp2", "lamp3", "lamp4", "lamp5", "lamp7"]
        assert len(rows) == 48
        assert {row.split for row in rows} == {split}
        assert len({row.id for row in rows}) == 48
    made = manifest(tmp_path)
    assert made.notes["synthetic"] is True
    assert len(made.inputs) == 24
    counts = made.notes["counts"]["lamp3"]["dev"]
    assert (counts["rows"], counts["users"], counts["users_seen_in_train"]) == (8, 8, 4)
    assert counts["profile_items_with_date"] == counts["profile_items_per_row"] * 8
    # One person in all tasks: the same ids everywhere, so that one user row serves them.
    assert len({row.user_id for row in rows}) == 8


def test_a_second_run_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")}
    with caplog.at_level(logging.INFO):
        prepared(tmp_path)
    assert "up to date" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")} == before


@pytest.mark.parametrize("damage", ["output", "manifest", "input", "setting", "sizes", "half"])
def test_what_changed_is_made_again(tmp_path: Path, damage: str) -> None:
    prepared(tmp_path)
    data, raw = tmp_path / "data" / "minilamp", tmp_path / "raw" / "minilamp"
    first = (data / "train.parquet").read_bytes()
    overrides = []
    if damage == "output":
        (data / "train.parquet").write_bytes(first[:-20])
    elif damage == "manifest":
        (data / "manifest.json").write_text("{")
    elif damage == "input":
        path = raw / "LaMP_3" / "train" / "train_questions.json"
        path.write_text(path.read_text().replace("user_id", "user_id", 1) + " ")
    elif damage == "setting":
        overrides = ["benchmark.tasks=[lamp3]"]
    elif damage == "sizes":
        overrides = ["prepare_data.minilamp.seed=1"]
    elif damage == "half":
        (raw / "LaMP_7" / "dev" / "dev_outputs.json").unlink()
    stamp = (data / "manifest.json").stat().st_mtime_ns
    prepared(tmp_path, *overrides)
    if damage != "half":
        assert (data / "manifest.json").stat().st_mtime_ns != stamp
    assert (raw / "LaMP_7" / "dev" / "dev_outputs.json").is_file()
    changed = (data / "train.parquet").read_bytes() != first
    assert changed == (damage in ("setting", "sizes"))


def test_files_that_somebody_put_there_are_not_overwritten(tmp_path: Path) -> None:
    prepared(tmp_path)
    raw = tmp_path / "raw" / "minilamp"
    (raw / "settings.json").unlink()
    path = raw / "LaMP_3" / "train" / "train_questions.json"
    theirs = path.read_text() + "\n"
    path.write_text(theirs)
    prepared(tmp_path, "prepare_data.minilamp.seed=5")
    assert path.read_text() == theirs


def test_overlap_derived_users_and_missing_dates_are_in_the_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = lamp3_files(tmp_path / "raw", {"train": ["a", "a", "b", ""], "dev": ["b", "b", "c"]})
    with caplog.at_level(logging.INFO):
        prepared(tmp_path, *lamp3(files))
    notes = manifest(tmp_path, "lamp").notes
    train, dev = notes["counts"]["lamp3"]["train"], notes["counts"]["lamp3"]["dev"]
    assert train["rows_per_user"] == {"min": 1, "mean": 1.33, "max": 2}
    assert (train["rows"], train["users"], train["rows_with_derived_user_id"]) == (4, 3, 1)
    assert (dev["users_seen_in_train"], dev["rows_of_users_seen_in_train"]) == (1, 2)
    assert notes["tasks_without_dates_use_file_order"] == ["lamp3"]
    assert notes["synthetic"] is False
    assert "no, file order; 1 user ids derived" in caplog.text
    users = {row.user_id for row in read_examples(tmp_path / "data" / "lamp" / "dev.parquet")}
    assert users == {"lamp3:b", "lamp3:c"}


def test_a_bad_dev_split_leaves_the_earlier_outputs(tmp_path: Path) -> None:
    files = lamp3_files(tmp_path / "raw", {"train": ["a"], "dev": ["a"]})
    prepared(tmp_path, *lamp3(files))
    data = tmp_path / "data" / "lamp"
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    lamp3_files(tmp_path / "other", {"train": ["z"], "dev": ["z"]})
    (tmp_path / "other" / "dev_questions.json").write_text("<html>")
    with pytest.raises(DataError, match="HTML"):
        prepared(tmp_path, *lamp3(tmp_path / "other"))
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_missing_lamp_files_are_all_named_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, "benchmark=lamp")
    for part in (
        str(tmp_path / "raw" / "lamp"),
        "LaMP_1/train",
        "LaMP_7/dev",
        prepare.LAMP_ADDRESS,
        "LaMP_2/new",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("benchmark.tasks=[lamp3,lamp9]", "task=lamp9: no such task. Known: lamp1"),
        ("benchmark.tasks=lamp3", "benchmark.tasks=lamp3: is not a list"),
        ("benchmark.tasks=[]", "is not a list"),
        ("benchmark.tasks=[lamp3,lamp3]", "lamp3 occurs twice"),
        ("benchmark.dir=null", "benchmark.dir: is empty"),
        ("prepare_data.minilamp.train_users=many", "minilamp.train_users=many: is not"),
        ("prepare_data.minilamp.dev_unseen_users=0", "dev_unseen_users=0: is not"),
        ("prepare_data.minilamp.dev_seen_users=5", "dev_seen_users=5"),
        ("prepare_data.users_across_tasks=maybe", "users_across_tasks: is not true or false"),
        ("prepare_data.sizes=1", "prepare_data.sizes: no such key"),
        ("custom_reward_function.path=x", "custom_reward_function.path: no such key"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, problem: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main("prepare_data", run, [f"run.outputs={tmp_path}", *SMALL, override])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert problem in lines[-1]


def test_an_output_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(StageError, match=r"data.*paths.examples"):
        prepared(tmp_path)


def test_tasks_are_refused_by_name_before_any_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lamp6"):
        prepared(tmp_path, "benchmark.tasks=[lamp6]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not REAL.is_dir(), reason="no real LaMP-3 rows here")
def test_real_reviews(tmp_path: Path) -> None:
    prepared(tmp_path, *lamp3(REAL))
    notes = manifest(tmp_path, "lamp").notes
    assert notes["counts"]["lamp3"]["train"]["rows"] == 600
    assert notes["counts"]["lamp3"]["dev"]["rows_of_users_seen_in_train"] == 120
    assert notes["tasks_without_dates_use_file_order"] == ["lamp3"]
