"""What the cluster's fault script counts as lost, and when it strikes; the kills themselves take a machine and an hour."""

import random

from tests.faults.rl_cluster import lost_steps, random_kills


def attempt(from_step: int, reached: int, saved: int) -> dict[str, int]:
    return {"from_step": from_step, "reached_step": reached, "saved_step": saved}


def test_what_is_lost_between_attempts() -> None:
    whole = [attempt(0, 3, 3), attempt(3, 3, 3), attempt(3, 9, 8), attempt(8, 12, 12)]
    assert lost_steps(whole) == {"most_steps_again": 1, "lost_checkpoints": 0}
    assert lost_steps([attempt(0, 9, 4), attempt(2, 5, 5)]) == {"most_steps_again": 5, "lost_checkpoints": 1}
    assert lost_steps([attempt(0, 3, 2)]) == {"most_steps_again": 0, "lost_checkpoints": 0}


def test_random_kills_are_of_all_kinds_and_half_of_them_come_at_any_moment() -> None:
    wanted = random_kills(random.Random(5), 20)
    assert {kill.kind for kill in wanted} == {"worker", "reward", "driver", "head"}
    assert sum(not kill.patient for kill in wanted) == 10
    assert wanted == random_kills(random.Random(5), 20)
