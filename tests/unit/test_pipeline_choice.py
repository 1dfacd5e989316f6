"""Filters, selection and preference pairs: pure functions of chains."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.preferences import (
    Brief,
    Candidate,
    Rollouts,
    choose_pairs,
    finish_pair,
    pqp_candidates,
    prp_candidates,
)
from data_pipeline.selection import interleave, select_chains, shuffled
from data_pipeline.settings import PreferenceSettings
from tagpr.schema import Chain
from tagpr.tags import split_response


def chain(
    name: str,
    answer: str = "[1]",
    verifiable: float = 1.0,
    task: str = "lamp1",
    example: str = "e",
    user: str = "u",
    gold: str = "[1]",
    reasoning: str | None = None,
) -> Chain:
    return Chain(
        id=name,
        example_id=example,
        task=task,
        user_id=user,
        prompt="with profile",
        gold=gold,
        rollout=0,
        reasoning=reasoning or f"because {answer}.",
        answer=answer,
        verifiable=verifiable,
    )


def brief(*arguments: object, **more: object) -> Brief:
    full = chain(*arguments, **more)  # type: ignore[arg-type]
    return Brief.of(
        full.id, full.example_id, full.task, full.user_id, full.answer, full.verifiable, full.reasoning
    )


SETTINGS = PreferenceSettings(
    prp_pairs=100, prp_instances_per_task=1, prp_rollouts=1, prp_minimum_gain=None, pqp_pairs=100, pqp_margin=0.0,
    pqp_last_word_share=None, extra_rollouts=0, extra_request={},
)  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_interleave_keeps_all_and_balances_every_prefix(items: list[tuple[int, int]]) -> None:
    order = interleave(items, lambda item: item[0], lambda item: item[1])
    assert Counter(order) == Counter(items)
    sizes = Counter(item[0] for item in items)
    for length in range(len(order)):
        taken = Counter(item[0] for item in order[:length])
        open_groups = [group for group, size in sizes.items() if taken[group] < size]
        assert all(max(taken.values(), default=0) - taken[group] <= 1 for group in open_groups)


def test_selection_caps_instances_balances_tasks_and_ignores_arrival_order() -> None:
    chains = [
        chain(f"{task}-{example}-{number}", task=task, example=f"{task}-{example}")
        for task, examples in (("lamp1", 10), ("lamp2", 3))
        for example in range(examples)
        for number in range(4)
    ]
    selected = select_chains(chains, size=14, per_instance=2, seed=0)
    assert Counter(each.task for each in selected) == {"lamp1": 8, "lamp2": 6}
    assert max(Counter(each.example_id for each in selected).values()) == 2
    random.Random(1).shuffle(chains)
    assert select_chains(chains, size=14, per_instance=2, seed=0) == selected


def test_prp_prefers_with_profile_and_needs_different_texts() -> None:
    kept = [brief("r0"), brief("r1", answer="[2]", verifiable=0.0)]
    without = [brief("n0", answer="[2]", verifiable=0.0), brief("n1", example="other", answer="[2]")]
    pairs = prp_candidates(kept, without, None)
    assert [(pair.chosen.id, pair.rejected.id) for pair in pairs] == [("r0", "n0")]
    better = prp_candidates(kept, [brief("n2", reasoning="luck.")], 0.0)
    assert [pair.chosen.id for pair in better] == ["r0"]
    assert len(prp_candidates(kept, [brief("n2", reasoning="luck.")], None)) == 2


def test_pqp_is_ordered_by_r_v_and_ties_are_dropped() -> None:
    chains = [
        brief("a", "x", 0.5),
        brief("b", "y", 1.0),
        brief("c", "z", 0.5),
        brief("d", "w", 0.9, example="other"),
    ]
    pairs = pqp_candidates(chains, 0.0)
    assert {(pair.chosen.id, pair.rejected.id) for pair in pairs} == {("b", "a"), ("b", "c")}
    assert all(pair.margin == 0.5 for pair in pairs)
    assert pqp_candidates(chains, 0.5) == []


def test_last_word_pairs_get_their_share_and_users_take_turns() -> None:
    chains = []
    for user in range(10):
        for example in range(6):
            words = [
                ("Why opens now", 1.0),
                ("Why opens again", 0.7),
                ("The opens now", 0.6),
                ("The shuts", 0.1),
            ]
            chains += [
                brief(
                    f"{user}-{example}-{words.index(word)}",
                    *word,
                    task="lamp4",
                    example=f"{user}-{example}",
                    user=str(user),
                )
                for word in words
            ]
    settings = SETTINGS.model_copy(update={"pqp_pairs": 100, "pqp_last_word_share": 0.4})
    chosen = choose_pairs(lambda: by_instance(chains, []), settings, seed=0)
    last = [pair for pair in chosen if pair.last_word_only]
    assert (len(chosen), len(last)) == (100, 40)
    assert all(
        pair.chosen.answer == "Why opens now" and pair.rejected.answer == "Why opens again" for pair in last
    )
    assert set(Counter(pair.chosen.user_id for pair in last).values()) == {4}
    assert set(Counter(pair.chosen.user_id for pair in chosen).values()) == {10}


def by_instance(personalised: list[Brief], without: list[Brief]) -> list[Rollouts]:
    found: dict[str, tuple[list[Brief], list[Brief]]] = {}
    for place, briefs in enumerate((personalised, without)):
        for each in briefs:
            found.setdefault(each.example_id, ([], []))[place].append(each)
    return [Rollouts(own[::2], own, blank) for own, blank in found.values()]


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 4), st.sampled_from(("x y", "x z", "w z"))), max_size=60),
    st.lists(st.integers(0, 11), max_size=12),
    st.sampled_from((None, 0.4)),
    st.integers(0, 12),
)  # fmt: skip
def test_pairs_are_those_of_shuffling_all_there_are_and_taking_turns(
    rollouts: list[tuple[int, int, str]], blanks: list[int], share: float | None, size: int
) -> None:
    def made(name: str, example: int, answer: str, value: int) -> Brief:
        user, task = f"u{example % 3}", f"lamp{1 + example % 2}"
        return brief(
            name, answer, value / 4, task=task, example=str(example), user=user, reasoning=f"{value}{answer}"
        )

    personalised = [
        made(f"r{number}", example, answer, value) for number, (example, value, answer) in enumerate(rollouts)
    ]
    without = [made(f"n{number}", example, "none", 0) for number, example in enumerate(blanks)]
    instances = by_instance(personalised, without)
    settings = SETTINGS.model_copy(
        update={"prp_pairs": size, "pqp_pairs": 2 * size, "pqp_last_word_share": share}
    )

    def first(candidates: list[Candidate], count: int) -> list[Candidate]:
        return interleave(
            shuffled(candidates, lambda pair: pair.id, 5),
            lambda pair: pair.chosen.user_id,
            lambda pair: pair.chosen.task,
            lambda pair: pair.chosen.example_id,
        )[:count]

    prp = [pair for each in instances for pair in prp_candidates(each.kept, each.without_profile, None)]
    pqp = [pair for each in instances for pair in pqp_candidates(each.personalised, 0.0)]
    expected = first(prp, size)
    if share is None:
        expected += first(pqp, 2 * size)
    else:
        last = round(share * 2 * size)
        expected += first([pair for pair in pqp if pair.last_word_only], last)
        expected += first([pair for pair in pqp if not pair.last_word_only], 2 * size - last)
    assert choose_pairs(lambda: iter(instances), settings, seed=5) == expected


def test_both_sides_of_a_pair_are_tagged_or_there_is_none() -> None:
    candidate = pqp_candidates([brief("a", "x", 0.5), brief("b", "y", 1.0)], 0.0)[0]
    text = "<analyze_input> because. </analyze_input>"
    good, bad = chain("b", "y", 1.0), chain("a", "x", 0.5)
    tagged = [each.model_copy(update={"tagged": text}) for each in (good, bad)]
    assert finish_pair(candidate, good, tagged[1]) is None
    assert finish_pair(candidate, tagged[0], bad) is None
    pair = finish_pair(candidate, *tagged)
    assert pair is not None
    assert (pair.kind, pair.prompt, pair.margin) == ("pqp", "with profile", 0.5)
    assert split_response(pair.chosen).answer == "y"
    assert split_response(pair.rejected).reasoning == text
