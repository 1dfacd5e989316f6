"""In every worker of a run: write the stacks of all threads to standard error when SIGUSR2 comes.

Loaded by ``VERL_USE_EXTERNAL_MODULES``; Ray brings a worker's standard error to the driver. Written in C by faulthandler, so that
a process that hangs in a library tells where, too.
"""

import faulthandler
import os
import signal
from pathlib import Path

import psutil

# Run directory, in the environment of every worker of a run.
RUN_DIR = "TAGPR_RUN_DIR"
SIGNAL = signal.SIGUSR2


def dump_here(run_dir: str) -> int:
    """Have the other processes of this run on this machine write their stacks; returns how many were told."""
    told = 0
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.environ().get(RUN_DIR) != run_dir:
                continue
            # To a process without the handler the signal would be the end.
            if hears(process.pid):
                process.send_signal(SIGNAL)
                told += 1
        except (psutil.Error, OSError):
            continue  # of somebody else, or gone
    return told


def hears(pid: int) -> bool:
    """Whether a process has a handler for the signal (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    return False


if RUN_DIR in os.environ:
    faulthandler.register(SIGNAL, file=2, all_threads=True, chain=False)
