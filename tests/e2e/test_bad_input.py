"""Bad input: one clear line that names the key or the file, exit status 2, nothing lost, nothing slow started."""

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from tagpr.benchmarks import prepare, validate
from tagpr.configuration import main
from tagpr.rl import launch
from tagpr.sft import train as sft

TASK = "benchmark.tasks=[lamp3]"
QUESTIONS = [
    {
        "id": "1",
        "input": "review: fine",
        "profile": [{"id": "2", "text": "good", "score": "4"}],
        "user_id": "u",
    }
]
GOLDS = {"task": "LaMP_3", "golds": [{"id": "1", "output": "4"}]}

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a stage in an empty folder; returns its one line of complaint."""
    monkeypatch.chdir(tmp_path)

    def run(stage: str, function: Callable[[DictConfig], None], *overrides: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(stage, function, overrides)
        assert stopped.value.code == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def lamp3(tmp_path: Path) -> Path:
    """A valid LaMP-3 folder of one row a split."""
    folder = tmp_path / "lamp3"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}_questions.json").write_text(json.dumps(QUESTIONS))
        (folder / f"{split}_outputs.json").write_text(json.dumps(GOLDS))
    return folder


def model_folder(path: Path) -> Path:
    """What passes for a model folder at a glance; no test here gets as far as loading it."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer.json").write_text("{}")
    return path


def test_missing_data_file(refused: Refused, lamp3: Path) -> None:
    (lamp3 / "dev_outputs.json").unlink()
    line = refused("prepare_data", prepare.run, "benchmark=lamp", f"benchmark.dir={lamp3}", TASK)
    assert "dev_outputs.json: missing beside dev_questions.json" in line


Question = dict[str, Any]


def _again(rows: list[Question], golds: list[Question]) -> None:
    rows.append(rows[0])


def _golds_again(rows: list[Question], golds: list[Question]) -> None:
    golds.append(golds[0])


def _one_gold_more(rows: list[Question], golds: list[Question]) -> None:
    golds.append({"id": "2", "output": "1"})


def _no_gold(rows: list[Question], golds: list[Question]) -> None:
    golds.clear()


def _no_field(rows: list[Question], golds: list[Question]) -> None:
    del rows[0]["profile"][0]["score"]


def _seven(rows: list[Question], golds: list[Question]) -> None:
    golds[0]["output"] = "7"


def _dates(*dates: str | None) -> Callable[[list[Question], list[Question]], None]:
    def change(rows: list[Question], golds: list[Question]) -> None:
        rows[0]["profile"] = [
            {"id": str(number), "text": "good", "score": "4"} | ({"date": date} if date else {})
            for number, date in enumerate(dates)
        ]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_again, "train_questions.json: question '1': occurs twice"),
        (_golds_again, "train_outputs.json: gold '1' occurs twice"),
        (_one_gold_more, "train_outputs.json: 1 golds without a question in train_questions.json, first '2'"),
        (_no_gold, "train_questions.json: question '1': has no gold"),
        (_no_field, "profile item '2' has no 'score'"),
        (_seven, "gold '1' is '7', not one of 1, 2, 3, 4, 5"),
        (_dates("2016-01-02", "02/03/2016"), "date '02/03/2016' is not year, year-month or year-month-day"),
        (_dates("2016-01-02", "02-03-2016"), "date '02-03-2016' is not year, year-month or year-month-day"),
        (_dates("2016-01-02", None), "some profile items have a date and some have none"),
    ],
)
def test_lamp_rows_that_cannot_be_meant(
    refused: Refused, lamp3: Path, change: Callable[[list[Question], list[Question]], None], says: str
) -> None:
    rows, golds = json.loads(json.dumps(QUESTIONS)), json.loads(json.dumps(GOLDS))
    change(rows, golds["golds"])
    (lamp3 / "train_questions.json").write_text(json.dumps(rows))
    (lamp3 / "train_outputs.json").write_text(json.dumps(golds))
    line = refused("prepare_data", prepare.run, "benchmark=lamp", f"benchmark.dir={lamp3}", TASK)
    assert says in line


