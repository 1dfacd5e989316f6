"""Which rows and chains are taken when there are more than needed: seeded, balanced, independent of arrival order."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Drawable(Protocol):
    """A row of a benchmark, as far as drawing looks at it."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def task(self) -> str:
        """Its task."""

    @property
    def user_id(self) -> str:
        """Whose it is."""


class Selectable(Protocol):
    """A chain, as far as selection looks at it."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def task(self) -> str:
        """Its task."""

    @property
    def example_id(self) -> str:
        """The instance that it is for."""


Row = TypeVar("Row", bound=Drawable)
Candidate = TypeVar("Candidate", bound=Selectable)


def shuffled(items: Iterable[Item], name: Callable[[Item], str], seed: int) -> list[Item]:
    """In the order of a hash of (seed, name): the same items give the same order, however they came."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {name(item)}".encode()).digest())


def interleave(items: Iterable[Item], *keys: Callable[[Item], Hashable]) -> list[Item]:
    """Take turns over the groups of the first key, within each over the second, and so on; any prefix is balanced."""
    if not keys:
        return list(items)
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(keys[0](item), []).append(item)
    queues = [interleave(group, *keys[1:]) for group in groups.values()]
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def draw_instances(examples: Sequence[Row], tasks: Sequence[str], per_task: int, seed: int) -> list[Row]:
    """``per_task`` random instances of each task, all of them where there are fewer (S5); users take turns."""
    drawn: list[Row] = []
    for task in tasks:
        rows = shuffled((row for row in examples if row.task == task), lambda row: row.id, seed)
        drawn += interleave(rows, lambda row: row.user_id)[:per_task]
    return drawn


def select_chains(chains: Sequence[Candidate], size: int, per_instance: int, seed: int) -> list[Candidate]:
    """At most ``size`` chains for SFT, at most ``per_instance`` of an instance, tasks and instances in turn (S14).

    Among the chains of an instance the choice is random, not by the judge's total: all have passed, and taking the best
    would undo what the teacher's distribution is.
    """
    order = shuffled(chains, lambda chain: chain.id, seed)
    capped: list[Candidate] = []
    taken: dict[str, int] = {}
    for chain in order:
        taken[chain.example_id] = taken.get(chain.example_id, 0) + 1
        if taken[chain.example_id] <= per_instance:
            capped.append(chain)
    return interleave(capped, lambda chain: chain.task, lambda chain: chain.example_id)[:size]
