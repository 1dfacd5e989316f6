"""``kill -9`` an evaluation at many points, run it again, compare with a run that nobody disturbed.

``python tests/faults/evaluation_kills.py [--kills 4] [--outputs FOLDER] [--data NAME ...]``: the real stage with vLLM and a tiny
model on MiniLaMP's six tasks, on real LaMP-3 reviews and on PGraphRAG's 126 users. Each must end with no row twice, none lost,
every row and the table byte for byte those of the undisturbed run. The last line is one JSON object of figures.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.faults.evaluation_setup import available, evaluation, finish, key, prepare, rows, start

# Few at a time and written at once: kills meet it at work.
SLOWLY = ["evaluate.only=[base]", "evaluate.engine.max_num_seqs=4", "evaluate.engine.write_every_s=0"]


def disturbed(outputs: Path, name: str, kills: int, *overrides: str) -> dict[str, Any]:
    """Evaluate once in peace and once with so many kills; figures, and ``problems`` that should be empty."""
    overrides = (*SLOWLY, *overrides)
    whole, broken = (outputs / f"{name}-{how}" for how in ("whole", "killed"))
    finish(start(evaluation(outputs, name, whole.name, *overrides)))
    expected = rows(whole / "base.jsonl")
    file = broken / "base.jsonl"
    found = []
    for number in range(kills):
        # One while the engine starts, the others at even distances between the first row and the last.
        wanted = round(len(expected) * number / kills)
        found.append(_killed_at(evaluation(outputs, name, broken.name, *overrides), file, wanted))
    last = start(evaluation(outputs, name, broken.name, *overrides))
    finish(last)
    answered = rows(file)
    problems = []
    ids = [key(row) for row in answered]
    if len(set(ids)) != len(ids):
        problems.append("a row is there twice")
    if set(ids) != {key(row) for row in expected}:
        problems.append("rows are missing, or there are others")
    if {key(row): row for row in answered} != {key(row): row for row in expected}:
        problems.append("rows differ")
    for made in ("table.md", "summary.json"):
        if (broken / made).read_bytes() != (whole / made).read_bytes():
            problems.append(f"{made} differs")
    unanswered = [_unanswered(folder / "base.unanswered.jsonl") for folder in (whole, broken)]
    if unanswered[0] != unanswered[1]:
        problems.append("unanswered rows differ")
    return {
        "rows": len(expected),
        "unanswered": len(unanswered[0]),
        "kills": kills,
        "rows_at_kill": found,
        "torn_lines_mended": _count(broken / "engine.log", "torn by a kill"),
        "problems": problems,
    }


def _killed_at(command: list[str], file: Path, wanted: int) -> int:
    """Kill the run once the file has so many rows, torn lines included; how many whole ones it had."""
    process = start(command)
    deadline = time.monotonic() + 600
    begun = time.monotonic()
    while time.monotonic() < deadline:
        lines = file.read_bytes().count(b"\n") if file.exists() else 0
        if (wanted and lines >= wanted) or (not wanted and time.monotonic() - begun > 8):
            break
        if process.poll() is not None:
            raise SystemExit(f"ended before it could be killed: {process.communicate()[1][-2000:]}")
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, process.returncode
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _unanswered(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines()) if path.exists() else []


def _count(path: Path, text: str) -> int:
    return path.read_text(errors="replace").count(text) if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--outputs", type=Path)
    parser.add_argument("--data", nargs="*", default=available())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        outputs = (arguments.outputs or Path(folder)).resolve()
        prepare(outputs, arguments.data)
        figures: dict[str, Any] = {}
        for name in arguments.data:
            # Sampled answers too, where they are quick.
            more = ["evaluate.seeds=[1]"] if name == "minilamp" else []
            figures[name] = disturbed(outputs, name, arguments.kills, *more)
            print(name, figures[name], flush=True)
    each = list(figures.values())
    print(
        json.dumps(
            {
                "data": list(figures),
                "rows": sum(one["rows"] for one in each),
                "unanswered": sum(one["unanswered"] for one in each),
                "kills": sum(one["kills"] for one in each),
                "problems": [
                    f"{name}: {problem}" for name in figures for problem in figures[name]["problems"]
                ],
            }
        )
    )
    if any(one["problems"] for one in each):
        sys.exit(1)


if __name__ == "__main__":
    main()
