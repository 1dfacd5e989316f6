"""How fast scoring is: against rouge_score in the same run, and all of LaMP's dev rows from a file in one process.

`python tests/perf/scoring.py`; the last line of stdout is one JSON object of figures.
"""

import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rouge_score.rouge_scorer import RougeScorer

from tagpr.benchmarks.lamp import TASKS
from tagpr.metrics import ScoredTask, rouge, score_rows

REPEATS = 9
# Rows of the dev splits (S1) and words of a gold, as in LaMP: a headline, a paper's title, a tweet.
ROWS = {"lamp1": 1500, "lamp2": 1410, "lamp3": 2500, "lamp4": 1500, "lamp5": 1500, "lamp7": 1498}
WORDS = {"lamp4": 10, "lamp5": 10, "lamp7": 20}


def texts(count: int, words: int, seed: int) -> list[tuple[str, str]]:
    """Gold and prediction of about ``words`` words, with capitals and punctuation; they share about half of their words."""
    rng = random.Random(seed)
    # Word frequencies as in a language: the n-th most frequent has 1/n of the first.
    vocabulary = ["".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(2, 9))) for _ in range(3000)]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]

    def sentence(parts: list[str]) -> str:
        return " ".join(parts).capitalize() + "."

    pairs = []
    for _ in range(count):
        length = max(3, round(rng.gauss(words, words / 5)))
        gold = rng.choices(vocabulary, weights, k=length)
        said = [word if rng.random() < 0.5 else rng.choices(vocabulary, weights)[0] for word in gold]
        pairs.append((sentence(gold), sentence(said)))
    return pairs


def seconds(run: object, pairs: list[tuple[str, str]]) -> float:
    started = time.perf_counter()
    for gold, said in pairs:
        run(gold, said)  # type: ignore[operator]
    return time.perf_counter() - started


def against_rouge_score(words: int, rows: int) -> dict[str, float]:
    """The two in turn, so that whatever else the machine does meets both alike; median of the ratios."""
    official = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    pairs = texts(rows, words, seed=words)
    worst = max(
        max(
            abs(ours - theirs[name].fmeasure)
            for ours, name in zip(rouge(*pair), ("rouge1", "rougeL"), strict=True)
        )
        for pair in pairs
        for theirs in [official.score(*pair)]
    )
    runs = [(seconds(official.score, pairs), seconds(rouge, pairs)) for _ in range(REPEATS)]
    ratios = [theirs / ours for theirs, ours in runs]
    return {
        "words": words,
        "rows": rows,
        "rouge_score_us_per_row": 1e6 * median(theirs for theirs, _ in runs) / rows,
        "ours_us_per_row": 1e6 * median(ours for _, ours in runs) / rows,
        "ratio": median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "largest_difference": worst,
    }


def write_predictions(path: Path, times: int) -> int:
    """``times`` x 9,908 rows of the six tasks as JSON lines; returns the number of rows."""
    rng = random.Random(0)
    rows = 0
    with path.open("w", encoding="utf-8") as file:
        for name, count in ROWS.items():
            if name in WORDS:
                pairs = texts(count, WORDS[name], seed=7)
            else:
                labels = TASKS[name].labels
                pairs = [(rng.choice(labels), rng.choice([*labels, "no answer"])) for _ in range(count)]
            for _ in range(times):
                for gold, prediction in pairs:
                    row = {"task": name, "id": f"{name}:{rows}", "gold": gold, "prediction": prediction}
                    file.write(json.dumps(row) + "\n")
                    rows += 1
    return rows


def read_predictions(path: Path) -> Iterator[tuple[ScoredTask, str, str, str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield TASKS[row["task"]], row["id"], row["gold"], row["prediction"]


def score_file(path: Path) -> dict[str, float]:
    """Score a file; seconds, then in a second pass the peak of what Python allocated."""
    score_rows(read_predictions(path.with_name("few.jsonl")))  # what is imported or compiled once
    gc.collect()
    started = time.perf_counter()
    found = score_rows(read_predictions(path))
    elapsed = time.perf_counter() - started
    tracemalloc.start()
    again = score_rows(read_predictions(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == again
    return {
        "rows": sum(each["rows"] for each in found.values()),
        "seconds": elapsed,
        "peak_python_kib": peak / 1024,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(score_file(Path(sys.argv[1]))))
        return
    figures: dict[str, object] = {}
    for words, rows in ((20, 2000), (300, 60)):
        figures[f"rouge_{words}_tokens"] = found = against_rouge_score(words, rows)
        print(
            f"{words} tokens: {found['ratio']:.1f} x rouge_score ({found['ratio_lowest']:.1f}-{found['ratio_highest']:.1f})"
        )
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.jsonl"
        write_predictions(Path(folder) / "all.jsonl", 1)
        few.write_text("\n".join((Path(folder) / "all.jsonl").read_text().splitlines()[::100]) + "\n")
        for times in (1, 10):
            path = Path(folder) / f"{times}.jsonl"
            size = (write_predictions(path, times), path.stat().st_size)
            # Each in a process of its own: a process never gives its highest memory back.
            done = subprocess.run(
                [sys.executable, __file__, str(path)], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            assert found["rows"] == size[0]
            figures[f"file_{times}x"] = {**found, "file_mib": size[1] / 2**20}
            print(
                f"{size[0]} rows: {found['seconds']:.2f} s, {found['peak_python_kib']:.0f} KiB by Python, "
                f"{found['peak_rss_mib']:.0f} MiB in all"
            )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
