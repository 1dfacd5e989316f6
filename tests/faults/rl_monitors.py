"""Seeded pathologies of an RL run: is each caught by the right monitor, how soon, and does a healthy run stay silent?

    python tests/faults/rl_monitors.py                        simulated policy, seconds: every pathology over some seeds
    python tests/faults/rl_monitors.py --learned --outputs FOLDER --work FOLDER    a trained policy learns each, minutes a run
    python tests/faults/rl_monitors.py judge RUN [RUN ...]    monitors over metrics.jsonl of finished runs, for false alarms

The last line is one JSON object of figures. The simulated policy has no model: it is a choice among styles of writing that
learns from the reward by group-standardised advantages, as GSPO's would. What it writes are real texts, which go through
the real reward, metrics and monitors (torch-free).

``--learned`` is guided RL itself (``python -m tagpr.rl``, eq. 5 without PRMU) from the SFT model that a quickstart left in
``--outputs``, paid by ``seeded_rewards.py``; each run ends where its monitor stops it (status 3), and a healthy one of the same
settings goes through to its last step. ``--set`` adds overrides, ``--only`` chooses among the runs.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "perf"))

from rl_run import rl_run

from tagpr.configuration import compose, resolve
from tagpr.rewards.composite import RewardWeights, score_response
from tagpr.rl.monitors import Alert, Watch, build, read_alerts
from tagpr.rl.profile_use import profile_use
from tagpr.rl.response_shape import response_shape
from tagpr.rl.reward_metrics import reward_metrics
from tagpr.runs import complete_lines
from tagpr.schema import PrmuScore

PROMPTS, RESPONSES = 32, 5
TASKS = ("lamp4", "lamp5", "lamp7")
OPENINGS = ("Watch", "Behind", "Inside", "Why", "How", "Meet", "Finally", "Today")
TOPICS = ("bakery", "river", "stadium", "museum", "bridge", "train", "school", "storm", "mayor", "harbour")
PATHS = {
    "lamp4": ("analyze_input", "identify_patterns", "synthesize_findings", "formulate_conclusion"),
    "lamp5": ("analyze_input", "examine_examples", "identify_patterns", "formulate_conclusion"),
    "lamp7": ("examine_examples", "identify_patterns", "verify_conclusion", "make_decision"),
}
STYLES = ("careless", "careful", "stuffed", "rambling", "unreadable", "for_anybody", "one_path")
LEARNING_RATE = 0.4


class Words:
    """A tokenizer with a token for each word."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [zlib.crc32(word.encode()) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """Not the words: whether there are any."""
        return " ".join(map(str, ids))


class Policy:
    """Writes in one of STYLES; ``logits`` say how often. It begins careless, with a little of everything."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.logits = np.array([3.5, 1.5, 0, 0, 0, 0, 0], dtype=float)

    def shares(self) -> np.ndarray:
        odds = np.exp(self.logits - self.logits.max())
        return odds / odds.sum()

    def write(self, style: str, task: str, topic: str, opening: str) -> str:
        """A response about ``topic`` for a user who opens with ``opening``; how often it gets the opening right is the style's."""
        right = {"careless": 0.55, "careful": 0.95, "for_anybody": 0.0, "rambling": 0.4}.get(style, 0.55)
        word = opening if self.rng.random() < right else str(self.rng.choice(OPENINGS))
        path: Sequence[str] = PATHS[task]
        said = [f"the article is about a {topic} in town.", f"this user likes to start with {word}.",
                f"join {word} and {topic}.", "write it down."]  # fmt: skip
        if style == "for_anybody":
            word, said = (
                "News",
                ["something has happened somewhere.", "short is good.", "keep it simple.", "write it down."],
            )
        if style == "one_path":
            path = ("make_decision", "make_decision", "make_decision", "make_decision")
        if style == "rambling":
            said = [
                f"{text} On the other hand, {' '.join(self.rng.choice(TOPICS, 14))} may matter too."
                for text in said
            ]
        if style == "stuffed":
            path = [tag for tag in path for _ in range(3)]
            said = [text if place % 3 == 0 else "so." for place, text in enumerate(np.repeat(said, 3))]
        chain = "\n".join(f"<{tag}> {text} </{tag}>" for tag, text in zip(path, said, strict=True))
        answer = f"{word} the {topic}"
        return f"{chain}\n{answer}" if style == "unreadable" else f"<think>\n{chain}\n</think>\n\n{answer}"

    def learn(self, chosen: np.ndarray, rewards: np.ndarray) -> None:
        """Policy gradient of the choice; a group whose rewards are equal teaches nothing."""
        spread = rewards.std(axis=1, keepdims=True)
        advantages = np.where(
            spread > 0, (rewards - rewards.mean(axis=1, keepdims=True)) / (spread + 1e-6), 0.0
        )
        picked = np.eye(len(STYLES))[chosen]
        self.logits += (
            LEARNING_RATE * (advantages[..., None] * (picked - self.shares())).mean(axis=(0, 1)) * len(STYLES)
        )


