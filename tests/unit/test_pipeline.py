"""The stage as a whole on 24 examples of MiniLaMP, with the SIMULATED endpoint over HTTP."""

import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.__main__ import run
from data_pipeline.draw import Draw
from data_pipeline.outputs import FILES
from data_pipeline.settings import read_settings
from tagpr.benchmarks.lamp import read_split
from tagpr.benchmarks.minilamp.generate import write
from tagpr.benchmarks.storage import read_examples, write_examples
from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.schema import Chain, PreferencePair
from tagpr.tags import check_tags, split_response, strip_tags

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("lamp1", "lamp2", "lamp3", "lamp4", "lamp5", "lamp7")
SMALL = ("chains.instances_per_task=4", "chains.rollouts=3", "chains.preferences.extra_rollouts=4")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write(
        folder / "raw",
        0,
        train_users=2,
        dev_seen_users=1,
        dev_unseen_users=1,
        train_rows_per_task=4,
        dev_rows_per_task=2,
    )
    rows = [row for task in TASKS for row in read_split(folder / "raw", task, "train")]
    assert write_examples(folder / "train.parquet", rows) == 24
    return folder


def overrides(examples: Path, chains: Path, *more: str) -> list[str]:
    return [f"paths.examples={examples}", f"paths.chains={chains}", *SMALL, *more]


