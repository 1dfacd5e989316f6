"""PRMU's training over Ray Train with two workers on the CPU (gloo): the weights of one worker, also after the death of one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from prmu_setup import ROOT
from prmu_tiny import make_base
from safetensors.torch import load_file
from test_prmu_train import habit_pairs, write

PATIENCE_S = 500.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    write(folder / "chains", habit_pairs(6, 8))
    make_base(folder / "base")
    return folder


def start(inputs: Path, name: str, workers: int, *settings: str) -> subprocess.Popen[str]:
    """The stage in a process of its own; its log goes to ``<name>.log``."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    with (inputs / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [
                sys.executable, "-m", "tagpr.prmu.train", f"run.outputs={inputs}", f"paths.base={inputs}/base",
                f"paths.chains={inputs}/chains", f"run.dir={inputs}/{name}", f"paths.prmu={inputs}/{name}/model",
                "train_prmu.batch_size=8", "train_prmu.learning_rate=1e-3", f"train_prmu.workers={workers}", *settings,
            ],
            env=environment, stdout=log, stderr=log, cwd=ROOT, text=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[str], inputs: Path, name: str) -> tuple[int, str]:
    """Exit status and log; never a hang."""
    try:
        status = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        pytest.fail(f"hangs: {(inputs / f'{name}.log').read_text()[-3000:]}")
    return status, (inputs / f"{name}.log").read_text()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray's processes that train."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill_one(process: subprocess.Popen[str], inputs: Path, name: str) -> None:
    """``kill -9`` of a worker once there is a checkpoint."""
    began = time.monotonic()
    while not list((inputs / name / "checkpoints").glob("step_*/state.json")):
        assert process.poll() is None, (inputs / f"{name}.log").read_text()[-3000:]
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.02)
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[-1].pid, signal.SIGKILL)


def same_weights(inputs: Path, one: str, other: str) -> None:
    first, second = (load_file(inputs / name / "model" / "model.safetensors") for name in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        # Gradients are summed in another order; dozens of updates of Adam carry the last bits further.
        assert torch.allclose(value, second[name], atol=1e-3), (name, (value - second[name]).abs().max())


LONG = ("train_prmu.epochs=12", "train_prmu.checkpoint_every=4")


@pytest.mark.slow
def test_a_worker_that_dies_costs_a_restart_and_changes_nothing(inputs: Path) -> None:
    status, log = finish(start(inputs, "alone", 1, *LONG), inputs, "alone")
    assert status == 0, log[-3000:]
    process = start(inputs, "killed", 2, *LONG)
    kill_one(process, inputs, "killed")
    status, log = finish(process, inputs, "killed")
    assert status == 0, log[-3000:]
    same_weights(inputs, "alone", "killed")
