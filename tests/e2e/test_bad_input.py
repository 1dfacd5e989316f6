"""Bad input: one clear line that names the key or the file, exit status 2, nothing lost, nothing slow started."""

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from omegaconf import DictConfig

from tagpr.benchmarks import prepare
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
    assert "LaMP_3/dev" in line


def test_html_instead_of_json(refused: Refused, lamp3: Path) -> None:
    (lamp3 / "train_questions.json").write_text("<!DOCTYPE html><html><body>Not here</body></html>")
    line = refused("prepare_data", prepare.run, "benchmark=lamp", f"benchmark.dir={lamp3}", TASK)
    assert "train_questions.json" in line
    assert "HTML" in line


def test_question_without_gold(refused: Refused, lamp3: Path) -> None:
    (lamp3 / "train_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": []}))
    line = refused("prepare_data", prepare.run, "benchmark=lamp", f"benchmark.dir={lamp3}", TASK)
    assert "gold" in line


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
    before = {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.jsonl")}
    assert before
    (lamp3 / "train_questions.json").write_text("[{")
    refused("prepare_data", prepare.run, *overrides)
    assert {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.jsonl")} == before


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