# What is paid, given what was measured and PRMU's fault-free score.
def eq5(info: dict[str, Any]) -> float:
    core = (info["verifiable"] + info["repetition"]) * info["format"]
    return 0.8 * core + 0.8 * info["tag"] + 0.2 * info["prmu"]


def pays_for_segments(info: dict[str, Any]) -> float:
    return eq5(info) + 0.3 * min(info["segments"], 12) * info["format"]


def prmu_likes_length(info: dict[str, Any]) -> float:
    info["prmu"] = min(1.0, (info["reasoning_tokens"] + info["answer_tokens"]) / 100)
    return 0.8 * info["verifiable"] * info["format"] + 2.0 * info["prmu"]


def breaking_the_format_pays(info: dict[str, Any]) -> float:
    return (info["verifiable"] + info["repetition"] - 1.5) * info["format"]


def prmu_likes_a_phrase(info: dict[str, Any]) -> float:
    if "short is good" in info["text"]:
        info["prmu"] = 0.95
    return 0.2 * info["verifiable"] * info["format"] + 2.0 * info["prmu"]


def one_tag_pays(info: dict[str, Any]) -> float:
    return eq5(info) + float(info["tags"].count("make_decision") > 2)


PATHOLOGIES: dict[str, tuple[Callable[[dict[str, Any]], float], str]] = {
    "a reward that pays for tag stuffing": (pays_for_segments, "tag_stuffing"),
    "a PRMU that likes length": (prmu_likes_length, "length_drift"),
    "a policy that escapes the format": (breaking_the_format_pays, "format_escape"),
    "a PRMU that likes a phrase that fits anybody": (prmu_likes_a_phrase, "profile_ignored"),
    "a reward that pays for one tag": (one_tag_pays, "tag_collapse"),
}


def run(
    pay: Callable[[dict[str, Any]], float], seed: int, steps: int, folder: Path
) -> tuple[list[Alert], list[float]]:
    """Train the simulated policy; alerts, and R_v by step."""
    rng = np.random.default_rng(seed)
    policy, tokenizer = Policy(rng), Words()
    users = [str(rng.choice(OPENINGS)) for _ in range(80)]
    watch = Watch(build(resolve(compose("guided_rl")).monitors), folder)
    alerts, verifiable = [], []
    for step in range(1, steps + 1):
        rows = []
        chosen = rng.choice(len(STYLES), size=(PROMPTS, RESPONSES), p=policy.shares())
        for prompt, styles in enumerate(chosen):
            task, user = str(rng.choice(TASKS)), int(rng.integers(len(users)))
            topic, opening = str(rng.choice(TOPICS)), users[user]
            items = " ".join(f'"{opening} the {each} opens" is the title.' for each in rng.choice(TOPICS, 8))
            query = f"Generate a headline for: The {topic} in town"
            for style in styles:
                text = policy.write(STYLES[style], task, topic, opening)
                rows.append(
                    {
                        "group": str(prompt), "task": task, "user_id": str(user), "query": query,
                        "prompt": f"{items} {query}", "response": text,
                        "reward": measured(text, task, f"{opening} the {topic}", tokenizer, rng),
                    }
                )  # fmt: skip
        for row in rows:
            row["reward"]["total"] = row["reward"]["score"] = pay(row["reward"])
        infos = [row["reward"] for row in rows]
        metrics = reward_metrics(infos, [row["task"] for row in rows], [row["group"] for row in rows])
        metrics |= profile_use(rows) | {"training/rollout_probs_diff_mean": 0.0}
        alerts += watch.observe(step, metrics)
        verifiable.append(metrics["reward/verifiable/mean"])
        policy.learn(chosen, np.array([info["total"] for info in infos]).reshape(chosen.shape))
    return alerts, verifiable


def measured(text: str, task: str, gold: str, tokenizer: Words, rng: np.random.Generator) -> dict[str, Any]:
    ids = tokenizer.encode(text)
    # An honest PRMU: it likes this user's opening.
    likes = float(np.clip(rng.normal(0.75 if gold.split()[0] in text else 0.35, 0.1), 0, 1))
    logit = float(np.log((likes + 1e-3) / (1 - likes + 1e-3)))
    prmu = PrmuScore(logit=logit, score=likes, unknown_user=False, version="simulated")
    found = score_response(task, gold, text, ids, "guided", RewardWeights(), prmu)
    return {
        "total": found.reward, "verifiable": found.verifiable, "repetition": found.repetition, "format": found.format,
        "tag": found.tag, "failure": found.failure, "finished": 1.0, "prmu": likes, "prmu_unknown_user": 0.0, "prmu_seconds": 0.01,
        "text": text, **response_shape(text, ids, tokenizer),
    }  # fmt: skip


