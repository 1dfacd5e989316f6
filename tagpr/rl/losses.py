"""Names the node or the worker that a run has lost, within seconds, and ends the run so that it can be started again.

verl finds out where it happens to wait for just that worker; for a rollout worker it waits nowhere, and the watchdog's limits are
made for slow phases. Ray's own records of nodes and actors are looked at instead.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tagpr.errors import RunFault

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """``reason``: why it is gone, where it is not ``alive`` and Ray says so."""

    name: str
    alive: bool
    reason: str = ""


@dataclass(frozen=True)
class Worker:
    """A Ray actor of this run. ``died``: its process ended as nobody meant it to."""

    name: str
    node: str
    alive: bool
    died: bool = False
    reason: str = ""


@dataclass
class Losses:
    """Compares what a run has with what it had when it was looked at last."""

    _had: dict[str, Worker] = field(default_factory=dict)

    def look(self, nodes: dict[str, Node], workers: dict[str, Worker]) -> str | None:
        """One line on what is lost; None where nothing is.

        Args:
            nodes: of the cluster, by id.
            workers: of this run, by id; living ones, and dead ones for as long as Ray remembers them.
        """
        for id, node in nodes.items():
            there = sorted(worker.name for worker in self._had.values() if worker.node == id)
            if there and not node.alive:
                reason = f" ({node.reason})" if node.reason else ""
                return f"node {node.name} is gone{reason}, and with it {', '.join(there)}"
        for id, worker in workers.items():
            had = self._had.get(id)
            if had is not None and worker.died:
                where = f" on node {nodes[had.node].name}" if had.node in nodes else ""
                return f"worker {had.name}{where} is dead{f' ({worker.reason})' if worker.reason else ''}"
        self._had = {id: worker for id, worker in workers.items() if worker.alive}
        return None


def ray_nodes() -> dict[str, Node]:
    """The nodes of the cluster this process is connected to, dead ones included."""
    import ray

    return {
        node["NodeID"]: Node(
            f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:8]})",
            node["Alive"],
            _first(node.get("DeathReasonMessage") or ""),
        )
        for node in ray.nodes()
    }


def ray_workers() -> dict[str, Worker]:
    """The actors that this process has started, directly or not."""
    import ray
    from ray.core.generated.common_pb2 import ActorDiedErrorContext

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    found = {}
    for id, actor in ray._private.state.actors(job_id=job).items():
        cause = actor["DeathCause"]
        context = cause.actor_died_error_context
        dead = actor["State"] == "DEAD"
        found[id] = Worker(
            f"{actor['ActorClassName'].rpartition('.')[2]} (process {actor['Pid']})",
            actor["Address"]["NodeID"],
            actor["State"] == "ALIVE",
            # Not those that were told to end, or that nobody needs any more.
            dead
            and (
                cause.HasField("oom_context")
                or (context.reason == ActorDiedErrorContext.WORKER_DIED and "INTENDED" not in context.error_message)
            ),
            "out of memory" if cause.HasField("oom_context") else _first(context.error_message),
        )  # fmt: skip
    return found


def _first(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].rstrip(". ")[:200]


def end(line: str) -> None:
    """Say it and end this process at once: its main thread may wait for what is gone."""
    logger.error(
        "lost: %s. Ending with status %d; the same command goes on after the last checkpoint.",
        line,
        RunFault.status,
    )
    logging.shutdown()
    os._exit(RunFault.status)


@contextmanager
def losses_named(
    every_s: float,
    *,
    nodes: Callable[[], dict[str, Node]] = ray_nodes,
    workers: Callable[[], dict[str, Worker]] = ray_workers,
    lost: Callable[[str], None] = end,
) -> Iterator[None]:
    """Look every few seconds (0: never) during the body; the first loss goes to ``lost``, in a thread."""
    if not every_s:
        yield
        return
    over, losses = threading.Event(), Losses()

    def watch() -> None:
        said = False
        while not over.wait(every_s):
            try:
                # In this order: what is started between the two questions is on a node that is known.
                found = workers()
                line = losses.look(nodes(), found)
            except Exception as error:  # noqa: BLE001 - Ray's records may be away for a moment, and the watch must not end by it
                if not said:
                    logger.warning("nodes and workers cannot be looked at: %s", _first(str(error)))
                said = True
                continue
            said = False
            # Once the run is over, its workers are ended.
            if line is not None and not over.is_set():
                lost(line)
                return

    thread = threading.Thread(target=watch, name="losses", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
