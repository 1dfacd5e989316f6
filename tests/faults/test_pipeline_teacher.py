"""A real vLLM teacher, tiny and on the CPU, through the path that a large one on GPUs takes; its engine is killed once."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from pipeline_kills import ROOT, assert_nothing_left

from tagpr.benchmarks.lamp import read_split
from tagpr.benchmarks.minilamp.generate import write
from tagpr.benchmarks.storage import write_examples
from tagpr.configuration import compose, resolve
from tagpr.schema import Chain

pytestmark = pytest.mark.slow
ROLLOUTS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base after a few steps: it need not be good, only end its chains now and then."""
    import torch

    from tagpr.tiny_model.pretrain import build, train

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    config = resolve(compose("base", ["base.steps=100"]))
    tokenizer, tiny = build(config)
    train(config, tokenizer, tiny, folder / "metrics.jsonl")
    tiny.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def ray() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="teacher-", dir="/tmp"))
    yield folder
    assert_nothing_left(folder)
    shutil.rmtree(folder, ignore_errors=True)


def test_sixteen_rollouts_of_each_instance_through_vllm(model: Path, ray: Path, tmp_path: Path) -> None:
    write(
        tmp_path / "raw", 0, train_users=2, dev_seen_users=1, dev_unseen_users=1, train_rows_per_task=2, dev_rows_per_task=2
    )  # fmt: skip
    write_examples(tmp_path / "train.parquet", read_split(tmp_path / "raw", "lamp3", "train"))
    command = [
        sys.executable, "-m", "data_pipeline", f"paths.examples={tmp_path}", f"paths.chains={tmp_path / 'chains'}",
        "benchmark.tasks=[lamp3]", "chains.accuracy.above={}", f"chains.rollouts={ROLLOUTS}", "chains.stop_after=judge",
        "chains.teacher.backend=vllm", f"chains.teacher.model={model}", "chains.teacher.temperature=1.0",
        "chains.teacher.top_p=1.0", "chains.teacher.max_tokens=80", "chains.teacher.vllm.tensor_parallel_size=1",
        "chains.teacher.vllm.gpus=0", "chains.teacher.vllm.dtype=float32", "chains.teacher.vllm.max_model_len=256",
        "+chains.teacher.vllm.engine.enforce_eager=true", "+chains.teacher.vllm.engine.block_size=16",
        "~chains.preferences.extra_request.simulated_faults",
    ]  # fmt: skip
    environment = {
        **os.environ, "RAY_TMPDIR": str(ray), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    ledger = tmp_path / "chains" / "ledger.sqlite"
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 400
        killed = False
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            if not killed and len(replies(ledger)) > 4:
                killed = kill_engine(process.pid)
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert process.returncode == 0, said[-3000:]
    assert killed
    assert re.search(r"a worker died with \d+ requests; another one takes over", said)

    rows = replies(ledger)
    instances = {(sample, kind) for sample, kind, *_ in rows}
    for kind in ("teacher", "teacher_without_profile"):
        assert any(each == kind for _, each in instances)
    seeds = Counter((kind, sample) for sample, kind, *_ in rows if kind == "teacher")
    assert min(seeds.values()) >= ROLLOUTS, "every rollout is a request of its own"
    assert len({row[2] for row in rows if row[1] == "teacher"}) == sum(seeds.values()), "with its own seed"
    assert any(cached for *_, cached, _ in rows), "rollouts of a prompt share its prefix"
    assert {finish for *_, finish in rows} <= {"stop", "length"}
    with closing(sqlite3.connect(tmp_path / "chains" / "ledger.results.sqlite")) as database:
        texts = [row[0] for row in database.execute("SELECT reasoning FROM chain")]
    assert texts
    assert not [text for text in texts if "think>" in text]
    assert Chain.model_fields, "kept as chains"


def replies(ledger: Path) -> list[tuple[str, str, int, int, str]]:
    """(sample, kind, seed, cached tokens, finish reason) of each of the teacher's."""
    if not ledger.exists():
        return []
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
        with suppress(sqlite3.OperationalError):
            found = database.execute(
                "SELECT kind, parameters, cached_prompt_tokens, finish_reason FROM unit WHERE kind LIKE 'teacher%'"
            ).fetchall()
            return [
                (noted["sample"], kind, noted["seed"], cached, finish)
                for kind, parameters, cached, finish in found
                for noted in [json.loads(parameters)]
            ]
    return []


def kill_engine(driver: int) -> bool:
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.Error):
            if "VllmWorker" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                return True
    return False
