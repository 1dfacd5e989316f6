"""Which part of the configuration fits this machine, where the command does not say."""

import subprocess
from collections.abc import Sequence


def chosen(overrides: Sequence[str], gpus: int) -> list[str]:
    """Overrides that choose ``rl_hardware`` for ``gpus`` CUDA devices: the paper's setting wants eight of them.

    Nothing where ``overrides`` choose it themselves, or where there is no GPU (the default).
    """
    if gpus == 0 or any(override.startswith("rl_hardware=") for override in overrides):
        return []
    return ["rl_hardware=gpu8" if gpus >= 8 and "setting=paper" in overrides else "rl_hardware=gpu"]


def local_gpus() -> list[float]:
    """Memory (GiB) of each NVIDIA GPU of this machine, by ``nvidia-smi``; [] without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [float(line) / 1024 for line in done.stdout.split() if line.strip().isdigit()]


def gpus_here() -> int:
    """CUDA devices that torch sees; 0 without importing it where there is no NVIDIA GPU."""
    if not local_gpus():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
