"""``python -m tagpr.rl guided_rl|exploratory_rl [key=value ...]``."""

import sys

import torch

from tagpr.configuration import main
from tagpr.rl.launch import run

if __name__ == "__main__":
    stage, overrides = sys.argv[1], sys.argv[2:]
    if torch.cuda.is_available() and not any(o.startswith("rl_hardware=") for o in overrides):
        overrides = ["rl_hardware=gpu", *overrides]
    main(stage, run, overrides)
