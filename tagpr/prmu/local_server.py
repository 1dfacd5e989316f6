"""A reward server of this run's own: started on loopback, stopped with the run, whatever ends it."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tagpr.errors import RewardServerError
from tagpr.prmu.wire import Address, read_address

logger = logging.getLogger(__name__)

START_DEADLINE_S = 300.0


@contextmanager
def local_server(checkpoint: str, run_dir: Path, device: str) -> Iterator[Address]:
    """Serve a PRMU checkpoint on a free loopback port while the body runs.

    The server watches this process and ends with it (``server.parent_pid``), so not even ``kill -9`` leaves it behind.

    Raises:
        RewardServerError: it did not come up; its log is named.
    """
    address_file = run_dir / "reward_server" / "server.json"
    address_file.unlink(missing_ok=True)
    log_path = run_dir / "reward_server" / "server.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "reward_server",
        f"paths.prmu={checkpoint}", f"run.dir={address_file.parent}", f"server.parent_pid={os.getpid()}",
        f"server.device={device}",
    ]  # fmt: skip
    with log_path.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield _wait_until_ready(process, address_file, log_path)
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen, address_file: Path, log_path: Path) -> Address:
    started = time.monotonic()
    while time.monotonic() - started < START_DEADLINE_S:
        if address_file.exists():
            address = read_address(address_file)
            logger.info(
                "reward server at %s, PRMU %s, ready after %.0f s",
                address.url, address.model_version, time.monotonic() - started,
            )  # fmt: skip
            return address
        if process.poll() is not None:
            lines = [
                line for line in log_path.read_text("utf-8", errors="replace").splitlines() if line.strip()
            ]
            last = lines[-1] if lines else "it printed nothing"
            raise RewardServerError(
                f"reward server: exited with status {process.returncode}: {last} Log: {log_path}"
            )
        time.sleep(0.1)
    raise RewardServerError(f"reward server: not ready after {START_DEADLINE_S:.0f} s. Log: {log_path}")
