"""What a Ray worker of a run on a CPU is for, told by an environment variable, so that it can import its libraries ahead of time.

An actor moves into a worker that has the same runtime environment: the variable decides which.
"""

from collections.abc import Mapping, Sequence

VARIABLE = "TAGPR_ROLE"

# Role -> (how many processes, what they import). "queue" are TransferQueue's two; it knows nothing of roles.
ROLES: Mapping[str, tuple[int, Sequence[str]]] = {
    "queue": (2, ("transfer_queue",)),
    "rollout": (1, ("verl.workers.rollout.vllm_rollout.vllm_async_server",)),
    "agent": (1, ("tagpr.rl.rollouts",)),
}


def environment_of(role: str) -> dict[str, str]:
    """Variables of a worker of this role, beside those of the run."""
    return {} if role == "queue" else {VARIABLE: role}
