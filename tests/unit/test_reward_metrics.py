"""Metrics of a batch: each number by hand, each name documented, each documented name there."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagpr.rl.profile_use import profile_use, words
from tagpr.rl.response_shape import response_shape
from tagpr.rl.reward_metrics import NAMES, documented, reward_metrics
from tagpr.tags import format_response, split_response
from tagpr.vocabulary import vocabulary

TAGS = list(vocabulary())


class Letters:
    """A tokenizer with a token for each character."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(map(ord, text))


def shape(text: str) -> dict[str, Any]:
    return response_shape(text, Letters().encode(text), Letters())


def info(tags: str, total: float = 1.0, reasoning: float = 30.0, **others: Any) -> dict[str, Any]:
    sequence = tags.split()
    return {
        "score": total, "total": total, "verifiable": total, "repetition": 0.0, "format": 1.0, "tag": 0.0, "failure": "",
        "finished": 1.0,
        "prmu": 0.5, "prmu_unknown_user": 0.0, "prmu_seconds": 0.2,
        "reasoning_tokens": reasoning, "answer_tokens": 4.0, "tags": tags,
        "segments": float(len(sequence)), "empty_segments": 0.0,
        "opened_tags": float(len(sequence)), "reopened_tags": float(len(sequence) - len(set(sequence))), **others,
    }  # fmt: skip


def metrics(*infos: dict[str, Any], tasks: str = "", groups: str = "") -> dict[str, float]:
    return reward_metrics(infos, list(tasks or "t" * len(infos)), list(groups or "g" * len(infos)))


def test_shape_of_a_whole_response() -> None:
    tagged = f"<{TAGS[0]}>ab</{TAGS[0]}> <{TAGS[2]}> </{TAGS[2]}>"
    found = shape(format_response(tagged, "yes"))
    assert found["reasoning_tokens"] == len(tagged)
    assert (found["tags"], found["segments"], found["empty_segments"]) == (f"{TAGS[0]} {TAGS[2]}", 2, 1)
    assert (found["opened_tags"], found["reopened_tags"]) == (2, 0)


def test_tags_of_a_broken_chain_are_counted() -> None:
    a, b = TAGS[:2]
    found = shape(f"<think>\n<{a}> x </{b}> <{b}> <{a}> <{a}> <unknown> <{a} </{a}>")
    assert (found["segments"], found["opened_tags"], found["reopened_tags"]) == (0, 4, 2)


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("just an answer", 0),
        ("<think>\nnever closed", len("<think>\nnever closed")),
        ("opened by the template</think> a", len("opened by the template")),
        ("", 0),
    ],
)
def test_reasoning_of_broken_responses(text: str, reasoning: int) -> None:
    found = shape(text)
    assert found["reasoning_tokens"] == reasoning
    assert found["tags"] == ""


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "x ", f"<{TAGS[0]}>", f"</{TAGS[0]}>", "\n"]), max_size=12
    )
)
def test_shape_has_constant_keys_and_no_negative_number(pieces: list[str]) -> None:
    found = shape("".join(pieces))
    assert found.keys() == shape("").keys()
    assert all(value >= 0 for value in found.values() if isinstance(value, float))
    if not split_response("".join(pieces)).reasoning:
        assert found["segments"] == 0


def test_distributions_over_all_and_by_task() -> None:
    found = metrics(*(info("", total) for total in (0.0, 1.0, 2.0, 5.0)), tasks="aabb", groups="wxyz")
    assert found["reward/total/mean"] == 2.0
    assert found["reward/total/p50"] == 1.5
    assert found["reward/total/max"] == 5.0
    assert found["a/reward/total/mean"] == 0.5
    assert found["b/reward/total/std"] == 1.5


def test_groups_whose_rewards_are_equal() -> None:
    found = metrics(*(info("", total) for total in (1, 1, 0, 1)), tasks="aabb", groups="xxyy")
    assert found["group/zero_spread_frac"] == 0.5
    assert (found["a/group/zero_spread_frac"], found["b/group/zero_spread_frac"]) == (1.0, 0.0)
    assert found["group/spread/mean"] == 0.25


def test_failures_by_reason_with_zeros() -> None:
    found = metrics(info("", failure="no_think", format=0.0), info("", failure="tag_nested", tag=-1.0))
    assert found["failure/no_think/share"] == found["failure/tag_nested/share"] == 0.5
    assert found["failure/format/share"] == found["tags/valid_frac"] == 0.5
    assert found["failure/truncated/share"] == 0.0
    cut = metrics(info(""), info("", finished=0.0), info("", finished=0.0), info(""))
    assert (found["length/cut_frac"], cut["length/cut_frac"]) == (0.0, 0.5)
    assert metrics(info("", failure="new_check"))["failure/new_check/share"] == 1.0


