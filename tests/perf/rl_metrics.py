"""What metrics and monitors of an RL step cost at 640 responses (128 prompts x 5), beside the rewards they are made of.

`python tests/perf/rl_metrics.py [RUN]`; the last line of stdout is one JSON object of figures: milliseconds of processor time
for one step. Two sizes of texts: MiniLaMP's and the paper's. RUN is the folder of a finished run: its own rollouts are
measured too, as a share of the seconds that its steps took (processor time of ours over wall time of a step).
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tagpr.configuration import compose, resolve
from tagpr.rewards.composite import RewardWeights, score_response
from tagpr.rl.monitors import Watch, build
from tagpr.rl.profile_use import profile_use
from tagpr.rl.response_shape import response_shape
from tagpr.rl.reward_metrics import reward_metrics
from tagpr.runs import complete_lines
from tagpr.tags import format_response
from tagpr.tiny_model.tokenizer import build_tokenizer
from tagpr.vocabulary import vocabulary

PROMPTS, GROUP, REPEATS = 128, 5, 5
# words of a prompt, words of a response
SIZES = {"minilamp": (60, 30), "paper": (1500, 400)}
TASKS = ("lamp4", "lamp5", "lamp7")


def batch(prompt_words: int, response_words: int, tokenizer: Any) -> list[dict[str, Any]]:
    rng = random.Random(0)
    known = ["".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(2, 9))) for _ in range(5000)]
    rows = []
    for prompt in range(PROMPTS):
        query = " ".join(rng.choices(known, k=max(5, prompt_words // 9)))
        text = f"{' '.join(rng.choices(known, k=prompt_words))} {query}"
        for _ in range(GROUP):
            tags = rng.choices(list(vocabulary()), k=5)
            chain = " ".join(
                f"<{tag}> {' '.join(rng.choices(known, k=max(2, response_words // 6)))} </{tag}>"
                for tag in tags
            )
            response = format_response(chain, " ".join(rng.choices(known, k=6)))
            rows.append(
                {
                    "group": str(prompt), "task": TASKS[prompt % 3], "user_id": str(prompt % 90), "query": query,
                    "prompt": text, "response": response, "gold": " ".join(rng.choices(known, k=6)),
                    "ids": tokenizer.encode(response, add_special_tokens=False),
                }
            )  # fmt: skip
    return rows


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of processor time, median of REPEATS, and what came out."""
    took = []
    for _ in range(REPEATS):
        began = time.process_time()
        found = work()
        took.append(1e3 * (time.process_time() - began))
    return median(took), found


def parts(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, float]:
    """Milliseconds of each part for one step's rows; fills in their rewards."""

    def rewards() -> list[dict[str, Any]]:
        return [
            reward_of(score_response(
                row["task"], row["gold"], row["response"], row["ids"], "guided", RewardWeights(gamma=0.0), None
            ))
            for row in rows
        ]  # fmt: skip

    spent: dict[str, float] = {}
    spent["rewards"], infos = timed(rewards)
    spent["shapes"], shapes = timed(
        lambda: [response_shape(row["response"], row["ids"], tokenizer) for row in rows]
    )
    infos = [info | shape for info, shape in zip(infos, shapes, strict=True)]
    tasks, groups = [row["task"] for row in rows], [row["group"] for row in rows]
    spent["metrics"], metrics = timed(lambda: reward_metrics(infos, tasks, groups))
    spent["profile_use"], used = timed(lambda: profile_use(rows))
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(build(resolve(compose("guided_rl")).monitors), Path(folder))
        # Late in the paper's run: all series are long.
        for step in range(845):
            watch.observe(step, metrics | used)
        spent["monitors"], _ = timed(lambda: watch.observe(846, metrics | used))
    return {name: round(value, 2) for name, value in spent.items()}


def reward_of(found: Any) -> dict[str, Any]:
    return {
        "total": found.reward, "verifiable": found.verifiable, "repetition": found.repetition,
        "format": found.format, "tag": found.tag, "failure": found.failure,
    }  # fmt: skip


def of_run(run: Path, tokenizer: Any) -> dict[str, Any]:
    """The same for the last dumped step of a run, and the share of its steps' median seconds."""
    rows = [json.loads(line) for line in complete_lines(max((run / "rollouts").glob("*.jsonl")))]
    for row in rows:
        row["ids"] = tokenizer.encode(row["response"], add_special_tokens=False)
        row.setdefault("query", "")
    spent = parts(rows, tokenizer)
    entries = [json.loads(line)["data"] for line in complete_lines(run / "metrics.jsonl")]
    seconds = median(entry["timing_s/step"] for entry in entries if "timing_s/step" in entry)
    added = sum(value for name, value in spent.items() if name != "rewards")
    return {
        "responses": len(rows), **spent, "step_s": round(seconds, 2), "share_of_step": round(added / 1e3 / seconds, 4)
    }  # fmt: skip


def main() -> None:
    tokenizer = build_tokenizer(0, users=40)
    figures: dict[str, Any] = {}
    for name, (prompt_words, response_words) in SIZES.items():
        rows = batch(prompt_words, response_words, tokenizer)
        figures[name] = {"responses": len(rows), **parts(rows, tokenizer)}
        print(name, figures[name])
    for run in sys.argv[1:]:
        figures[Path(run).name] = of_run(Path(run), tokenizer)
        print(run, figures[Path(run).name])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
