"""Figures on rows made by hand, so that every one of them can be worked out on paper."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagpr.evaluation.rows import Generation, Row
from tagpr.evaluation.score import Decoding, Summary, score_row, summarise, summarise_model
from tagpr.evaluation.tables import SYNTHETIC, markdown, tables
from tagpr.schema import Example

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
    found = summarise_model(rows)
    assert (found.rows, found.users, found.seeds) == (4, 3, [None])
    assert found.verifiable == {"lamp1": 1.0, "lamp3": pytest.approx(1 / 3)}
    assert found.task_score == pytest.approx((1 + 1 / 3) / 2)  # tasks weigh the same, whatever their rows
    assert found.lamp["lamp3"]["mae"] == pytest.approx(5 / 3)
    assert found.lamp["lamp3"]["mse"] == pytest.approx(17 / 3)
    assert found.lamp["lamp3"]["rmse"] == pytest.approx(math.sqrt(17 / 3))
    assert found.lamp["lamp1"]["accuracy"] == 1.0
    assert found.unparsable == pytest.approx(1 / 4)
    assert (found.well_formed, found.format, found.tag) == (0.75, 1.0, 0.75)
    assert found.failures == {"text_outside_tags": 1}
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
    found = summarise({"base": base, "sft": better, "guided": best}, 500, 0, "greedy")
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
    found = summarise(
        {"base": model([False] * 60, users), "sft": model(right, users)}, 2000, 0, "greedy"
    ).differences[0]
    assert found.low == 0.0  # the one user who gains is in only 65 % of the samples
    assert found.users == 11


def test_no_bold_best_inside_its_interval() -> None:
    users = [str(n) for n in range(20)]
    almost = model([n != 3 for n in range(20)], users)
    full = model([True] * 20, users)
    found = summarise({"base": almost, "sft": full}, 1000, 0, "greedy")
    assert found.models["sft"].task_score > found.models["base"].task_score
    assert found.best == {}
    assert "**0." not in markdown(summary(found, synthetic=True))


def test_one_user_gives_a_difference_without_an_interval() -> None:
    found = summarise({"base": model([False], ["a"]), "sft": model([True], ["a"])}, 100, 0, "greedy")
    assert found.differences[0].mean == 1.0
    assert found.differences[0].low is None
    assert found.best == {}
    assert "no interval" in markdown(summary(found, synthetic=True))


def test_several_seeds_are_averaged_before_anything_is_compared() -> None:
    users = [str(n) for n in range(4)]
    rows = model([True] * 4, users, seed=0) + model([False] * 4, users, seed=1)
    found = summarise({"base": rows}, 100, 0, "sampled")
    assert found.models["base"].task_score == 0.5
    assert found.models["base"].task_score_deviation == pytest.approx(math.sqrt(0.5))
    assert found.models["base"].rows == 4
    assert found.models["base"].seeds == [0, 1]
    text = markdown(summary(found, synthetic=True))
    assert "4 rows of 4 users, sampled, 2 seeds (0, 1)" in text


def summary(decoding: Decoding, synthetic: bool) -> Summary:
    return Summary(
        benchmark="minilamp" if synthetic else "lamp",
        synthetic=synthetic,
        split="dev",
        tasks=["lamp3"],
        rows_selected=20,
        rows_left_out=0,
        temperature=1.0,
        bootstrap_resamples=100,
        decodings=[decoding],
    )


def test_the_papers_figures_stand_apart_and_never_beside_synthetic_ones() -> None:
    decoding = summarise({"base": model([True, False], ["a", "b"])}, 100, 0, "greedy")
    synthetic = markdown(summary(decoding, synthetic=True))
    assert SYNTHETIC in synthetic
    assert "paper" not in synthetic
    real = summary(decoding, synthetic=False)
    paper = next(table for table in tables(real) if table.title == "paper (LaMP, Qwen3-8B)")
    shown = {row[0].text: [cell.text for cell in row[1:]] for row in paper.rows}
    assert shown == {
        "LaMP-3 MAE ↓": ["0.291", "0.339", "0.218"],
        "LaMP-3 RMSE ↓": ["0.645", "0.878", "0.263 (?)"],
    }
    assert "SYNTHETIC" not in markdown(real)
    assert not any(table.title != paper.title and "TagPR" in table.head for table in tables(real))


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
    found = summarise(models, 20, 0, "greedy")
    difference = found.differences[0]
    assert difference.mean == pytest.approx(
        found.models["sft"].task_score - found.models["base"].task_score, abs=1e-9
    )
    if difference.low is not None and difference.high is not None:
        assert difference.low <= difference.high


def test_table_columns_line_up_in_a_terminal() -> None:
    users = [str(n % 7) for n in range(30)]
    decoding = summarise(
        {"base": model([False] * 30, users), "sft": model([True] * 30, users)}, 100, 0, "greedy"
    )
    for block in markdown(summary(decoding, synthetic=False)).split("\n\n"):
        if block.startswith("|"):
            assert len({len(line) for line in block.splitlines()}) == 1, block
    assert "**1.000**" in markdown(summary(decoding, synthetic=False))
