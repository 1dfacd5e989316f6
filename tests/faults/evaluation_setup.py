"""What the fault tests of the evaluation share: a tiny model, prepared data, runs of the real stage as processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"

# Real text is long to the tiny model: its tokens are half words of another world.
SHORT = ["benchmark.max_response_tokens=60"]
DATA: dict[str, tuple[list[str], list[str]]] = {
    # name -> overrides of prepare_data and of evaluate
    "minilamp": ([], []),
    "lamp3_real": (
        ["benchmark=lamp", "benchmark.tasks=[lamp3]", f"benchmark.dir={SHARED}/lamp3_real"],
        # So few that some queries do not fit.
        ["benchmark=lamp", "benchmark.tasks=[lamp3]", "benchmark.max_prompt_tokens=1000", *SHORT],
    ),
    "pgraphrag": (
        ["benchmark=pgraphrag", "benchmark.splits=[dev]", f"benchmark.dir={SHARED}/pgraphrag"],
        ["benchmark=pgraphrag", "benchmark.max_prompt_tokens=2000", *SHORT],
    ),
}


def environment() -> dict[str, str]:
    """Quiet, small and without a network."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def available() -> list[str]:
    """The data sets that can be evaluated here."""
    folders = {"lamp3_real": SHARED / "lamp3_real", "pgraphrag": SHARED / "pgraphrag"}
    return [name for name in DATA if name not in folders or folders[name].is_dir()]


def prepare(outputs: Path, names: list[str]) -> None:
    """Make ``outputs/base/model`` and the prepared data, where they are missing."""
    if not (outputs / "base" / "model").is_dir():
        _tagpr("tagpr", "base", f"run.outputs={outputs}", "base.steps=150", "base.evaluation_rows=12")
    for name in names:
        _tagpr(
            "tagpr.benchmarks.prepare",
            f"run.outputs={outputs}",
            "prepare_data.download.enabled=false",
            *DATA[name][0],
        )


def _tagpr(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment(), cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)}: {done.stderr[-2000:]}")


def evaluation(outputs: Path, name: str, run: str, *overrides: str) -> list[str]:
    """The command that evaluates on one data set into ``outputs/<run>``."""
    return [
        sys.executable, "-m", "tagpr.evaluation", f"run.outputs={outputs}", f"run.name={run}",
        "evaluate.reward=false", "evaluate.bootstrap.resamples=200", *DATA[name][1], *overrides,
    ]  # fmt: skip


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start it in a session of its own, so that a kill takes all of it."""
    return subprocess.Popen(
        command, env={**environment(), **variables}, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout_s: float = 900) -> str:
    """What it wrote to standard error; anything but success ends the script."""
    output, errors = process.communicate(timeout=timeout_s)
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args[1:4])}: {errors[-3000:]}\n{output[-500:]}")  # type: ignore[index]
    return errors


def rows(path: Path) -> list[dict[str, Any]]:
    """Every line of a rows file; a line that is no JSON is an error."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def key(row: dict[str, Any]) -> tuple[str, int | None]:
    """What a row is known by."""
    return row["id"], row["seed"]
