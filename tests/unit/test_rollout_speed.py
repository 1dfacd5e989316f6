"""What makes rollouts faster on a CPU draws from the same distribution and computes the same norms."""

import subprocess
import sys

import pytest
import torch
from scipy.stats import chisquare

from tagpr.cpu_platform.rollout_speed import draw


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, -3.0, 0.5]])
    rows = 200_000
    counts = draw(logits.repeat(rows, 1)).bincount(minlength=6)
    expected = logits.softmax(-1)[0].double() * rows
    assert chisquare(counts.numpy(), expected.numpy() * (rows / float(expected.sum()))).pvalue > 1e-3
    # The test sees a difference of one in a hundred.
    wrong = (logits + torch.tensor([[0.02, 0, 0, -0.02, 0, 0]])).softmax(-1)[0].double() * rows
    assert chisquare(counts.numpy(), wrong.numpy() * (rows / float(wrong.sum()))).pvalue < 1e-3


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.full((50_000, 40), -torch.inf)
    logits[:, 7] = 0.0
    assert draw(logits).eq(7).all()
    assert draw(logits).shape == (50_000,)


def test_the_only_token_left_wins_with_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert draw(logits).tolist() == [1]
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 1 - 2.0**-24))
    assert draw(logits).tolist() == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the CPU platform stands aside")
def test_norms_by_the_compiled_kernels_are_vllm_s_own() -> None:
    """In a process of its own: what vLLM takes is chosen for the whole process."""
    code = """
import torch
from tagpr.cpu_platform.patches import for_vllm
for_vllm()
for_vllm()  # vLLM may load its plugins again
from vllm import ir
from vllm.platforms import current_platform
assert current_platform.get_default_ir_op_priority(None).rms_norm == ["tagpr_cpu", "native"]
torch.manual_seed(0)
def both(op, *given):
    copies = lambda: [each.clone() if torch.is_tensor(each) else each for each in given]
    return [op.impls[name].impl_fn(*copies()) for name in ("native", "tagpr_cpu")]
x, residual, weight = torch.randn(9, 64), torch.randn(9, 64), torch.randn(64)
torch.testing.assert_close(*both(ir.ops.rms_norm, x, weight, 1e-6))
for one, other in zip(*both(ir.ops.fused_add_rms_norm, x, residual, weight, 1e-6)):
    torch.testing.assert_close(one, other)
heads = torch.randn(9, 3 * 4 * 16)[:, 64:128].view(9, 4, 16)  # a slice, as queries and keys are
native = ir.ops.rms_norm.impls["native"].impl_fn(heads, weight[:16], 1e-6)
torch.testing.assert_close(native, ir.ops.rms_norm.impls["tagpr_cpu"].impl_fn(heads, weight[:16], 1e-6))
takes = ir.ops.rms_norm.impls["tagpr_cpu"].supports_args
assert takes(x, weight, 1e-6) and not takes(x, weight.double(), 1e-6) and not takes(x, None, 1e-6)
assert not takes(torch.randn(5, 12), torch.randn(12), 1e-6)
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "same"
