"""What our own parts of an RL step cost at 640 responses (128 prompts x 5): rewards, metrics, monitors, rows of rollouts.

    python tests/perf/rl_metrics.py [RUN ...]                                  each part alone, on made-up responses
    python tests/perf/rl_metrics.py --run --outputs FOLDER --work FOLDER       all of them inside a real run's steps

The last line of stdout is one JSON object of figures. Alone: milliseconds of processor time for one step, for two sizes of
texts, MiniLaMP's and the paper's. RUN is the folder of a finished run: its own rollouts are measured too, as a share of the
seconds that its steps took (processor time of ours over wall time of a step).

``--run`` is guided RL with PRMU from the models that a quickstart left in ``--outputs``, 128 prompts x 5 responses and four
updates a step. What the trainer's process does for us is timed by the wall, since the step waits for it; what the reward
manager does (``clocked_reward.py``; without the reward server, which is a process of its own) by the processor, since others
generate meanwhile. The first step is left out. ``share_of_step`` is the sum of the two over the time from step to step.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rl_run import finished_rl_run

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
        "finished": 1.0,
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


def driver(record: Path, stage: str, overrides: list[str]) -> None:
    """The stage in this process, with a clock on each of our parts of the trainer's; calls go to ``record``."""
    from tagpr.configuration import main as configured
    from tagpr.rl import launch
    from tagpr.rl.hardware import chosen, gpus_here

    calls: list[dict[str, Any]] = []
    train = launch.train_or_name_the_fault

    def clocked_train(config: Any) -> Any:
        # Not before: verl and Ray are imported here, which the launcher prepares for.
        put_clocks(calls)
        return train(config)

    launch.train_or_name_the_fault = clocked_train
    try:
        configured(stage, launch.run, [*chosen(overrides, gpus_here()), *overrides])
    finally:
        record.write_text(json.dumps(calls))


def put_clocks(calls: list[dict[str, Any]]) -> None:
    """Record when each of our parts ends, and its seconds."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    from tagpr.rl import trainer
    from tagpr.rl.advantage import NAME
    from tagpr.rl.gauges import Gauges
    from tagpr.runs import MetricsLog

    def clocked(part: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                spent = {"wall": time.perf_counter() - wall, "cpu": time.thread_time() - cpu}
                calls.append({"part": part, "at": time.time(), **spent})

        return outer

    ADV_ESTIMATOR_REGISTRY[NAME] = clocked("advantages", ADV_ESTIMATOR_REGISTRY[NAME])
    for part, owner, name in (
        ("metrics", trainer, "reward_metrics"),
        ("profile_use", trainer, "profile_use"),
        ("monitors", trainer.Watch, "observe"),
        ("rows", trainer.TagPRTrainer, "_reward_rows"),
        ("dump", trainer.TagPRTrainer, "_log_rollout_data"),
        ("metrics_file", MetricsLog, "log"),
        ("gauges", Gauges, "log"),
    ):
        setattr(owner, name, clocked(part, getattr(owner, name)))


def of_steps(given: argparse.Namespace) -> dict[str, Any]:
    """A real run, and what our parts took of its steps."""
    outputs, work = given.outputs.resolve(), given.work.resolve()
    run_dir, record = work / "parts", work / "calls.json"
    if run_dir.exists():
        raise SystemExit(f"{run_dir}: is there already. Give --work another folder.")
    work.mkdir(parents=True, exist_ok=True)
    finished_rl_run(
        run_dir,
        __file__, "--driver", str(record), "guided_rl", f"run.outputs={work}", "run.name=parts",
        f"paths.examples={outputs}/data/minilamp", f"paths.sft={outputs}/sft/model", f"paths.prmu={outputs}/prmu/model",
        f"data.train_batch_size={PROMPTS}", f"actor_rollout_ref.rollout.n={GROUP}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // 4}", f"trainer.total_training_steps={given.steps}",
        "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=1000",
        f"reward.reward_manager.module.path={Path(__file__).resolve().with_name('clocked_reward.py')}", *given.set,
    )  # fmt: skip
    dumps = sorted((run_dir / "rollouts").glob("*.jsonl"))
    first, last = (path.stat().st_mtime for path in (dumps[0], dumps[-1]))
    steps = len(dumps) - 1
    spent: dict[str, dict[str, float]] = defaultdict(lambda: {"wall": 0.0, "cpu": 0.0})
    for call in json.loads(record.read_text()):
        if first < call["at"] <= last + 0.05:
            spent[call["part"]]["wall"] += call["wall"] / steps
            spent[call["part"]]["cpu"] += call["cpu"] / steps
    rewards = [[json.loads(line)["reward"] for line in complete_lines(path)] for path in dumps[1:]]
    cpu_of_rewards = sum(row["own_cpu_s"] for rows in rewards for row in rows) / steps
    seconds = (last - first) / steps
    ours = sum(each["wall"] for each in spent.values())
    entries = [json.loads(line)["data"] for line in complete_lines(run_dir / "metrics.jsonl")][1:]
    return {
        "responses": len(rewards[-1]), "steps": steps, "step_s": round(seconds, 2),
        "phases_s": {
            name: round(median(entry[f"timing_s/{name}"] for entry in entries), 2)
            for name in ("gen", "old_log_prob", "adv", "update_actor", "update_weights")
        },
        "trainer_ms": {
            part: {key: round(1e3 * value, 1) for key, value in each.items()} for part, each in spent.items()
        },
        "reward_manager_cpu_ms": round(1e3 * cpu_of_rewards, 1),
        "trainer_share": round(ours / seconds, 4), "reward_manager_share": round(cpu_of_rewards / seconds, 4),
        "share_of_step": round((ours + cpu_of_rewards) / seconds, 4),
        "cpus": os.cpu_count(), "load": os.getloadavg()[0],
    }  # fmt: skip


def alone(runs: list[Path]) -> dict[str, Any]:
    """Each part by itself."""
    tokenizer = build_tokenizer(0, users=40)
    figures: dict[str, Any] = {}
    for name, (prompt_words, response_words) in SIZES.items():
        rows = batch(prompt_words, response_words, tokenizer)
        figures[name] = {"responses": len(rows), **parts(rows, tokenizer)}
        print(name, figures[name])
    for run in runs:
        figures[run.name] = of_run(run, tokenizer)
        print(run, figures[run.name])
    return figures


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]:
        driver(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        sys.exit()
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--outputs", type=Path, help="with --run: folder of a quickstart's outputs")
    parser.add_argument("--work", type=Path, help="with --run: where the run's folder is made, and stays")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="with --run: overrides")
    # What was started is ended with this, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = parser.parse_args()
    if given.run and not (given.outputs and given.work):
        parser.error("--run needs --outputs and --work")
    print(json.dumps(of_steps(given) if given.run else alone(given.runs)))
