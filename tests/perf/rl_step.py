"""Seconds of one RL step beside TRL's GRPOTrainer on the same machine, in the same run: time, tokens, start-up, learning curves.

    python tests/perf/rl_step.py [--peer-python /path/of/a/venv/bin/python | --install-peer FOLDER] [--outputs FOLDER]

Both train the same model on the same prompts with the same reward (eq. 11: no reward server on either side; ours goes through
the reward manager), GSPO with the paper's clip, 16 prompts x 5 responses, two updates, AdamW, fp32, two cores. Three sizes:
``small`` (MiniLaMP's own model, 0.43M parameters, at most 64 tokens a response), whose rewards are the learning curves, one a
seed; ``large`` (2.4M parameters with random weights, which hardly ever end before 256 tokens) and ``fixed`` (the small model,
responses of one token: what a step costs before there is anything to compute), for time alone: their rewards are all the same. A
step is everything between the end of one and the end of the next, the median after warm-up; start-up is from the start of the
process to the start of the first step. ``--outputs`` is a folder in which `bash recipes/quickstart.sh` left data and an SFT
model; without it, prepared data and the base model are made first (two minutes).

``--replicas 1,2`` adds weak scaling: so many rollout engines and FSDP workers of one thread each, with as many times the prompts.

The last line of standard output is one JSON object.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path
from typing import Any

from rl_run import environment, finished_rl_run

HERE = Path(__file__).parent
PEER = "trl==1.16"
PROMPTS, GROUP, MINI_BATCH = 16, 5, 8
RESPONSE_TOKENS = {"small": 64, "large": 256, "fixed": 1}
LEARNING_RATE = 2e-4
WARM_UP = 2
PHASES = ("gen", "old_log_prob", "adv", "update_actor", "update_weights")


def prepared(outputs: Path) -> tuple[Path, Path]:
    """(examples, a model that answers MiniLaMP) of an outputs folder; makes what is missing."""
    examples, sft, base = outputs / "data" / "minilamp", outputs / "sft" / "model", outputs / "base" / "model"
    if not (sft / "config.json").exists() and not (base / "config.json").exists():
        subprocess.run(
            [sys.executable, "-m", "tagpr", "base", f"run.outputs={outputs}"],
            check=True,
            stdout=sys.stderr,
            env=environment(),
        )
    return examples, sft if (sft / "config.json").exists() else base


def large_model(tokenizer_of: Path, folder: Path) -> Path:
    """A random Qwen3 of 2.4M parameters with the small model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=448, tie_word_embeddings=True, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def parameters(model: Path) -> int:
    """How many, by the headers of its weights."""
    from safetensors import safe_open

    count = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def ours(
    size: str,
    model: Path,
    examples: Path,
    folder: Path,
    steps: int,
    seed: int,
    extra: list[str],
    replicas: int = 1,
    threads: int | None = None,
) -> dict[str, Any]:
    """One run of exploratory RL as a user starts it; its metrics are read as they are written, which dates each step.

    ``threads`` of each worker; None: the run's own choice.
    """
    name = f"{size}-{seed}" if threads is None else f"{size}-{seed}-{replicas}-replicas"
    run_dir = folder / name
    arguments = [
        "-m", "tagpr.rl", "exploratory_rl", f"run.outputs={folder}", f"run.name={name}", f"run.seed={seed}",
        f"paths.examples={examples}", f"actor_rollout_ref.model.path={model}",
        f"data.train_batch_size={PROMPTS * replicas}", f"actor_rollout_ref.rollout.n={GROUP}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={MINI_BATCH * replicas}", f"actor_rollout_ref.actor.optim.lr={LEARNING_RATE}",
        f"benchmark.max_response_tokens={RESPONSE_TOKENS[size]}", f"trainer.total_training_steps={steps}",
        f"trainer.save_freq={steps}", "trainer.test_freq=-1", "trainer.val_before_train=false",
        f"trainer.n_gpus_per_node={replicas}", *extra,
    ]  # fmt: skip
    began = time.time()
    dates: list[float] = []
    done = threading.Event()

    def watch() -> None:
        file = run_dir / "metrics.jsonl"
        while not done.is_set():
            lines = file.read_bytes().count(b"\n") if file.exists() else 0
            dates.extend([time.time()] * (lines - len(dates)))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    try:
        finished_rl_run(run_dir, *arguments, timeout_s=900, **own)
    finally:
        done.set()
        watcher.join()
    found = [json.loads(line)["data"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    saved = found[-1].get("timing_s/save_checkpoint", 0.0)
    startup = dates[0] - found[0]["timing_s/step"] - began
    ends = [began + startup, *dates]
    made = [
        {
            "seconds": end - before,
            "tokens": step["response_length/mean"] * PROMPTS * GROUP * replicas,
            "reward": step["reward/total/mean"],
            **{phase: step[f"timing_s/{phase}"] for phase in PHASES},
            "probs_diff_max": step["training/rollout_probs_diff_max"],
        }
        for before, end, step in zip(ends, ends[1:], found, strict=False)
    ]
    made[-1]["seconds"] -= saved
    return {"startup_s": startup, "steps": made, "seconds": time.time() - began}


def peer(
    python: Path, model: Path, rows: Path, folder: Path, size: str, steps: int, seed: int, threads: int
) -> dict[str, Any]:
    """The same through TRL, on the very rows that our run rendered."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, result = folder / "settings.json", folder / "result.json"
    settings.write_text(
        json.dumps(
            {
                "model": str(model), "rows": str(rows), "folder": str(folder), "prompts": PROMPTS, "group": GROUP,
                "mini_batch": MINI_BATCH, "response_tokens": RESPONSE_TOKENS[size], "learning_rate": LEARNING_RATE,
                "steps": steps, "seed": seed, "threads": threads, "began": time.time(),
            }
        )
    )  # fmt: skip
    subprocess.run(
        [python, str(HERE / "rl_peer.py"), str(settings), str(result)],
        check=True,
        stdout=sys.stderr,
        env=environment(OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false"),
        timeout=900,
    )
    made: dict[str, Any] = json.loads(result.read_text())
    return made


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps after warm-up."""
    steps = [step for run in runs for step in run["steps"][WARM_UP:]]
    keys = [key for key in steps[0] if key not in ("reward", "probs_diff_max")]
    medians = {key: statistics.median(step[key] for step in steps) for key in keys}
    made: dict[str, Any] = {
        "seconds_per_step": round(medians.pop("seconds"), 3),
        "tokens_per_step": round(medians.pop("tokens")),
        "response_tokens_per_s": round(statistics.median(step["tokens"] / step["seconds"] for step in steps)),
        "startup_s": round(statistics.median(run["startup_s"] for run in runs), 1),
    }
    if medians:
        other = made["seconds_per_step"] - sum(medians.values())
        made["phases_s"] = {key: round(value, 3) for key, value in {**medians, "other": other}.items()}
        made["probs_diff_max"] = max(step["probs_diff_max"] for run in runs for step in run["steps"])
    return made


def curves(runs: list[dict[str, Any]], window: int = 4) -> dict[str, Any]:
    """Reward of each step and seed, and the means of the first and the last steps."""
    rewards = [[round(step["reward"], 3) for step in run["steps"]] for run in runs]
    return {
        "reward": rewards,
        "first": [round(statistics.mean(each[:window]), 3) for each in rewards],
        "last": [round(statistics.mean(each[-window:]), 3) for each in rewards],
    }


def apart(own: list[list[float]], other: list[list[float]], window: int = 4) -> dict[str, float | None]:
    """How far the curves (means over ``window`` steps) lie apart: between the trainers, and between seeds of one (or None)."""

    def smooth(curve: list[float]) -> list[float]:
        return [statistics.mean(curve[at : at + window]) for at in range(len(curve) - window + 1)]

    def gap(one: list[float], two: list[float]) -> float:
        return statistics.mean(abs(a - b) for a, b in zip(one, two, strict=True))

    mine, theirs = [smooth(curve) for curve in own], [smooth(curve) for curve in other]
    between = [gap(one, two) for one in mine for two in theirs]
    within = [
        gap(same[i], same[j])
        for same in (mine, theirs)
        for i in range(len(same))
        for j in range(i + 1, len(same))
    ]
    return {
        "between_trainers": round(statistics.mean(between), 4),
        "between_seeds": round(statistics.mean(within), 4) if within else None,
    }


def install_peer(folder: Path) -> Path:
    """TRL in a virtual environment of its own, on top of this environment's torch and transformers."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        found = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"],
            capture_output=True,
            text=True,
            check=True,
        )
        import torch

        shared = Path(torch.__file__).parent.parent
        (Path(found.stdout.strip()) / "shared.pth").write_text(f"{shared}\n")
        subprocess.run([python, "-m", "pip", "install", "-q", PEER], check=True)
    return python


def run(given: argparse.Namespace) -> None:
    """All runs, then the JSON object."""
    load = os.getloadavg()[0]
    python = install_peer(Path(given.install_peer)) if given.install_peer else given.peer_python
    if python is None:
        print(f"no peer: give --peer-python or --install-peer to compare with {PEER}")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rl-step-", dir=given.scratch) as scratch:
        folder = Path(scratch)
        examples, small = prepared(Path(given.outputs) if given.outputs else folder / "outputs")
        for size in filter(None, given.sizes.split(",")):
            model = large_model(small, folder / "large") if size == "large" else small
            steps = given.large_steps if size == "large" else given.steps
            own: list[dict[str, Any]] = []
            other: list[dict[str, Any]] = []
            # In turns, so that a busy minute of the machine meets both.
            for seed in range(given.seeds):
                own.append(ours(size, model, examples, folder / "ours", steps, seed, given.set))
                print(size, "ours", seed, summary(own[-1:]), flush=True)
                if python is None:
                    continue
                rows = folder / "ours" / f"{size}-{seed}" / "data" / "train.parquet"
                best = None
                for threads in (1, 2) if seed == 0 else (other[0]["threads"],):
                    made = peer(
                        Path(python),
                        model,
                        rows,
                        folder / "peer" / f"{size}-{seed}-{threads}",
                        size,
                        steps,
                        seed,
                        threads,
                    )
                    made["threads"] = threads
                    print(size, "peer", seed, threads, "threads", summary([made]), flush=True)
                    took = summary([made])["seconds_per_step"]
                    if best is None or took < summary([best])["seconds_per_step"]:
                        best = made
                assert best is not None
                other.append(best)
            figures[size] = {
                "parameters": parameters(model), "responses": PROMPTS * GROUP, "response_tokens": RESPONSE_TOKENS[size],
                "steps": steps, "ours": {**summary(own), "curves": curves(own)},
            }  # fmt: skip
            if other:
                mine, theirs = summary(own), summary(other)
                figures[size]["peer"] = {
                    "name": other[0]["peer"], "threads": other[0]["threads"], **theirs, "curves": curves(other),
                }  # fmt: skip
                figures[size]["seconds_ratio_peer_to_ours"] = round(
                    theirs["seconds_per_step"] / mine["seconds_per_step"], 3
                )
                figures[size]["tokens_per_s_ratio_ours_to_peer"] = round(
                    mine["response_tokens_per_s"] / theirs["response_tokens_per_s"], 3
                )
                if size == "small":
                    figures[size]["curves_apart"] = apart(
                        figures[size]["ours"]["curves"]["reward"], figures[size]["peer"]["curves"]["reward"]
                    )
        if given.replicas:
            scaled = {
                count: summary(
                    [
                        ours(
                            "small",
                            small,
                            examples,
                            folder / "ours",
                            given.steps,
                            0,
                            given.set,
                            count,
                            threads=1,
                        )
                    ]
                )
                for count in map(int, given.replicas.split(","))
            }
            one = scaled[min(scaled)]["response_tokens_per_s"] / min(scaled)
            figures["weak_scaling"] = {
                str(count): {**found, "efficiency": round(found["response_tokens_per_s"] / count / one, 3)}
                for count, found in scaled.items()
            }
    print(json.dumps({**figures, "load": load, "cpus": os.cpu_count(), "overrides": given.set}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--outputs", help="folder of a quickstart's outputs")
    parser.add_argument("--scratch", help="where the runs' folders are made (deleted at the end)")
    parser.add_argument("--sizes", default="fixed,small,large")
    parser.add_argument("--steps", type=int, default=16, help="of the other sizes")
    parser.add_argument("--large-steps", type=int, default=6, help="of size large")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each size, in turns with the peer's")
    parser.add_argument("--replicas", help="weak scaling besides: rollout engines (and FSDP workers), as 1,2")
    parser.add_argument("--peer-python")
    parser.add_argument("--install-peer")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for our runs")
    # What was started is ended with this, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(parser.parse_args())
