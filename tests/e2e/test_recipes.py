"""Each training recipe for a few steps on the embedded default, through kills and faults, and what it leaves behind."""

import json
import math
import os
import signal
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.e2e.conftest import Workplace

pytestmark = pytest.mark.slow

GUIDED = [
    "trainer.total_training_steps=4",
    "trainer.save_freq=2",
    "trainer.test_freq=4",
    "prmu_client.deadline_s=4",
]


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    """Training metrics by step; fails on a line that is no JSON, on a step logged twice, and on a number that is none."""
    steps: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "training/global_step" not in record["data"]:
            continue
        assert record["step"] not in steps, f"step {record['step']} was logged twice"
        assert all(math.isfinite(value) for value in record["data"].values())
        steps[record["step"]] = record["data"]
    return steps


def address(run: Path) -> dict[str, Any]:
    return json.loads((run / "reward_server" / "server.json").read_text())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, todo = [], [pid]
    while todo:
        own = children.get(todo.pop(), [])
        found += own
        todo += own
    return found


def assert_all_gone(pids: list[int], within_s: float = 40.0) -> None:
    give_up = time.monotonic() + within_s
    while any(map(is_alive, pids)) and time.monotonic() < give_up:
        time.sleep(0.5)
    left = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids if is_alive(pid)]
    assert left == []


def test_sft_learns_and_hands_over_a_model(tuned: Workplace) -> None:
    losses = [
        record["data"]["train/loss"]
        for record in map(json.loads, (tuned.outputs / "sft" / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in record["data"]
    ]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0]
    assert (tuned.outputs / "sft" / "model" / "config.json").is_file()
    assert "finished" in tuned.run("sft")


def test_guided_rl_survives_its_drivers_and_its_reward_servers_death(rewarded: Workplace) -> None:
    run = rewarded.outputs / "guided_rl"
    started: list[int] = []

    def kill_driver(pid: int) -> None:
        started.extend(descendants(pid))
        os.kill(pid, signal.SIGKILL)

    status, _ = rewarded.run_until("guided_rl", *GUIDED, line="checkpoint of step 2 saved", then=kill_driver)
    assert status == -signal.SIGKILL
    assert len(started) > 5

    def kill_reward_server(_: int) -> None:
        os.kill(address(run)["pid"], signal.SIGKILL)

    status, seen = rewarded.run_until("guided_rl", *GUIDED, line="workers ready", then=kill_reward_server)
    assert status == 75
    assert "going on after step 2" in seen
    errors = [line for line in seen.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "reward server" in errors[0]
    assert address(run)["url"] in errors[0]
    assert "Traceback" not in seen
    assert sorted(metrics_of(run)) == [1, 2], "a step was logged without its rewards"

    seen = rewarded.run("guided_rl", *GUIDED)
    assert "going on after step 2" in seen
    steps = metrics_of(run)
    assert sorted(steps) == [1, 2, 3, 4]
    for metrics in steps.values():
        for component in ("verifiable", "repetition", "format", "tag", "prmu", "total"):
            assert f"reward/{component}/mean" in metrics
        assert 0 < metrics["reward/prmu/mean"] < 1
        # fp32 on both sides: what is left is rounding.
        assert metrics["training/rollout_probs_diff_max"] < 1e-4
        assert metrics["training/rollout_actor_probs_pearson_corr"] > 0.9999
    rows = [json.loads(line) for line in (run / "rollouts" / "000004.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 5
    for row in rows:
        reward = row["reward"]
        expected = (
            0.8 * (reward["verifiable"] + reward["repetition"]) * reward["format"]
            + 0.8 * reward["tag"]
            + 0.2 * reward["prmu"]
        )
        assert reward["total"] == pytest.approx(expected, abs=1e-9)
    assert (run / "model" / "model.safetensors").is_file()
    assert "finished" in rewarded.run("guided_rl", *GUIDED)
    # Ray's processes, vLLM and the reward server ended with the killed driver, although nobody could tell them to. Ray's own
    # agents take up to a minute to notice, which has passed by now.
    assert_all_gone(started)


@pytest.fixture(scope="session")
def few_reviews(rewarded: Workplace) -> list[str]:
    """Overrides for LaMP-3 of real users without dates, a few rows; none where there are no real data, and a warning."""
    real = REPOSITORY.parent / "shared" / "data" / "lamp3_real"
    if not real.is_dir():
        warnings.warn(f"no real data at {real}: exploratory RL is tested on MiniLaMP alone", stacklevel=1)
        return []
    few = rewarded.folder / "lamp3_few"
    few.mkdir()
    for split, rows in (("train", 24), ("dev", 6)):
        questions = json.loads((real / f"{split}_questions.json").read_text())[:rows]
        outputs = json.loads((real / f"{split}_outputs.json").read_text())
        chosen = {question["id"] for question in questions}
        outputs["golds"] = [gold for gold in outputs["golds"] if gold["id"] in chosen]
        (few / f"{split}_questions.json").write_text(json.dumps(questions))
        (few / f"{split}_outputs.json").write_text(json.dumps(outputs))
    return [
        "benchmark=lamp", f"benchmark.dir={few}", "benchmark.tasks=[lamp3]",
        "benchmark.max_prompt_tokens=400", "benchmark.max_response_tokens=40",
    ]  # fmt: skip


def test_exploratory_rl_and_evaluation(rewarded: Workplace, few_reviews: list[str]) -> None:
    """Exploratory RL takes real reviews the way it takes MiniLaMP; the evaluation compares all four models."""
    run = rewarded.outputs / "exploratory_rl"
    if not (rewarded.outputs / "guided_rl" / "model").is_dir():
        pytest.skip("guided RL left no model (its own test says why)")
    steps_2 = ["trainer.total_training_steps=2", "trainer.save_freq=2", "trainer.test_freq=-1"]
    rewarded.run("exploratory_rl", *steps_2, *few_reviews)
    steps = metrics_of(run)
    assert sorted(steps) == [1, 2]
    assert "reward/prmu/mean" not in steps[2]
    if few_reviews:
        assert "lamp3/reward/total/mean" in steps[2]
    seen = rewarded.run("evaluate", "evaluate.limit=12")
    assert "exploratory" in seen
    assert "reward (eq. 5)" in seen
    assert (rewarded.outputs / "evaluation" / "report.html").stat().st_size > 5000
    for label in ("base", "sft", "guided", "exploratory"):
        assert len((rewarded.outputs / "evaluation" / f"{label}.jsonl").read_text().splitlines()) == 12
