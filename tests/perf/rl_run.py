"""One RL run as a user starts it, for scripts that measure it or break it on purpose."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's, with this project's sources, without the hub, without warnings."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        **more,
    }  # fmt: skip


def rl_run(*arguments: str, timeout_s: float = 1800.0, **variables: str) -> int:
    """Run a driver to its end; what it prints goes to standard error.

    Args:
        arguments: of this Python: ``-m``, ``tagpr.rl``, a stage, overrides.
        timeout_s: after so many seconds it is asked to end, as it is when this process is interrupted.
        variables: of the environment, on top of this process's.

    Returns:
        Its exit status.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    process = subprocess.Popen([sys.executable, *arguments], stdout=sys.stderr, env=environment(**variables))
    try:
        return process.wait(timeout=timeout_s)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def finished_rl_run(run_dir: Path, *arguments: str, **more: Any) -> Path:
    """Its folder, after a run (:func:`rl_run`) that has to end well.

    Raises:
        SystemExit: it has not; naming the file that says why.
    """
    status = rl_run(*arguments, **more)
    if status:
        raise SystemExit(f"{run_dir}/driver.log: the run ended with status {status}. See there.")
    return run_dir
