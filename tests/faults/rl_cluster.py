"""RL on a cluster of two nodes and a reward server, all on this machine, while they are killed: the supervised run ends anyway.

    python tests/faults/rl_cluster.py WORK --outputs OUTPUTS                      # undisturbed, then each kind of kill once
    python tests/faults/rl_cluster.py WORK --outputs OUTPUTS --random 20 --steps 50 --plain 2 --minutes 60

Two raylets with addresses, ports and folders of their own (head 127.0.0.2, worker 127.0.0.3) started by
recipes/cluster/ray_node.sh with a token; FSDP over both (world size 2), a vLLM replica on each; PRMU beside them. The stage is
submitted as a Ray job with launch.restarts. A keeper starts a killed node again after some seconds, as Kubernetes or an init
system would; nobody else intervenes. OUTPUTS holds what the stages before have made (data, sft, prmu).

Kinds of kill, all by ``kill -9`` of a process and its descendants: worker, reward, driver, head; ``hang``: a rollout worker is
stopped (SIGSTOP), so that nothing dies and the watchdog has to act. A random kill comes some seconds after a new checkpoint, or,
every second time, at any moment after the kill before, mostly while the run is still being started again.

The undisturbed runs (``--plain``, one seed each) are what the killed one's metrics are compared with: means over the last half of
the steps, and how far the seeds are apart. The last line of stdout is a JSON object.
"""

