"""A process forked from the fork server that stands for one started anew: with its parent's environment, directory and output."""

import atexit
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

# Environment variable of a run's processes: process id and socket of the fork server.
ADDRESS = "TAGPR_FORK_SERVER"
# Variables that are read when a library is loaded or imported begin with these. A process that wants others than the server has had
# is started anew.
READ_AT_IMPORT = (
    "PYTHON", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TORCH_", "PYTORCH_", "HF_", "TRANSFORMERS_",
    "VLLM_LOGGING_", "VERL_PLATFORM", "VERL_USE_", "VERL_LOGGING_", "TOKENIZERS_", "TAGPR_", "RAY_AUTH_",
)  # fmt: skip
# But not these: ours, the engine's (asked for by itself), and one that each worker of Ray's sets for itself.
OTHERS = {ADDRESS, "LD_PRELOAD", "PYTHONBREAKPOINT"}
# In a process that was forked from the server: what the imports have left there.
after_imports: dict[str, str] = {}


class WarmProcess(multiprocessing.context.ForkServerProcess):
    """Of the server's: what it has imported. Of the process that starts it: environment, directory, output."""

    _environment: dict[str, str]
    _output: list[Any]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": dict(os.environ), "_output": [DupFd(1), DupFd(2)]}

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        # The server is its parent for the system: what ends the children of a process would not find it.
        threading.Thread(target=end_with, args=(parent_sentinel,), daemon=True).start()
        for number, duplicate in enumerate(self._output, start=1):
            received = duplicate.detach()
            os.dup2(received, number)
            os.close(received)
        # What the imports have set (vLLM's do) they would have set here.
        before = environment_at_start(os.getppid())
        set_by_imports = {name: value for name, value in after_imports.items() if before.get(name) != value}
        os.environ.clear()
        os.environ.update({**set_by_imports, **self._environment})
        # A new process has its own, as it has its own random numbers (Python's are seeded anew after a fork).
        tracker: Any = multiprocessing.resource_tracker._resource_tracker
        tracker._fd = None
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        status: int = super()._bootstrap(parent_sentinel)  # type: ignore[misc]
        return status


def end_with(sentinel: int) -> None:
    """End this process when the one that started it has ended."""
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def environment_at_start(pid: int) -> dict[str, str]:
    """With what environment a process was started."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def reach_server(preload: str | None = None) -> bool:
    """Have this process's :class:`WarmProcess` forked from the run's fork server; False where that would give another process.

    Args:
        preload: what ``LD_PRELOAD`` has to be there, if that matters.
    """
    pid, _, address = os.environ.get(ADDRESS, "").partition(":")
    if not pid:
        return False
    try:
        theirs = environment_at_start(int(pid))
    except OSError:
        return False
    for name in {*theirs, *os.environ} - OTHERS:
        here, there = os.environ.get(name), theirs.get(name)
        if name.startswith(READ_AT_IMPORT) and here not in (there, after_imports.get(name, there)):
            return False
    if preload is not None and theirs.get("LD_PRELOAD", "") != preload:
        return False
    server: Any = multiprocessing.forkserver._forkserver
    server._forkserver_address = address
    # The server is to live while the driver lives, whatever becomes of this process.
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
    server.ensure_running = lambda: None
    return True


def run_script(path: str, arguments: Sequence[str]) -> None:
    """What ``python path arguments...`` does."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