def test_tags_by_hand() -> None:
    a, b = TAGS[0], TAGS[1]
    found = metrics(info(f"{a} {b}"), info(f"{a} {b}"), info(f"{b} {a} {b}", empty_segments=1.0), info(""))
    assert found[f"tags/coverage/{a}"] == 0.75
    assert found[f"tags/coverage/{TAGS[5]}"] == 0.0
    assert found["tags/segments/mean"] == 7 / 4
    assert found["tags/distinct/mean"] == 6 / 4
    assert found["tags/repeated_frac"] == pytest.approx(1 / 7)
    assert found["tags/empty_frac"] == pytest.approx(1 / 7)
    assert found["tags/commonest_sequence_frac"] == 0.5
    # a-b twice, then b-a (against the order), a-b; b-b says nothing
    assert found["tags/order_agreement"] == pytest.approx(3 / 4)
    assert found["tags/segment_tokens/mean"] == pytest.approx(90 / 7)
    shares = (3 / 7, 4 / 7)
    assert found["tags/entropy_bits"] == pytest.approx(-sum(p * math.log2(p) for p in shares))


def test_entropy_of_transitions() -> None:
    a, b = TAGS[0], TAGS[1]
    assert metrics(info(f"{a} {b}"), info(f"{a} {b}"))["tags/transition_entropy_bits"] == 0.0
    # Only the start is open (1 bit in 2 of 4 transitions): a or b, then the end.
    assert metrics(info(a), info(b))["tags/transition_entropy_bits"] == pytest.approx(0.5)


def test_without_any_tags_nothing_is_divided_by_zero() -> None:
    found = metrics(info(""), info(""))
    assert found["tags/entropy_bits"] == 0.0
    assert "tags/order_agreement" not in found
    assert all(map(math.isfinite, found.values()))
    json.dumps(found)


def row(
    group: str, user: str, prompt: str, response: str, query: str = "", task: str = "t"
) -> dict[str, str]:
    return {
        "group": group, "task": task, "user_id": user, "query": query, "prompt": f"{prompt} {query}", "response": response
    }  # fmt: skip


def test_profile_use_counts_own_words_against_those_of_others() -> None:
    found = profile_use(
        [
            row("1", "u", "the title starts with Towards", "<think>Towards the sea</think>", query="the sea"),
            row("2", "v", "the title starts with Behind", "<think>starts with Behind</think>"),
        ]
    )
    # Response 1 without its query: {towards}, only in u's prompt. Response 2: {starts, with, behind}: 3/3 and 2/3.
    assert found["profile/own"] == 1.0
    assert found["profile/other"] == pytest.approx((0 + 2 / 3) / 2)
    assert found["profile/use"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["t/profile/use"] == found["profile/use"]


def test_profile_use_is_zero_where_profiles_are_exchanged() -> None:
    prompts = {user: f"items {user}{user} of this person" for user in "abcdef"}
    users = list(prompts)
    fitting = [row(u, u, prompts[u], f"of {u}{u}") for u in users]
    others = [row(u, u, prompts[u], f"of {o}{o}") for u, o in zip(users, users[1:] + users[:1], strict=True)]
    assert profile_use(fitting)["profile/use"] > 0.4
    assert profile_use(others)["profile/use"] < 0


def test_profile_use_of_the_same_user_is_no_comparison() -> None:
    same = [row("1", "u", "a b", "a"), row("2", "u", "c d", "c")]
    assert profile_use(same) == {}
    assert profile_use([row("1", "u", "a b", "q", query="q"), row("2", "v", "c", "q", query="q")]) == {}


def test_words_of_scripts_without_spaces() -> None:
    assert words("很好吃的店 <make_decision> Good-ish 12") == {"很好", "吃的", "店", "good", "ish", "12"}


def everything() -> set[str]:
    found = metrics(info(f"{TAGS[0]} {TAGS[1]}"), info(TAGS[0]), tasks="aa", groups="xy")
    rows = [row("1", "u", "a b", "a"), row("2", "v", "c d", "c")]
    return {*found, *profile_use(rows), "monitor/plateau"}


def test_every_name_is_documented_and_every_documented_name_is_there() -> None:
    names = everything()
    assert [name for name in names if documented(name) is None] == []
    assert {documented(name) for name in names} == set(NAMES)
    assert documented("reward/nonsense/mean") is None
    assert documented("actor/entropy") is None


def test_names_fit_tensorboard_and_wandb() -> None:
    assert all(re.fullmatch(r"[\w./@-]+", name) for name in everything())
