"""Which chains and instances are taken (S5, S14): properties that hold for any pile of them."""

import random
from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.selection import draw_instances, select_chains


@dataclass(frozen=True)
class Row:
    """What selection looks at, of a chain and of an example."""

    id: str
    task: str
    example_id: str
    user_id: str


@st.composite
def piles(draw: st.DrawFn) -> list[Row]:
    """Chains of up to four tasks, with up to eight instances of very unequal numbers of chains, of up to four users."""
    rows = []
    for task in range(draw(st.integers(1, 4))):
        for instance in range(draw(st.integers(0, 8))):
            user = draw(st.integers(0, 3))
            for number in range(draw(st.integers(0, 5))):
                name = f"{task}-{instance}"
                rows.append(Row(f"{name}-{number}", f"t{task}", name, f"u{user}"))
    return rows


def balanced(taken: list[str], sizes: Counter[str]) -> bool:
    """In every prefix no group is more than one ahead of a group that has any left."""
    counts: Counter[str] = Counter()
    for name in taken:
        counts[name] += 1
        open_groups = [counts[group] for group, size in sizes.items() if counts[group] < size]
        if open_groups and max(counts.values()) - min(open_groups) > 1:
            return False
    return True


@given(piles(), st.integers(1, 60), st.integers(1, 4), st.integers(0, 3))
def test_selection_is_capped_and_balanced_in_every_prefix(
    rows: list[Row], size: int, cap: int, seed: int
) -> None:
    selected = select_chains(rows, size, cap, seed)
    assert len({row.id for row in selected}) == len(selected)
    per_instance = {name: min(count, cap) for name, count in Counter(row.example_id for row in rows).items()}
    assert len(selected) == min(size, sum(per_instance.values()))
    assert all(count <= cap for count in Counter(row.example_id for row in selected).values())
    task_of = {row.example_id: row.task for row in rows}
    sizes: Counter[str] = Counter()
    for name, count in per_instance.items():
        sizes[task_of[name]] += count
    assert balanced([row.task for row in selected], sizes)
    for task in sizes:
        own = [row.example_id for row in selected if row.task == task]
        assert balanced(own, Counter({name: n for name, n in per_instance.items() if task_of[name] == task}))


@given(piles(), st.integers(1, 60), st.integers(1, 4), st.integers(0, 3), st.randoms(use_true_random=False))
def test_selection_ignores_arrival_order_and_grows_by_adding(
    rows: list[Row], size: int, cap: int, seed: int, shuffle: random.Random
) -> None:
    selected = select_chains(rows, size, cap, seed)
    mixed = list(rows)
    shuffle.shuffle(mixed)
    assert select_chains(mixed, size, cap, seed) == selected
    assert select_chains(rows, size + 7, cap, seed)[:size] == selected


def test_another_seed_is_another_choice_and_the_same_seed_the_same() -> None:
    rows = [Row(f"{e}-{n}", f"t{e % 3}", str(e), "u") for e in range(30) for n in range(4)]
    choices = [[row.id for row in select_chains(rows, 20, 1, seed)] for seed in range(5)]
    assert len({tuple(choice) for choice in choices}) == 5
    assert [row.id for row in select_chains(rows, 20, 1, 0)] == choices[0]


def test_which_chain_of_an_instance_is_taken_does_not_depend_on_the_others() -> None:
    rows = [Row(f"{e}-{n}", "t", str(e), "u") for e in range(40) for n in range(4)]
    first = {row.id for row in select_chains(rows, 1000, 1, 0)}
    fewer = [row for row in rows if int(row.example_id) < 20]
    assert {row.id for row in select_chains(fewer, 1000, 1, 0)} == {
        name for name in first if int(name.split("-")[0]) < 20
    }
    taken = Counter(name.split("-")[1] for name in first)
    assert set(taken) == {"0", "1", "2", "3"}, "not always the first rollout"


@given(piles(), st.integers(1, 10), st.integers(0, 3), st.randoms(use_true_random=False))
def test_instances_are_drawn_by_task_with_users_in_turn(
    rows: list[Row], per_task: int, seed: int, shuffle: random.Random
) -> None:
    tasks = sorted({row.task for row in rows})
    drawn = draw_instances(rows, tasks, per_task, seed)
    sizes = Counter(row.task for row in rows)
    assert Counter(row.task for row in drawn) == {task: min(per_task, sizes[task]) for task in tasks}
    for task in tasks:
        users = Counter(row.user_id for row in rows if row.task == task)
        assert balanced([row.user_id for row in drawn if row.task == task], users)
    mixed = list(rows)
    shuffle.shuffle(mixed)
    assert draw_instances(mixed, tasks, per_task, seed) == drawn
