"""One RL stage from its configuration: check, prepare, serve the reward, train, hand over a model.

Guided and exploratory RL differ in ``objective.mode`` and in the model they start from, nothing else (paper section 3.4).
"""

import logging
import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from tagpr.checkpoints import export_model, latest_complete
from tagpr.configuration import exported
from tagpr.console import library_output_to
from tagpr.dense_retrieval import install
from tagpr.errors import RewardServerError, RunFault, StageError
from tagpr.local_ray import local_ray, prepare_environment
from tagpr.prmu.client import check_server
from tagpr.prmu.local_server import local_server
from tagpr.prmu.wire import Address, read_token
from tagpr.ray_jobs import connected, forwarded, prepare_to_connect
from tagpr.rewards.weights import asks_prmu
from tagpr.rl.checks import check, check_context, schedule
from tagpr.rl.data import check_examples, draw, examples_of, write_rows
from tagpr.rl.monitors import Alert
from tagpr.rl.preflight import Wanted, preflight
from tagpr.rl.report import write_report
from tagpr.rl.resume import check_unchanged, hold, resume
from tagpr.rl.side_by_side import prepared
from tagpr.rl.stacks import RUN_DIR
from tagpr.rl.supervisor import attempt_number, limits_of, patience_s
from tagpr.rl.waiting import free_gpus, until_there
from tagpr.rl.warm.server import fork_server
from tagpr.rl.watchdog import check_watchdog
from tagpr.runs import (
    check_model_folder,
    check_tags_of,
    file_hash,
    installed_versions,
    manifest,
    write_json_atomically,
    write_text_atomically,
)

logger = logging.getLogger(__name__)

# How long a reward server that should be there already may take to answer.
CONNECT_DEADLINE_S = 30.0
# Free on every node, for the libraries alone: the CPU path's workers on tiny models, or loading a model beside CUDA's.
LEAST_MEMORY_GIB = {"cpu": 2.0, "cuda": 16.0}
# For Ray's logs and objects that leave memory.
LEAST_DISK_GIB = 5.0
# What verl.trainer.constants_ppo.get_ppo_ray_runtime_env says to workers that concerns a CPU.
CPU_RUNTIME_ENV = {
    "VLLM_LOGGING_LEVEL": "WARN",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VERL_FULL_DETERMINISM": "0",
    "VLLM_BATCH_INVARIANT": "0",
    "VERL_RL_INSIGHT_ENABLE": "0",
}
# Exit status of a run that a monitor stopped: nobody is to start it again by itself.
ENDED_ON_PURPOSE = 3
RECIPES = {"guided": "sft.sh", "exploratory": "guided_rl.sh"}


