"""Ray's workers import their libraries while the driver still imports its own, prepares prompts and starts the reward server.

Left alone, verl starts its processes one after the other, each with seconds of imports, while other cores idle. A Ray worker that
has run a task stays, and an actor with the same runtime environment moves into it (tagpr/cpu_platform/roles.py).
"""

import importlib
from collections.abc import Sequence

from tagpr.cpu_platform.roles import ROLES, environment_of


def import_modules(names: Sequence[str]) -> None:
    """What a worker does ahead of its time. What cannot be imported will say so when the actor needs it."""
    for name in names:
        importlib.import_module(name)


def warm_up() -> None:
    """Start one worker for each process of a run on this machine; returns at once."""
    import ray

    task = ray.remote(num_cpus=0)(import_modules)
    for role, (count, modules) in ROLES.items():
        for _ in range(count):
            task.options(runtime_env={"env_vars": environment_of(role)}, max_retries=0).remote(modules)
