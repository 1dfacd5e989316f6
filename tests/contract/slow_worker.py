"""A training worker of verl that does nothing but take its time, for ``test_side_by_side.py``."""

import time
from typing import Any

from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register


class SlowWorker(Worker):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.loaded_at = 0.0

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        time.sleep(3.0)
        self.loaded_at = time.time()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def when_loaded(self) -> float:
        return self.loaded_at