def run(config: DictConfig) -> None:
    """Train until ``trainer.total_training_steps``, going on from the last complete checkpoint; then export the model.

    Raises:
        ConfigError: the settings contradict each other.
        StageError: what this stage starts from is missing.
        RewardServerError: the reward server is another one than configured, or stayed away too long.
    """
    check(config)
    limits_of(config)
    check_watchdog(config)
    make_paths_absolute(config)
    start_model = config.actor_rollout_ref.model.path
    check_model_folder(start_model, "actor_rollout_ref.model.path", RECIPES[config.objective.mode])
    check_tags_of(Path(start_model).parent, "actor_rollout_ref.model.path")
    run_dir = Path(config.run.dir)
    model = run_dir / "model"
    check_context(config)
    steps_file = run_dir / "finished.json"
    if model.is_dir() and steps_file.is_file():
        logger.info(
            "%s is finished: %s. Delete the folder, or set run.name, to train again.", config.run.name, model
        )
        return

    for split in ("train", "dev"):
        check_examples(config.paths.examples, split)
    hold(config)
    resumed = resume(config)
    check_unchanged(config, {}, resumed)
    began = time.monotonic()
    with (
        library_output_to(run_dir / "driver.log", config.run.verbose),
        own_server(config) as server,
        ray_cluster(config),
    ):
        # 1. What is asked, as verl reads it
        prompts = prepare_rows(config)
        steps_per_epoch, steps = schedule(config, prompts)
        logger.info(
            "%s RL: %s, %d prompts, %d steps (%d an epoch) of %d x %d responses, lr %g, clip %g/%g, on %s",
            config.objective.mode, start_model, prompts, steps, steps_per_epoch, config.data.train_batch_size,
            config.actor_rollout_ref.rollout.n, config.actor_rollout_ref.actor.optim.lr,
            config.actor_rollout_ref.actor.clip_ratio_low, config.actor_rollout_ref.actor.clip_ratio_high,
            config.trainer.device,
        )  # fmt: skip
        inputs = {
            "model": Path(start_model),
            "train": Path(config.data.train_files),
            "dev": Path(config.data.val_files),
        }
        record = manifest(
            config.run.name, inputs, config.run.seed, synthetic=config.benchmark.synthetic, resumed_at=resumed
        )
        check_unchanged(config, record.inputs, resumed)
        write_text_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(config))
        write_json_atomically(run_dir / "manifest.json", record.model_dump())

        # 2. Train
        with reward_server(config, server):
            until_there(config, lambda: look_before(config))
            ended = train_or_name_the_fault(config)

    # 3. Hand over
    last = latest_complete(Path(config.trainer.default_local_dir))
    if last is None:
        raise StageError(
            f"{config.trainer.default_local_dir}: training left no complete checkpoint. See {run_dir}/driver.log."
        )
    if ended is not None and ended.action == "stop":
        logger.error(
            "%s stopped after step %d, checkpoint saved: monitor %s: %s. See %s/alerts.jsonl; the same command goes on, "
            "with monitors.%s.action=warn to its end.",
            config.run.name, last[0], ended.monitor, ended.reason, run_dir, ended.monitor,
        )  # fmt: skip
        logger.info("%s", write_report(run_dir))
        sys.exit(ENDED_ON_PURPOSE)
    with library_output_to(run_dir / "driver.log", config.run.verbose):
        export_model(last[1] / "actor", model)
    if ended is not None:
        write_json_atomically(
            run_dir / "switched.json", {"step": last[0], "monitor": ended.monitor, "reason": ended.reason}
        )
        logger.info("this stage ends early, for the next one: monitor %s: %s", ended.monitor, ended.reason)
    write_json_atomically(steps_file, {"step": last[0]})
    logger.info(
        "%s done in %.0f s: %s; %s",
        config.run.name, time.monotonic() - began, model, write_report(run_dir),
    )  # fmt: skip


def make_paths_absolute(config: DictConfig) -> None:
    """Ray workers have another working directory than the driver: every local path becomes absolute, in place."""
    for node, key in (
        (config.run, "dir"),
        (config.data, "train_files"),
        (config.data, "val_files"),
        (config.trainer, "default_local_dir"),
        (config.trainer, "rollout_data_dir"),
        (config.actor_rollout_ref.model, "path"),
        (config.paths, "prmu"),
        (config.prmu_client, "token_file"),
    ):
        # A model may also be named by its hub id, which is no path.
        if node[key] is not None and (Path(node[key]).exists() or key != "path"):
            node[key] = str(Path(node[key]).resolve())


def prepare_rows(config: DictConfig) -> int:
    """Render the training and validation prompts of this run; returns the number of training prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)

    def count_tokens(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    benchmark = config.benchmark
    install(benchmark.retriever, benchmark.retriever_model)
    prompts = 0
    for split, path in (("train", config.data.train_files), ("dev", config.data.val_files)):
        examples = [e for e in examples_of(config.paths.examples, split) if e.task in benchmark.tasks]
        if split == "train":
            examples = draw(examples, benchmark.rl_rows, config.run.seed)
        written = write_rows(
            examples,
            Path(path),
            profile_size=benchmark.profile_size,
            retriever=benchmark.retriever,
            count_tokens=count_tokens,
            max_prompt_tokens=benchmark.max_prompt_tokens,
            seed=config.run.seed,
        )
        prompts = written if split == "train" else prompts
    return prompts


@contextmanager
def own_server(config: DictConfig) -> Iterator[Future[Address] | None]:
    """The reward server of this run's own, where it needs one, starts while the body does other things, and ends after it."""
    if not asks_prmu(config.objective):
        yield None
        return
    if config.prmu_client.url is not None:
        # Somebody else's: looked at before anything is started.
        with reward_server(config):
            yield None
        return
    check_model_folder(config.paths.prmu, "paths.prmu", "train_prmu.sh")
    server = local_server(config.paths.prmu, Path(config.run.dir), config.trainer.device)
    with ThreadPoolExecutor(1) as thread:
        # Imports nothing: that two threads do at once may end in a deadlock.
        starting = thread.submit(server.__enter__)
        try:
            yield starting
        finally:
            if starting.exception() is None:
                server.__exit__(None, None, None)


