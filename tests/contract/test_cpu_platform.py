"""The CPU platform is taken, and each patch is still needed: when one of these fails, delete the patch."""

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: the CPU platform stands aside"
)


def run_python(code: str) -> str:
    """Run code in a process of its own, since verl resolves its platform once per process."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_verl_takes_the_platform_by_its_entry_point() -> None:
    code = "from verl.plugin.platform import get_platform; p = get_platform(); print(p.device_name, p.ray_resource_name())"
    assert run_python(code).split()[-2:] == ["cpu", "GPU"]


def test_the_engine_refuses_another_platform() -> None:
    code = (
        "import os; os.environ['VERL_PLATFORM'] = 'nvidia'\n"
        "try:\n    import tagpr.cpu_platform.engine\nexcept RuntimeError as error:\n    print('refused:', error)"
    )
    assert "refused: verl chose the platform 'cuda'" in run_python(code)


def test_the_fsdp2_engine_is_registered() -> None:
    code = (
        "import tagpr.cpu_platform.engine\nfrom verl.workers.engine import EngineRegistry\n"
        "print(EngineRegistry._engines['language_model']['fsdp2']['cpu'].__name__)"
    )
    assert "CPUFSDPEngineWithLMHead" in run_python(code)


def test_every_abstract_method_is_there() -> None:
    from tagpr.cpu_platform.platform import PlatformCPU

    assert not PlatformCPU.__abstractmethods__


def test_still_needed_duplicate_backends() -> None:
    from verl.utils import distributed

    assert 'f"cpu:gloo,{get_device_name()}' in inspect.getsource(distributed), (
        "verl no longer names gloo twice"
    )
    code = (
        "import torch.distributed as dist\n"
        "try:\n    dist.init_process_group('cpu:gloo,cpu:gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)\n"
        "except ValueError as error:\n    print('refused')"
    )
    assert "refused" in run_python(code), "torch no longer refuses the duplicate"


def test_still_needed_distribution_name() -> None:
    from verl.third_party import vllm as verl_vllm

    assert 'package_name = "vllm"' in inspect.getsource(verl_vllm), (
        "verl no longer asks for the distribution 'vllm'"
    )
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("vllm")


def test_still_needed_linear_weights() -> None:
    code = (
        "import torch\nfrom vllm.model_executor.layers import utils\n"
        "layer = torch.nn.Linear(64, 64, bias=False)\nlayer.weight.requires_grad_(False)\n"
        "utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)\nprint('left', layer.weight.numel())\n"
        "from vllm.model_executor.layers import linear\nimport inspect\n"
        "print('removes', 'remove_weight=True' in inspect.getsource(linear.UnquantizedLinearMethod))"
    )
    printed = run_python(code)
    assert "left 0" in printed, "vLLM no longer frees packed weights"
    assert "removes True" in printed, "vLLM's linear layers no longer free their weights"


def test_still_needed_unpinned_offload() -> None:
    from verl.workers.engine.fsdp import transformer_impl

    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(transformer_impl), "verl no longer pins"


def test_still_needed_without_ascend() -> None:
    import verl

    folder = Path(verl.__file__).parent / "checkpoint_engine"
    assert "from .hccl_checkpoint_engine import" in (folder / "__init__.py").read_text("utf-8"), (
        "verl no longer imports the engine for Ascend everywhere"
    )
    assert "from vllm" in (folder / "hccl_checkpoint_engine.py").read_text("utf-8"), (
        "verl's engine for Ascend no longer imports vLLM"
    )


def test_vllm_has_what_makes_rollouts_faster() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.sample.ops import topk_topp_sampler

    step = inspect.getsource(EngineCoreProc._process_engine_step)
    assert "self.output_queue.put_nowait(output)" in step
    assert "self.requests: dict[str, Request] = {}" in inspect.getsource(Scheduler.__init__)
    assert "return compiled_random_sample(logits)" in inspect.getsource(
        topk_topp_sampler.TopKTopPSampler.forward_cpu
    )
    assert "exponential_()" in inspect.getsource(topk_topp_sampler)


def test_attention_knows_the_kernel_that_tells_its_sums() -> None:
    """Private ones of torch; a change of their arguments is to be seen here and not in a run."""
    names = {
        "_scaled_dot_product_flash_attention_for_cpu": 7,
        "_scaled_dot_product_flash_attention_for_cpu_backward": 10,
    }
    for name, arguments in names.items():
        assert len(getattr(torch.ops.aten, name).default._schema.arguments) == arguments
