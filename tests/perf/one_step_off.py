"""What one-step-off training (``trainer.v1.trainer_mode=colocate_async``) costs and brings, beside synchronous training.

    python tests/perf/one_step_off.py --outputs FOLDER --work FOLDER [--seeds 0 1] [--steps 16]

Guided RL with PRMU from the SFT model that a quickstart left in ``--outputs``, 16 prompts x 5 responses a step, the modes in
turns, so that a busy minute of the machine meets both. Runs in ``--work`` that are finished already are only read again.

The last line of standard output is one JSON object: by mode the reward of each step and seed, its mean over the last 4 steps
(total and verifiable), R_v of greedy answers to the dev rows after the last step, seconds a step (median of the time between
the dumps of two steps), and by how many versions of the weights responses lag behind; then ratio and differences of the modes.
"""

import argparse
import json
import os
import signal
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from rl_run import finished_rl_run

MODES = ("sync", "colocate_async")
WINDOW, WARM_UP = 4, 3
SETTINGS = (
    "data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "trainer.val_before_train=false",
)  # fmt: skip
STALENESS = "training/off_policy/trajectory_staleness_worst/"


def train(mode: str, seed: int, given: argparse.Namespace) -> Path:
    """The run's folder; trained now, unless it is finished."""
    outputs, name = given.outputs.resolve(), f"{mode}-{seed}"
    run_dir: Path = given.work.resolve() / name
    return finished_rl_run(
        run_dir,
        "-m", "tagpr.rl", "guided_rl", f"run.outputs={run_dir.parent}", f"run.name={name}",
        f"run.seed={seed}", f"trainer.v1.trainer_mode={mode}", f"paths.examples={outputs}/data/minilamp",
        f"paths.sft={outputs}/sft/model", f"paths.prmu={outputs}/prmu/model", f"trainer.total_training_steps={given.steps}",
        f"trainer.test_freq={given.steps}", f"trainer.save_freq={given.steps}", *SETTINGS, *given.set,
    )  # fmt: skip


def figures(run_dir: Path) -> dict[str, Any]:
    """Of one run."""
    found = [json.loads(line)["data"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in found if "timing_s/step" in entry]
    dumps = sorted((run_dir / "rollouts").glob("[0-9]*.jsonl"))
    ends = [path.stat().st_mtime for path in dumps]
    # The last step also saves and validates, after its dump.
    between = [later - before for before, later in pairwise(ends)][WARM_UP - 1 :]
    validated = [
        value
        for name, value in found[-1].items()
        if name.startswith("val-aux/") and name.endswith("/verifiable/mean@1")
    ]
    return {
        "total": [round(entry["reward/total/mean"], 3) for entry in steps],
        "verifiable": [round(entry["reward/verifiable/mean"], 3) for entry in steps],
        "dev_verifiable": statistics.mean(validated),
        "seconds": between,
        "staleness": {
            "mean": statistics.mean(entry[f"{STALENESS}mean"] for entry in steps[1:]),
            "max": max(entry[f"{STALENESS}max"] for entry in steps),
        },
        "rollout_against_actor": max(entry["training/rollout_probs_diff_mean"] for entry in steps),
        "entropy": [round(entry["actor/entropy"], 3) for entry in (steps[0], steps[-1])],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of one mode, a seed each."""
    last = {key: [statistics.mean(run[key][-WINDOW:]) for run in runs] for key in ("total", "verifiable")} | {
        "dev_verifiable": [run["dev_verifiable"] for run in runs]
    }
    return {
        "reward": [run["total"] for run in runs],
        "verifiable": [run["verifiable"] for run in runs],
        **{f"last_{key}": [round(value, 3) for value in values] for key, values in last.items()},
        "seconds_per_step": round(statistics.median(each for run in runs for each in run["seconds"]), 2),
        "staleness_mean": round(statistics.mean(run["staleness"]["mean"] for run in runs), 2),
        "staleness_max": max(run["staleness"]["max"] for run in runs),
        "probs_diff_mean": max(run["rollout_against_actor"] for run in runs),
        "entropy": [run["entropy"] for run in runs],
    }


def main(given: argparse.Namespace) -> None:
    """All runs, then the JSON object."""
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for seed in given.seeds:
        for mode in MODES if seed % 2 == 0 else MODES[::-1]:
            runs[mode].append(figures(train(mode, seed, given)))
            print(mode, seed, summary(runs[mode][-1:]), flush=True)
    made = {mode: summary(each) for mode, each in runs.items()}
    sync, other = (made[mode] for mode in MODES)
    print(
        json.dumps(
            {
                **made,
                "seconds_ratio_async_to_sync": round(other["seconds_per_step"] / sync["seconds_per_step"], 3),
                **{
                    f"{key}_async_less_sync": round(
                        statistics.mean(other[f"last_{key}"]) - statistics.mean(sync[f"last_{key}"]), 3
                    )
                    for key in ("total", "verifiable", "dev_verifiable")
                },
                "steps": given.steps, "seeds": given.seeds, "cpus": os.cpu_count(), "load": os.getloadavg()[0],
                "overrides": given.set,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--outputs", required=True, type=Path, help="folder of a quickstart's outputs")
    parser.add_argument("--work", required=True, type=Path, help="where the runs' folders are made, and stay")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--set", nargs="*", default=[], help="overrides of all runs")
    # What was started is ended with this, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(parser.parse_args())
