"""Where the job runs: a Ray of its own on this machine, or a cluster that is there."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from data_pipeline.settings import RaySettings
from tagpr.errors import StageError
from tagpr.local_ray import local_ray
from tagpr.ray_jobs import connected, forwarded

# Enough for requests and replies under way; nothing is kept in it.
OBJECT_STORE_BYTES = 100 * 2**20


@contextmanager
def ray_running(settings: RaySettings) -> Iterator[None]:
    """Ray while the body runs: the cluster at ``chains.ray.address``, else one of this process's own, on loopback only.

    What is started here ends with this process, even by ``kill -9``.

    Raises:
        StageError: there is no such cluster, or it does not start.
    """
    # Ray reads it when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if settings.address is not None:
        quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
        with connected(settings.address, forwarded(), key="chains.ray.address", **quiet):
            yield
        return
    # Ray runs workers at the lowest priority; these are what the driver waits for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with ExitStack() as stack:
        try:
            stack.enter_context(
                local_ray(settings.cpus, dashboard=settings.dashboard, object_store_bytes=OBJECT_STORE_BYTES)
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise StageError(
                f"chains.ray.address=null: a Ray of its own cannot be started ({reason}). Mend that, or give a cluster's address."
            ) from error
        yield
