"""What a person sees while a stage runs: our own lines, not those of the libraries underneath."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OURS = ("tagpr", "data_pipeline", "reward_server")


@contextmanager
def library_output_to(log_path: Path, verbose: bool = False) -> Iterator[None]:
    """Send everything written to this process's stdout and stderr to a file; our loggers keep the terminal.

    Works on file descriptors, so that output of child processes, C libraries and Ray workers is caught as well. Nothing is
    lost: our own lines are in the file too. ``verbose`` changes nothing.
    """
    if verbose:
        yield
        return
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    terminal = logging.StreamHandler(os.fdopen(os.dup(2), "w", buffering=1))
    terminal.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    with log_path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    loggers = [logging.getLogger(name) for name in OURS]
    for logger in loggers:
        logger.addHandler(terminal)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(terminal)
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        terminal.stream.close()