@contextmanager
def reward_server(config: DictConfig, own: Future[Address] | None = None) -> Iterator[None]:
    """Make sure that the configured PRMU is served while the body runs; fills in ``prmu_client`` (url, version, token).

    Args:
        config: of the run.
        own: what :func:`own_server` started.

    Raises:
        RewardServerError: it did not start, does not answer, or serves another checkpoint.
    """
    if not asks_prmu(config.objective):
        yield
        return
    client = config.prmu_client
    check_model_folder(config.paths.prmu, "paths.prmu", "train_prmu.sh")
    # Not before Ray is up: it brings transformers.
    from tagpr.prmu.model import content_version

    version = content_version(Path(config.paths.prmu))
    with open_dict(client):
        client.version = version
    deadline_s = CONNECT_DEADLINE_S
    if own is None:
        deadline_s = max(deadline_s, patience_s(config))
    else:
        address = own.result()
        client.url = address.url
        client.token_file = str(Path(address.token_file).resolve()) if address.token_file else None
    check_server(client.url, read_token(client.token_file), version, deadline_s=deadline_s)
    yield


@contextmanager
def ray_cluster(config: DictConfig) -> Iterator[None]:
    """Ray while the body runs: the cluster at ``launch.address``, else one of this process's own, on loopback.

    Raises:
        StageError: on a machine without a GPU, verl did not take the CPU platform; or there is no such cluster.
    """
    # Ray reads its own variables when it is imported, which verl does.
    if config.launch.address is None:
        prepare_environment()
    else:
        prepare_to_connect(config.launch.address)
    environment = environment_of_workers(config)
    os.environ.update(environment)
    arguments: Any = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
    asked = arguments.pop("runtime_env", None) or {}
    runtime_env = {**verl_runtime_env(config), **asked}
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **environment, **asked.get("env_vars", {})}
    address = config.launch.address
    if address is not None:
        # The cluster has its own resources, and its own dashboard.
        runtime_env.pop("working_dir", None)
        with ExitStack() as stack:
            until_there(
                config,
                lambda: stack.enter_context(connected(address, environment, runtime_env=dict(runtime_env))),
            )
            check_platform(config)
            yield
        return
    cpus, dashboard = arguments.pop("num_cpus", None), arguments.pop("include_dashboard", False)
    on_cpu = config.trainer.device == "cpu"
    forks = on_cpu and config.launch.fork_workers
    with fork_server(runtime_env["env_vars"]) if forks else nullcontext() as ray_is_up:
        # verl moves rollouts through the object store: as large as Ray makes it.
        with local_ray(
            cpus,
            dashboard=dashboard,
            object_store_bytes=None,
            quiet=False,
            runtime_env=runtime_env,
            **arguments,
        ):
            if ray_is_up is not None:
                ray_is_up()
            with prepared(config) if on_cpu else nullcontext():
                check_platform(config)
                if on_cpu:
                    import_ahead(config)
            yield


def verl_runtime_env(config: DictConfig) -> dict[str, Any]:
    """The runtime environment that verl wants; on a CPU without importing verl, so that Ray need not wait for it.

    ``tests/contract/test_verl_hooks.py`` compares the two.
    """
    if config.trainer.device == "cpu":
        return {
            "env_vars": {**CPU_RUNTIME_ENV, **{k: v for k, v in os.environ.items() if k in CPU_RUNTIME_ENV}}
        }
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    found: dict[str, Any] = get_ppo_ray_runtime_env(config)
    return found


def check_platform(config: DictConfig) -> None:
    """Import verl, and look whether it found the platform.

    Raises:
        StageError: on a machine without a GPU, verl did not take the CPU platform.
    """
    # Raises what verl's entry-point loading would swallow.
    import tagpr.cpu_platform.platform  # noqa: F401

    if config.trainer.device == "cpu":
        from verl.plugin.platform import get_platform

        if get_platform().device_name != "cpu":
            raise StageError(
                f"trainer.device=cpu: verl chose the platform {get_platform().device_name!r}. "
                "Install the project in this environment (bash recipes/setup.sh) and unset VERL_PLATFORM."
            )


