"""An actor, and a child of it, that tell what they find around themselves (test_warm.py)."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import setproctitle


class Looking:
    """What a worker is."""

    def look(self) -> dict[str, Any]:
        """Of this process."""
        imported = "vllm.v1.engine.core" in sys.modules
        import numpy as np
        import ray

        return {
            "pid": os.getpid(), "parent": os.getppid(), "imported": imported, "given": os.environ.get("GIVEN"),
            "own": os.environ.get("OWN"), "threads": os.environ.get("OMP_NUM_THREADS"), "preload": os.environ.get("LD_PRELOAD"),
            "directory": os.getcwd(), "argument": sys.argv[0], "random": float(np.random.rand()),
            "worker": ray.get_runtime_context().get_worker_id(), "object": ray.put(1).hex(),
            "random_id": ray.WorkerID.from_random().hex(),
            "title": Path("/proc/self/cmdline").read_text(),
        }  # fmt: skip

    def child(self, preload: str) -> dict[str, Any]:
        """Of a process that is started as vLLM starts its engine."""
        from vllm.v1.engine import utils

        os.environ.update(LD_PRELOAD=preload, LATE="set by the parent")
        context = utils.get_mp_context()
        reader, writer = context.Pipe()
        process = context.Process(target=answer, args=(writer,))
        process.start()
        told = reader.recv()
        process.join()
        same = told.pop("pid") == process.pid
        return {
            **told,
            "output": told["output"] == os.readlink("/proc/self/fd/1"),
            "same": same,
            "status": process.exitcode,
        }

    def linger(self, preload: str) -> int:
        """Process id of another one, which stays."""
        from vllm.v1.engine import utils

        os.environ["LD_PRELOAD"] = preload
        self.lingering = utils.get_mp_context().Process(target=time.sleep, args=(600,))
        self.lingering.start()
        assert self.lingering.pid
        return self.lingering.pid


def answer(pipe: Any) -> None:
    """Tell, and end with a status of its own."""
    setproctitle.setproctitle("VLLM::test")
    pipe.send(
        {
            "pid": os.getpid(), "parent": os.getppid(), "late": os.environ.get("LATE"),
            "imported": "vllm.v1.engine.core" in sys.modules, "output": os.readlink("/proc/self/fd/1"),
            "titled": Path("/proc/self/cmdline").read_text().startswith("VLLM::test"),
        }
    )  # fmt: skip
    sys.exit(7)
