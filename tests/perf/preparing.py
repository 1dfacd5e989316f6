"""Preparing a large file: rows and megabytes a second, and memory that does not grow with the file.

    python tests/perf/preparing.py [megabytes=300]

LaMP-3-like files of two sizes are prepared by the stage itself, each in a process of its own; the peer in the same run is what the
official code does first, ``json.load`` of the whole file. The last line is one JSON object of figures.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [f"word{number}" for number in range(5000)]
ITEMS = 100

PEER = """
import json, sys
rows = json.load(open(sys.argv[1], encoding="utf-8"))
print(len(rows))
"""


def write(folder: Path, megabytes: float) -> tuple[int, float]:
    """Write both splits of LaMP-3, the training questions of about that size; returns rows and megabytes."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    pool = [" ".join(draw.choices(WORDS, k=110)) for _ in range(20_000)]

    def question(number: int) -> dict[str, object]:
        profile = [
            {
                "id": str(n),
                "text": draw.choice(pool),
                "score": str(n % 5 + 1),
                "date": f"2012-{n % 12 + 1:02}-03",
            }
            for n in range(ITEMS)
        ]
        text = f"What is the score of the following review? review: {number} {draw.choice(pool)}"
        return {"id": str(number), "input": text, "user_id": f"u{number // 2}", "profile": profile}

    for split, size in (("train", megabytes), ("dev", 0.5)):
        path = folder / f"{split}_questions.json"
        rows = 0
        with path.open("w", encoding="utf-8") as stream:
            stream.write("[")
            while stream.tell() < size * 1e6:
                stream.write((", " if rows else "") + json.dumps(question(rows)))
                rows += 1
            stream.write("]")
        golds = [{"id": str(number), "output": "3"} for number in range(rows)]
        (folder / f"{split}_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
        if split == "train":
            written = rows, path.stat().st_size / 1e6
    return written


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds on the clock and of processor time, and the most memory in MB that the process had at a time."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:4]}: status {process.returncode}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def main(megabytes: float) -> None:
    """Measure and print."""
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, size in (("quarter", megabytes / 4), ("whole", megabytes)):
            folder = Path(scratch) / name
            rows, written = write(folder, size)
            overrides = [
                "benchmark=lamp",
                "benchmark.tasks=[lamp3]",
                f"benchmark.dir={folder}",
                f"run.outputs={scratch}/{name}-outputs",
            ]
            seconds, cpu_s, memory = measure([sys.executable, "-m", "tagpr.benchmarks.prepare", *overrides])
            _, peer_s, peer_memory = measure(
                [sys.executable, "-c", PEER, str(folder / "train_questions.json")]
            )
            figures[name] = {
                "megabytes": round(written),
                "rows": rows,
                "seconds": round(seconds, 1),
                "cpu_s": round(cpu_s, 1),
                "rows_per_s": round(rows / seconds),
                "megabytes_per_s": round(written / seconds, 1),
                "ms_per_row": round(1000 * seconds / rows, 2),
                "peak_memory_mb": round(memory),
                "json_load_cpu_s": round(peer_s, 1),
                "json_load_peak_memory_mb": round(peer_memory),
                "cpu_ratio_to_json_load": round(cpu_s / peer_s, 2),
                "memory_ratio_to_json_load": round(memory / peer_memory, 2),
            }
            print(name, figures[name], flush=True)
    whole, quarter = figures["whole"], figures["quarter"]
    assert isinstance(whole, dict)
    assert isinstance(quarter, dict)
    figures["memory_growth_for_four_times_the_file"] = round(
        whole["peak_memory_mb"] / quarter["peak_memory_mb"], 2
    )
    figures["minutes_for_lamp3_at_1700_megabytes"] = round(1700 / whole["megabytes_per_s"] / 60, 1)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 300)
