"""A whole TagPR in small: each fixture is one stage, run as a user runs it, on what the stage before it left."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SMALL = {
    "prepare_data": [
        "prepare_data.minilamp.train_users=12",
        "prepare_data.minilamp.dev_seen_users=4",
        "prepare_data.minilamp.dev_unseen_users=4",
        "prepare_data.minilamp.train_rows_per_task=40",
        "prepare_data.minilamp.dev_rows_per_task=4",
    ],
    "base": ["base.steps=120", "base.evaluation_rows=12"],
    "build_chains": ["chains.instances_per_task=30", "chains.rollouts=2"],
    "sft": ["trainer.total_epochs=2"],
    "train_prmu": ["train_prmu.epochs=1", "train_prmu.max_training_pairs=96"],
    "guided_rl": ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4"],
    "exploratory_rl": ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4"],
}


@dataclass
class Workplace:
    """A folder in which stages are run; ``outputs`` below it is what they make."""

    folder: Path

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def command(self, stage: str, *overrides: str) -> list[str]:
        return [sys.executable, "-m", "tagpr", stage, *SMALL.get(stage, []), *overrides]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}

    def run(self, stage: str, *overrides: str, status: int = 0, timeout_s: float = 600) -> str:
        """Run a stage to its end; returns what a person would have seen."""
        done = subprocess.run(
            self.command(stage, *overrides),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == status, done.stdout[-4000:]
        assert "Traceback" not in done.stdout, done.stdout[-4000:]
        return done.stdout

    def run_until(
        self, stage: str, *overrides: str, line: str, then: Callable[[int], None], timeout_s: float = 600
    ) -> tuple[int, str]:
        """Run a stage; when a line with ``line`` in it appears, call ``then(pid)``; returns (exit status, output)."""
        process = subprocess.Popen(
            self.command(stage, *overrides),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seen, waiting = [], True
        assert process.stdout is not None
        give_up = time.monotonic() + timeout_s
        for text in process.stdout:
            seen.append(text)
            if waiting and line in text:
                waiting = False
                then(process.pid)
            if time.monotonic() > give_up:
                process.kill()
                break
        status = process.wait(timeout=60)
        output = "".join(seen)
        assert not waiting, f"no line with {line!r}:\n{output[-4000:]}"
        return status, output


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("tagpr"))
    place.run("prepare_data")
    return place


@pytest.fixture(scope="session")
def based(prepared: Workplace) -> Workplace:
    prepared.run("base")
    return prepared


@pytest.fixture(scope="session")
def chained(prepared: Workplace) -> Workplace:
    prepared.run("build_chains")
    return prepared


@pytest.fixture(scope="session")
def tuned(based: Workplace, chained: Workplace) -> Workplace:
    chained.run("sft")
    return chained


@pytest.fixture(scope="session")
def rewarded(tuned: Workplace) -> Workplace:
    tuned.run("train_prmu")
    return tuned
