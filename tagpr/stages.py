"""Which stage needs what of which other, and how to run one with everything that it is missing.

    python -m tagpr guided_rl trainer.total_training_steps=10

On the embedded default (``setting=minilamp``) a missing prerequisite is made first, two at a time where they do not depend on
each other; with any other setting the stage itself names what is missing and the recipe that makes it, because there a
prerequisite costs GPU-days or money.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tagpr.configuration import compose, export, resolve
from tagpr.dry_run import dry_run
from tagpr.errors import ConfigError, StageError, TagPRError
from tagpr.ray_jobs import absolute_overrides, be_no_actor, forwarded, submit
from tagpr.rewards.weights import asks_prmu
from tagpr.rl.supervisor import supervise_jobs

logger = logging.getLogger("tagpr")

SIDE_BY_SIDE = 2


@dataclass(frozen=True)
class Stage:
    """``module`` runs it; ``makes`` is the configuration key of its product; ``needs`` are other stages."""

    module: str
    makes: str | None
    product: str
    needs: tuple[str, ...]
    takes_name: bool = False


STAGES: dict[str, Stage] = {
    "prepare_data": Stage("tagpr.benchmarks.prepare", "paths.examples", "manifest.json", ()),
    "validate_data": Stage("tagpr.benchmarks.validate", None, "", ()),
    "base": Stage("tagpr.tiny_model.pretrain", "paths.base", "config.json", ("prepare_data",)),
    "build_chains": Stage("data_pipeline", "paths.chains", "manifest.json", ("prepare_data",)),
    "review_chains": Stage("data_pipeline.review", None, "", ("build_chains",)),
    "publish_chains": Stage("data_pipeline.publish", None, "", ("build_chains",)),
    "sft": Stage("tagpr.sft", "paths.sft", "config.json", ("base", "build_chains")),
    "train_prmu": Stage("tagpr.prmu.train", "paths.prmu", "config.json", ("base", "build_chains")),
    "prmu_variants": Stage("tagpr.prmu.variants", None, "", ("base", "build_chains")),
    "prmu_report": Stage("tagpr.prmu.personalisation", None, "", ("prepare_data", "train_prmu")),
    "add_prmu_users": Stage("tagpr.prmu.cold_start", None, "", ("train_prmu",)),
    "serve_prmu": Stage("reward_server", None, "", ("train_prmu",)),
    "guided_rl": Stage("tagpr.rl", "paths.guided", "config.json", ("prepare_data", "sft", "train_prmu"), takes_name=True),
    "exploratory_rl": Stage("tagpr.rl", "paths.exploratory", "config.json", ("prepare_data", "guided_rl"), takes_name=True),
    "export": Stage("tagpr.export", None, "", ()),
    "serve": Stage("tagpr.serving", None, "", ("prepare_data", "train_prmu", "exploratory_rl")),
    "report": Stage("tagpr.rl.report", None, "", ()),
    "evaluate": Stage("tagpr.evaluation", None, "", ("prepare_data", "base", "sft", "train_prmu", "guided_rl", "exploratory_rl")),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One stage with its overrides."""

    stage: str
    overrides: tuple[str, ...]

    def command(self) -> list[str]:
        """Argument vector of the process that runs it."""
        stage = STAGES[self.stage]
        name = [self.stage] if stage.takes_name else []
        return [sys.executable, "-m", stage.module, *name, *self.overrides]


def plan(stage: str, overrides: Sequence[str]) -> dict[Job, tuple[Job, ...]]:
    """Order the jobs that end in ``stage``: each with the jobs it has to wait for, prerequisites first.

    Raises:
        ConfigError: an override is wrong.
    """
    jobs: dict[Job, tuple[Job, ...]] = {}

    def add(job: Job) -> None:
        config = compose(job.stage, job.overrides)
        waits = []
        for need in wanted(job.stage, config):
            product = Path(OmegaConf.select(config, str(STAGES[need].makes)))
            if config.setting == "minilamp" and not (product / STAGES[need].product).exists():
                before = Job(need, tuple(passed_on(job.overrides, need)))
                if before not in jobs:
                    add(before)
                waits.append(before)
        jobs[job] = tuple(waits)

    add(Job(stage, tuple(overrides)))
    return jobs


def wanted(stage: str, config: DictConfig) -> list[str]:
    """Prerequisites that this configuration really uses (guided RL without gamma asks no PRMU, for one)."""
    needs = list(STAGES[stage].needs)
    if stage == "guided_rl" and not asks_prmu(config.objective):
        needs.remove("train_prmu")
    if stage == "serve":
        unused = {
            "prepare_data": config.serve.profiles is not None,
            "train_prmu": not config.serve.prmu or config.prmu_client.url is not None,
            "exploratory_rl": config.serve.model != config.paths.exploratory,
        }
        needs = [need for need in needs if not unused[need]]
    if stage == "evaluate" and config.evaluate.get("only"):
        labels = {"base": "base", "sft": "sft", "guided_rl": "guided", "exploratory_rl": "exploratory"}
        needs = [need for need in needs if need not in labels or labels[need] in config.evaluate.only]
    if stage == "evaluate" and not (config.evaluate.reward and config.evaluate.reward_weights.gamma):
        needs.remove("train_prmu")
    return needs


