"""``python -m tagpr.sft [key=value ...]``; ``--worker CONFIG`` is one rank under torchrun."""

import sys

import torch
from omegaconf import DictConfig, OmegaConf

from tagpr.configuration import main
from tagpr.sft.train import run, train_worker

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        loaded = OmegaConf.load(sys.argv[2])
        assert isinstance(loaded, DictConfig)
        train_worker(loaded)
    else:
        asked = sys.argv[1:]
        if torch.cuda.is_available() and not any(override.startswith("sft_hardware=") for override in asked):
            asked = ["sft_hardware=gpu", *asked]
        main("sft", run, asked)