def import_ahead(config: DictConfig) -> None:
    """Import now, while the first workers start, what training would import when all else waits for it (seconds; vLLM)."""
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    import tagpr.rl.trainer  # noqa: F401

    RolloutReplicaRegistry.get(config.actor_rollout_ref.rollout.name)


def look_before(config: DictConfig) -> None:
    """Preflight of every node, as ``launch.preflight`` wants it.

    Raises:
        StageError: a node lacks something; nothing has been started on it.
    """
    import ray

    alive = sum(node["Alive"] for node in ray.nodes())
    needed = config.trainer.nnodes * config.trainer.n_gpus_per_node
    free = free_gpus(needed)
    # What the start before had may not be free yet; in a first start, verl says it.
    if free < needed and attempt_number() > 1:
        raise StageError(
            f"trainer.nnodes={config.trainer.nnodes}: {free:g} of {needed} GPUs are free. Add nodes, or wait for them."
        )
    alone_here = alive == 1 and config.trainer.nnodes == 1
    if config.launch.preflight is False or (config.launch.preflight == "auto" and alone_here):
        return
    trainer, client = config.trainer, config.prmu_client
    on_gpus = trainer.device != "cpu"
    models = {"actor_rollout_ref.model.path": config.actor_rollout_ref.model.path}
    wanted = Wanted(
        versions=installed_versions(),
        device=trainer.device,
        gpus=trainer.n_gpus_per_node,
        shared=[config.run.dir, config.trainer.default_local_dir],
        nonce=secrets.token_hex(16),
        models={key: model for key, model in models.items() if Path(model).exists()},
        files={path: file_hash(Path(path)) for path in exported().values()},
        reward=(client.url, client.token_file, client.version) if "version" in client else None,
        memory_gib=LEAST_MEMORY_GIB["cuda" if on_gpus else "cpu"],
        disk_gib=LEAST_DISK_GIB,
    )
    preflight(wanted, nodes=trainer.nnodes)


def environment_of_workers(config: DictConfig) -> dict[str, str]:
    """Variables that every worker of this run needs, wherever it runs; no secret among them."""
    environment = {
        "VERL_USE_EXTERNAL_MODULES": "tagpr.cpu_platform.platform,tagpr.rl.stacks",
        RUN_DIR: config.run.dir,
        "TENSORBOARD_DIR": str(Path(config.run.dir) / "tensorboard"),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        **forwarded(config.launch.environment),
    }
    if config.trainer.device == "cpu":
        # Of this machine's cores, for each worker that it has.
        threads = max(1, len(os.sched_getaffinity(0)) // int(config.trainer.n_gpus_per_node))
        environment |= {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Threads that wait for each other spin for microseconds only: at OpenMP's own milliseconds two of them take several
            # times as long as one as soon as anybody else uses the machine, and if they sleep at once two are no faster than one.
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000"),
            # What is compiled costs seconds of the first step, and none of it is faster for it.
            "TORCH_COMPILE_DISABLE": "1",
            # GiB; without it each vLLM engine takes half of the machine.
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VERL_PLATFORM": "cpu",
            # Ray starts workers at niceness 15, at which anything else on the machine starves them.
            "RAY_worker_niceness": "0",
        }
    return environment


def train_or_name_the_fault(config: DictConfig) -> Alert | None:
    """Train; say in one line what ended it. All of it may go well another time (:class:`RunFault`)."""
    import ray

    from tagpr.rl.replay_buffer import RolloutFailure
    from tagpr.rl.trainer import train

    log = Path(config.run.dir) / "driver.log"
    try:
        return train(config)
    except ray.exceptions.RayError as error:
        # The whole story goes to the log.
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
        raise RunFault(
            f"Ray: {type(error).__name__}: {what[:300].rstrip('.')}. The reason is in {log}; the same command goes on from the "
            "last checkpoint."
        ) from error
    except RolloutFailure as failure:
        if config.prmu_client.url is not None and "version" in config.prmu_client:
            try:
                check_server(
                    config.prmu_client.url,
                    read_token(config.prmu_client.token_file),
                    config.prmu_client.version,
                    deadline_s=5.0,
                )
            except RewardServerError as fault:
                raise RunFault(f"{failure}, because the reward server is gone: {fault}") from failure
        raise RunFault(
            f"{failure}. The reason is in {log}; the same command goes on from the last checkpoint."
        ) from failure
