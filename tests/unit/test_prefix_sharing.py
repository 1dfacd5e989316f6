"""Responses that share their prompt: the same log-probabilities, entropies and gradients as one response a row."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config, Qwen3ForCausalLM

from tagpr.cpu_platform.prefix_sharing import group_size, lay_out, partitions_of_groups
from tagpr.tree_attention import Segment, tree_attention, use_tree_attention

VOCABULARY = 97


def tiny_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, tie_word_embeddings=True, max_position_embeddings=256, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).double()


def groups(seed: int, prompts: int = 4, size: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, each ``size`` times, and responses of random lengths, one of them of a single token."""
    rng = random.Random(seed)

    def some(least: int, most: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(least, most))]

    asked = [some(1, 20) for _ in range(prompts)]
    pairs = [(prompt, some(1, 15)) for prompt in asked for _ in range(size)]
    pairs[0] = (pairs[0][0], [5])
    rng.shuffle(pairs)
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def one_by_one(model: Qwen3ForCausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens at the places that predict a response, [response, vocabulary]."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_as_each_response_alone(seed: int) -> None:
    prompts, responses = groups(seed)
    plain, packed = tiny_model(), tiny_model()
    use_tree_attention(packed)
    layout = lay_out(prompts, responses)
    logits = packed(
        input_ids=layout.token_ids[None], position_ids=layout.positions[None], attention_mask=None,
        segments=layout.segments, logits_to_keep=layout.rows,
    ).logits[0]  # fmt: skip
    ours = logits.log_softmax(-1)[torch.arange(len(layout.labels)), layout.labels]
    theirs = [
        one_by_one(plain, prompt, response)[torch.arange(len(response)), torch.tensor(response)]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    for at, expected in enumerate(theirs):
        torch.testing.assert_close(ours[layout.owners == at], expected, rtol=0, atol=1e-12)
    # Another weight for each response, as advantages are.
    weights = torch.randn(len(prompts), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (ours * weights[layout.owners]).sum().backward()
    torch.stack([weight * each.sum() for weight, each in zip(weights, theirs, strict=True)]).sum().backward()
    for (name, one), two in zip(packed.named_parameters(), plain.parameters(), strict=True):
        # RMSNorm rounds to float32 inside.
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-6, msg=name)


# A prefix, its branches, a branch of a part of it, one of the whole again, another prefix and its branch.
SEGMENTS = (
    Segment(0, 40, 0, 0), Segment(40, 57, 0, 40), Segment(57, 58, 0, 40), Segment(58, 90, 0, 12), Segment(90, 99, 0, 40),
    Segment(99, 130, 99, 99), Segment(130, 171, 99, 130),
)  # fmt: skip


@pytest.mark.parametrize("strided", [False, True], ids=["plain", "strided"])
def test_attention_and_its_gradients_against_a_mask(strided: bool) -> None:
    """In float64; two heads of the query share one of the keys. Strides that the kernel does not take go another way."""
    torch.manual_seed(0)
    length = SEGMENTS[-1].end
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in SEGMENTS:
        allowed[start:end, prefix_start:prefix_end] = True
        allowed[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()

    def some(heads: int) -> torch.Tensor:
        made = torch.randn(1, heads, length, 16, dtype=torch.float64)
        return (made.transpose(2, 3).contiguous().transpose(2, 3) if strided else made).requires_grad_()

    query, key, value = some(4), some(2), some(2)
    ours, weights = tree_attention(
        torch.nn.Identity(), query, key, value, None, segments=SEGMENTS, scaling=0.3
    )
    assert weights is None
    theirs = scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), allowed, scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    towards = torch.randn_like(theirs)
    for own, other in zip(
        torch.autograd.grad(ours, (query, key, value), towards),
        torch.autograd.grad(theirs, (query, key, value), towards),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_attention_under_autocast_takes_what_norms_leave_in_float32() -> None:
    query, key, value = (torch.randn(1, 2, 171, 16) for _ in range(3))
    exact, _ = tree_attention(torch.nn.Identity(), query, key, value, None, segments=SEGMENTS)
    mixed, _ = tree_attention(torch.nn.Identity(), query, key, value.bfloat16(), None, segments=SEGMENTS)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, atol=0.05, rtol=0.05)


def test_each_prompt_is_computed_once() -> None:
    prompts, responses = [[1, 2, 3], [1, 2], [1, 2, 3]], [[4, 5], [6], [7, 8, 9]]
    layout = lay_out(prompts, responses)
    assert layout.token_ids.tolist() == [1, 2, 3, 4, 7, 8, 1, 2]
    assert layout.positions.tolist() == [0, 1, 2, 3, 3, 4, 0, 1]
    assert layout.segments == (
        Segment(0, 3, 0, 0),
        Segment(3, 4, 0, 3),
        Segment(4, 6, 0, 3),
        Segment(6, 8, 6, 6),
    )
    assert layout.rows.tolist() == [2, 3, 2, 4, 5, 7]
    assert layout.labels.tolist() == [4, 5, 7, 8, 9, 6]
    assert layout.owners.tolist() == [0, 0, 2, 2, 2, 1]
    # Three sequences behind each other: tokens 0-4, 5-7, 8-13.
    assert layout.places.tolist() == [2, 3, 10, 11, 12, 6]


def test_an_empty_response_and_an_empty_prompt() -> None:
    layout = lay_out([[1, 2], [3]], [[], [4]])
    assert (layout.labels.tolist(), layout.owners.tolist(), layout.places.tolist()) == ([4], [1], [2])
    with pytest.raises(ValueError, match="prompt"):
        lay_out([[]], [[1]])


ENGINE = """
import sys
sys.path.insert(0, "tests/unit")
import torch
from tensordict import NonTensorData, TensorDict
from test_prefix_sharing import groups, tiny_model
from tagpr.cpu_platform.engine import CPUFSDPEngineWithLMHead
from tagpr.tree_attention import use_tree_attention
from verl.workers.engine.fsdp import transformer_impl

def nested(rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

def batch(prompts, responses, supervised):
    whole = [p + r for p, r in zip(prompts, responses)]
    fields = {"input_ids": nested(whole), "position_ids": nested([list(range(len(each))) for each in whole])}
    if supervised:
        fields["loss_mask"] = nested([[0] * len(p) + [1] * len(r) for p, r in zip(prompts, responses)])
    else:
        fields |= {"prompts": nested(prompts), "responses": nested(responses)}
    made = TensorDict(fields, batch_size=len(whole))
    made["temperature"] = torch.linspace(0.5, 1.5, len(whole)).double()
    for key, value in {"use_remove_padding": False, "calculate_entropy": True, "pad_token_id": 0}.items():
        made[key] = NonTensorData(value)
    return made

def engine(takes_trees):
    made = CPUFSDPEngineWithLMHead.__new__(CPUFSDPEngineWithLMHead)
    made.module, made.use_ulysses_sp, made._takes_trees, made._usual_attention = tiny_model(), False, takes_trees, "sdpa"
    made.engine_config = type("Config", (), {"entropy_checkpointing": False})()
    made.pad_to_length = None
    use_tree_attention(made.module)
    return made

def responses_of(values, prompts, responses):
    found, start = [], 0
    for p, r in zip(prompts, responses):
        found.append(values[start + len(p) - 1 : start + len(p) + len(r) - 1])
        start += len(p) + len(r)
    return torch.cat(found)

prompts, responses = groups(7)
for supervised in (False, True):
    made = []
    for takes_trees in (False, True):
        own = engine(takes_trees)
        data = batch(prompts, responses, supervised)
        inputs, arguments = own.prepare_model_inputs(data)
        assert ("segments" in inputs) == takes_trees
        output = own.prepare_model_outputs(own.module(**inputs, use_cache=False), arguments, data, None)
        made.append([responses_of(output[name].values(), prompts, responses) for name in ("log_probs", "entropy")])
    for theirs, ours in zip(*made):
        assert ours.abs().max() > 1
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=2e-6)
print("equal")
"""


def test_the_engine_gives_what_verl_gives() -> None:
    """verl's own way of the same engine (a padded row a response) beside ours, in RL and in supervised batches."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], capture_output=True, text=True, timeout=300, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "equal"


def test_groups_stay_together() -> None:
    assert group_size([[1], [1], [2], [2], [1], [1]]) == 2
    assert group_size([[1], [1], [2]]) == 1

    def halves(work: list[float], k_partitions: int, equal_size: bool) -> list[list[int]]:
        assert equal_size
        order = sorted(range(len(work)), key=lambda at: -work[at])
        return [order[0::k_partitions], order[1::k_partitions]]

    shared_out = partitions_of_groups(halves, 2)([1.0, 1.0, 9.0, 9.0, 5.0, 5.0, 2.0, 2.0], 2, True)
    assert shared_out == [[2, 3, 6, 7], [0, 1, 4, 5]]
    # Rows that do not come out even: verl's own way.
    assert partitions_of_groups(halves, 4)([1.0, 2.0, 3.0, 4.0], k_partitions=2, equal_size=True) == [
        [3, 1],
        [2, 0],
    ]
