"""Where the job runs: a Ray of its own on this machine, a cluster that is there, or a cluster that it is submitted to."""

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tagpr
from data_pipeline.settings import RaySettings
from tagpr.configuration import exported
from tagpr.errors import ConfigError, StageError

logger = logging.getLogger(__name__)

# Enough for requests and replies under way; nothing is kept in it.
OBJECT_STORE_BYTES = 100 * 2**20
# What a job needs of the sources: the packages, without data, outputs, checkpoints or repository.
PACKAGES = ("tagpr", "data_pipeline")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.safetensors", "*.sqlite*", ".*")
# One for each process: Ray remembers the first that it has seen.
_TOKEN = secrets.token_hex(32)
# What Ray and its cluster set in the environment of a job that was submitted to it.
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@contextmanager
def ray_running(settings: RaySettings) -> Iterator[None]:
    """Ray while the body runs: the cluster at ``chains.ray.address``, else one of this process's own, on loopback only.

    What is started here ends with this process, even by ``kill -9``.

    Raises:
        StageError: there is no such cluster, or it does not start.
    """
    address = settings.address
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    if address is None:
        # Ray takes the machine's outward address even where it is told 127.0.0.1, unless clusters are off altogether.
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray runs workers at the lowest priority; these are what the driver waits for.
        environment["RAY_worker_niceness"] = "0"
        if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
            # Other users of this machine are not invited either.
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    with _environment(environment):
        yield from _connected(settings)


def _connected(settings: RaySettings) -> Iterator[None]:
    # It reads the environment as it is imported.
    import ray

    address = settings.address
    arguments: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    if address is None:
        arguments |= {
            "address": "local",
            "num_cpus": settings.cpus,
            "include_dashboard": settings.dashboard,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        arguments |= {"address": address}
        if IN_A_JOB not in os.environ:
            # A job has brought its sources along.
            root = Path(tagpr.__file__).parent.parent
            arguments["runtime_env"] = {
                "py_modules": [str(root / name) for name in PACKAGES],
                "excludes": ["**/__pycache__"],
                "env_vars": exported(),
            }
    try:
        context = ray.init(**arguments)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = "a Ray of its own" if address is None else address
        raise StageError(
            f"chains.ray.address={address or 'null'}: {where} cannot be used ({reason}). "
            "Start the cluster or mend the address; null starts one on this machine."
        ) from error
    if settings.dashboard and address is None:
        logger.info("Ray's dashboard: http://%s", context.dashboard_url)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """These variables, where they are not set, for this process and what it starts."""
    added = [name for name in more if name not in os.environ]
    os.environ.update({name: more[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def submit(url: str, overrides: Sequence[str]) -> None:
    """Run this stage as a job of the cluster whose dashboard is at ``url``, and follow its log until it ends.

    The sources travel along; data and outputs do not: their folders must be the same on the cluster's head node. No key
    travels either: the driver reads it there, from its environment or from a file.

    Raises:
        ConfigError: ``url`` is no URL of a dashboard.
        StageError: the cluster cannot be reached, or the job failed.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"chains.ray.submit={url}: is no URL of a Ray dashboard. Give http://<head>:8265, or set chains.ray.address."
        )
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(url)
    except (ConnectionError, RuntimeError) as error:
        raise StageError(
            f"chains.ray.submit={url}: no Ray dashboard answers there. Start the cluster (`ray start --head`)."
        ) from error
    with tempfile.TemporaryDirectory(prefix="tagpr-job-") as folder:
        ship_sources(Path(folder))
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "data_pipeline", *overrides]),
            runtime_env={"working_dir": folder, "env_vars": exported()},
            metadata={"stage": "build_chains"},
        )
    logger.info(
        "job %s at %s; `ray job logs -f %s` follows it, `ray job stop %s` ends it", job, url, job, job
    )

    async def follow() -> None:
        async for text in client.tail_job_logs(job):
            sys.stderr.write(text)

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        logger.info("job %s goes on; `ray job logs -f %s --address %s` follows it again", job, job, url)
        return
    status = client.get_job_status(job)
    if status != JobStatus.SUCCEEDED:
        raise StageError(f"job {job}: {status.value.lower()}, see its lines above. Submit it again to go on.")


def ship_sources(folder: Path) -> None:
    """Copy the packages into ``folder``: what a job needs to know of us, and nothing else."""
    root = Path(tagpr.__file__).parent.parent
    for name in PACKAGES:
        shutil.copytree(root / name, folder / name, ignore=_LEFT_OUT)
