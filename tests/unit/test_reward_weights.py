"""Reward weights of a stage: as configured, changing by step, and whether PRMU is asked at all."""

import json

import pytest

from tagpr.configuration import compose
from tagpr.errors import ConfigError
from tagpr.rewards.composite import RewardWeights
from tagpr.rewards.weights import asks_prmu, read_weights


def objective(*overrides: str, stage: str = "guided_rl"):
    return compose(stage, [f"objective.{override}" for override in overrides]).objective


def test_the_papers_weights_never_change() -> None:
    schedule = read_weights(objective())
    assert schedule.start == RewardWeights(0.8, 0.8, 0.2)
    assert schedule.at(0) is schedule.at(845) is schedule.start


def test_steps_hold_until_the_next() -> None:
    schedule = read_weights(objective("changes=[{step: 10, gamma: 0.4, beta: 0.5}, {step: 20, gamma: 0}]"))
    seen = {step: schedule.at(step) for step in (1, 9, 10, 19, 20, 500)}
    assert [one.gamma for one in seen.values()] == [0.2, 0.2, 0.4, 0.4, 0, 0]
    assert [one.beta for one in seen.values()] == [0.8, 0.8, 0.5, 0.5, 0.5, 0.5]
    assert {one.alpha for one in seen.values()} == {0.8}


def test_lines_pass_through_the_changes_of_each_weight() -> None:
    changes = "changes=[{step: 10, gamma: 0.4}, {step: 15, beta: 0.2}, {step: 20, gamma: 0}]"
    schedule = read_weights(objective(changes, "change=linear"))
    assert [schedule.at(step).gamma for step in (0, 5, 10, 15, 20, 30)] == pytest.approx(
        [0.2, 0.3, 0.4, 0.2, 0, 0]
    )
    assert [schedule.at(step).beta for step in (0, 5, 15, 30)] == pytest.approx([0.8, 0.6, 0.2, 0.2])


def test_guards_go_with_every_step() -> None:
    schedule = read_weights(objective("floor_core=true", "gate_all=true", "changes=[{step: 1, gamma: 1}]"))
    assert schedule.at(5) == RewardWeights(0.8, 0.8, 1.0, floor_core=True, gate_all=True)


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ([], True),
        (["gamma=0"], False),
        (["gamma=0", "changes=[{step: 5, gamma: 0.1}]"], True),
        (["gamma=0.2", "changes=[{step: 5, gamma: 0}]"], True),
        (["mode=exploratory"], False),
    ],
)
def test_prmu_is_asked_where_gamma_ever_counts(overrides: list[str], asked: bool) -> None:
    assert asks_prmu(objective(*overrides)) == asked


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("alpha=-1", "objective.alpha=-1"),
        ("beta=much", "objective.beta=much"),
        ("gamma=inf", "objective.gamma=inf"),
        ("change=cubic", "objective.change=cubic"),
        ("changes=[3]", "objective.changes[0]"),
        ("changes=[{step: 3}]", "objective.changes[0]"),
        ("changes=[{gamma: 3}]", "objective.changes[0]"),
        ("changes=[{step: 3, delta: 1}]", "objective.changes[0]"),
        ("changes=[{step: 0, gamma: 1}]", "objective.changes[0].step=0"),
        ("changes=[{step: 3, gamma: 1}, {step: 3, gamma: 2}]", "objective.changes[1].step=3"),
        ("changes=[{step: 3, gamma: -1}]", "objective.changes[0].gamma=-1"),
    ],
)
def test_what_cannot_be_meant_is_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_weights(objective(override))
    assert str(caught.value).startswith(says), json.dumps(str(caught.value))
