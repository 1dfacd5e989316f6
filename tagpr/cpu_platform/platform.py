"""The CPU as one of verl's platforms. verl imports this module in every process (entry point ``verl.plugins``)."""

import os
import resource
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from tagpr.cpu_platform import patches


def _device_module() -> types.ModuleType:
    """``torch.cpu`` with the calls that verl makes on ``torch.cuda``: memory figures (bytes), RNG state, cache."""
    module = types.ModuleType("tagpr.cpu_platform.device")
    for name in dir(torch.cpu):
        if not name.startswith("__"):
            setattr(module, name, getattr(torch.cpu, name))

    def resident(*_: Any, **__: Any) -> int:
        return psutil.Process().memory_info().rss

    def peak(*_: Any, **__: Any) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def mem_get_info(*_: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    for name, function in {
        "memory_allocated": resident,
        "memory_reserved": resident,
        "max_memory_allocated": peak,
        "max_memory_reserved": peak,
        "mem_get_info": mem_get_info,
        "reset_peak_memory_stats": nothing,
        "reset_accumulated_memory_stats": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "set_device": nothing,
        "get_device_name": lambda *_: "CPU",
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
    }.items():
        setattr(module, name, function)
    return module


_DEVICE_MODULE = _device_module()


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One "device" per worker process, gloo between them."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DEVICE_MODULE

    def is_available(self) -> bool:
        """A CPU always is."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Choose the CPU where torch sees no GPU."""
        return not torch.cuda.is_available()

    def current_device(self) -> torch.device:
        """verl passes this on to ``Tensor.to``, where an index would mean a CUDA device."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """One per process."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to choose from."""

    def synchronize(self, device_index: int | None = None) -> None:
        """CPU kernels return when they are done."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """There is no caching allocator to set."""

    def empty_cache(self) -> None:
        """There is no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """Unknown, as verl expects of anything but CUDA."""
        return None, None

    def communication_backend_name(self) -> str:
        """Gloo."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Verl wants a name; nothing reads it on a CPU."""
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """Logical Ray GPUs stand for workers: verl's resource pools count nothing else (single_controller/ray/base.py)."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Nothing to keep Ray from setting."""
        return []

    def is_ipc_supported(self) -> bool:
        """Weights travel to the rollout engine through shared memory, not CUDA IPC."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """vLLM's CPU settings, forwarded to its server processes."""
        names = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")
        return {name: os.environ[name] for name in names if name in os.environ}

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No NVTX."""
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def cudart(self) -> Any:
        """No CUDA runtime."""
        return None


def _is_chosen() -> bool:
    wanted = os.environ.get("VERL_PLATFORM", "").strip().lower()
    return wanted == "cpu" or (not wanted and not torch.cuda.is_available())


if _is_chosen():
    patches.deduplicate_process_group_backends()
    patches.answer_for_vllm_distribution()
    patches.leave_out_ascend()
