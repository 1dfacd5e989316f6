"""verl's update as we configure it is eq. 10: loss, gradient, clipping and advantages against an independent float64 one (S29)."""

import math
import random

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from tagpr.configuration import compose, resolve
from tagpr.rewards.composite import SAME, RewardWeights, guided
from tagpr.rl.advantage import NAME, combine_normalised, standardise

LOW, HIGH = 3e-4, 4e-4
GROUP = 5


@pytest.fixture(scope="module")
def config():
    return resolve(compose("guided_rl", ["setting=paper", "rl_hardware=gpu8"]))


@pytest.fixture(scope="module")
def actor(config):
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


# Eq. 10, one response at a time, in float64 and plain Python


def reference(
    new: list[list[float]], old: list[list[float]], rewards: list[float], groups: list[int]
) -> tuple[float, list[list[float]], list[bool]]:
    """-J, its gradient with respect to every log-probability, and which responses are clipped."""
    loss, gradients, clipped = 0.0, [], []
    for own, before, reward, group in zip(new, old, rewards, groups, strict=True):
        peers = [other for other, its in zip(rewards, groups, strict=True) if its == group]
        mean = math.fsum(peers) / len(peers)
        deviation = math.sqrt(math.fsum((other - mean) ** 2 for other in peers) / (len(peers) - 1))
        advantage = 0.0 if max(peers) == min(peers) else (reward - mean) / (deviation + 1e-6)
        ratio = math.exp(math.fsum(a - b for a, b in zip(own, before, strict=True)) / len(own))
        bounded = min(max(ratio, 1 - LOW), 1 + HIGH)
        loss -= min(ratio * advantage, bounded * advantage) / len(new)
        beyond = ratio * advantage > bounded * advantage
        clipped.append(beyond)
        # d ratio / d log-probability of one token = ratio / length
        slope = 0.0 if beyond else -ratio * advantage / len(own) / len(new)
        gradients.append([slope] * len(own))
    return loss, gradients, clipped