@pytest.mark.parametrize("name", ["train_questions.json", "train_outputs.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<!DOCTYPE html><html><body>Not here</body></html>", "HTML"),
        ("", ""),
        ('[{"id": "1", "inp', ""),
        ("[1, 2]", ""),
    ],
)
def test_lamp_files_that_are_none(refused: Refused, lamp3: Path, name: str, content: str, says: str) -> None:
    (lamp3 / name).write_text(content)
    line = refused("prepare_data", prepare.run, "benchmark=lamp", f"benchmark.dir={lamp3}", TASK)
    assert f"{lamp3 / name}: " in line
    assert says in line


def test_other_than_the_published_number_of_rows(refused: Refused, lamp3: Path) -> None:
    overrides = [
        "benchmark=lamp",
        f"benchmark.dir={lamp3}",
        TASK,
        "prepare_data.download.check_counts=always",
    ]
    line = refused("prepare_data", prepare.run, *overrides)
    assert "train_questions.json: 1 rows, the published split has 20000" in line


def test_what_is_kept_is_counted(lamp3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty profile, a megabyte in one item, a profile rating of 7, years beside days: documented in counts.py."""
    monkeypatch.chdir(tmp_path)
    items = [
        [],
        [{"id": "1", "text": "x" * 1_000_000, "score": "4"}],
        [{"id": "1", "text": "x", "score": "7"}],
        [
            {"id": "1", "text": "x", "score": "4", "date": "2016"},
            {"id": "2", "text": "x", "score": "4", "date": "2015-01-02"},
        ],
    ]
    rows = [QUESTIONS[0] | {"id": str(number), "profile": profile} for number, profile in enumerate(items)]
    golds = {"task": "LaMP_3", "golds": [{"id": row["id"], "output": "4"} for row in rows]}
    (lamp3 / "train_questions.json").write_text(json.dumps(rows))
    (lamp3 / "train_outputs.json").write_text(json.dumps(golds))
    with pytest.raises(SystemExit) as stopped:
        main("prepare_data", prepare.run, ["benchmark=lamp", f"benchmark.dir={lamp3}", TASK])
    assert stopped.value.code == 0
    notes = json.loads((tmp_path / "outputs" / "data" / "lamp" / "manifest.json").read_text())["notes"]
    assert list(notes["counts"]["lamp3"]["train"]["kept_as_they_are"].values()) == [1, 1, 1, 1]


OWN_TASKS = """
wine_score:
  title: Wine score
  kind: rating
  labels: [1, 2, 3, 4, 5]
  fields: [note, score]
  long_field: note
  item: "{score}/5 for: {note}"
  prompt: "{items}\\n{query}"
"""
OWN_ROW: Question = {
    "id": "1",
    "task": "wine_score",
    "user_id": "mara",
    "query": "Dark cherry and a little smoke?",
    "gold": "4",
    "profile": [{"id": "a", "date": "2024-01-02", "fields": {"note": "plum", "score": "4"}}],
}


def _own(**changes: Any) -> str:
    return json.dumps(OWN_ROW | {"id": "2"} | changes)


def _own_items(*items: Any) -> str:
    return _own(profile=list(items))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("<!DOCTYPE html>", "is HTML"),
        ('{"id": "2", "ta', "is no JSON"),
        (json.dumps(OWN_ROW), "id '1' is that of line 1 too"),
        (
            json.dumps({key: value for key, value in OWN_ROW.items() if key != "query"} | {"id": "2"}),
            "has no 'query'",
        ),
        (_own(gold="7"), "gold '7' is not one of 1, 2, 3, 4, 5"),
        (_own_items({"id": "a", "fields": {"note": "plum"}}), "profile item 'a' has no field 'score'"),
        (
            _own_items({"id": "a", "date": "02/01/2024", "fields": OWN_ROW["profile"][0]["fields"]}),
            "date is '02/01/2024'",
        ),
        (
            _own_items(OWN_ROW["profile"][0], {"id": "b", "fields": {"note": "x", "score": "1"}}),
            "1 of 2 profile items",
        ),
        (_own(query="\ud83d"), "half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("stage", ["prepare_data", "validate_data"])
def test_own_rows_that_cannot_be_meant(
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    line: str,
    says: str,
) -> None:
    monkeypatch.setenv("TAGPR_TASKS", "")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "tasks.yaml").write_text(OWN_TASKS)
    (folder / "train.jsonl").write_text(json.dumps(OWN_ROW) + "\n")
    (folder / "dev.jsonl").write_text(f"{_own(id='1', query='Another wine, lighter?')}\n\n{line}\n")
    where = f"{folder / 'dev.jsonl'}:3: "
    if stage == "prepare_data":
        told = refused(stage, prepare.run, "benchmark=own", f"benchmark.dir={folder}")
        assert told.startswith(f"error: {where}")
    else:
        summary = refused(stage, validate.run, "benchmark=own", f"benchmark.dir={folder}")
        assert summary.startswith(f"error: {folder}: 1 errors, see above")
        report = json.loads((tmp_path / "outputs" / "validation" / "validation.json").read_text())
        shown = [
            one
            for kind in report["findings"].values()
            if kind["severity"] == "error"
            for one in kind["shown"]
        ]
        assert [one["line"] for one in shown] == [3]
        told = shown[0]["message"]
    assert says in told


def test_unknown_task(refused: Refused, lamp3: Path) -> None:
    line = refused(
        "prepare_data", prepare.run, "benchmark=lamp", f"benchmark.dir={lamp3}", "benchmark.tasks=[lamp6]"
    )
    assert "lamp6" in line
    assert "lamp7" in line


def test_bad_data_leaves_what_was_prepared(refused: Refused, lamp3: Path, tmp_path: Path) -> None:
    overrides = ["benchmark=lamp", f"benchmark.dir={lamp3}", TASK]
    with pytest.raises(SystemExit) as stopped:
        main("prepare_data", prepare.run, overrides)
    assert stopped.value.code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.parquet")}
    assert before
    (lamp3 / "train_questions.json").write_text("[{")
    refused("prepare_data", prepare.run, *overrides)
    assert {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.parquet")} == before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.epochs=3", "trainer.epochs: no such key"),
        ("custom_reward_function.path=mine.py", "reward.custom_reward_function"),
        ("reward_model.enable=true", "reward.reward_model"),
        ("actor_rollout_ref.actor.clip_ratio_high=0.2", "3e-4"),
    ],
)
def test_wrong_rl_key(refused: Refused, override: str, says: str) -> None:
    assert says in refused("guided_rl", launch.run, override)


def test_no_sft_model_yet(refused: Refused) -> None:
    assert "sft.sh" in refused("guided_rl", launch.run)


def test_sft_folder_that_is_none(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    line = refused("guided_rl", launch.run, f"paths.sft={tmp_path / 'pictures'}")
    assert "is no Hugging Face model folder" in line
    assert "pictures" in line


def test_more_tokens_than_the_model_has_context(refused: Refused, tmp_path: Path) -> None:
    sft_model = model_folder(tmp_path / "sft")
    (sft_model / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    line = refused("guided_rl", launch.run, f"paths.sft={sft_model}", "benchmark.max_response_tokens=4096")
    assert "benchmark.max_response_tokens=4096" in line
    assert "4096 tokens of context" in line


def test_no_chains_yet(refused: Refused, tmp_path: Path) -> None:
    line = refused("sft", sft.run, f"paths.base={model_folder(tmp_path / 'base')}")
    assert "build_chains.sh" in line


def test_reward_server_of_another_prmu(refused: Refused, tmp_path: Path) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(
                {"model_version": "another", "engine": "transformers", "users": 1, "max_tokens": 9}
            ).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"

        def serve(config: DictConfig) -> None:
            with launch.reward_server(config):
                raise AssertionError("a server of another PRMU was accepted")

        prmu = model_folder(tmp_path / "prmu")
        (prmu / "users.json").write_text("{}")
        line = refused("guided_rl", serve, f"paths.prmu={prmu}", f"prmu_client.url={url}")
        assert url in line
        assert "another" in line
    finally:
        server.shutdown()
        server.server_close()


def test_no_reward_server_there(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

    def serve(config: DictConfig) -> None:
        monkeypatch.setattr(launch, "CONNECT_DEADLINE_S", 1.0)
        with launch.reward_server(config):
            raise AssertionError("nobody listens there")

    prmu = model_folder(tmp_path / "prmu")
    (prmu / "users.json").write_text("{}")
    line = refused("guided_rl", serve, f"paths.prmu={prmu}", f"prmu_client.url={url}")
    assert url in line
    assert "serve_prmu.sh" in line
