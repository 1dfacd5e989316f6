"""What a later start of a run waits for, and a first one does not: nodes, free GPUs, Ray itself."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from omegaconf import DictConfig

from tagpr.errors import RunFault, StageError
from tagpr.rl.supervisor import patience_s

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
EVERY_S = 3.0
# How long a node may take to answer: it may have to start a process first.
ANSWER_S = 60.0


def until_there(
    config: DictConfig, look: Callable[[], Found], pause: Callable[[float], None] = time.sleep
) -> Found:
    """``look()``; in a later start of a supervised run again and again while it raises, for ``launch.patience_s``.

    Raises:
        StageError: as ``look`` did, in a first start.
        RunFault: it still does when the time is up.
    """
    patience = patience_s(config)
    give_up, said = time.monotonic() + patience, ""
    while True:
        try:
            return look()
        except StageError as fault:
            if not patience:
                raise
            if time.monotonic() >= give_up:
                raise RunFault(f"{fault} Waited {patience:.0f} s (launch.patience_s).") from fault
            if str(fault) != said:
                logger.warning("waiting, up to %.0f s: %s", patience, fault)
                said = str(fault)
        pause(EVERY_S)


def free_gpus(needed: float) -> float:
    """GPUs of the cluster that nobody has; where they seem fewer than ``needed`` every node is asked for its own count first.

    Ray's head believes what a node reported last. Where a node came back while a placement group of the attempt before was being
    moved to it, Ray 2.60 takes its GPUs out of the head's books, fails to reach it, forgets to put them back, and is corrected
    only when something else on the node changes: a task that takes a hundredth of a CPU.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def free() -> float:
        return float(ray.available_resources().get("GPU", 0))

    if free() >= needed:
        return free()
    task = ray.remote(num_cpus=0.01, max_retries=0)(_nothing)
    asked = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"]
    ]
    _, late = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    for each in late:
        ray.cancel(each, force=True)
    return free()


def _nothing() -> None:
    """A task that only has to come and go."""
