"""verl's FSDP2 engine for the device "cpu" (loaded in every training worker through ``model.external_lib``)."""

import os
from unittest import mock

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.plugin.platform import get_platform
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from tagpr.cpu_platform import TRAINING_THREADS

if get_platform().device_name != "cpu":
    raise RuntimeError(
        f"verl chose the platform {get_platform().device_name!r}, not 'cpu': its plugin entry point was not loaded. "
        "Install the project (pip install -e .) in the environment of the Ray workers."
    )

if TRAINING_THREADS in os.environ:
    torch.set_num_threads(int(os.environ[TRAINING_THREADS]))


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
class CPUFSDPEngineWithLMHead(transformer_impl.FSDPEngineWithLMHead):
    """FSDP2 over gloo."""

    def _build_fsdp_module(self, module):  # type: ignore[no-untyped-def]
        # A forward-only engine (the KL reference) asks for pinned host memory, which needs an accelerator.
        unpinned = CPUOffloadPolicy(pin_memory=False)
        with mock.patch.object(transformer_impl, "CPUOffloadPolicy", return_value=unpinned):
            return super()._build_fsdp_module(module)
