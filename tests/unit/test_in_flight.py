"""A stuck rollout is laid at the reward's door, or at the rollout engine's, as it is."""

import pytest

from tagpr.rl.in_flight import GENERATED, SCORED, InFlight, verdict


def test_responses_are_counted_by_what_is_done_with_them() -> None:
    now = [100.0]
    flight = InFlight(clock=lambda: now[0])
    assert flight.state() == {}
    with flight.being(GENERATED):
        now[0] = 130.0
        with flight.being(GENERATED), flight.being(SCORED):
            now[0] = 140.0
            assert flight.state() == {GENERATED: (2, 40.0), SCORED: (1, 10.0)}
        assert flight.state() == {GENERATED: (1, 40.0)}
    with pytest.raises(KeyError), flight.being(SCORED):
        raise KeyError("a reward that fails")
    assert flight.state() == {}


def test_who_is_waited_for() -> None:
    assert verdict({SCORED: (3, 610.2)}, True) == (
        "waits for the reward (3 responses being scored, the longest for 610 s)"
    )
    assert verdict({GENERATED: (1, 9.0)}, True) == (
        "waits for the rollout engine (1 response being generated, the longest for 9 s)"
    )
    both = verdict({GENERATED: (7, 9.0), SCORED: (1, 600.0)}, True)
    assert both.startswith("waits for the reward (1 response")
    assert "and waits for the rollout engine (7 responses" in both
    assert verdict({}, True) == "waits for nothing"


def test_a_reward_that_blocks_the_worker_is_named() -> None:
    """Others seem to be generated meanwhile: nobody can take them from the engine."""
    assert verdict({GENERATED: (7, 600.0), SCORED: (1, 599.0)}, False) == (
        "hangs in the reward (1 response being scored, the longest for 599 s)"
    )
    assert verdict({GENERATED: (7, 600.0)}, False) == "hangs in its own work"
