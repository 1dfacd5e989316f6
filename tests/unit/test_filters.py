"""The accuracy filter (S7), and chains that say nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.filters import MASTER_KEYS, chain_problem, check_thresholds, content_words
from data_pipeline.settings import AccuracySettings
from tagpr.errors import ConfigError
from tagpr.schema import Chain

REASONED = "The author writes on vision, and only the second reference is about a camera."


def settings(**changes: object) -> AccuracySettings:
    return AccuracySettings.model_validate({"rouge": "rougeL", "above": {}, "minimum_words": 6, **changes})


def chain(answer: str = "[2]", task: str = "lamp1", gold: str = "[2]", reasoning: str = REASONED) -> Chain:
    return Chain(
        id="e-r0", example_id="e", task=task, user_id="u", prompt="p", gold=gold, rollout=0,
        reasoning=reasoning, answer=answer, verifiable=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "task", "gold", "problem"),
    [
        ("[2]", "lamp1", "[2]", ""),
        ("The answer is [2].", "lamp1", "[2]", ""),
        ("[1]", "lamp1", "[2]", "wrong_answer"),
        ("not [1] but [2]", "lamp1", "[2]", "wrong_answer"),
        ("4 out of 5", "lamp3", "4", ""),
        ("5", "lamp3", "4", "wrong_answer"),
    ],
)
def test_closed_tasks_must_match_exactly(answer: str, task: str, gold: str, problem: str) -> None:
    assert chain_problem(chain(answer, task, gold), settings()) == problem


def test_generation_must_exceed_its_own_threshold_by_the_rouge_that_is_set() -> None:
    # ROUGE-L 0.5 (2 of 4 tokens in order), ROUGE-1 0.75.
    title = chain("opens the mayor again", "lamp4", "the mayor now opens")
    assert chain_problem(title, settings(above={"lamp4": 0.49})) == ""
    assert chain_problem(title, settings(above={"lamp4": 0.5})) == "wrong_answer"
    assert chain_problem(title, settings(above={"lamp4": 0.74}, rouge="rouge1")) == ""
    assert chain_problem(title, settings(above={"lamp4": 0.62}, rouge="mean")) == ""
    assert chain_problem(title, settings(above={"lamp4": 0.63}, rouge="mean")) == "wrong_answer"


def test_thresholds_must_name_the_generation_tasks() -> None:
    check_thresholds(settings(above={"lamp4": 0.1}), ["lamp1", "lamp4"])
    with pytest.raises(ConfigError, match=r"^chains.accuracy.above.lamp5: is missing"):
        check_thresholds(settings(above={"lamp4": 0.1}), ["lamp4", "lamp5"])
    with pytest.raises(ConfigError, match=r"^chains.accuracy.above.lamp1: this task"):
        check_thresholds(settings(above={"lamp1": 0.1}), ["lamp1"])


@given(
    st.lists(st.sampled_from(MASTER_KEYS), min_size=1, max_size=6),
    st.sampled_from([":", ".\n", " ... ", ",", "\u200b: "]),
)
def test_master_keys_say_nothing_however_many(keys: list[str], joint: str) -> None:
    text = joint.join(key.capitalize() for key in keys) + joint
    assert content_words(text) == 0
    assert chain_problem(chain(reasoning=text), settings()) == "says_nothing"


@pytest.mark.parametrize(
    "text",
    [
        ":",
        ".",
        "...",
        " ",
        "\u200b\u200b",
        "**",
        "#" * 500,
        "Let’s solve this step by step.",
        "Ｓｏｌｕｔｉｏｎ",
    ],
)
def test_no_words_are_no_reasoning(text: str) -> None:
    assert chain_problem(chain(reasoning=text), settings()) == "says_nothing"


def test_an_opener_before_reasoning_does_no_harm() -> None:
    assert chain_problem(chain(reasoning=f"Let's solve this step by step. {REASONED}"), settings()) == ""
    assert content_words("解: 作者写的是视觉") == 7
    assert content_words("Solution: it is about cameras") == 4


@pytest.mark.parametrize(
    "answer", [":", "Solution", "Thought process:", "Let's solve this step by step", ".", ""]
)
@pytest.mark.parametrize(
    ("task", "gold"),
    [
        ("lamp1", "[2]"),
        ("lamp2", "comedy"),
        ("lamp3", "4"),
        ("lamp4", "The mayor now opens"),
        ("lamp5", "A camera model"),
        ("lamp7", "rain again today"),
    ],
)
def test_master_keys_as_answers_are_wrong_in_every_task(answer: str, task: str, gold: str) -> None:
    accuracy = settings(above=dict.fromkeys(("lamp4", "lamp5", "lamp7"), 0.0))
    assert chain_problem(chain(answer, task, gold), accuracy) == "wrong_answer"
