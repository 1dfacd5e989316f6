"""Figures on rows made by hand, so that every one of them can be worked out on paper."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagpr.errors import ConfigError
from tagpr.evaluation.measures import Bootstrap
from tagpr.evaluation.rows import Generation, Row
from tagpr.evaluation.score import (
    Decoding,
    ModelSummary,
    Replicate,
    Rewards,
    Summary,
    SweepPoint,
    guided_reward,
    interval,
    measure,
    score_row,
    summarise,
    summarise_model,
)
from tagpr.evaluation.tables import SYNTHETIC, markdown, tables
from tagpr.rewards.composite import RewardWeights, score_response
from tagpr.rewards.repetition import repetition_reward
from tagpr.schema import Example, PrmuScore

TAGGED = "<analyze_input> a. </analyze_input>\n<identify_patterns> b. </identify_patterns>\n<make_decision> c. </make_decision>"


def answered(
    id_: str,
    response: str,
    *,
    gold: str,
    task: str = "lamp3",
    user: str = "u",
    seed: int | None = None,
    seen: bool | None = True,
    finish_reason: str = "stop",
    reasoning_tokens: int = 10,
    thinking: bool = True,
) -> Row:
    example = Example(id=id_, task=task, split="dev", user_id=user, query="q", profile=(), gold=gold)
    generation = Generation(
        id=id_,
        task=task,
        user_id=user,
        seed=seed,
        prompt_tokens=5,
        items_used=8,
        items_shortened=0,
        response=response,
        response_tokens=20,
        reasoning_tokens=reasoning_tokens,
        repetition=-0.25,
        finish_reason=finish_reason,  # type: ignore[arg-type]
        thinking=thinking,
        thinking_cut=False,
    )
    return score_row(generation, example, seen)


def tagged(answer: str, reasoning: str = TAGGED) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def test_a_gold_answer_in_tagged_reasoning_scores_the_maximum() -> None:
    for task, gold in [("lamp1", "[2]"), ("lamp2", "sci-fi"), ("lamp3", "4"), ("lamp4", "A title")]:
        row = answered("a", tagged(gold), gold=gold, task=task)
        assert (row.verifiable, row.format, row.tag, row.failure) == (1.0, 1.0, 0.0, "")
        assert row.tags == {"analyze_input": 1, "identify_patterns": 1, "make_decision": 1}
        assert row.parsed == gold


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("4", "no_think"),
        ("<think>\nfor ever", "think_unclosed"),
        (tagged("4", "plain words."), "text_outside_tags"),
        (tagged("4", "<analyze_input> a. </analyze_input>"), "too_few_segments"),
        (tagged("4", "<guess> a. </guess>"), "tag_unknown"),
        (tagged(""), "empty_answer"),
    ],
)
def test_the_first_failed_check_is_named(response: str, failure: str) -> None:
    row = answered("a", response, gold="4")
    assert row.failure == failure
    assert row.format + row.tag < 1.0


def test_figures_of_one_model() -> None:
    rows = [
        # lamp3: right, off by one, unparsable (5 is the farther of 1 and 5 from a gold of 1)
        answered("a", tagged("4"), gold="4", user="1"),
        answered("b", tagged("3"), gold="4", user="2", finish_reason="length"),
        answered("c", tagged("no idea"), gold="1", user="2", seen=False),
        # lamp1: one row, right, without tags
        answered("d", tagged("[1]", "plain."), gold="[1]", task="lamp1", user="3", seen=False),
    ]
    found = figures(rows)
    assert (found.rows, found.users, found.replicates) == (4, 3, ["greedy"])
    assert found.verifiable == {"lamp1": 1.0, "lamp3": pytest.approx(1 / 3)}
    assert found.task_score == pytest.approx((1 + 1 / 3) / 2)  # tasks weigh the same, whatever their rows
    assert found.metrics["lamp3"]["mae"] == pytest.approx(5 / 3)
    assert found.metrics["lamp3"]["mse"] == pytest.approx(17 / 3)
    assert found.metrics["lamp3"]["rmse"] == pytest.approx(math.sqrt(17 / 3))
    assert found.metrics["lamp1"]["accuracy"] == 1.0
    assert found.unparsable == pytest.approx(1 / 4)
    assert (found.well_formed, found.format, found.tag) == (
        0.5,
        0.75,
        0.75,
    )  # truncated: R_f = 0, as in training
    assert found.failures == {"text_outside_tags": 1, "truncated": 1}
    assert (found.reward, found.reward_parts) == (None, None)
    assert found.truncated == 1
    assert found.segments == 3.0
    assert found.tag_shares == dict.fromkeys(
        ("analyze_input", "identify_patterns", "make_decision"), pytest.approx(1 / 3)
    )
    assert found.groups["seen"].rows == 2
    assert found.groups["seen"].task_score == 0.5
    assert found.groups["unseen"].users == 2
    assert found.groups["unseen"].task_score == pytest.approx((0 + 1) / 2)
    assert "unknown" not in found.groups


def replicates(rows: Sequence[Row], rewards: Rewards | None = None, run: int = 0) -> list[Replicate]:
    seeds = dict.fromkeys(row.seed for row in rows)
    return [Replicate([row for row in rows if row.seed == seed], rewards, run) for seed in seeds]


def compared(
    models: Mapping[str, Sequence[Row]],
    resamples: int,
    rewards: Mapping[str, Rewards] | None = None,
    decoding: Literal["greedy", "sampled"] = "greedy",
) -> Decoding:
    its = {
        label: replicates(rows, None if rewards is None else rewards[label]) for label, rows in models.items()
    }
    return summarise(its, resamples, 0, decoding)


def figures(rows: Sequence[Row], rewards: Rewards | None = None) -> ModelSummary:
    return summarise_model(replicates(rows, rewards))


def model(right: Sequence[bool], users: Sequence[str], seed: int | None = None) -> list[Row]:
    return [
        answered(f"r{n}", tagged("4" if good else "2"), gold="4", user=user, seed=seed)
        for n, (good, user) in enumerate(zip(right, users, strict=True))
    ]


def test_differences_are_paired_and_resample_users() -> None:
    users = [str(n % 20) for n in range(80)]
    base = model([n % 2 == 0 for n in range(80)], users)
    better = model([n % 2 == 0 or n % 5 == 0 for n in range(80)], users)
    best = model([True] * 80, users)
    found = compared({"base": base, "sft": better, "guided": best}, 500)
    pairs = {(each.model, each.against): each for each in found.differences if each.measure == "task_score"}
    assert set(pairs) == {("sft", "base"), ("guided", "sft"), ("guided", "base")}
    lead = pairs["guided", "base"]
    assert lead.mean == pytest.approx(0.5)
    assert lead.low is not None
    assert lead.high is not None
    assert lead.low < 0.5 < lead.high
    assert (lead.rows, lead.users) == (80, 20)
    assert found.best["task_score"] == "guided"
    assert found.best["lamp3/mae"] == "guided"  # lower is better there
    assert "well_formed" not in found.best  # all the same


def test_the_interval_belongs_to_users_not_rows() -> None:
    """One user with many rows is one observation: rows would give a narrow interval, users a wide one."""
    right = [True] * 50 + [False] * 10
    users = ["a"] * 50 + [str(n) for n in range(10)]
    found = compared({"base": model([False] * 60, users), "sft": model(right, users)}, 2000).differences[0]
    assert found.low is not None
    assert found.low <= 0.0  # the one user who gains is in only 65 % of the samples
    assert found.users == 11


def test_no_bold_best_inside_its_interval() -> None:
    users = [str(n) for n in range(20)]
    almost = model([n != 3 for n in range(20)], users)
    full = model([True] * 20, users)
    found = compared({"base": almost, "sft": full}, 1000)
    assert found.models["sft"].task_score > found.models["base"].task_score
    assert found.best == {}
    assert "**0." not in markdown(summary(found, synthetic=True))


def test_one_user_gives_a_difference_without_an_interval() -> None:
    found = compared({"base": model([False], ["a"]), "sft": model([True], ["a"])}, 100)
    assert found.differences[0].mean == 1.0
    assert found.differences[0].low is None
    assert found.best == {}
    assert "no interval" in markdown(summary(found, synthetic=True))


def test_several_seeds_are_averaged_before_anything_is_compared() -> None:
    users = [str(n) for n in range(4)]
    rows = model([True] * 4, users, seed=0) + model([False] * 4, users, seed=1)
    found = compared({"base": rows}, 100, decoding="sampled")
    assert found.models["base"].task_score == 0.5
    assert found.models["base"].task_score_deviation == pytest.approx(math.sqrt(0.5))
    assert found.models["base"].rows == 4
    assert found.models["base"].replicates == ["seed 0", "seed 1"]
    text = markdown(summary(found, synthetic=True))
    assert "4 rows of 4 users, sampled, 2 seeds" in text


def prmu(logit: float, unknown: bool = False) -> PrmuScore:
    return PrmuScore(logit=logit, score=1 / (1 + math.exp(-logit)), unknown_user=unknown, version="v1")


def rewarded(rows: Sequence[Row], logit: float = 0.0) -> Rewards:
    return {row.key: guided_reward(row, RewardWeights(), prmu(logit, row.user_id == "u")) for row in rows}


pieces = st.sampled_from(["<think>", "</think>", *TAGGED.splitlines(), "4", "2", " ", "\n", "<|im_end|>"])


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.builds(
            lambda reasoning, answer: tagged(answer, reasoning),
            st.sampled_from([TAGGED, "plain."]),
            st.sampled_from(["4", "2", ""]),
        ),
        st.lists(pieces, max_size=8).map("".join),
    ),
    st.lists(st.integers(0, 3), max_size=12),
    st.floats(-20, 20),
    st.booleans(),
    st.tuples(*[st.floats(-2, 2)] * 3),
)
def test_a_rows_reward_is_that_of_training(
    response: str, token_ids: list[int], logit: float, finished: bool, weights: tuple[float, float, float]
) -> None:
    row = answered("a", response, gold="4", finish_reason="stop" if finished else "length")
    row = row.model_copy(update={"repetition": repetition_reward(token_ids)})
    trained = score_response(
        "lamp3", "4", response, token_ids, "guided", RewardWeights(*weights), prmu(logit), finished=finished
    )
    assert guided_reward(row, RewardWeights(*weights), prmu(logit)) == trained


def test_a_reward_without_prmus_score_is_an_error_unless_it_weighs_nothing() -> None:
    row = answered("a", tagged("4"), gold="4")
    with pytest.raises(
        ConfigError, match=r"evaluate\.reward_weights\.gamma=0\.2: needs PRMU's score of row a"
    ):
        guided_reward(row, RewardWeights(), None)
    assert guided_reward(row, RewardWeights(gamma=0.0), None).reward == pytest.approx(0.8 * (1 - 0.25))


def test_mean_reward_and_its_parts() -> None:
    rows = [
        answered("a", tagged("4"), gold="4", user="u", seen=False),  # .8 * .75 + .1
        answered("b", tagged("4", "plain."), gold="4", user="v"),  # the same - .8
        answered("c", tagged("[1]"), gold="[2]", task="lamp1", user="v"),  # .8 * -.25 + .1
    ]
    found = figures(rows, rewarded(rows))
    assert found.reward == pytest.approx(((0.7 - 0.1) / 2 - 0.1) / 2)  # tasks weigh the same
    assert found.reward_deviation is None
    assert found.reward_parts is not None
    assert found.reward_parts.model_dump() == pytest.approx(
        {
            "verifiable": 0.5,
            "repetition": -0.25,
            "format": 1.0,
            "tag": -0.25,
            "prmu": 0.5,
            "unknown_user": 1 / 3,
        }
    )
    assert found.groups["unseen"].reward == pytest.approx(0.7)
    assert found.groups["unseen"].unknown_user == 1.0
    assert found.groups["seen"].reward == pytest.approx(-0.1)
    assert found.groups["seen"].unknown_user == 0.0


def test_without_gamma_prmu_has_no_figures() -> None:
    rows = model([True, False], ["a", "b"])
    weights = RewardWeights(gamma=0.0)
    found = figures(rows, {row.key: guided_reward(row, weights, None) for row in rows})
    assert found.reward_parts is not None
    assert (found.reward_parts.prmu, found.reward_parts.unknown_user) == (None, None)
    assert found.reward == pytest.approx(0.8 * (0.5 - 0.25))


def test_rewards_are_compared_like_task_scores() -> None:
    users = [str(n % 20) for n in range(60)]
    base, sft = model([n % 2 == 0 for n in range(60)], users), model([n % 2 == 0 for n in range(60)], users)
    # The same answers: only PRMU tells them apart.
    rewards = {"base": rewarded(base, -1.0), "sft": rewarded(sft, 1.0)}
    found = compared({"base": base, "sft": sft}, 500, rewards)
    by_measure = {each.measure: each for each in found.differences}
    assert by_measure["task_score"].mean == 0.0
    lead = by_measure["reward"]
    assert lead.mean == pytest.approx(0.2 * (math.exp(1) - 1) / (math.exp(1) + 1))
    assert lead.low is not None
    assert lead.low > 0
    assert (lead.rows, lead.users) == (60, 20)
    assert found.best == {"reward": "sft"}
    text = markdown(summary(found, synthetic=True, weights=RewardWeights()))
    assert f"**{found.models['sft'].reward:.3f}**" in text
    assert "PRMU v1" in text
    assert text.count("reward (eq. 5)") >= 4  # main figures, differences, its parts, users
    without = markdown(summary(compared({"base": base, "sft": sft}, 50), synthetic=True))
    assert "eq. 5" not in without


def test_rewards_of_several_seeds() -> None:
    rows = model([True] * 3, ["a", "b", "c"], seed=0) + model([False] * 3, ["a", "b", "c"], seed=1)
    decoding = compared({"base": rows}, 50, {"base": rewarded(rows)}, "sampled")
    found = decoding.models["base"]
    assert found.reward == pytest.approx(0.8 * 0.25 + 0.1)
    assert found.reward_deviation == pytest.approx(0.8 * math.sqrt(0.5))
    assert "0.300 ± 0.566" in markdown(summary(decoding, synthetic=True, weights=RewardWeights()))


def summary(
    decoding: Decoding,
    synthetic: bool,
    weights: RewardWeights | None = None,
    sweep: Sequence[SweepPoint] = (),
) -> Summary:
    return Summary(
        benchmark="minilamp" if synthetic else "lamp",
        synthetic=synthetic,
        split="dev",
        tasks=["lamp3"],
        retriever="recency",
        profile_size=8,
        rows_selected=20,
        rows_left_out=0,
        temperature=1.0,
        bootstrap_resamples=100,
        reward_weights=None if weights is None else {"alpha": 0.8, "beta": 0.8, "gamma": 0.2},
        prmu_version=None if weights is None else "v1",
        decodings=[decoding],
        sweep=list(sweep),
    )


def test_the_papers_figures_stand_apart_and_never_beside_synthetic_ones() -> None:
    decoding = compared({"base": model([True, False], ["a", "b"])}, 100)
    synthetic = markdown(summary(decoding, synthetic=True))
    assert SYNTHETIC in synthetic
    assert "paper" not in synthetic
    real = summary(decoding, synthetic=False)
    paper = next(table for table in tables(real) if table.title == "paper: Table 1")
    assert paper.head == ("", "R", "LaMP-3 MAE ↓", "LaMP-3 RMSE ↓")
    shown = {row[0].text: [cell.text for cell in row[1:]] for row in paper.rows}
    assert len(shown) == 23
    assert shown["RAG-R (Base)"] == ["✓", "0.291", "0.645"]
    assert shown["GPT-4o"] == ["", "0.254", "0.554"]
    assert shown["TagPR"] == ["✓", "0.218", "0.263 (?)"]
    assert "(TagPR w/o Reward, TagPR; S33)" in paper.note
    assert "SYNTHETIC" not in markdown(real)
    ours = [table for table in tables(real) if table.title != paper.title]
    assert not any("TagPR" in cell.text for table in ours for row in table.rows for cell in row)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.sampled_from("abcd"), st.sampled_from(["lamp3", "lamp1"])),
        min_size=2,
        max_size=30,
    )
)
def test_a_difference_is_the_difference_of_the_figures(rows: list[tuple[bool, bool, str, str]]) -> None:
    golds = {"lamp3": ("4", "2"), "lamp1": ("[1]", "[2]")}
    models = {
        label: [
            answered(f"r{n}", tagged(golds[task][not good[place]]), gold=golds[task][0], task=task, user=user)
            for n, (*good, user, task) in enumerate(rows)
        ]
        for place, label in enumerate(("base", "sft"))
    }
    rewards = {label: rewarded(its, len(its[0].user_id)) for label, its in models.items()}
    found = compared(models, 20, rewards)
    for name in ("task_score", "reward"):
        difference = next(each for each in found.differences if each.measure == name)
        base, sft = (getattr(found.models[label], name) for label in models)
        assert difference.mean == pytest.approx(sft - base, abs=1e-9)
        if difference.low is not None and difference.high is not None:
            assert difference.low <= difference.high


def test_table_columns_line_up_in_a_terminal() -> None:
    users = [str(n % 7) for n in range(30)]
    decoding = compared({"base": model([False] * 30, users), "sft": model([True] * 30, users)}, 100)
    for block in markdown(summary(decoding, synthetic=False)).split("\n\n"):
        if block.startswith("|"):
            assert len({len(line) for line in block.splitlines()}) == 1, block
    assert "**1.000**" in markdown(summary(decoding, synthetic=False))


def test_a_method_without_thinking_is_judged_by_its_answer_alone() -> None:
    row = answered("a", " 4\n", gold="4", thinking=False)
    assert (row.answer, row.verifiable, row.failure, row.reasoning) == ("4", 1.0, "", "")
    assert answered("a", "4", gold="4").verifiable == 0.0  # asked to think, it did not
    assert answered("b", " ", gold="4", thinking=False).failure == "empty_answer"
    assert answered("b", "4", gold="4", thinking=False, finish_reason="length").verifiable == 0.0
    plain = [
        answered("a", "4", gold="4", user="u", thinking=False),
        answered("b", "2", gold="4", user="v", thinking=False),
    ]
    deep = model([True, True], ["u", "v"])
    deep = [row.model_copy(update={"id": id_}) for row, id_ in zip(deep, "ab", strict=True)]
    found = compared({"plain": plain, "deep": deep}, 50)
    assert (found.models["plain"].well_formed, found.models["deep"].well_formed) == (None, 1.0)
    assert {each.measure for each in found.differences} == {
        "task_score", "reasoning_tokens", "lamp3/mae", "lamp3/mse", "lamp3/rmse"
    }  # fmt: skip
    assert "–: not asked of a method without thinking" in markdown(summary(found, synthetic=True))


def test_the_official_reading_stands_beside_the_lenient_one() -> None:
    rows = [
        answered("a", tagged("The score is 4"), gold="4", user="u"),
        answered("b", tagged("2"), gold="2", user="v"),
    ]
    found = figures(rows)
    assert (found.metrics["lamp3"]["mae"], found.strict["lamp3"]["mae"]) == (0.0, 1.5)
    text = markdown(summary(compared({"base": rows}, 50), synthetic=True))
    assert "· read strictly: MAE ↓" in text
    clean = markdown(summary(compared({"base": rows[1:]}, 50), synthetic=True))
    assert "· read strictly" not in clean


def test_rmse_and_f1_have_intervals_of_their_own() -> None:
    users = [str(n) for n in range(30)]
    rows = [
        answered(f"r{n}", tagged(said), gold=gold, task="lamp1", user=user)
        for n, (user, said, gold) in enumerate(
            zip(users, ["[1]", "[2]", "[1]"] * 10, ["[1]", "[2]", "[2]"] * 10, strict=True)
        )
    ]
    found = compared({"base": rows}, 400).models["base"]
    for metric in ("accuracy", "f1_macro", "f1_positive"):
        bounds = found.intervals[f"lamp1/{metric}"]
        assert bounds.mean == pytest.approx(found.metrics["lamp1"][metric])
        assert bounds.low is not None
        assert bounds.high is not None
        assert bounds.low < bounds.mean < bounds.high
    ratings = model([n % 3 > 0 for n in range(30)], users)
    bounds = compared({"base": ratings}, 400).models["base"].intervals["lamp3/rmse"]
    assert bounds.mean == pytest.approx(math.sqrt(4 / 3))


def test_training_runs_widen_the_interval() -> None:
    users = [str(n % 20) for n in range(40)]
    base = replicates(model([n % 2 == 0 for n in range(40)], users))
    runs = [
        Replicate(model([n % 2 == 0 or n % 20 < share for n in range(40)], users), run=run)
        for run, share in enumerate((2, 8, 20))
    ]
    one = summarise({"base": base, "sft": runs[1:2]}, 500, 0, "greedy").differences[0]
    three = summarise({"base": base, "sft": runs}, 500, 0, "greedy").differences[0]
    assert one.low is not None
    assert three.low is not None
    assert three.high is not None
    assert one.high is not None
    assert three.high - three.low > one.high - one.low
    found = summarise({"base": base, "sft": runs}, 500, 0, "greedy").models["sft"]
    assert (found.runs, len(found.replicates)) == (3, 3)
    assert found.replicates[2] == "run 3, greedy"
    assert found.task_score == pytest.approx((0.55 + 0.7 + 1.0) / 3)


def test_many_comparisons_widen_the_corrected_interval() -> None:
    users = [str(n) for n in range(40)]
    models = {
        f"m{number}": model([(n * (number + 3)) % 7 < 4 for n in range(40)], users) for number in range(6)
    }
    found = [each for each in compared(models, 2000).differences if each.measure == "task_score"]
    for each in found:
        assert each.corrected_low is not None
        assert each.low is not None
        assert each.corrected_high is not None
        assert each.high is not None
        assert each.p_value is not None
        assert each.corrected_high - each.corrected_low > each.high - each.low
        assert (each.p_value < 0.05) == (not each.corrected_low <= 0 <= each.corrected_high)


def test_users_with_few_items_have_figures_of_their_own() -> None:
    rows = [
        row.model_copy(update={"history": items})
        for row, items in zip(model([True, False, True, True], list("abcd")), (0, 1, 8, 40), strict=True)
    ]
    found = figures(rows).histories
    assert {name: group.task_score for name, group in found.items()} == {
        "0": 1.0,
        "1": 0.0,
        "5-8": 1.0,
        "33+": 1.0,
    }
    assert "5-8: mean task score" in markdown(summary(compared({"base": rows}, 20), synthetic=True))


def test_a_sweep_is_a_table_of_conditions() -> None:
    bootstrap = Bootstrap(50, 0)
    points = [
        SweepPoint(
            retriever="recency",
            profile_size=size,
            model="base",
            rows=4,
            items_used=size,
            prompts_shortened=0,
            intervals={
                name: interval(name, each)
                for name, each in measure(
                    replicates(model([n < size for n in range(4)], list("abcd"))), bootstrap, 0
                ).items()
            },
        )
        for size in (0, 2, 4)
    ]
    text = markdown(
        summary(compared({"base": model([True] * 4, list("abcd"))}, 50), synthetic=True, sweep=points)
    )
    assert "mean task score (R_v) ↑: recency, 2" in text
    assert "LaMP-3 MAE ↓: recency, 4" in text


def test_an_interval_ends_where_its_measure_ends() -> None:
    users = [str(n) for n in range(4)]
    rows = [
        answered(f"r{n}", tagged(said), gold="[1]", task="lamp1", user=user)
        for n, (user, said) in enumerate(zip(users, ["[1]", "[1]", "[1]", "[2]"], strict=True))
    ]
    bounds = compared({"base": rows}, 400).models["base"].intervals["lamp1/accuracy"]
    assert bounds.high == 1.0
    assert bounds.low is not None
    assert 0.0 <= bounds.low < 0.75