import argparse
import itertools
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
# How long a node stays away.
AWAY_S = 3.0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def kill_tree(pid: int) -> int:
    """``kill -9`` of a process and all its descendants; how many they were."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=20)
    return len(tree)


class Cluster:
    """Head, worker and reward server; a keeper starts again what has died."""

    def __init__(self, work: Path, outputs: Path) -> None:
        self.work, self.outputs = work, outputs
        work.mkdir(parents=True, exist_ok=True)
        for name in ("ray.token", "prmu.token"):
            if not (work / name).exists():
                (work / name).touch(mode=0o600)
                (work / name).write_text(secrets.token_hex(32))
        # Room for both nodes' ports; the worker's processes take them from the upper half.
        self.base = 20000 + random.randrange(0, 60) * 200
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TAGPR_"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(work / "ray.token"), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0", "GLOO_SOCKET_IFNAME": "lo", "VERL_PLATFORM": "cpu",
            # A node that is gone is noticed within seconds, and a worker whose head is gone ends.
            "RAY_health_check_period_ms": "2000", "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        }  # fmt: skip
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.starts: dict[str, int] = {}
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    @property
    def dashboard(self) -> str:
        return f"http://{HEAD}:{self.base + 1}"

    @property
    def reward_url(self) -> str:
        return f"http://127.0.0.1:{self.base + 2}"

    def command(self, role: str) -> list[str]:
        if role == "reward":
            return [
                sys.executable, "-m", "tagpr", "serve_prmu", f"run.outputs={self.work}", f"paths.prmu={self.outputs}/prmu/model",
                f"server.port={self.base + 2}", f"server.token_file={self.work}/prmu.token", "run.name=reward",
                f"server.parent_pid={os.getpid()}", "server.device=cpu",
            ]  # fmt: skip
        shift = 20 if role == "head" else 120
        ports = {
            "dashboard-agent-listen-port": shift, "metrics-export-port": shift + 1, "dashboard-agent-grpc-port": shift + 2,
            "runtime-env-agent-port": shift + 3, "node-manager-port": shift + 4, "object-manager-port": shift + 5,
            "min-worker-port": shift + 10, "max-worker-port": shift + 69,
        }  # fmt: skip
        options = [f"--{name}={self.base + number}" for name, number in ports.items()]
        options.append("--object-store-memory=300000000")
        script = ["bash", str(ROOT / "recipes" / "cluster" / "ray_node.sh")]
        if role == "head":
            own = [
                f"--port={self.base}",
                f"--dashboard-port={self.base + 1}",
                f"--ray-client-server-port={self.base + 3}",
            ]
            return [*script, "head", *own, f"--temp-dir={self.work}/h", *options]
        return [*script, "worker", f"{HEAD}:{self.base}", f"--temp-dir={self.work}/w", *options]

    def start(self, role: str) -> None:
        log = self.work / f"{role}.log"
        with log.open("ab") as file:
            self.processes[role] = subprocess.Popen(
                self.command(role), stdout=file, stderr=file, cwd=self.work, start_new_session=True,
                env={**self.environment, "TAGPR_NODE_IP": {"head": HEAD, "worker": WORKER}.get(role, "")},
            )  # fmt: skip
        self.starts[role] = self.starts.get(role, 0) + 1

    def _keep(self) -> None:
        died: dict[str, float] = {}
        while not self._over.wait(0.5):
            for role, process in list(self.processes.items()):
                if process.poll() is None:
                    died.pop(role, None)
                elif time.monotonic() - died.setdefault(role, time.monotonic()) > AWAY_S:
                    kill_tree(process.pid)
                    if not self._over.is_set():
                        self.start(role)

    @contextmanager
    def up(self) -> Iterator["Cluster"]:
        try:
            (self.work / "reward" / "server.json").unlink(missing_ok=True)
            self.start("reward")
            self.start("head")
            time.sleep(10)
            self.start("worker")
            self._keeper.start()
            give_up = time.monotonic() + 200
            while not (self.work / "reward" / "server.json").exists() and time.monotonic() < give_up:
                time.sleep(0.5)
            yield self
        finally:
            self._over.set()
            if self._keeper.is_alive():
                self._keeper.join(30)
            for process in self.processes.values():
                kill_tree(process.pid)

    def driver(self) -> int | None:
        """The RL driver: below the head's raylet."""
        try:
            below = psutil.Process(self.processes["head"].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return None
        for process in below:
            try:
                if "tagpr.rl" in process.cmdline() and "shell" not in process.name():
                    return process.pid
            except psutil.Error:
                continue
        return None

    def rollout_worker(self) -> int | None:
        """A vLLM server of the worker's node."""
        for process in psutil.Process(self.processes["worker"].pid).children(recursive=True):
            try:
                if "vllm" in " ".join(process.cmdline()).lower():
                    return process.pid
            except psutil.Error:
                continue
        return None

    def strike(self, kind: str) -> bool:
        """Kill one of the kinds; whether there was something to kill."""
        if kind == "hang":
            pid = self.rollout_worker()
            if pid is not None:
                os.kill(pid, signal.SIGSTOP)
            return pid is not None
        pid = self.driver() if kind == "driver" else self.processes[kind].pid
        return pid is not None and kill_tree(pid) > 0


class Run:
    """One supervised run, submitted as a job."""

    def __init__(self, cluster: Cluster, name: str, steps: int, seed: int = 0, restarts: int = 8) -> None:
        self.folder = cluster.work / "outputs" / name
        outputs = cluster.outputs
        self.log = cluster.work / f"{name}.log"
        overrides = [
            f"launch.submit={cluster.dashboard}", f"launch.restarts={restarts}", "launch.first_pause_s=1",
            "launch.longest_pause_s=10", "launch.patience_s=240", "launch.preflight=false",
            f"run.outputs={cluster.work}/outputs", f"run.name={name}", f"run.seed={seed}",
            f"paths.examples={outputs}/data/minilamp", f"paths.sft={outputs}/sft/model", f"paths.prmu={outputs}/prmu/model",
            f"paths.base={outputs}/base/model", f"paths.chains={outputs}/chains",
            "trainer.nnodes=2", "trainer.n_gpus_per_node=1", f"trainer.total_training_steps={steps}", "trainer.save_freq=1",
            "trainer.test_freq=-1", "trainer.val_before_train=false", "data.train_batch_size=8", "benchmark.tasks=[lamp3]",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.max_num_seqs=32",
            f"prmu_client.url={cluster.reward_url}", f"prmu_client.token_file={cluster.work}/prmu.token",
            "watchdog.floor_s=180", "watchdog.start_s=400",
        ]  # fmt: skip
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tagpr", "guided_rl", *overrides],
                stdout=file, stderr=file, cwd=cluster.work, env=cluster.environment, start_new_session=True,
            )  # fmt: skip

    def steps(self) -> dict[int, dict[str, float]]:
        """Metrics by step; raises where one was logged twice."""
        found: dict[int, dict[str, float]] = {}
        path = self.folder / "metrics.jsonl"
        for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith("\n"):
                continue
            record = json.loads(line)
            if "training/global_step" in record["data"]:
                assert record["step"] not in found, f"step {record['step']} was logged twice"
                found[record["step"]] = record["data"]
        return found

    def saved(self) -> int:
        """Newest step with a complete checkpoint."""
        markers = self.folder.glob("checkpoints/global_step_*/complete.json")
        return max((int(path.parent.name.rsplit("_", 1)[1]) for path in markers), default=0)

    def wait_for_step(self, step: int, until: float) -> bool:
        """Until a checkpoint of ``step`` is there; False where the run or the time ends before."""
        while time.monotonic() < until:
            if self.saved() >= step:
                return True
            if self.process.poll() is not None:
                return self.saved() >= step
            time.sleep(0.5)
        return False

    def history(self) -> list[dict[str, Any]]:
        path = self.folder / "restarts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def end(self) -> None:
        """Ctrl-C, as a person would; then not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                kill_tree(self.process.pid)


@dataclass(frozen=True)
class Kill:
    """``patient``: ``pause_s`` after the next complete checkpoint; else after the kill before, whatever the run does then."""

    kind: str
    pause_s: float
    patient: bool = True


def random_kills(rng: random.Random, number: int) -> list[Kill]:
    kinds = rng.choices(["worker", "reward", "driver", "head"], k=number)
    return [
        Kill(kind, rng.uniform(5, 60), False) if n % 2 else Kill(kind, rng.uniform(0, 6))
        for n, kind in enumerate(kinds)
    ]


def kills(cluster: Cluster, run: Run, wanted: list[Kill], steps: int, until: float) -> list[dict[str, Any]]:
    """Strike; what each kill has cost, up to the next complete checkpoint or the next kill."""
    done: list[dict[str, Any]] = []
    for n, kill in enumerate(wanted):
        if kill.patient and not run.wait_for_step(run.saved() + 1, until):
            break
        time.sleep(kill.pause_s)
        while not (
            over := run.process.poll() is not None or time.monotonic() > until or run.saved() >= steps - 1
        ):
            if cluster.strike(kill.kind):
                break
            time.sleep(1.0)  # it is not there at this moment
        if over:
            break
        struck, saved, starts = time.monotonic(), run.saved(), len(run.history())
        say(f"{n + 1}. killed: {kill.kind} (newest complete checkpoint: step {saved})")
        record = {"kind": kill.kind, "at_step": saved}
        done.append(record)
        if n + 1 < len(wanted) and not wanted[n + 1].patient:
            record["seconds"] = None
            continue
        # The step that is under way may have its rewards already.
        record["came_back"] = run.wait_for_step(saved + (2 if kill.kind == "reward" else 1), until)
        record["seconds"] = round(time.monotonic() - struck, 1)
        record["restarts"] = len(run.history()) - starts
        record["saved_after"] = run.saved()
        say(json.dumps(record))
        if not record["came_back"]:
            break
    return done


def lost_steps(history: list[dict[str, Any]]) -> dict[str, int]:
    """Between two attempts: finished steps that had to be done again (at most), and checkpoints that were there no more."""
    pairs = list(itertools.pairwise(history))
    return {
        "most_steps_again": max(
            (before["reached_step"] - before["saved_step"] for before, _ in pairs), default=0
        ),
        "lost_checkpoints": sum(after["from_step"] < before["saved_step"] for before, after in pairs),
    }


def figures(run: Run) -> dict[str, float]:
    """Means over the last half of a run's steps."""
    steps = run.steps()
    last = [steps[step] for step in sorted(steps)[len(steps) // 2 :]]
    names = (
        "reward/total/mean",
        "reward/verifiable/mean",
        "reward/format/mean",
        "tags/valid_frac",
        "response_length/mean",
    )
    return {
        name: round(statistics.mean(step[name] for step in last), 4)
        for name in names
        if last and name in last[-1]
    }


def undisturbed(cluster: Cluster, seed: int, steps: int, until: float) -> dict[str, Any]:
    """One run that nobody touches."""
    began = time.monotonic()
    run = Run(cluster, f"plain{seed}", steps, seed=seed)
    try:
        run.process.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        say("the time is up: ending the run")
    finally:
        run.end()
    found = {"seed": seed, "status": run.process.returncode, "seconds": round(time.monotonic() - began, 1),
             "steps": len(run.steps()), "metrics": figures(run)}  # fmt: skip
    say(json.dumps(found))
    return found


def struck(cluster: Cluster, name: str, wanted: list[Kill], steps: int, until: float) -> dict[str, Any]:
    """One run that is killed again and again."""
    began = time.monotonic()
    run = Run(cluster, name, steps, restarts=max(8, len(wanted)))
    done: list[dict[str, Any]] = []
    try:
        done = kills(cluster, run, wanted, steps, until)
        try:
            run.process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            say("the time is up: ending the run")
    finally:
        run.end()
    reached = sorted(run.steps())
    found = {
        "kills": done, "killed": len(done), "status": run.process.returncode, "seconds": round(time.monotonic() - began, 1),
        "steps": len(reached), "gapless": reached == list(range(1, len(reached) + 1)), "attempts": len(run.history()),
        **lost_steps(run.history()), "metrics": figures(run), "starts": dict(cluster.starts),
    }  # fmt: skip
    say(json.dumps({key: value for key, value in found.items() if key != "kills"}))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--outputs", type=Path, required=True, help="outputs of the stages before: data, sft, prmu"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kill", default="worker,reward,driver,head")
    parser.add_argument(
        "--random", type=int, default=0, help="this many kills of random kinds at random moments"
    )
    parser.add_argument(
        "--plain", type=int, default=1, help="undisturbed runs, of as many seeds, after the killed one"
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--name", default=None, help="goes on with a run of an earlier call")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds")
    options = parser.parse_args()
    work, outputs = options.work.resolve(), options.outputs.resolve()
    until = time.monotonic() + options.minutes * 60
    report: dict[str, Any] = {}
    if options.random:
        wanted = random_kills(random.Random(options.seed), options.random)
    else:
        wanted = [Kill(kind, 2.0) for kind in options.kill.split(",") if kind]
    with Cluster(work, outputs).up() as cluster:
        if wanted:
            name = options.name or ("random" if options.random else "killed")
            report["killed"] = struck(cluster, name, wanted, options.steps, until)
        report["plain"] = []
        for seed in range(options.plain):
            if time.monotonic() < until:
                report["plain"].append(undisturbed(cluster, seed, options.steps, until))
    print(json.dumps(report))
    ended_well = all(
        each["status"] == 0 for each in [*report["plain"], *([report["killed"]] if wanted else [])]
    )
    whole = len(report["plain"]) == options.plain and (
        not wanted or (report["killed"]["gapless"] and report["killed"]["killed"] == len(wanted))
    )
    return 0 if ended_well and whole else 1


if __name__ == "__main__":
    sys.exit(main())
