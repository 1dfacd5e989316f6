"""``python -m tagpr.rl guided_rl|exploratory_rl [key=value ...]``."""

import os
import sys

from omegaconf import DictConfig

from tagpr.configuration import main
from tagpr.rl.hardware import chosen, gpus_here
from tagpr.rl.launch import run
from tagpr.rl.supervisor import ATTEMPT

if __name__ == "__main__":
    stage, overrides = sys.argv[1], sys.argv[2:]

    def supervised(config: DictConfig) -> None:
        """Train; where ``launch.restarts`` asks for it become the small process that has others do it."""
        if config.launch.restarts and ATTEMPT not in os.environ:
            os.execv(sys.executable, [sys.executable, "-m", "tagpr.rl.supervisor", *sys.argv[1:]])
        run(config)

    main(stage, supervised, [*chosen(overrides, gpus_here()), *overrides])