def passed_on(overrides: Sequence[str], stage: str) -> list[str]:
    """Overrides that mean the same for a prerequisite: where things are, the setting, the seed; for data, the benchmark."""
    shared = ["run.outputs", "run.seed", "setting", "paths.", "tags."]
    if stage == "prepare_data":
        shared.append("benchmark")
    return [override for override in overrides if override.lstrip("+~").startswith(tuple(shared))]


def execute(jobs: dict[Job, tuple[Job, ...]]) -> None:
    """Run jobs as processes, independent ones side by side; stops all of them as soon as one fails.

    Raises:
        StageError: a job failed (it has said why).
    """
    waiting = dict(jobs)
    running: dict[Job, tuple[subprocess.Popen, threading.Thread, float]] = {}
    took: dict[Job, float] = {}
    began = time.monotonic()

    def say(job: Job) -> Callable[[str], None]:
        return lambda line: print_line(f"[{time.monotonic() - began:4.0f}s {job.stage}] {line}")

    try:
        while waiting or running:
            ready = [job for job, needs in waiting.items() if all(need in took for need in needs)]
            for job in ready[: SIDE_BY_SIDE - len(running)]:
                del waiting[job]
                running[job] = (*start(job, say(job)), time.monotonic())
            time.sleep(0.1)
            for job, (process, pump, started) in list(running.items()):
                if process.poll() is None:
                    continue
                pump.join()
                del running[job]
                took[job] = time.monotonic() - started
                if process.returncode:
                    raise StageError(
                        f"{job.stage}: failed (status {process.returncode}), see above. The same command goes on."
                    )
    finally:
        for process, pump, _ in running.values():
            stop(process)
            pump.join()
    if len(took) > 1:
        spent = "  ".join(f"{job.stage} {seconds:.0f} s" for job, seconds in took.items())
        print_line(f"all done in {time.monotonic() - began:.0f} s: {spent}")


def die_with_parent() -> None:
    """In a child, before it becomes the job: end when this process ends, even by ``kill -9`` (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def start(job: Job, say: Callable[[str], None]) -> tuple[subprocess.Popen, threading.Thread]:
    """Start a job in a process group of its own, its output passed on line by line."""
    say("$ " + " ".join(["python", *job.command()[1:]]))
    process = subprocess.Popen(
        job.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1, start_new_session=True,
        preexec_fn=die_with_parent, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip

    def pump() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    return process, thread


def stop(process: subprocess.Popen) -> None:
    """End a job and what it started: politely, then not."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sent)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue


def print_line(line: str) -> None:
    """One whole line on standard output, also when two jobs print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def submit_stage(stage: str, overrides: Sequence[str], config: DictConfig) -> int:
    """Run a stage as a job of the cluster at ``launch.submit``; the job's exit status.

    Raises:
        ConfigError: what would travel carries a secret, or a setting is wrong.
        StageError: the cluster cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    absolute = absolute_overrides(config)
    export(resolve(config))
    # Where the job runs is for its cluster to say.
    kept = [
        each for each in overrides if not each.lstrip("+~").startswith(("launch.submit=", "launch.address="))
    ]
    on_gpus = stage == "sft" and config.trainer.device == "cuda"
    gpus = config.trainer.n_gpus_per_node if on_gpus else config.launch.gpus
    if OmegaConf.select(config, "launch.restarts"):
        return supervise_jobs(stage, [*kept, *absolute], config, gpus)
    return submit(
        config.launch.submit,
        stage,
        [*kept, *absolute],
        environment=forwarded(config.launch.environment),
        gpus=gpus,
    )


def main(arguments: Sequence[str]) -> int:
    """``python -m tagpr <stage> [key=value ...]``; returns the exit status."""
    # A scheduler's SIGTERM is treated like a person's interrupt: what was started is ended. Not by way of SIGINT,
    # which a shell's background job ignores.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    be_no_actor()
    try:
        if not arguments or arguments[0] not in STAGES:
            given = arguments[0] if arguments else "nothing"
            raise ConfigError(f"stage={given}: no such stage. Use one of {', '.join(STAGES)}.")
        stage, overrides = arguments[0], list(arguments[1:])
        if "--cfg" in overrides:
            os.execv(sys.executable, Job(stage, tuple(overrides)).command())
        if "--dry-run" in overrides:
            overrides.remove("--dry-run")
            *before, _ = plan(stage, overrides)
            print_line(dry_run(stage, overrides, [job.stage for job in before]))
            return 0
        config = compose(stage, overrides)
        if OmegaConf.select(config, "launch.submit") is not None:
            return submit_stage(stage, overrides, config)
        jobs = plan(stage, overrides)
        *before, last = jobs
        if before:
            print_line(f"{stage}: first makes what is missing: {', '.join(job.stage for job in before)}")
            execute({job: jobs[job] for job in jobs})
            return 0
    except TagPRError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return error.status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        return 130
    # Nothing to wait for: become the stage itself, so that signals and the exit status are its own.
    os.execv(sys.executable, last.command())
