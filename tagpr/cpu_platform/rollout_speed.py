"""What makes vLLM 0.28.0 generate faster on a CPU, where its own way was made for GPUs: one function each, with its reason.

For 80 responses of 256 tokens by 2.4M parameters on two cores, the engine takes a sixth less time, and what goes on beside it
takes less of its cores. Norms are the same to rounding, tokens are drawn from the same distribution
(``tests/unit/test_rollout_speed.py``).
"""

from typing import Any

import torch

from tagpr.cpu_platform.bunched_outputs import BunchedOutputs

NORMS = "tagpr_cpu"


def bunch_outputs() -> None:
    """The engine's process holds rollouts' tokens back for a while (:mod:`tagpr.cpu_platform.bunched_outputs`)."""
    from vllm.v1.engine.core import EngineCoreProc

    original = EngineCoreProc._process_engine_step
    if getattr(original, "bunches", False):
        return

    def process_engine_step(self: Any) -> bool:
        if not isinstance(self.output_queue, BunchedOutputs):
            self.output_queue = BunchedOutputs(self.output_queue, self.scheduler.requests)
        return original(self)

    process_engine_step.bunches = True  # type: ignore[attr-defined]
    EngineCoreProc._process_engine_step = process_engine_step


def draw_from_uniform_numbers() -> None:
    """Tokens are drawn with exponential noise made of uniform numbers.

    torch's own exponential numbers take five times as long on a CPU, in one thread.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.compiled_random_sample = draw


def draw(logits: torch.Tensor) -> torch.Tensor:
    """One token a row of ``logits`` [rows, vocabulary], with the probabilities of their softmax; returns [rows].

    The token whose probability is the most times its exponential number is token ``i`` with probability ``p_i``. ``-log(u)`` is
    such a number, on a grid of 2^-24: a token of probability 2^-22 is drawn in 88 % of the cases that are its due, one below
    2^-27 hardly ever.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    # Never infinite: the only token that is allowed has to win with any number.
    noise = torch.rand_like(probabilities).clamp_(min=2.0**-25).log_().neg_()
    return probabilities.div_(noise).argmax(dim=-1)


def compiled_norms() -> None:
    """RMSNorm by the kernels that vLLM has compiled for the CPU, too, and uses on GPUs only: one call instead of seven."""
    from vllm import ir
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms import current_platform

    if NORMS in ir.ops.rms_norm.impls:
        return
    current_platform.import_kernels()

    def takes(weight: torch.Tensor | None, x: torch.Tensor, variance_size: int | None) -> bool:
        # The kernel works in vectors, which have to come out even.
        even = x.shape[-1] % 16 == 0
        return even and variance_size is None and weight is not None and weight.dtype == x.dtype

    @ir.ops.rms_norm.register_impl(
        NORMS, supports_args=lambda x, weight, epsilon, variance_size=None: takes(weight, x, variance_size)
    )
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        # The norms of queries and keys get slices.
        out = torch.empty(x.shape, dtype=x.dtype)
        torch.ops._C.rms_norm(out, x.contiguous(), weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(
        NORMS,
        supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: (
            takes(weight, x, variance_size) and x.is_contiguous() and x_residual.is_contiguous()
        ),
        inplace=True,
    )
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual

    def priority(cls: type, vllm_config: Any) -> IrOpPriorityConfig:
        return IrOpPriorityConfig.with_default(
            ["native"], rms_norm=[NORMS, "native"], fused_add_rms_norm=[NORMS, "native"]
        )

    type(current_platform).get_default_ir_op_priority = classmethod(priority)