def start(examples: Path, chains: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "data_pipeline", *overrides(examples, chains, *more)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def asked(log: str) -> int:
    return sum(int(number.replace(",", "")) for number in re.findall(r"asked ([\d,]+)", log))


def rows(ledger: Path) -> dict[str, float]:
    if not ledger.exists():
        return {}
    with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as database:
        try:
            return dict(database.execute("SELECT key, created FROM unit").fetchall())
        except sqlite3.OperationalError:  # no table yet
            return {}


@pytest.fixture(scope="module")
def finished(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(examples, folder)
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return folder, log


def test_every_output_is_there_and_consistent(finished: tuple[Path, str]) -> None:
    folder, log = finished
    funnel = json.loads((folder / "funnel.json").read_text())["stages"]
    chains = [Chain.model_validate_json(line) for line in (folder / "chains.jsonl").read_text().splitlines()]
    assert funnel["instances"]["all"] == 24
    assert funnel["rollouts"]["all"] == 72
    assert len(chains) == funnel["distinct"]["all"]
    order = ["rollouts", "parsed", "distinct", "accurate", "judged", "tagged", "selected"]
    counts = [funnel[stage]["all"] for stage in order]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] > 20
    judged = [chain for chain in chains if chain.judge_scores]
    assert len(judged) == funnel["judged"]["all"]
    assert all(sum(chain.judge_scores or ()) > 15 for chain in judged)
    assert "SIMULATED" in log
    assert "distinct" in log
    assert "Traceback" not in log
    assert not list(folder.glob("*.results.sqlite*")), "all of it is in the outputs"


def test_sft_rows_are_tagged_chains_in_the_response_form(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    table = pq.read_table(folder / "sft.parquet")
    assert table.schema.names == ["id", "task", "user_id", "prompt", "response"]
    chains = {
        chain.id: chain
        for chain in map(Chain.model_validate_json, (folder / "chains.jsonl").read_text().splitlines())
    }
    for row in table.to_pylist():
        response = split_response(row["response"])
        chain = chains[row["id"]]
        assert response.problem == ""
        assert check_tags(response.reasoning) == ""
        assert strip_tags(response.reasoning).split() == chain.reasoning.split()
        assert (response.answer, row["prompt"]) == (chain.answer, chain.prompt)


def test_pairs_are_tagged_on_both_sides_under_the_prompt_with_profile(
    finished: tuple[Path, str], examples: Path
) -> None:
    folder, _ = finished
    golds = {example.id: example for example in read_examples(examples / "train.parquet")}
    prompts = {
        chain.prompt
        for chain in map(Chain.model_validate_json, (folder / "chains.jsonl").read_text().splitlines())
    }
    for kind in ("prp", "pqp"):
        pairs = [
            PreferencePair.model_validate_json(line)
            for line in (folder / f"{kind}.jsonl").read_text().splitlines()
        ]
        assert len(pairs) > 5
        for pair in pairs:
            assert pair.prompt in prompts
            example = golds[pair.id.split("/")[1].rsplit("-", 1)[0]]
            assert (example.user_id, example.task) == (pair.user_id, pair.task)
            assert pair.chosen != pair.rejected
            for text in (pair.chosen, pair.rejected):
                assert check_tags(split_response(text).reasoning) == ""
            assert pair.margin is not None
            assert pair.margin > 0 or kind == "prp"


def test_the_manifest_says_simulated(finished: tuple[Path, str]) -> None:
    notes = json.loads((finished[0] / "manifest.json").read_text())["notes"]
    assert notes["simulated"] is True
    assert set(notes["models"].values()) == {"simulated-teacher", "simulated-judge", "simulated-tagger"}


def test_a_second_run_does_nothing_and_a_damaged_output_costs_nothing(
    finished: tuple[Path, str], examples: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = finished
    caplog.set_level(logging.INFO)
    before = {name: (folder / name).read_bytes() for name in FILES}
    paid = rows(folder / "ledger.sqlite")
    config = resolve(compose("build_chains", overrides(examples, folder)))
    run(config)
    assert "nothing to do" in caplog.text
    (folder / "prp.jsonl").write_text("damaged")
    run(config)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert rows(folder / "ledger.sqlite") == paid
    assert asked(caplog.text) == 0


def test_the_simulated_endpoint_ends_with_its_parent(examples: Path, tmp_path: Path) -> None:
    process = start(examples, tmp_path, "chains.simulated.latency_s=0.5")
    assert process.stdout is not None
    port = 0
    for line in process.stdout:
        if match := re.search(r"on 127\.0\.0\.1:(\d+)", line):
            port = int(match[1])
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert port
    process.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.05)
    pytest.fail(f"the simulated endpoint still listens on {port}")


def test_missing_and_broken_examples_are_one_clear_line(examples: Path, tmp_path: Path) -> None:
    config = resolve(compose("build_chains", overrides(tmp_path / "none", tmp_path)))
    with pytest.raises(
        StageError, match=r"train.parquet: no such file. Make it with `bash recipes/prepare_data.sh`"
    ):
        run(config)
    (tmp_path / "train.parquet").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"train.parquet: "):
        run(resolve(compose("build_chains", overrides(tmp_path, tmp_path / "out"))))


def test_rows_of_tasks_that_are_not_asked_for_are_counted(
    examples: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = resolve(compose("build_chains", [f"paths.examples={examples}", *SMALL]))
    draw = Draw(config, read_settings(config), ["lamp1", "lamp4"], examples / "train.parquet")
    assert len(list(draw.instances())) == 8
    assert "left out: lamp2 4, lamp3 4, lamp5 4, lamp7 4" in caplog.text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("chains.rollouts=many", "chains.rollouts=many"),
        ("+chains.typo=1", "chains.typo"),
        ("chains.judge_minimum=20", "chains.judge_minimum=20"),
        ("chains.endpoint=openai", "chains.teacher: chains.endpoint=openai needs base_url"),
        ("~chains.accuracy.above.lamp5", "chains.accuracy.above.lamp5: is missing"),
        ("chains.prompts.judge=nowhere.md", "chains.prompts.judge=nowhere.md: cannot be read"),
        ("chains.simulated.teacher={typo: 0.5}", "chains.simulated.teacher"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    examples: Path, tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises((ConfigError, StageError), match=re.escape(says)):
        run(resolve(compose("build_chains", overrides(examples, tmp_path, override))))


def test_the_papers_setting_asks_for_96000_chains() -> None:
    settings = read_settings(resolve(compose("build_chains", ["setting=paper"])))
    assert settings.instances_per_task * len(TASKS) * settings.rollouts == 96_000
    assert settings.teacher.model == "Qwen/Qwen3-235B-A22B-Thinking-2507"
    assert (settings.judge.model, settings.tagger.model, settings.judge_minimum) == ("gpt-4o", "gpt-4o", 15)
    assert settings.preferences.prp_minimum_gain is None


def test_no_deep_learning_library_is_imported() -> None:
    code = "import sys, data_pipeline.__main__; print({'torch', 'vllm', 'verl', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
