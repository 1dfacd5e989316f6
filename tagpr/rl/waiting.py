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
