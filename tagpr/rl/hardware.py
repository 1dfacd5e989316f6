"""Which part of the configuration fits this machine, where the command does not say."""

from collections.abc import Sequence


def chosen(overrides: Sequence[str], gpus: int) -> list[str]:
    """Overrides that choose ``rl_hardware`` for ``gpus`` CUDA devices: the paper's setting wants eight of them.

    Nothing where ``overrides`` choose it themselves, or where there is no GPU (the default).
    """
    if gpus == 0 or any(override.startswith("rl_hardware=") for override in overrides):
        return []
    return ["rl_hardware=gpu8" if gpus >= 8 and "setting=paper" in overrides else "rl_hardware=gpu"]