def batch(seed: int, size: float, prompts: int = 8, longest: int = 60):
    """Ragged responses whose ratios lie about ``size`` from 1, with rewards of both signs."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, longest, rng.randint(1, longest)]) for _ in range(prompts * GROUP)]
    old = [[-abs(rng.gauss(0, 2)) for _ in range(length)] for length in lengths]
    # The mean over tokens decides the ratio: shift all tokens of a response together, and each a little.
    new = []
    for row in old:
        shift = rng.gauss(0, size)
        new.append([value + shift + rng.gauss(0, size) / 10 for value in row])
    rewards = [float(np.float32(rng.uniform(-1, 1))) for _ in lengths]
    groups = [place // GROUP for place in range(len(lengths))]
    return new, old, rewards, groups


# The same through verl: estimator, loss function, micro-batches


def advantages_of(config, rewards: list[float], groups: list[int], lengths: list[int]) -> torch.Tensor:
    width = max(lengths)
    mask = torch.tensor([[1.0] * length + [0.0] * (width - length) for length in lengths])
    levels = torch.zeros(len(lengths), width)
    for row, (length, reward) in enumerate(zip(lengths, rewards, strict=True)):
        levels[row, length - 1] = reward
    estimator = get_adv_estimator_fn(config.algorithm.adv_estimator)
    advantages, _ = estimator(
        token_level_rewards=levels,
        response_mask=mask,
        index=np.array([str(group) for group in groups], dtype=object),
        config=config.algorithm,
    )
    assert torch.equal(advantages * (1 - mask), torch.zeros_like(advantages))
    return advantages


def through_verl(config, actor, new, old, rewards, groups, micro: list[int], dtype=torch.float64):
    lengths = [len(row) for row in new]
    advantages = advantages_of(config, rewards, groups, lengths).to(dtype)
    loss, gradients, metrics = 0.0, [], []
    start = 0
    for size in micro:
        rows = range(start, start + size)
        start += size
        # One prompt token before each response: verl shifts the model's output by one.
        leaves = torch.tensor(
            [value for row in rows for value in (*new[row], 0.0)], dtype=dtype, requires_grad=True
        )

        def nested(values):
            return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

        data = TensorDict(
            {
                "prompts": nested(torch.zeros(1, dtype=torch.int64) for _ in rows),
                "responses": nested(torch.zeros(lengths[row], dtype=torch.int64) for row in rows),
                "response_mask": nested(torch.ones(lengths[row], dtype=torch.int64) for row in rows),
                "old_log_probs": nested(torch.tensor(old[row], dtype=dtype) for row in rows),
                "advantages": nested(advantages[row, : lengths[row]] for row in rows),
            },
            batch_size=size,
        )
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(lengths), global_batch_size=len(new))
        output = {
            "log_probs": torch.nested.nested_tensor_from_jagged(
                leaves, torch.tensor([0, *np.cumsum([lengths[row] + 1 for row in rows])])
            )
        }
        part, its = ppo_loss(actor, output, data)
        part.backward()
        loss += part.item()
        metrics.append(its)
        place = 0
        for row in rows:
            gradients.append(leaves.grad[place : place + lengths[row]].tolist())
            assert leaves.grad[place + lengths[row]] == 0
            place += lengths[row] + 1
    return loss, gradients, metrics


def flat(rows: list[list[float]]) -> np.ndarray:
    return np.array([value for row in rows for value in row])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1e-5, 4e-4, 1e-2, 0.5])
def test_loss_and_gradient_are_those_of_equation_10(config, actor, seed: int, size: float) -> None:
    new, old, rewards, groups = batch(seed, size)
    loss, gradients, clipped = reference(new, old, rewards, groups)
    # Whole, and in micro-batches of unequal size, as dynamic batches make them.
    for micro in ([40], [1, 7, 20, 12]):
        found, slopes, _ = through_verl(config, actor, new, old, rewards, groups, micro)
        # Advantages travel as float32.
        assert found == pytest.approx(loss, abs=3e-7)
        np.testing.assert_allclose(flat(slopes), flat(gradients), rtol=3e-6, atol=1e-12)
    share = {1e-5: 0.0, 1e-2: 0.45, 0.5: 0.45}.get(size)
    if share is not None:
        assert np.mean(clipped) == pytest.approx(share, abs=0.2)
        assert (share == 0.0) == (not any(clipped))


@pytest.mark.parametrize("seed", range(3))
def test_float32_log_probabilities_keep_the_ratio(config, actor, seed: int) -> None:
    new, old, rewards, groups = batch(seed, 4e-4, longest=400)
    rounded = [[[float(np.float32(value)) for value in row] for row in rows] for rows in (new, old)]
    loss, gradients, _ = reference(*rounded, rewards, groups)
    found, slopes, _ = through_verl(config, actor, *rounded, rewards, groups, [40], torch.float32)
    assert found == pytest.approx(loss, abs=2e-6)
    # A ratio within 2e-7 of a bound may be on its other side.
    different = ~np.isclose(flat(slopes), flat(gradients), rtol=2e-5, atol=1e-9)
    assert different.mean() < 0.02


@pytest.mark.parametrize(
    ("step", "sign", "expected"),
    [
        (5e-4, 1, 1.0), (5e-4, -1, 0.0), (-5e-4, 1, 0.0), (-5e-4, -1, 1.0),
        (2e-4, 1, 0.0), (-2e-4, -1, 0.0), (3.5e-4, 1, 0.0), (-3.5e-4, -1, 1.0),
    ],
)  # fmt: skip
def test_only_a_ratio_that_has_gone_far_enough_its_own_way_is_clipped(
    config, actor, step: float, sign: int, expected: float
) -> None:
    # One pair: the response in question and its opposite, which stays at ratio 1.
    old = [[-1.0] * 7, [-1.0] * 3]
    new = [[-1.0 + step] * 7, [-1.0] * 3]
    _, gradients, metrics = through_verl(config, actor, new, old, [sign * 0.5, -sign * 0.5], [0, 0], [2])
    assert metrics[0]["actor/pg_clipfrac"].aggregate() == pytest.approx(expected * 7 / 10)
    assert (flat(gradients[:1]) == 0).all() == bool(expected)
    assert (flat(gradients[1:]) != 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_groups_that_agree_give_no_gradient(config, actor, seed: int) -> None:
    # Too close to 1 for any clipping.
    new, old, rewards, groups = batch(seed, 1e-5)
    same = random.Random(seed).uniform(-1, 1)
    rewards = [
        float(np.float32(same)) if group % 2 else reward
        for reward, group in zip(rewards, groups, strict=True)
    ]
    _, gradients, _ = through_verl(config, actor, new, old, rewards, groups, [40])
    for row, group in zip(gradients, groups, strict=True):
        assert all(value == 0.0 for value in row) == bool(group % 2)


def test_trap_verls_own_estimator_pushes_groups_that_agree() -> None:
    levels = torch.full((GROUP, 1), 0.97)
    advantages, _ = compute_grpo_outcome_advantage(levels, torch.ones(GROUP, 1), np.array(["a"] * GROUP))
    assert advantages.abs().max() > 0.05, "verl's grpo gives zero now: tagpr.rl.advantage may go"


# Advantages


def test_the_configured_estimator_is_ours(config) -> None:
    assert config.algorithm.adv_estimator == NAME
    assert config.algorithm.norm_adv_by_std_in_grpo


def test_advantages_are_standardised_within_the_group() -> None:
    rng = np.random.default_rng(0)
    scores, groups = rng.normal(size=50), np.repeat(np.arange(10), GROUP)
    order = rng.permutation(50)
    found = standardise(scores[order], list(groups[order]))
    for group in range(10):
        own = found[groups[order] == group]
        assert own.mean() == pytest.approx(0, abs=1e-12)
        assert own.std(ddof=1) == pytest.approx(1, abs=1e-4)
    verl, _ = compute_grpo_outcome_advantage(
        torch.tensor(scores[order]).unsqueeze(1), torch.ones(50, 1, dtype=torch.float64), groups[order]
    )
    np.testing.assert_allclose(found, verl[:, 0].numpy(), rtol=1e-12)


@pytest.mark.parametrize("reward", [0.97, 0.81, -0.3, 0.0, 1.0])
def test_equal_up_to_rounding_is_equal(reward: float) -> None:
    noise = np.array([0, 1, -1, 2, 0]) * 1e-7
    assert (standardise(reward + noise, ["a"] * 5) == 0).all()
    assert (standardise(reward + noise * 10 * SAME / 1e-7, ["a"] * 5) != 0).any()


def test_a_group_of_one_teaches_nothing() -> None:
    assert standardise([0.7, 0.1, 0.2], ["alone", "b", "b"])[0] == 0


# Component normalisation


def info(verifiable: float, tag: float, prmu: float, format_ok: float = 1.0) -> dict[str, float]:
    return {"verifiable": verifiable, "repetition": 0.0, "format": format_ok, "tag": tag, "prmu": prmu}


def test_components_are_standardised_each_by_itself() -> None:
    weights = [RewardWeights()] * 4
    rows = [info(1, 0, 0.51), info(1, 0, 0.50), info(0, 0, 0.52), info(0, 0, 0.49)]
    plain = standardise(
        [guided(r["verifiable"], 0, 1, r["tag"], r["prmu"], w) for r, w in zip(rows, weights, strict=True)],
        [0] * 4,
    )
    combined = combine_normalised(rows, [0] * 4, "guided", weights)
    # By themselves, differences of a hundredth between PRMU scores hardly count; standardised they weigh gamma to alpha.
    assert plain[0] - plain[1] < 0.01
    assert combined[0] - combined[1] > 0.1
    assert combined[1] > combined[2]
    expected = 0.8 * standardise([1, 1, 0, 0], [0] * 4) + 0.2 * standardise([0.51, 0.50, 0.52, 0.49], [0] * 4)
    np.testing.assert_allclose(combined, standardise(expected, [0] * 4))


def test_components_of_exploratory_are_one() -> None:
    rows = [info(v, -1, 0.5, f) for v, f in ((1, 1), (0.2, 1), (0.7, 0), (0.4, 1))]
    combined = combine_normalised(rows, [0] * 4, "exploratory", [RewardWeights()] * 4)
    # Standardising twice adds EPSILON twice.
    np.testing.assert_allclose(combined, standardise([1, 0.2, 0, 0.4], [0] * 4), rtol=1e-5, atol=1e-12)
    assert (combine_normalised([info(1, 0, 0.5)] * 4, [0] * 4, "guided", [RewardWeights()] * 4) == 0).all()
