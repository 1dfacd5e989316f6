"""``kill -9`` of PRMU's training at random points; the last line is one JSON object.

    python tests/faults/prmu_training_kills.py [--kills 20] [--seed 0]

The real stage as a process, on a tiny model. It is killed at a random moment after each new checkpoint (in the middle of writing
the next one, too) and started again, until it has been killed so often and is left to end. What must hold: weights, user rows and
metrics are byte for byte those of a run that nobody disturbed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from prmu_tiny import make_base  # noqa: E402

from tagpr.schema import PreferencePair  # noqa: E402

RUN_TIMEOUT_S = 600.0
USERS, EACH = 8, 40
STEPS_PER_EPOCH = 36
"""Nine tenths of the pairs, eight at a time."""
CHECKPOINT_EVERY = 5


def run(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Train twice, once disturbed; returns figures."""
    chains = folder / "chains"
    chains.mkdir(parents=True)
    pairs = [_pair(user, number) for user in range(USERS) for number in range(EACH)]
    (chains / "prp.jsonl").write_text("")
    (chains / "pqp.jsonl").write_text("".join(pair.model_dump_json() + "\n" for pair in pairs))
    make_base(folder / "base")
    epochs = 1 + (kills + 4) * CHECKPOINT_EVERY * 2 // STEPS_PER_EPOCH
    _wait(_start(folder, "whole", epochs), "whole")
    rng = random.Random(seed)
    killed_at: list[int] = []
    while len(killed_at) < kills:
        before = killed_at[-1] if killed_at else 0
        process = _start(folder, "killed", epochs)
        step = _after_checkpoint(folder / "killed" / "checkpoints", before, process)
        if step is None:
            break
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(step)
    if process.poll() is None or process.returncode:
        _wait(_start(folder, "killed", epochs), "killed")
    same = {
        name: (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes()
        for name in ("model/model.safetensors", "model/users.json", "metrics.jsonl", "held_out.json")
    }
    return {
        "steps": epochs * STEPS_PER_EPOCH, "kills": len(killed_at), "killed_after_step": killed_at, "same": same,
        "left": sorted(path.name for path in (folder / "killed").glob("checkpoints*")),
        "ok": all(same.values()) and len(killed_at) == kills and not (folder / "killed" / "checkpoints").exists(),
    }  # fmt: skip


def _start(folder: Path, name: str, epochs: int) -> subprocess.Popen[bytes]:
    overrides = [
        f"run.outputs={folder}", f"run.name={name}", f"paths.prmu={folder}/{name}/model", f"paths.base={folder}/base",
        f"paths.chains={folder}/chains", "train_prmu.batch_size=8", f"train_prmu.epochs={epochs}",
        f"train_prmu.checkpoint_every={CHECKPOINT_EVERY}", "train_prmu.unseen_users=0.0",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tagpr.prmu.train", *overrides], cwd=folder, env=environment, stdout=log, stderr=log
        )  # fmt: skip


def _wait(process: subprocess.Popen[bytes], name: str) -> None:
    try:
        status = process.wait(RUN_TIMEOUT_S)
    finally:
        process.kill()
    if status:
        raise RuntimeError(f"the run {name} ended with status {status}; see its log")


def _after_checkpoint(folder: Path, before: int, process: subprocess.Popen[bytes]) -> int | None:
    """The first step after ``before`` that a checkpoint was kept of; None if the run ended first."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while time.monotonic() < deadline:
        steps = [int(path.name.removeprefix("step_")) for path in folder.glob("step_*")]
        if steps and max(steps) > before:
            return max(steps)
        if process.poll() is not None:
            return None
        time.sleep(0.01)
    process.kill()
    raise TimeoutError(f"no checkpoint after step {before}")


def _pair(user: int, number: int) -> PreferencePair:
    liked, other = ("boats", "rain") if user % 2 else ("rain", "boats")
    return PreferencePair(
        id=f"{user}-{number}", kind="pqp", task="lamp4", user_id=f"u{user}", prompt=f"movie {number}",
        chosen=f"a title about {liked}", rejected=f"a title about {other}",
    )  # fmt: skip


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), given.kills, given.seed)
    print(json.dumps(figures))
    sys.exit(0 if figures["ok"] else 1)


if __name__ == "__main__":
    main()
