"""Clusters that are not ours: connect a stage to a Ray that is there, or submit it to one as a job.

The sources travel, and the variables that our plugins and libraries read. Data, models and outputs do not: every node has to see
them at the same path. Nor does anything that looks like a secret: tokens and keys are read where they are used.
"""

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import tagpr
from tagpr.configuration import exported
from tagpr.errors import ConfigError, StageError

logger = logging.getLogger(__name__)

PACKAGES = ("tagpr", "reward_server", "data_pipeline")
# What our packages consist of; anything else that lies in them is somebody's data.
SOURCE_SUFFIXES = frozenset({".py", ".yaml", ".md", ".html", ".css", ".js", ".json"})
# Ray refuses packages above 512 MiB; sources are nowhere near, so that more than this is a mistake.
LARGEST_SOURCES_BYTES = 16 * 2**20
# Ray and its cluster set this in the environment of a job that was submitted to it.
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Variables that decide how our libraries behave, on whichever node.
PREFIXES = ("VERL_", "VLLM_", "TAGPR_", "NCCL_", "GLOO_", "HF_", "WANDB_")
NAMES = ("OMP_NUM_THREADS", "PYTHONWARNINGS", "TOKENIZERS_PARALLELISM", "RAY_USAGE_STATS_ENABLED")
# Of this machine only.
STAY = frozenset({"TAGPR_PYTHON"})
SECRET_WORDS = {
    "TOKEN",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "CREDENTIALS",
    "KEY",
    "KEYS",
    "APIKEY",
    "AUTH",
}
CREDENTIALS_IN_URL = re.compile(r"://[^/\s@]+:[^/\s@]+@")

# Keys whose value is a path: always, or where it names something that is there and no id on the Hugging Face hub.
PATH_KEYS = (
    "run.outputs", "run.dir", "paths.examples", "paths.chains", "paths.prmu", "tags.vocabulary", "benchmark.dir",
    "benchmark.own_tasks", "prmu_client.token_file", "data.train_files", "data.val_files", "trainer.default_local_dir",
    "trainer.rollout_data_dir", "chains.ledger", "chains.prompts.*", "chains.*.key_file", "server.token_file",
)  # fmt: skip
MODEL_KEYS = (
    "paths.*", "actor_rollout_ref.model.path", "model.path", "benchmark.retriever_model", "chains.tokenizer",
    "train_prmu.init", "evaluate.models.*", "evaluate.models.*.model",
)  # fmt: skip

LOST_CONNECTION_S = 60.0
CONNECT_S = 10.0
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable looks like a secret: by a word in its name, or by credentials in a URL."""
    return bool(SECRET_WORDS & set(name.upper().split("_"))) or bool(CREDENTIALS_IN_URL.search(value))


def forwarded(asked: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of this process that travel, with ``asked`` (names) besides; those that look like secrets stay, and are named.

    Raises:
        ConfigError: one of ``asked`` looks like a secret or is not set.
    """
    for name in asked:
        if name not in environ:
            raise ConfigError(f"launch.environment: {name} is not set here. Export it, or take it out.")
        if is_secret(name, environ[name]):
            raise ConfigError(
                f"launch.environment: {name} looks like a secret, and a runtime environment can be read by everybody on the "
                "cluster. Set it on the nodes, or give a file that they can read."
            )
    wanted = {
        name for name in environ if (name.startswith(PREFIXES) or name in NAMES) and name not in STAY
    } | set(asked)
    kept_back = sorted(name for name in wanted if is_secret(name, environ[name]))
    if kept_back:
        logger.info("%s: stay here (they look like secrets); set them on the nodes", ", ".join(kept_back))
    return {name: environ[name] for name in sorted(wanted - set(kept_back))} | exported()


def ship_sources(folder: Path) -> int:
    """Copy what a job needs to know of us into ``folder``: sources and plugin declarations; returns bytes.

    Raises:
        StageError: there is far too much of it.
    """
    root = Path(tagpr.__file__).parent.parent
    for name in PACKAGES:
        shutil.copytree(root / name, folder / name, ignore=_no_sources)
    # verl and vLLM find plugins by the metadata of a distribution, which thereby need not be installed on the nodes.
    distribution = metadata.distribution("tagpr")
    declared = folder / f"tagpr-{distribution.version}.dist-info"
    declared.mkdir()
    (declared / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tagpr\nVersion: {distribution.version}\n"
    )
    (declared / "entry_points.txt").write_text(distribution.read_text("entry_points.txt") or "")
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if sum(sizes.values()) > LARGEST_SOURCES_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise StageError(
            f"{largest.relative_to(folder)}: the sources that travel have {sum(sizes.values()) / 2**20:.0f} MiB, "
            f"{sizes[largest] / 2**20:.0f} of them in this file. Move what is no source out of the packages."
        )
    return sum(sizes.values())


def _no_sources(folder: str, names: list[str]) -> set[str]:
    left_out = set()
    for name in names:
        path = Path(folder, name)
        if name.startswith((".", "__pycache__")) or path.is_symlink():
            left_out.add(name)
        elif path.is_dir():
            if name in ("outputs", "checkpoints"):
                left_out.add(name)
        elif path.suffix not in SOURCE_SUFFIXES:
            left_out.add(name)
    return left_out


