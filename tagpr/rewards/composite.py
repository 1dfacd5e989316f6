"""The reward of one response and everything it was made of (eq. 5 guided, eq. 11 exploratory; S27, S28)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from tagpr.errors import ConfigError, RewardServerError
from tagpr.metrics import RougeKind
from tagpr.rewards.format import format_reward
from tagpr.rewards.repetition import repetition_reward
from tagpr.rewards.tag import tag_reward
from tagpr.rewards.verifiable import verifiable_reward
from tagpr.schema import PrmuScore, RewardBreakdown
from tagpr.tags import split_response

Mode = Literal["guided", "exploratory"]

SAME = 1e-6
"""Rewards of a group that lie within this of each other are equal: what is left is float32 and the order of a server's sums."""


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """Weights of eq. 5; the defaults are the paper's. The guards are opt-in, against two ways in which breaking the format pays.

    ``floor_core``: the core R_v + R_rep does not fall below 0. As written, a wrong answer with repetition (R_v + R_rep < 0)
    gains when R_f = 0 makes it 0.

    ``gate_all``: R_f = 0 takes away R_PRMU too, and costs the whole of beta, as if the tags were wrong. As written, a response
    whose format is broken keeps gamma * R_PRMU, and its tags count as they are.

    With both, no response with a broken format is worth more than any well-formed one.

    Raises:
        ConfigError: a weight is not finite.
    """

    alpha: float = 0.8
    beta: float = 0.8
    gamma: float = 0.2
    floor_core: bool = False
    gate_all: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)}: not a finite weight. Set a number.")


def foundation(verifiable: float, repetition: float, format_ok: float, floor: bool = False) -> float:
    """(R_v + R_rep) * R_f: all of eq. 11, and the part of eq. 5 that alpha weighs; ``floor``: at least 0."""
    core = verifiable + repetition
    if floor and core < 0.0:
        core = 0.0
    return core * format_ok + 0.0  # never -0.0


def terms(
    verifiable: float, repetition: float, format_ok: float, tag: float, prmu: float, weights: RewardWeights
) -> tuple[float, float, float]:
    """What alpha, beta and gamma weigh, guards applied."""
    core = foundation(verifiable, repetition, format_ok, weights.floor_core)
    if weights.gate_all and format_ok == 0.0:
        return core, -1.0, 0.0
    return core, tag, prmu


def guided(
    verifiable: float, repetition: float, format_ok: float, tag: float, prmu: float, weights: RewardWeights
) -> float:
    """Eq. 5: alpha * (R_v + R_rep) * R_f + beta * R_tag + gamma * R_PRMU."""
    core, tag, prmu = terms(verifiable, repetition, format_ok, tag, prmu, weights)
    return weights.alpha * core + weights.beta * tag + weights.gamma * prmu


def exploratory(verifiable: float, repetition: float, format_ok: float, floor: bool = False) -> float:
    """Eq. 11: (R_v + R_rep) * R_f, without alpha."""
    return foundation(verifiable, repetition, format_ok, floor)


def score_response(
    task: str,
    gold: str,
    response_text: str,
    token_ids: Sequence[int],
    mode: Mode,
    weights: RewardWeights,
    prmu: PrmuScore | None,
    *,
    finished: bool = True,
    rouge: RougeKind = "mean",
    vocabulary: Iterable[str] | None = None,
    minimum_segments: int = 3,
    repetition_n: int = 4,
    repetition_delta: float = 1e-6,
) -> RewardBreakdown:
    """Score one response of the policy.

    ``response_text`` may end in one ``<|im_end|>``; ``token_ids`` are the policy's own tokens of the same
    response; ``finished`` is false where the policy ran into its token limit, which breaks the format
    however whole the text looks. Every component is computed in both modes, so that their curves go on when
    the mode changes; exploratory adds neither R_tag nor R_PRMU. ``failure`` names the first check that
    failed: those of the format (``tags.split_response``, then ``truncated``), then those of the tags
    (``tags.check_tags``); a wrong answer is no failure.

    Raises:
        ConfigError: guided with gamma != 0 but no ``prmu`` (a missing score is never a 0), or an unknown
            mode, task or setting.
        DataError: the gold answer is empty.
        RewardServerError: PRMU's logit is not finite, or its score is no probability.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode={mode}: no such reward. Use {' or '.join(get_args(Mode))}.")
    if mode == "guided" and weights.gamma != 0.0 and prmu is None:
        raise ConfigError(
            f"gamma={weights.gamma}: the guided reward needs PRMU's score of every response. "
            "Serve PRMU, or set gamma to 0."
        )
    if prmu is not None and not (math.isfinite(prmu.logit) and 0.0 <= prmu.score <= 1.0):
        raise RewardServerError(
            f"prmu: logit {prmu.logit} and score {prmu.score} are no score. Check the reward server's model."
        )
    response = split_response(response_text, vocabulary)
    if not finished and not response.problem:
        response = replace(response, problem="truncated")
    format_ok = format_reward(response)
    verifiable = verifiable_reward(task, gold, response, rouge)
    repetition = repetition_reward(token_ids, repetition_n, repetition_delta)
    tag, tag_problem = tag_reward(response.reasoning, minimum_segments, vocabulary)
    if mode == "guided":
        personal = prmu.score if prmu is not None else 0.0  # gamma is 0 then
        reward = guided(verifiable, repetition, format_ok, tag, personal, weights)
    else:
        reward = exploratory(verifiable, repetition, format_ok, weights.floor_core)
    components = (reward, verifiable, repetition, format_ok, tag)
    assert all(math.isfinite(value) for value in components), components
    return RewardBreakdown(
        reward=reward,
        verifiable=verifiable,
        repetition=repetition,
        format=format_ok,
        tag=tag,
        prmu=None if prmu is None else prmu.score,
        prmu_logit=None if prmu is None else prmu.logit,
        prmu_unknown_user=None if prmu is None else prmu.unknown_user,
        prmu_version=None if prmu is None else prmu.version,
        failure=response.problem or tag_problem,
    )
