"""A disk that is full: said in one line; a checkpoint's half removed, the ones before it untouched."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tagpr.checkpoints import half_written
from tagpr.errors import RunFault

FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch, the operating system and Ray's copy of a worker's error say; torch does not always say why.
WORDS = ("no space left", "errno 28", "disk quota", "file write failed", "unexpected pos")
NEARLY_FULL_BYTES = 16 * 2**20


@contextmanager
def disk_full_is_named(checkpoints: Path) -> Iterator[None]:
    """Turn whatever a full disk raises in the body into one line.

    Raises:
        RunFault: the disk was full; the checkpoint's half is gone, which gives its space back.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error, checkpoints):
            raise
        free = shutil.disk_usage(checkpoints).free / 2**20
        for half in half_written(checkpoints):
            shutil.rmtree(half, ignore_errors=True)
        raise RunFault(
            f"{checkpoints}: no space for the checkpoint ({free:.0f} MiB free). Make room, or lower "
            "trainer.max_actor_ckpt_to_keep; the run goes on after the last complete one."
        ) from error


@contextmanager
def no_space_is_named(run_dir: Path) -> Iterator[None]:
    """The same for what this process itself writes in the body: metrics, rollouts, curves.

    Raises:
        RunFault: the disk was full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunFault(
            f"{error.filename or run_dir}: no space on the disk ({shutil.disk_usage(run_dir).free / 2**20:.0f} MiB free). Make "
            "room; the run goes on after the last complete checkpoint."
        ) from error


def _is_full(error: BaseException, folder: Path) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        if any(word in str(seen).lower() for word in WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return folder.is_dir() and shutil.disk_usage(folder).free < NEARLY_FULL_BYTES
