import json
import logging
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


# ---- getting files


class Web:
    """A server on loopback with the files below ``folder``; ``asked`` are the paths of its requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        web = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given, directory=str(folder))

            def do_GET(self) -> None:
                web.asked.append(self.path)
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def lamp(self, place: str, task: str, split: str, rows: int) -> None:
        folder = self.folder / place / split
        folder.mkdir(parents=True)
        profile = [
            {"id": "p", "text": "t", "score": "2", "description": "d", "tag": "comedy", "date": "2016-02-01"}
        ]
        asked = [
            {"id": str(n), "input": f"review: {n}", "profile": profile, "user_id": "u"} for n in range(rows)
        ]
        gold = "3" if task == "LaMP_3" else "comedy"
        golds = {"task": task, "golds": [{"id": str(n), "output": gold} for n in range(rows)]}
        (folder / f"{split}_questions.json").write_text(json.dumps(asked))
        (folder / f"{split}_outputs.json").write_text(json.dumps(golds))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "web").mkdir()
    server = Web(tmp_path / "web")
    yield server
    server.server.shutdown()
    server.server.server_close()


def lamp_server(web: Web) -> list[str]:
    return [
        "benchmark=lamp",
        "benchmark.tasks=[lamp2,lamp3]",
        f"prepare_data.download.lamp_address={web.address}/LaMP",
        "prepare_data.download.backoff_s=0",
        "prepare_data.download.check_counts=never",
    ]


def test_missing_lamp_files_are_fetched_movie_tagging_from_its_own_path(tmp_path: Path, web: Web) -> None:
    for place, task in (("LaMP/time/LaMP_2/new", "LaMP_2"), ("LaMP/time/LaMP_3", "LaMP_3")):
        web.lamp(place, task, "train", 4)
        web.lamp(place, task, "dev", 2)
    prepared(tmp_path, *lamp_server(web))
    made = manifest(tmp_path, "lamp")
    assert made.notes["counts"]["lamp2"]["train"]["rows"] == 4
    assert made.notes["settings"]["split_by"] == "time"
    assert len(made.notes["downloads"]) == len(made.inputs) == 8
    for name, entry in made.notes["downloads"].items():
        assert entry["sha256"] == made.inputs[name]
        assert entry["address"].startswith(f"{web.address}/LaMP/time/LaMP_")
    asked = list(web.asked)
    prepared(tmp_path, *lamp_server(web))
    assert web.asked == asked


def test_the_user_split_has_its_own_paths_and_folder(tmp_path: Path, web: Web) -> None:
    for place, task in (("LaMP/LaMP_2/new", "LaMP_2"), ("LaMP/LaMP_3", "LaMP_3")):
        web.lamp(place, task, "train", 1)
        web.lamp(place, task, "dev", 1)
    prepared(tmp_path, *lamp_server(web), "benchmark.split_by=user")
    assert manifest(tmp_path, "lamp").notes["settings"]["split_by"] == "user"
    assert (tmp_path / "raw" / "lamp-user" / "LaMP_2" / "train" / "train_questions.json").is_file()
    assert not any("/time/" in path for path in web.asked)


def test_a_web_page_with_status_200_is_one_line(tmp_path: Path, web: Web) -> None:
    folder = web.folder / "LaMP" / "time" / "LaMP_2" / "new" / "train"
    folder.mkdir(parents=True)
    (folder / "train_outputs.json").write_text("<!DOCTYPE html><html>Not here</html>")
    with pytest.raises(DataError, match=r"train_outputs\.json: is an HTML page") as caught:
        prepared(tmp_path, *lamp_server(web))
    assert "\n" not in str(caught.value)
    assert "LaMP_2/train, LaMP_2/dev, LaMP_3/train" in str(caught.value)


@pytest.mark.parametrize(("check", "refused"), [("downloaded", True), ("always", True), ("never", False)])
def test_downloaded_files_have_the_published_number_of_rows(
    tmp_path: Path, web: Web, check: str, refused: bool
) -> None:
    web.lamp("LaMP/time/LaMP_3", "LaMP_3", "train", 4)
    web.lamp("LaMP/time/LaMP_3", "LaMP_3", "dev", 2)
    overrides = [*lamp_server(web), "benchmark.tasks=[lamp3]", f"prepare_data.download.check_counts={check}"]
    if not refused:
        prepared(tmp_path, *overrides)
        return
    with pytest.raises(DataError, match=r"train_questions\.json: 4 rows, the published split has 20000\."):
        prepared(tmp_path, *overrides)
    assert not (tmp_path / "data" / "lamp" / "train.parquet").exists()


def test_files_put_there_by_hand_may_have_other_counts_but_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = lamp3_files(tmp_path / "raw", {"train": ["a"], "dev": ["a"]})
    prepared(tmp_path, *lamp3(files))
    assert "1 rows, the published split has 2500: figures from it do not compare" in caplog.text
    assert manifest(tmp_path, "lamp").notes["other_than_published"]["lamp3/dev"] == {
        "rows": 1,
        "published": 2500,
    }
    with pytest.raises(DataError, match="published split has 20000"):
        prepared(tmp_path / "again", *lamp3(files), "prepare_data.download.check_counts=always")


def test_half_a_split_is_not_filled_up_from_elsewhere(tmp_path: Path, web: Web) -> None:
    files = lamp3_files(tmp_path / "raw", {"train": ["a"], "dev": ["a"]})
    (files / "dev_outputs.json").unlink()
    with pytest.raises(DataError, match=r"dev_outputs\.json: missing beside dev_questions\.json"):
        prepared(tmp_path, *lamp_server(web), *lamp3(files))
    assert web.asked == []


@pytest.mark.parametrize(
    ("override", "begins"),
    [
        ("prepare_data.download.enabled=false", "raw/lamp-time: lacks"),
        ("prepare_data.download.lamp_address=http://127.0.0.1:9/LaMP", "no connection"),
    ],
)
def test_without_the_server_all_that_is_missing_is_named_with_its_place(
    tmp_path: Path, override: str, begins: str
) -> None:
    with pytest.raises(DataError, match=begins) as caught:
        prepared(tmp_path, "benchmark=lamp", "prepare_data.download.backoff_s=0", override)
    for part in (
        str(tmp_path / "raw" / "lamp-time"),
        "LaMP_1/train",
        "LaMP_7/dev",
        "/time/LaMP_2/new/<split>",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- other benchmarks


def test_pgraphrag_is_fetched_and_users_without_history_are_counted(
    tmp_path: Path, web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    def review(name: str) -> dict[str, Any]:
        return {"rating": 4, "title": f"Title {name}", "text": f"Text {name}", "pid": name}

    users = [
        {"id": "a", "profile": [review("1"), review("2")]},
        {"id": "b", "profile": [review("3")]},
    ]
    for split in ("train", "dev", "test"):
        (web.folder / f"amazon_{split}.json").write_text(json.dumps(users))
    with caplog.at_level(logging.INFO):
        prepared(tmp_path, "benchmark=pgraphrag", f"prepare_data.download.pgraphrag_address={web.address}")
    counts = manifest(tmp_path, "pgraphrag").notes["counts"]["pgraphrag_title"]
    assert {split: row["rows"] for split, row in counts.items()} == {"train": 1, "dev": 1, "test": 1}
    assert counts["test"]["users_seen_in_train"] == counts["test"]["users_seen_in_dev"] == 1
    assert counts["dev"]["reader"]["users_without_history"] == 1
    assert "pgraphrag_title dev: 1 users without history" in caplog.text
    # Another choice of splits leaves none of the old ones behind.
    prepared(tmp_path, "benchmark=pgraphrag", "benchmark.splits=[dev]")
    assert [path.name for path in (tmp_path / "data" / "pgraphrag").glob("*.parquet")] == ["dev.parquet"]


def test_longlamp_takes_a_tenth_of_the_test_split(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "longlamp" / "topic_writing_temporal"
    folder.mkdir(parents=True)
    rows = [
        {
            "author": f"u{n}",
            "input": f"in {n}",
            "output": "out",
            "profile": [{"summary": "s", "content": "c"}],
        }
        for n in range(50)
    ]
    for split in ("train", "val", "test"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    prepared(tmp_path, "benchmark=longlamp", "benchmark.tasks=[longlamp_topic]")
    made = manifest(tmp_path, "longlamp")
    counts = made.notes["counts"]["longlamp_topic"]
    assert {split: row["rows"] for split, row in counts.items()} == {"train": 50, "dev": 50, "test": 5}
    assert (made.notes["settings"]["test_share"], made.notes["settings"]["seed"]) == (0.1, 0)
    assert len(made.inputs) == 3
    # One of two files is not the split.
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00000-of-00002.parquet")
    overrides = [
        "benchmark=longlamp",
        "benchmark.tasks=[longlamp_topic]",
        "prepare_data.download.enabled=false",
    ]
    with pytest.raises(DataError, match=r"lacks topic_writing_temporal/train-\*\.parquet"):
        prepared(tmp_path, *overrides)


def test_dianping_is_built_from_posts(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "dianping"
    folder.mkdir(parents=True)
    posts = [
        {
            "user_id": user,
            "post_id": f"{user}{day}",
            "date": f"2024-01-{day:02}",
            "title": f"第{day}次",
            "content": f"{user}在第{day}天去了一家很不错的餐厅，味道好，服务也好，下次还会再来。",
        }
        for user in ("甲", "乙")
        for day in range(1, 11)
    ]
    (folder / "posts.jsonl").write_text("\n".join(json.dumps(post) for post in posts))
    prepared(tmp_path, "benchmark=dianping")
    rows = read_examples(tmp_path / "data" / "dianping" / "test.parquet")
    assert {(row.task, row.user_id, len(row.profile)) for row in rows} == {
        (task, user, 8) for task in ("dianping_content", "dianping_title") for user in ("甲", "乙")
    }
    with pytest.raises(ConfigError, match=r"benchmark\.rewriter\.base_url"):
        prepared(
            tmp_path / "again",
            "benchmark=dianping",
            f"benchmark.dir={folder}",
            "benchmark.tasks=[dianping_paraph]",
        )
    with pytest.raises(ConfigError, match=r"benchmark\.rewriter\.concurrency"):
        prepared(
            tmp_path,
            "benchmark=dianping",
            "benchmark.rewriter.base_url=http://x/v1",
            "benchmark.rewriter.concurrency=0",
        )


@pytest.mark.parametrize(
    ("benchmark", "says"),
    [
        ("longlamp", "abstract_generation_temporal/train-*.parquet"),
        ("pgraphrag", "amazon_train.json, amazon_dev.json, amazon_test.json"),
        ("dianping", "posts.jsonl"),
    ],
)
def test_what_to_put_where_is_said_of_every_benchmark(tmp_path: Path, benchmark: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, f"benchmark={benchmark}", "prepare_data.download.enabled=false")
    assert says in str(caught.value)
    assert str(tmp_path / "raw" / benchmark) in str(caught.value)


def test_what_may_be_a_mistake_is_kept_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = lamp3_files(tmp_path / "raw", {"train": ["a", "b", "c", "d"], "dev": ["e"]})
    rows = json.loads((files / "train_questions.json").read_text())
    rows[0]["profile"] = []
    rows[1]["profile"] = [{"id": "1", "text": "x" * 1_000_000, "score": "5"}]
    rows[2]["profile"] = [{"id": "1", "text": "x", "score": "7"}]
    rows[3]["profile"] = [
        {"id": "1", "text": "x", "score": "5.0", "date": "2014"},
        {"id": "2", "text": "x", "score": "5", "date": "2015-01-02"},
    ]
    (files / "train_questions.json").write_text(json.dumps(rows))
    prepared(tmp_path, *lamp3(files))
    counts = manifest(tmp_path, "lamp").notes["counts"]["lamp3"]["train"]
    assert counts["kept_as_they_are"] == {
        "rows with an empty profile": 1,
        "rows whose dates differ in precision": 1,
        "rows with an item of over 100,000 characters": 1,
        "profile ratings off the scale": 1,
    }
    assert (counts["fewest_profile_items"], counts["most_profile_items"]) == (0, 2)
    assert counts["longest_profile_text"] == 1_000_000
    assert "lamp3 train: 1 profile ratings off the scale; kept as they are" in caplog.text


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
        ("prepare_data.download.enabled=maybe", "download.enabled: is not true or false"),
        ("prepare_data.download.attempts=0", "download.attempts=0: is not a positive number"),
        ("prepare_data.download.check_counts=yes", "check_counts="),
        ("benchmark.name=lmap", "benchmark.name=lmap: is none of minilamp, lamp"),
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
