"""Each component of the reward by hand, then the composites and what they refuse (S23-S28)."""

import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagpr.benchmarks.lamp import TASKS
from tagpr.errors import ConfigError, DataError, RewardServerError
from tagpr.metrics import rouge
from tagpr.rewards.composite import (
    Mode,
    RewardWeights,
    exploratory,
    foundation,
    guided,
    score_response,
    terms,
)
from tagpr.rewards.format import format_reward
from tagpr.rewards.repetition import repetition_reward
from tagpr.rewards.tag import tag_reward
from tagpr.rewards.verifiable import verifiable_reward
from tagpr.schema import PrmuScore, RewardBreakdown
from tagpr.tags import Response, format_response, split_response

CHAIN = "\n".join(
    f"<{tag}> Step {number}. </{tag}>"
    for number, tag in enumerate(("analyze_input", "identify_patterns", "make_decision"))
)
PRMU = PrmuScore(logit=1.0, score=1 / (1 + math.exp(-1)), unknown_user=False, version="v1")
WEIGHTS = RewardWeights()
TOKENS = list(range(20))


def score(
    answer: str = "comedy",
    reasoning: str = CHAIN,
    text: str | None = None,
    task: str = "lamp2",
    gold: str = "comedy",
    token_ids: list[int] = TOKENS,
    mode: Mode = "guided",
    weights: RewardWeights = WEIGHTS,
    prmu: PrmuScore | None = PRMU,
) -> RewardBreakdown:
    response = format_response(reasoning, answer) if text is None else text
    return score_response(task, gold, response, token_ids, mode, weights, prmu)


# R_v


@pytest.mark.parametrize("name", TASKS)
def test_gold_answers_score_the_maximum(name: str) -> None:
    for gold in TASKS[name].labels or ("A title, with 3 < 4 and <i>more</i>", "second"):
        whole = score(answer=gold, task=name, gold=gold, weights=RewardWeights(alpha=1.0))
        assert whole.verifiable == 1.0
        assert whole.failure == ""
        assert whole.reward == pytest.approx(1.0 + 0.2 * PRMU.score)


def test_verifiable_reads_messy_labels_and_scores_text_by_rouge() -> None:
    assert verifiable_reward("lamp2", "comedy", Response("r", "**Comedy**", "")) == 1.0
    assert verifiable_reward("lamp2", "comedy", Response("r", "not comedy", "")) == 0.0
    assert verifiable_reward("lamp2", "comedy", Response("r", "dark comedy", "")) == 0.0
    assert verifiable_reward("lamp3", "4", Response("r", "The score is 4.", "")) == 1.0
    assert verifiable_reward("lamp3", "4", Response("r", "5", "")) == 0.0
    gold, said = "a b c", "b a c d"
    assert verifiable_reward("lamp4", gold, Response("r", said, "")) == pytest.approx(
        sum(rouge(gold, said)) / 2
    )
    assert verifiable_reward("lamp4", gold, Response("r", said, ""), "rouge1") == rouge(gold, said)[0]
    assert verifiable_reward("lamp4", gold, Response("r", said, ""), "rougeL") == rouge(gold, said)[1]


def test_an_answer_out_of_place_is_no_answer() -> None:
    assert verifiable_reward("lamp2", "comedy", split_response("comedy")) == 0.0
    assert verifiable_reward("lamp2", "comedy", Response("r", "comedy", "tag_in_answer")) == 0.0


def test_verifiable_refuses_what_cannot_be_scored() -> None:
    with pytest.raises(ConfigError, match="lamp6"):
        verifiable_reward("lamp6", "x", Response("r", "x", ""))
    with pytest.raises(DataError, match="lamp4"):
        verifiable_reward("lamp4", " ", Response("r", "x", ""))


# R_rep


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5), st.floats(1e-9, 0.5))
def test_repetition_is_equation_8(tokens: list[int], n: int, delta: float) -> None:
    grams = Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    expected = -(grams.total() - len(grams)) / (grams.total() + delta)
    assert repetition_reward(tokens, n, delta) == pytest.approx(expected)
    assert -1.0 < repetition_reward(tokens, n, delta) <= 0.0