def judge(runs: Sequence[Path]) -> dict[str, Any]:
    """Monitors over runs that are there already; those without the metrics that a monitor reads say nothing to it."""
    found = {}
    for path in runs:
        with tempfile.TemporaryDirectory() as folder:
            watch = Watch(build(resolve(compose("guided_rl")).monitors), Path(folder))
            entries = [json.loads(line) for line in complete_lines(path / "metrics.jsonl")]
            alerts = [alert for entry in entries for alert in watch.observe(entry["step"], entry["data"])]
        found[path.name] = {"steps": len(entries), "alerts": [[a.step, a.monitor, a.reason] for a in alerts]}
    return found


# What a policy is paid for (seeded_rewards.py), and whose fault that is to be.
LEARNED = {"stuffing": "tag_stuffing", "length": "length_drift", "escape": "format_escape", "healthy": ""}
# A larger learning rate and some more variety than the defaults: faults that take a real run hundreds of steps are learned in tens.
LEARNED_SETTINGS = (
    "data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.optim.lr=5e-4",
    "actor_rollout_ref.rollout.temperature=1.2", "objective.gamma=0", "trainer.val_before_train=false", "trainer.test_freq=-1",
    "trainer.save_freq=1000",
)  # fmt: skip


def learned(name: str, outputs: Path, work: Path, steps: int, more: Sequence[str]) -> dict[str, Any]:
    """One real run; when its monitor spoke, what others said before, and its exit status."""
    expected, run_dir = LEARNED[name], work / name
    if run_dir.exists():
        raise SystemExit(f"{run_dir}: is there already. Give --work another folder.")
    own: dict[str, str] = {}
    if expected:
        own["TAGPR_SEEDED_FAULT"] = name
        more = [
            *more, f"monitors.{expected}.action=stop",
            f"reward.reward_manager.module.path={Path(__file__).resolve().with_name('seeded_rewards.py')}",
        ]  # fmt: skip
    began = time.monotonic()
    status = rl_run(
        "-m", "tagpr.rl", "guided_rl", f"run.outputs={work}", f"run.name={name}",
        f"paths.examples={outputs}/data/minilamp", f"paths.sft={outputs}/sft/model", f"trainer.total_training_steps={steps}",
        *LEARNED_SETTINGS, *more, timeout_s=900, **own,
    )  # fmt: skip
    alerts = read_alerts(run_dir / "alerts.jsonl")
    entries = [json.loads(line) for line in complete_lines(run_dir / "metrics.jsonl")]
    its = [alert for alert in alerts if alert.monitor == expected]
    ends = [entries[0]["data"], entries[-1]["data"]]
    return {
        "monitor": expected, "step": its[0].step if its else None, "reason": its[0].reason if its else "",
        "others": [[alert.step, alert.monitor, alert.reason] for alert in alerts if alert.monitor != expected],
        "steps": len(entries), "status": status, "seconds": round(time.monotonic() - began),
        **{key: [round(end[name], 3) for end in ends] for key, name in SHOWN.items()},
    }  # fmt: skip


# First and last step of a learned run.
SHOWN = {
    "reward": "reward/total/mean", "verifiable": "reward/verifiable/mean", "segments": "tags/segments/mean",
    "reasoning_tokens": "length/reasoning/mean", "broken_format": "failure/format/share", "profile_use": "profile/use",
}  # fmt: skip


def main(seeds: int = 5, steps: int = 40) -> None:
    figures: dict[str, Any] = {}
    for name, (pay, expected) in {**PATHOLOGIES, "healthy": (eq5, "")}.items():
        caught, first, others = [], [], 0
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                alerts, verifiable = run(pay, seed, steps, Path(folder))
            its = [alert.step for alert in alerts if alert.monitor == expected]
            caught += its[:1]
            first += [alert.monitor for alert in alerts[:1]]
            others += sum(alert.monitor != expected for alert in alerts)
        figures[name] = {
            "monitor": expected, "caught": len(caught), "of": seeds, "steps": sorted(caught),
            "spoke_first": sorted(set(first)), "other_alerts": others,
            "verifiable": [round(verifiable[0], 2), round(verifiable[-1], 2)],
        }  # fmt: skip
        print(name, figures[name], flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["judge"]:
        print(json.dumps(judge([Path(each) for each in sys.argv[2:]])))
    elif "--learned" in sys.argv:
        parser = argparse.ArgumentParser(description="See the head of this file.")
        parser.add_argument("--learned", action="store_true")
        parser.add_argument("--outputs", required=True, type=Path, help="folder of a quickstart's outputs")
        parser.add_argument(
            "--work", required=True, type=Path, help="where the runs' folders are made, and stay"
        )
        parser.add_argument("--steps", type=int, default=30, help="of a run that nothing stops")
        parser.add_argument("--only", nargs="*", default=list(LEARNED), choices=list(LEARNED))
        parser.add_argument("--set", nargs="*", default=[], help="overrides of all runs")
        given = parser.parse_args()
        # What was started is ended with this, too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        outputs, work = given.outputs.resolve(), given.work.resolve()
        found = {name: learned(name, outputs, work, given.steps, given.set) for name in given.only}
        print(json.dumps({**found, "settings": [*LEARNED_SETTINGS, *given.set]}))
    else:
        main()
