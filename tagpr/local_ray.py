"""A Ray of this process's own: on loopback only, with a token, gone with the process."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

# For messages and small results; whoever moves data asks for more.
OBJECT_STORE_BYTES = 256 * 2**20


@contextmanager
def local_ray(
    cpus: int, *, dashboard: bool = False, object_store_bytes: int = OBJECT_STORE_BYTES
) -> Iterator[None]:
    """Start it, never joining one that somebody else has left running here, and stop it after the body.

    Call it before anything else imports ray: Ray reads the environment when it is imported.

    Raises:
        ConnectionError, RuntimeError, ValueError, OSError: Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray takes the machine's outward address even where it is told 127.0.0.1, unless clusters are off altogether.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        # Other users of this machine are not invited either.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=dashboard,
        object_store_memory=object_store_bytes,
        log_to_driver=False,
        configure_logging=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()
