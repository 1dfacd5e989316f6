"""A Ray of this process's own: on loopback only, with a token, gone with the process."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

# For messages and small results; whoever moves data asks for more.
OBJECT_STORE_BYTES = 256 * 2**20


def prepare_environment() -> None:
    """What Ray has to find in the environment when it is imported: loopback only, a token, no usage statistics."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray takes the machine's outward address even where it is told 127.0.0.1, unless clusters are off altogether.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        # Other users of this machine are not invited either.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


@contextmanager
def local_ray(
    cpus: int | None,
    *,
    dashboard: bool = False,
    object_store_bytes: int | None = OBJECT_STORE_BYTES,
    quiet: bool = True,
    **arguments: Any,
) -> Iterator[None]:
    """Start it, never joining one that somebody else has left running here, and stop it after the body.

    ``cpus`` None: what the machine has; ``object_store_bytes`` None: Ray's own choice, a third of the memory; ``quiet`` keeps
    Ray's and its workers' output from this process; ``arguments`` go to ``ray.init``. Call it, or
    :func:`prepare_environment`, before anything imports ray: Ray reads the environment then.

    Raises:
        ConnectionError, RuntimeError, ValueError, OSError: Ray does not start.
    """
    prepare_environment()
    import ray

    if quiet:
        arguments |= {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    if object_store_bytes is not None:
        arguments["object_store_memory"] = object_store_bytes
    context = ray.init(address="local", num_cpus=cpus, include_dashboard=dashboard, **arguments)
    if dashboard:
        logger.info("Ray's dashboard: http://%s", context.dashboard_url)
    try:
        yield
    finally:
        ray.shutdown()