def test_repetition_by_hand() -> None:
    assert repetition_reward([1, 2, 3]) == 0.0
    assert repetition_reward([]) == 0.0
    assert repetition_reward(list(range(100))) == 0.0
    assert math.copysign(1, repetition_reward(list(range(100)))) == 1.0
    assert repetition_reward([7] * 103) == pytest.approx(-0.99)
    assert repetition_reward([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(-1 / 5)
    assert repetition_reward([1, 1, 1], n=1, delta=0.5) == pytest.approx(-2 / 3.5)
    for n, delta in ((0, 1e-6), (4, 0.0), (4, -1.0), (4, math.nan)):
        with pytest.raises(ConfigError):
            repetition_reward([1], n, delta)


# R_f and R_tag


def test_format_and_tag() -> None:
    assert format_reward(split_response(format_response(CHAIN, "x"))) == 1.0
    assert format_reward(split_response("x")) == 0.0
    assert tag_reward(CHAIN) == (0.0, "")
    assert tag_reward("plain") == (-1.0, "text_outside_tags")
    assert tag_reward(CHAIN, minimum=4) == (-1.0, "too_few_segments")
    assert tag_reward("<a> x </a>", minimum=1, vocabulary=("a",)) == (0.0, "")


# Composites

share = st.floats(0, 1)
weight = st.floats(-2, 2)


@given(
    share, share.map(lambda x: -x), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, -1.0]), share, weight
)
def test_equations_5_and_11(
    r_v: float, r_rep: float, r_f: float, r_tag: float, r_prmu: float, w: float
) -> None:
    weights = RewardWeights(alpha=w, beta=0.8, gamma=-w)
    expected = w * (r_v + r_rep) * r_f + 0.8 * r_tag - w * r_prmu
    assert guided(r_v, r_rep, r_f, r_tag, r_prmu, weights) == pytest.approx(expected, abs=1e-12)
    assert exploratory(r_v, r_rep, r_f) == pytest.approx((r_v + r_rep) * r_f)


def test_the_papers_weights_and_a_whole_reward_by_hand() -> None:
    assert (WEIGHTS.alpha, WEIGHTS.beta, WEIGHTS.gamma) == (0.8, 0.8, 0.2)
    assert (WEIGHTS.floor_core, WEIGHTS.gate_all) == (False, False)
    tokens = [1, 2, 3, 4, 1, 2, 3, 4]
    result = score(token_ids=tokens)
    assert result.reward == pytest.approx(0.8 * (1 - 1 / 5) + 0.2 * PRMU.score)
    assert result == RewardBreakdown(
        reward=result.reward,
        verifiable=1.0,
        repetition=repetition_reward(tokens),
        format=1.0,
        tag=0.0,
        prmu=PRMU.score,
        prmu_logit=1.0,
        prmu_unknown_user=False,
        prmu_version="v1",
        failure="",
    )
    assert score(token_ids=tokens, mode="exploratory").reward == pytest.approx(0.8)


@given(share, share.map(lambda x: -x), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, -1.0]), share)
def test_without_guards_every_bit_is_that_of_the_equations(
    r_v: float, r_rep: float, r_f: float, r_tag: float, r_prmu: float
) -> None:
    expected = 0.8 * ((r_v + r_rep) * r_f + 0.0) + 0.8 * r_tag + 0.2 * r_prmu
    assert guided(r_v, r_rep, r_f, r_tag, r_prmu, WEIGHTS).hex() == expected.hex()
    assert exploratory(r_v, r_rep, r_f).hex() == ((r_v + r_rep) * r_f + 0.0).hex()
    assert terms(r_v, r_rep, r_f, r_tag, r_prmu, WEIGHTS)[1:] == (r_tag, r_prmu)


tags = st.sampled_from([0.0, -1.0])
weight_not_negative = st.floats(0, 2)


@given(share, share.map(lambda x: -x))
def test_a_floored_core_is_not_raised_by_a_broken_format(r_v: float, r_rep: float) -> None:
    assert exploratory(r_v, r_rep, 0.0, True) <= exploratory(r_v, r_rep, 1.0, True)
    if r_v + r_rep >= 0:
        assert exploratory(r_v, r_rep, 1.0, True) == exploratory(r_v, r_rep, 1.0)


@given(
    st.tuples(share, share, tags, share),
    st.tuples(share, share, tags, share),
    st.tuples(weight_not_negative, weight_not_negative, weight_not_negative),
)
def test_with_both_guards_no_broken_response_is_worth_more_than_a_well_formed_one(
    broken: tuple[float, ...], formed: tuple[float, ...], own: tuple[float, float, float]
) -> None:
    weights = RewardWeights(*own, floor_core=True, gate_all=True)
    values = [
        guided(r_v, -r_rep, r_f, r_tag, r_prmu, weights)
        for (r_v, r_rep, r_tag, r_prmu), r_f in ((broken, 0.0), (formed, 1.0))
    ]
    assert values[0] <= values[1]
    assert values[0] == -weights.beta


def test_a_broken_format_is_a_plain_zero() -> None:
    assert math.copysign(1, foundation(0.0, -0.5, 0.0)) == 1.0  # -0.0 would show up in every log


def test_the_literal_equations_reward_an_escape_and_the_guards_are_opt_in() -> None:
    looping = [7] * 50
    guarded = RewardWeights(floor_core=True, gate_all=True)
    broken, formed = (
        [
            score(text=text, gold="action", token_ids=looping, weights=weights).reward
            for weights in (WEIGHTS, guarded)
        ]
        for text in (f"<think>{CHAIN}</think>", format_response(CHAIN, "comedy"))
    )
    assert broken[0] > formed[0]
    assert broken[1] < formed[1]