@contextmanager
def connected(
    address: str, environment: Mapping[str, str], *, key: str = "launch.address", **arguments: Any
) -> Iterator[None]:
    """The Ray cluster at ``address`` while the body runs; its workers get our sources and ``environment``.

    ``arguments`` go to ``ray.init``; a ``runtime_env`` among them is completed.

    Raises:
        StageError: no cluster answers there, or it refuses the token.
    """
    prepare_to_connect(address)
    _check_somebody_listens(address, key)
    import ray

    runtime_env = dict(arguments.pop("runtime_env", None) or {})
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **environment}
    # A job's own runtime environment has some of these already, with the same values.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    with tempfile.TemporaryDirectory(prefix="tagpr-sources-") as folder:
        if IN_A_JOB not in os.environ:
            ship_sources(Path(folder))
            runtime_env["working_dir"] = folder
        try:
            ray.init(address=address, runtime_env=runtime_env, **arguments)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise StageError(
                f"{key}={address}: cannot be used ({_first_line(error)}). Start the cluster, mend the address (or RAY_ADDRESS), "
                "or set null for a Ray of this run's own."
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def use_token_if_there_is_one() -> None:
    """Have Ray present its token where there is one, in the environment or where Ray keeps it; call it before ray is imported."""
    kept = Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or kept.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def prepare_to_connect(address: str) -> None:
    """Set what Ray needs to know beforehand of the cluster at ``address``; call it before ray is imported."""
    use_token_if_there_is_one()
    host, _, port = address.rpartition(":")
    if host in ("127.0.0.1", "localhost") and port.isdecimal() and not _open_to_others(int(port)):
        # Ray would take this machine's outward address instead, where a head on loopback does not listen.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def _check_somebody_listens(address: str, key: str) -> None:
    """Ray itself tries for minutes, in which it can neither be interrupted nor says anything.

    Raises:
        StageError: nothing takes connections at ``address``, where it is a host and a port.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise StageError(
            f"{key}={address}: nobody listens there ({getattr(error, 'strerror', None) or error}). Start the cluster, mend the "
            "address (or RAY_ADDRESS), or set null for a Ray of this run's own."
        ) from error


def _open_to_others(port: int) -> bool:
    """Whether something listens at this port of this machine's outward address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 53))  # sends nothing: it chooses a route, as Ray does
            outward = probe.getsockname()[0]
        except OSError:
            return False
    try:
        socket.create_connection((outward, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def be_no_actor() -> None:
    """In a job: forget that Ray left the GPUs of its driver alone, by which verl takes a process for one of Ray's actors."""
    if IN_A_JOB in os.environ:
        for name in [name for name in os.environ if name.startswith("RAY_EXPERIMENTAL_NOSET_")]:
            del os.environ[name]


def absolute_overrides(config: DictConfig) -> list[str]:
    """Overrides for a job that runs in another folder: relative paths as they are seen from here, made absolute.

    ``config`` is composed but not resolved: what is interpolated follows what it is made of.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    found = {}
    for keys, may_be_id in ((PATH_KEYS, False), (MODEL_KEYS, True)):
        for pattern in keys:
            for key, value in _leaves(raw, pattern.split(".")):
                if key in found or not isinstance(value, str) or "${" in value or "://" in value or not value:
                    continue
                path = Path(value).expanduser()
                if may_be_id and not path.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                    continue
                if str(path.absolute()) != value:
                    found[key] = f"{key}={json.dumps(str(path.absolute()), ensure_ascii=False)}"
    return list(found.values())


def _leaves(node: Any, pattern: Sequence[str], at: str = "") -> Iterator[tuple[str, Any]]:
    if not pattern:
        yield at, node
    elif isinstance(node, dict):
        for name in node if pattern[0] == "*" else [pattern[0]]:
            if name in node:
                yield from _leaves(node[name], pattern[1:], f"{at}.{name}" if at else str(name))


def submit(
    url: str,
    stage: str,
    overrides: Sequence[str],
    *,
    environment: Mapping[str, str],
    gpus: float = 0,
    say: Callable[[str], None] | None = None,
) -> int:
    """Run ``python -m tagpr <stage> <overrides>`` as a job of the cluster whose dashboard is at ``url``; follow its log.

    Args:
        gpus: what the job's own process needs on its node; workers that it asks Ray for are not among them.
        say: takes the log's text as it comes; the terminal where absent.

    Returns:
        The job's exit status; 130 when the watching was interrupted, in which case the job goes on.

    Raises:
        ConfigError: ``url`` is no URL of a dashboard, or an override carries a secret.
        StageError: the cluster cannot be reached, refuses the token, or lost the job.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"launch.submit={url}: is no URL of a Ray dashboard. Give http://<head>:8265, or set launch.address."
        )
    for override in overrides:
        name = override.lstrip("+~").partition("=")[0].rsplit(".", 1)[-1]
        if re.fullmatch(r"(?i)(.*_)?(token|secret|password|api_?key)", name) or CREDENTIALS_IN_URL.search(
            override
        ):
            raise ConfigError(
                f"{override.partition('=')[0]}: looks like a secret, and a job's command can be read by everybody on the "
                "cluster. Give a file that the nodes can read."
            )
    client, job = start_job(url, stage, overrides, environment=environment, gpus=gpus)
    at = f"--address {url}"
    try:
        name, status = follow_job(client, job, say)
    except KeyboardInterrupt:
        logger.info(
            "job %s goes on: `ray job logs -f %s %s` follows it, `ray job stop %s %s` ends it",
            job,
            job,
            at,
            job,
            at,
        )
        return 130
    logger.info("job %s: %s", job, name.lower())
    return status


def start_job(
    url: str, stage: str, overrides: Sequence[str], *, environment: Mapping[str, str], gpus: float = 0
) -> tuple[Any, str]:
    """The first half of :func:`submit`: (client of the cluster, name of the job)."""
    use_token_if_there_is_one()
    import ray.exceptions
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(url)
        # Only now: the client makes Ray talkative.
        for talkative in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(talkative).setLevel(logging.WARNING)
        with tempfile.TemporaryDirectory(prefix="tagpr-job-") as folder:
            size = ship_sources(Path(folder))
            job = _submit(
                client,
                entrypoint=shlex.join(["python", "-m", "tagpr", stage, *overrides]),
                runtime_env={"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1", **environment}},
                entrypoint_num_gpus=gpus or None,
                metadata={"stage": stage},
            )
    except ray.exceptions.AuthenticationError as error:
        raise StageError(
            f"launch.submit={url}: the cluster wants its token. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the one it was "
            "started with."
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise StageError(
            f"launch.submit={url}: {_first_line(error)}. Start the cluster (`ray start --head`), or mend the URL."
        ) from error
    at = f"--address {url}"
    logger.info(
        "job %s: %d KiB of sources, %d variables sent to %s", job, size // 1024, len(environment), url
    )
    logger.info("`ray job logs -f %s %s` follows it too, `ray job stop %s %s` ends it", job, at, job, at)
    return client, job


def follow_job(client: Any, job: str, say: Callable[[str], None] | None = None) -> tuple[str, int]:
    """The second half: pass the job's log on until it ends; (what Ray calls its end, exit status)."""
    asyncio.run(_follow(client, job, say or _to_terminal))
    return _final_status(client, job)


def job_state(client: Any, job: str) -> str | None:
    """What Ray calls the job's state; None where its cluster has been started anew and knows nothing of it.

    Raises:
        OSError, RuntimeError: the cluster does not answer.
    """
    try:
        return str(client.get_job_info(job).status.value)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise


def _submit(client: Any, **job: Any) -> str:
    """Submit; a cluster that has just been started takes no jobs for some seconds, although its dashboard answers."""
    give_up = time.monotonic() + LOST_CONNECTION_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > give_up:
                raise StageError(
                    "launch.submit: no node of the cluster takes jobs. Where two Rays share the head's machine, give this one "
                    "ports of its own (`ray start --head --dashboard-agent-listen-port=...`)."
                ) from error
        logger.info("the cluster takes no jobs yet; waiting")
        time.sleep(3.0)


def _to_terminal(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def _follow(client: Any, job: str, say: Callable[[str], None]) -> None:
    """Pass the job's log on; where the connection drops, go on behind what was passed."""
    import aiohttp

    passed, lost_since = 0, None
    while True:
        skip = passed
        try:
            async for text in client.tail_job_logs(job):
                lost_since = None
                fresh = text[skip:]
                skip -= len(text) - len(fresh)
                passed += len(fresh)
                if fresh:
                    say(fresh)
            return
        except (aiohttp.ClientError, ConnectionError, RuntimeError) as error:
            if "404" in str(error) or "does not exist" in str(error):
                raise StageError(
                    f"job {job}: its cluster has been started anew, and does not know it."
                ) from error
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > LOST_CONNECTION_S:
                raise StageError(
                    f"job {job}: its cluster has not answered for {LOST_CONNECTION_S:.0f} s ({_first_line(error)}). "
                    f"The job may go on: `ray job status {job}` tells when the head is back."
                ) from error
            await asyncio.sleep(2.0)


def _final_status(client: Any, job: str) -> tuple[str, int]:
    """(what Ray calls it, exit status); the log ends a moment before the job is said to."""
    give_up = time.monotonic() + LOST_CONNECTION_S
    while True:
        info = client.get_job_info(job)
        if info.status.value in TERMINAL:
            break
        if time.monotonic() > give_up:
            raise StageError(
                f"job {job}: its log has ended, but it is {info.status.value}. Ask `ray job status {job}`."
            )
        time.sleep(0.2)
    if info.status.value == "SUCCEEDED":
        return "SUCCEEDED", 0
    code = info.driver_exit_code
    if code is None:
        logger.error("job %s: %s", job, _first_line(info.message or "ended without an exit status"))
    # A driver that a signal ended has a negative status.
    return info.status.value, 1 if not code else code if code > 0 else 128 - code


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
