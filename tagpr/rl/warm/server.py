"""The driver's side: start the fork server, and have Ray fork its workers from it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from tagpr.rl.warm.process import ADDRESS

# What Ray is told of a worker that waits for the imports: seconds until it takes it for dead (60 by itself).
REGISTER_TIMEOUT_S = 600


def package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    found = find_spec(name)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def preloaded() -> str:
    """``LD_PRELOAD`` as vLLM sets it for its engine on a CPU (vllm/platforms/cpu.py): its allocator, torch's OpenMP.

    Empty where it sets none, or another one than is understood here; then vLLM's engine is started anew.
    """
    torch, vllm = package("torch"), package("vllm")
    openmp = [*torch.parent.glob("torch.libs/libgomp*.so*"), *torch.glob("lib/libgomp*.so*")]
    allocator = [*vllm.glob("libs/libtcmalloc_minimal*.so*"), *vllm.glob("libs/libtcmalloc.so*")]
    return ":".join(str(each[0]) for each in (allocator, openmp) if each)


@contextmanager
def fork_server(environment: Mapping[str, str]) -> Iterator[Callable[[], None]]:
    """A fork server with all imports while the body runs; Ray, started in the body, has its workers forked from it.

    It ends with this process, however that ends; what was forked from it does not. The body gets a function to call when Ray is up.

    Args:
        environment: variables of all workers, beside this process's own.
    """
    if not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ:
        yield lambda: None
        return
    with (
        # Of this user's alone; not where TMPDIR is, since a socket's path has at most 107 characters.
        tempfile.TemporaryDirectory(prefix="tagpr-", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(f"{folder}/fork")
        listener.listen()
        alive, held = os.pipe()
        try:
            server = subprocess.Popen(
                [sys.executable, "-c", "from multiprocessing.forkserver import main; "
                 f"main({listener.fileno()}, {alive}, ['tagpr.rl.warm.imports'])"],
                pass_fds=[listener.fileno(), alive],
                stdin=subprocess.PIPE,
                env={**os.environ, **environment, "LD_PRELOAD": preloaded()},
            )  # fmt: skip
            os.close(alive)
            listener.close()
            variables = {
                ADDRESS: f"{server.pid}:{folder}/fork",
                "RAY_worker_register_timeout_seconds": str(REGISTER_TIMEOUT_S),
                # Workers without the run's environment, which nobody would ask for.
                "RAY_prestart_worker_first_driver": "0",
            }
            os.environ.update(variables)
            try:
                with workers_are_forked():
                    yield lambda: tell(server)
            finally:
                for name in variables:
                    del os.environ[name]
                server.kill()
                server.wait()
        finally:
            os.close(held)


def tell(server: subprocess.Popen[bytes]) -> None:
    """Tell the server which variables this Ray's raylet gives to the workers of this job."""
    import ray._private.worker

    (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
    variables = {
        "RAY_RAYLET_PID": str(raylet.process.pid),
        "RAY_JOB_ID": ray.get_runtime_context().get_job_id(),
    }
    assert server.stdin is not None
    with contextlib.suppress(BrokenPipeError), server.stdin:
        server.stdin.write(f"{json.dumps(variables)}\n".encode())


@contextmanager
def workers_are_forked() -> Iterator[None]:
    """Ray, started in the body, starts its workers with ``setup_worker.py`` of this folder, and no autoscaler."""
    import ray._private.parameter

    original = ray._private.parameter.RayParams

    def parameters(*args: object, **kwargs: object) -> object:
        ours = {"setup_worker_path": str(Path(__file__).with_name("setup_worker.py")), "no_monitor": True}
        return original(*args, **{**kwargs, **ours})

    with mock.patch.object(ray._private.parameter, "RayParams", parameters):
        yield