@pytest.mark.parametrize(
    ("text", "failure", "format_ok", "tag"),
    [
        ("comedy", "no_think", 0.0, -1.0),
        (f"<think>{CHAIN}", "think_unclosed", 0.0, -1.0),
        (f"<think>{CHAIN}</think>", "empty_answer", 0.0, 0.0),
        (f"<think>{CHAIN}</think><make_decision>comedy</make_decision>", "tag_in_answer", 0.0, 0.0),
        ("<think>plain</think>", "empty_answer", 0.0, -1.0),
        ("<think>plain</think>comedy", "text_outside_tags", 1.0, -1.0),
        (f"<think>{CHAIN}<other>x</other></think>comedy<|im_end|>", "tag_unknown", 1.0, -1.0),
        (f"<think>{CHAIN}</think>action", "", 1.0, 0.0),
        ("", "empty_response", 0.0, -1.0),
    ],
)
@pytest.mark.parametrize("mode", ["guided", "exploratory"])
def test_the_first_failing_check_is_named(
    text: str, failure: str, format_ok: float, tag: float, mode: Mode
) -> None:
    result = score(text=text, mode=mode)
    assert (result.failure, result.format, result.tag) == (failure, format_ok, tag)
    if not format_ok:
        assert result.verifiable == 0.0
    if mode == "exploratory":
        assert result.reward == (result.verifiable + result.repetition) * format_ok
        assert math.copysign(1, result.reward) == 1.0
    else:
        assert result.reward == pytest.approx(
            0.8 * (result.verifiable + result.repetition) * format_ok + 0.8 * tag + 0.2 * PRMU.score
        )


def test_a_response_cut_at_the_token_limit_is_no_answer() -> None:
    def cut(text: str) -> RewardBreakdown:
        return score_response("lamp2", "comedy", text, TOKENS, "guided", WEIGHTS, PRMU, finished=False)

    whole = cut(format_response(CHAIN, "comedy"))
    assert (whole.failure, whole.format, whole.verifiable, whole.tag) == ("truncated", 0.0, 0.0, 0.0)
    assert whole.reward == pytest.approx(0.2 * PRMU.score)
    assert cut(f"<think>{CHAIN}").failure == "think_unclosed"


def test_a_missing_prmu_score_is_never_a_zero() -> None:
    with pytest.raises(ValueError, match="gamma"):
        score(prmu=None)
    without = score(prmu=None, weights=RewardWeights(gamma=0.0))
    assert without.reward == pytest.approx(0.8)
    assert (without.prmu, without.prmu_logit, without.prmu_unknown_user, without.prmu_version) == (None,) * 4
    assert score(prmu=None, mode="exploratory").reward == 1.0
    assert score(mode="exploratory").prmu == PRMU.score


def test_only_finite_numbers() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(RewardServerError):
            score(prmu=PrmuScore(logit=bad, score=0.5, unknown_user=True, version="v"))
        with pytest.raises(RewardServerError):
            score(prmu=PrmuScore.model_construct(logit=0.0, score=bad, unknown_user=True, version="v"))
        for name in ("alpha", "beta", "gamma"):
            with pytest.raises(ConfigError, match=name):
                RewardWeights(**{name: bad})


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="mode"):
        score(mode="free")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lamp6"):
        score(task="lamp6")
    with pytest.raises(DataError):
        score(gold="")


def test_settings_reach_their_component() -> None:
    arguments = ("lamp4", "a b c", "<think><a> x </a></think>b a c d", [1, 1, 1], "guided", WEIGHTS, PRMU)
    result = score_response(
        *arguments,
        rouge="rouge1",
        vocabulary=("a",),
        minimum_segments=1,
        repetition_n=1,
        repetition_delta=0.5,
    )
    assert result.verifiable == pytest.approx(6 / 7)
    assert result.repetition == pytest.approx(-2 / 3.5)
    assert result.failure == ""
    assert score_response(*arguments).failure == "tag_unknown"


@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "<|im_end|>", CHAIN, "comedy", " ", "<", "x"]), max_size=8
    ),
    st.sampled_from(["guided", "exploratory"]),
    st.booleans(),
    st.booleans(),
)
def test_any_text_gets_a_finite_reward_within_bounds(
    parts: list[str], mode: Mode, floor: bool, gate: bool
) -> None:
    weights = RewardWeights(floor_core=floor, gate_all=gate)
    result = score(text="".join(parts), mode=mode, weights=weights)
    assert -1.6 <= result.reward <= 1.0
    assert (result.failure == "") == (result.format == 1.0 and result.tag == 0.0)


def test_rewards_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys, tagpr.rewards.composite; sys.exit(bool({'torch', 'ray', 'verl'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
