"""What the fork server imports: all that the processes of a run do, and nothing that acts on being imported."""

import gc
import importlib
import json
import os
import sys
import traceback
from multiprocessing.context import SpawnContext
from typing import Any

import setproctitle

from tagpr.rl.warm import process

# Those that do not bring Ray come first, since they need not wait for it to be up.
WITHOUT_RAY = (
    "sklearn.metrics",
    "tensordict",
    "torch",
    "transformers.models.auto.auto_factory",
    "transformers.models.qwen3.modeling_qwen3",
    "vllm",
)
WITH_RAY = (
    "transfer_queue",
    "tagpr.cpu_platform.platform",
    "tagpr.rl.reward_manager",
    "tagpr.rl.rollouts",
    "tagpr.rl.stacks",
    "verl.workers.engine_workers",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
)


class Engine(process.WarmProcess):
    """Of vLLM's, which gives it a title."""

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        # Finds the place of the title while it is where it was when the server began; Ray's workers have a way of their own.
        os.environ["SPT_NOENV"] = "1"
        setproctitle.getproctitle()
        return super()._bootstrap(parent_sentinel)


class WarmContext(SpawnContext):
    """Processes that are forked from the server; all else as where they are started anew."""

    Process = Engine  # type: ignore[assignment]


def import_all(names: tuple[str, ...]) -> None:
    """Import modules by their names."""
    for name in names:
        importlib.import_module(name)


def draw_no_random_numbers_of_rays() -> None:
    """Random names of the classes that become actors, as they are imported, come from the system.

    Ray's library draws them from its own sequence, which begins with the first: after it, all forked processes would go on alike.
    """
    import ray.actor

    class ActorClassIDs:
        @staticmethod
        def from_random() -> Any:
            return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))

    ray.actor.ActorClassID = ActorClassIDs


def fork_vllms_engine() -> None:
    """vLLM's engine is forked from the server too, where vLLM would start it anew with the libraries that are preloaded there."""
    import vllm.v1.engine.utils

    original = vllm.v1.engine.utils.get_mp_context

    def get_mp_context() -> Any:
        wanted = original()
        if wanted.get_start_method() != "spawn" or not process.reach_server(os.environ.get("LD_PRELOAD", "")):
            return wanted
        return WarmContext()

    vllm.v1.engine.utils.get_mp_context = get_mp_context


def main() -> None:
    """Import everything; ends the server where that fails, so that processes are started anew."""
    import_all(WITHOUT_RAY)
    # Ray's library reads its variables when it is imported, among them whose workers its processes are.
    assert "ray" not in sys.modules, "something in WITHOUT_RAY brings Ray"
    told = sys.stdin.readline()
    if not told:
        # No Ray, or no driver any more.
        sys.exit()
    os.environ.update(json.loads(told))
    draw_no_random_numbers_of_rays()
    import_all(WITH_RAY)
    fork_vllms_engine()
    process.after_imports = dict(os.environ)
    # What is there now stays: the collector of a forked process need not look at it, so that its memory stays shared.
    gc.collect()
    gc.freeze()


if __name__ != "__main__":
    try:
        main()
    except ImportError:
        # With which the standard library's server would go on.
        traceback.print_exc()
        sys.exit(1)
