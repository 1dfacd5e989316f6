"""The estimate: what goes into it, what a ledger changes, and when it asks."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.cost import (
    ENOUGH,
    Measured,
    _stretch,
    check_budget,
    compare,
    estimate,
    measure,
    spent_dollars,
)
from data_pipeline.ledger import Ledger
from data_pipeline.settings import ChainSettings, read_settings
from data_pipeline.tagging import RestrictedTagging
from tagpr.chat.client import Reply
from tagpr.chat.cost import Price
from tagpr.chat.tokens import BYTES_PER_TOKEN, approximate_tokens
from tagpr.configuration import compose, resolve
from tagpr.errors import StageError

PROMPTS = [("a question about a user's taste " * 200, "a question " * 20)] * 5


def settings(*overrides: str) -> ChainSettings:
    return read_settings(resolve(compose("build_chains", ["setting=paper", *overrides])))


def test_units_follow_the_settings() -> None:
    made = estimate(settings(), PROMPTS, 6000, 1000)
    units = {stage.name: stage.units for stage in made.stages}
    assert units["teacher"] == 96_000
    assert units["teacher without profile"] == 2_000
    assert units["judge"] == pytest.approx(96_000 * 0.45 * 1.03)
    twice = estimate(settings(), PROMPTS, 12_000, 1000)
    assert twice.stages[2].dollars() == pytest.approx(2 * made.stages[2].dollars(), rel=1e-6)


def test_prompts_are_counted_as_they_are_rendered() -> None:
    made = estimate(settings(), PROMPTS, 6000, 0)
    question = approximate_tokens(PROMPTS[0][0])
    teacher, _, judge = made.stages[:3]
    assert teacher.prompt_tokens == question
    assert judge.prompt_tokens > question + 900 + 300
    longer = estimate(settings(), [(PROMPTS[0][0] * 2, None)], 6000, 0)
    assert longer.stages[2].prompt_tokens - judge.prompt_tokens == pytest.approx(question, abs=2)


def test_batch_is_half_and_span_is_a_fraction_of_paper() -> None:
    made = estimate(settings(), PROMPTS, 6000, 1000)
    assert made.dollars(batch=True) == pytest.approx(made.dollars(batch=False) / 2)
    paper, span = made.tagging["paper"], made.tagging["span"]
    assert span.completion_tokens < 0.3 * paper.completion_tokens
    assert made.dollars("span") < made.dollars("paper")
    assert made.dollars(cached=True) < made.dollars()
    chosen = estimate(settings("chains.tagging.mode=span", "chains.judge.mode=batch"), PROMPTS, 6000, 1000)
    assert made.dollars("span", batch=True) < chosen.dollars() < made.dollars("span", batch=False)
    text = "\n".join(made.lines())
    assert "in all with tagging.mode=paper" in text
    assert "real instances" in text
    assert "no examples yet" in estimate(settings(), None, 6000, 1000).lines()[0]


def test_an_expensive_run_asks_first() -> None:
    made = estimate(settings(), PROMPTS, 6000, 1000)
    with pytest.raises(
        StageError, match=r"ask_above_dollars=20: this run is estimated at \$.* chains\.budget\.yes=true"
    ):
        check_budget(made, settings(), 0.0)
    check_budget(made, settings("chains.budget.yes=true"), 0.0)
    check_budget(made, settings("chains.budget.ask_above_dollars=null"), 0.0)
    check_budget(made, settings(), made.dollars() - 1.0)
    check_budget(estimate(settings(), PROMPTS, 6, 1), settings("chains.exploratory.chains=10"), 0.0)


def test_a_ledger_s_replies_replace_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    assert measure(path, 16) is None
    with Ledger(path) as ledger:

        def record(
            kind: str, number: int, prompt: int, reply: int, rollout: int = 0, attempt: int = 0
        ) -> None:
            ledger.record(
                f"{kind}{number}",
                kind,
                "gpt-4o",
                {"rollout": rollout, "attempt": attempt},
                Reply("", None, "stop", prompt, 0, reply),
            )

        for number in range(ENOUGH * 16):
            record("teacher", number, 1000, 500, rollout=number % 16)
        for number in range(ENOUGH * 4):
            record("judge", number, 2000, 100, attempt=int(number % 4 == 3))
        for number in range(ENOUGH - 1):
            record("tagger", number, 1, 1)
        ledger.commit()
        rows = ledger.spent()
    known = measure(path, 16)
    assert known is not None
    made = estimate(settings("chains.preferences.pqp_pairs=0"), PROMPTS, 6000, 0, known)
    teacher, judge = made.stages[0], made.stages[2]
    assert (teacher.prompt_tokens, teacher.completion_tokens, teacher.measured) == (1000, 500, True)
    assert (judge.prompt_tokens, judge.completion_tokens) == (2000, 100)
    # Three of sixteen rollouts came to the judge, and a third of them once more.
    assert judge.units == pytest.approx(96_000 * 3 / 16 * 4 / 3)
    assert not made.tagging["paper"].measured
    assert spent_dollars(rows, {"gpt-4o": Price(1.0, 1.0, 0.0)}) == pytest.approx(
        (ENOUGH * 16 * 1000 + ENOUGH * 4 * 2000 + ENOUGH - 1) / 1e6
    )
    own = estimate(settings("chains.preferences.pqp_pairs=0"), PROMPTS, ENOUGH, 0, known)
    lines = compare(own, rows)
    assert lines[1].split()[-3:] == ["1.000", "1.000", "1.000"]
    assert lines[2].split()[-3:] == ["1.000", "1.000", "1.000"]


def test_a_run_that_was_stopped_while_it_tagged_is_not_taken_for_one_that_needs_no_more() -> None:
    whole = estimate(settings(), PROMPTS, 6000, 1000)
    halfway = Measured({}, None, {}, None, tagged_per_judged=0.1)
    assert estimate(settings(), PROMPTS, 6000, 1000, halfway).tagging["paper"].units == pytest.approx(
        whole.tagging["paper"].units
    )
    more = estimate(settings(), PROMPTS, 6000, 1000, replace(halfway, tagged_per_judged=2.0))
    assert more.tagging["paper"].units == pytest.approx(6000 * 16 * 0.45 * 2.0 * 1.03)


@pytest.mark.parametrize(("tokens", "segments"), [(27.0, 4), (60.0, 9), (900.0, 6)])
def test_a_chain_that_is_expected_has_the_segments_that_are_expected(tokens: float, segments: int) -> None:
    tagging = RestrictedTagging.load("paper", settings().prompts, 3)
    chain = _stretch(tokens, segments)
    assert len(chain) == int(tokens * BYTES_PER_TOKEN)
    assert tagging.typical_reply(chain, segments).count("</") == segments
