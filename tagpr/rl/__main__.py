"""``python -m tagpr.rl guided_rl|exploratory_rl [key=value ...]``."""

import sys

import torch

from tagpr.configuration import main
from tagpr.rl.hardware import chosen
from tagpr.rl.launch import run

if __name__ == "__main__":
    stage, overrides = sys.argv[1], sys.argv[2:]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    main(stage, run, [*chosen(overrides, gpus), *overrides])
