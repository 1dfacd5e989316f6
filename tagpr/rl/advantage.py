"""Group-relative advantages (eq. 10, S29): standardised within the responses of one prompt, exactly 0 where all rewards agree.

verl's own estimator computes in float32 and divides by the deviation plus 1e-6. Where the mean of five equal float32 rewards is
not that reward (0.97, for one), a group that teaches nothing gets advantages of up to 0.056, all of one sign; equal responses
whose PRMU score differs by rounding get more. This one computes in float64 and takes such groups for what they are.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from verl.trainer.ppo.core_algos import register_adv_est

from tagpr.rewards.composite import SAME, Mode, RewardWeights, terms

NAME = "group_standardised"
"""Value of ``algorithm.adv_estimator``."""

EPSILON = 1e-6
"""Added to the deviation, as in verl."""


def standardise(
    scores: Sequence[float] | NDArray[np.float64], groups: Sequence[Hashable], by_deviation: bool = True
) -> NDArray[np.float64]:
    """(R - mean) / (std + EPSILON) within each group, the deviation that of a sample (n - 1).

    A group whose scores are equal (``SAME``) gets zeros, and so does a group of one, which has nothing to be compared with.

    Args:
        scores: [n] rewards.
        groups: [n] prompt of each response.
        by_deviation: false leaves out the division.
    """
    values = np.asarray(scores, dtype=np.float64)
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    advantages = np.zeros_like(values)
    for places in members.values():
        own = values[places]
        if np.ptp(own) <= SAME:
            continue
        centred = own - own.mean()
        advantages[places] = centred / (own.std(ddof=1) + EPSILON) if by_deviation else centred
    return advantages


def combine_normalised(
    infos: Sequence[Mapping[str, Any]],
    groups: Sequence[Hashable],
    mode: Mode,
    weights: Sequence[RewardWeights],
) -> NDArray[np.float64]:
    """Advantages from components that were standardised each by itself, so that none drowns the others by its spread.

    sum of weight * standardised term, standardised once more; a term on which the group agrees adds nothing. Of one term, as in
    eq. 11, this is :func:`standardise`.

    Args:
        infos: [n] ``reward_extra_info`` of each response.
        groups: [n] prompt of each response.
        mode: guided (core, tag, PRMU) or exploratory (core alone).
        weights: [n] of each response, those of its step.
    """
    parts = [
        terms(info["verifiable"], info["repetition"], info["format"], info["tag"], info.get("prmu", 0.0), own)
        for info, own in zip(infos, weights, strict=True)
    ]
    total = standardise([part[0] for part in parts], groups)
    if mode == "guided":
        total = np.array([own.alpha for own in weights]) * total
        for number, name in ((1, "beta"), (2, "gamma")):
            scale = np.array([getattr(own, name) for own in weights])
            total += scale * standardise([part[number] for part in parts], groups)
    return standardise(total, groups)


@register_adv_est(NAME)
def group_standardised(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`standardise` as verl calls an estimator.

    Args:
        token_level_rewards: [n, tokens], a response's reward at one of its tokens.
        response_mask: [n, tokens], 0 on padding.
        index: [n] prompt of each response.
        config: verl's ``algorithm``.

    Returns:
        Advantages [n, tokens], the same on all tokens of a response, twice (verl also asks for returns).
    """
    by_deviation = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    scores = token_level_rewards.detach().double().sum(dim=-1).cpu().numpy()
    advantages = torch.from_numpy(standardise(scores, list(index), by_deviation))
    spread = advantages.to(token_level_rewards).unsqueeze(-1) * response_mask
    return spread, spread
