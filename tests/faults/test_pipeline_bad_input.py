"""What goes wrong around the pipeline is one line that names a key or a file, and the same command goes on afterwards."""

import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pipeline_kills import KEY_VARIABLE, MOST_IN_FLIGHT, ROLES, RUN_TIMEOUT_S, TASKS, Bench, Job

TOKEN = "0123456789abcdef" * 4
STATE_API = (
    *(f"api/v0/{what}?detail=true" for what in ("actors", "tasks", "workers", "nodes", "jobs", "objects", "runtime_envs")),
    "api/jobs/", "logical/actors", "nodes?view=details", "api/cluster_status", "events", "api/v0/cluster_metadata",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Path(tmp_path_factory.mktemp("bad")))


@pytest.fixture
def job(bench: Bench) -> Iterator[Job]:
    with bench.job() as made:
        yield made


def test_keys_endpoints_budgets_and_ledgers(bench: Bench, job: Job) -> None:
    """One job that fails in every way in turn, and then gets through as if nothing had been."""
    line = job.fail(**{KEY_VARIABLE: ""})
    assert f"chains.teacher.key_variable={KEY_VARIABLE}: this environment variable is not set" in line
    assert not job.billed

    line = job.fail(**{KEY_VARIABLE: "wrong-key"})
    assert re.search(
        rf"chains\.teacher: {job.proxy.url} refuses the key in {KEY_VARIABLE} \(status 401\)", line
    )
    assert "wrong-key" not in job.log.read_text()
    assert not job.billed

    line = job.fail("chains.judge.base_url=http://127.0.0.1:9/v1", "chains.retries=1")
    assert "chains.judge.base_url=http://127.0.0.1:9/v1: no answer after 2 tries" in line
    assert 0 < job.rows() < bench.calls
    assert job.billed - job.rows() <= MOST_IN_FLIGHT

    prices = "{" + ", ".join(
        f"simulated-{role}: {{prompt: 10, cached_prompt: 5, completion: 10}}" for role in ROLES
    ) + "}"  # fmt: skip
    paid = job.rows()
    line = job.fail(
        f"+chains.prices={prices}", "chains.budget.dollars=1", "chains.budget.yes=true", "chains.teacher.max_tokens=4000"
    )  # fmt: skip
    assert "chains.teacher.max_tokens=32768, this run has 4000" in line, (
        "max_tokens is part of what a reply is"
    )
    line = job.fail(f"+chains.prices={prices}", "chains.budget.dollars=1", "chains.budget.yes=true")
    assert re.search(r"chains\.budget\.dollars=1: reached \(\$[\d.]+ is spent", line), line
    assert job.rows() >= paid

    line = job.fail("chains.judge.temperature=0.5")
    assert re.search(
        r"its \d+ judge replies were paid for with chains\.judge\.temperature=0\.0, this run has 0\.5", line
    )

    lost = job.billed - job.rows()
    job.finish()
    job.proxy.settle()
    bench.check(job)
    assert job.billed_again <= lost


def test_a_full_disk(bench: Bench, job: Job) -> None:
    disk = job.folder / "chains"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        line = job.fail()
        assert re.search(
            r"\.sqlite: SQLite cannot (use|write) this file \(.*(full|I/O).*\)\. Check the disk", line
        ), line
        kept, lost = job.rows(), job.billed - job.rows()
        assert kept
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        job.finish()
        job.proxy.settle()
        bench.check(job)
        assert job.billed_again <= lost <= MOST_IN_FLIGHT + kept
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_broken_rows_are_named_before_anything_is_paid(job: Job) -> None:
    source = job.examples / "train.parquet"
    whole = source.read_bytes()
    try:
        table = pq.read_table(source)
        ids = table["id"].to_pylist()
        ids[7] = ids[3]
        pq.write_table(table.set_column(0, "id", [ids]), source)
        assert re.search(rf"train\.parquet:8: id '{ids[3]}' is that of row 4 too", job.fail())
        source.write_bytes(whole[: len(whole) // 2])
        assert "train.parquet: is no parquet file of examples" in job.fail()
    finally:
        source.write_bytes(whole)
    assert not job.billed
    assert len(TASKS) == 6


def test_the_key_is_in_no_command_line_log_state_api_answer_ledger_batch_or_output(job: Job) -> None:
    key = job.environment[KEY_VARIABLE]
    process = job.start(
        "chains.ray.dashboard=true", "chains.judge.mode=batch", "chains.batch.poll_s=0.2",
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not (
            job.billed > 20
            and (found := re.search(r"dashboard: (http://127\.0\.0\.1:\d+)", job.log.read_text()))
        ):
            assert process.poll() is None, job.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Ray tells of its tasks a second or so after they began.
        while "HttpWorker" not in ask(f"{found[1]}/api/v0/tasks?detail=true"):
            assert process.poll() is None, job.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answers = {path: ask(f"{found[1]}/{path}") for path in STATE_API}
        commands = command_lines()
        environments = [
            text for text in answers["api/v0/runtime_envs?detail=true"].splitlines() if KEY_VARIABLE in text
        ]
    finally:
        assert process.wait(RUN_TIMEOUT_S) == 0, job.log.read_text()[-3000:]
    assert "HttpWorker" in answers["api/v0/actors?detail=true"], "the answers are about this job"
    assert "HttpWorker" in answers["api/v0/tasks?detail=true"]
    assert not [path for path, text in answers.items() if key in text]
    written = [path for root in (job.folder, job.ray) for path in root.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"ledger.sqlite", "manifest.json", "log", "gcs_server.out"}
    assert not [path for path in written if key.encode() in path.read_bytes()]
    batches = [path.name for path in written if path.parent.name == "simulated-batches"]
    assert [name for name in batches if name.startswith("batch_")], "there were batches"
    assert any("HttpWorker" in line for line in commands), "seen while it ran"
    assert any(f"chains.judge.key_variable={KEY_VARIABLE}" in line for line in commands)
    assert not [line for line in commands if key in line]
    assert not environments, "not even its name is in a runtime environment"
    assert KEY_VARIABLE in json.dumps(json.loads((job.folder / "chains" / "manifest.json").read_text())), (
        "the variable's name may be there"
    )
    assert os.environ.get(KEY_VARIABLE) is None


def command_lines() -> list[str]:
    return subprocess.check_output(["ps", "-eww", "-o", "args"], text=True).splitlines()


def ask(url: str) -> str:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        return str(error.read().decode())
