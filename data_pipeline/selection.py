"""Which rows and chains are taken when there are more than needed: seeded, balanced, independent of arrival order."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import repeat
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
    return sorted(items, key=lambda item: place(name(item), seed))


def place(name: str, seed: int) -> bytes:
    """Where something of this name comes in a shuffled order."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def interleave(items: Iterable[Item], *keys: Callable[[Item], Hashable]) -> list[Item]:
    """Take turns over the groups of the first key, within each over the second, and so on; any prefix is balanced."""
    return list(turns(items, *keys))


def turns(
    items: Iterable[Item], *keys: Callable[[Item], Hashable], times: Callable[[Item], int] = lambda _: 1
) -> Iterator[Item]:
    """The order of :func:`interleave`, item by item; each stands for ``times(item)`` equal ones that follow one another."""
    if not keys:
        for item in items:
            yield from repeat(item, times(item))
        return
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(keys[0](item), []).append(item)
    queues = [turns(group, *keys[1:], times=times) for group in groups.values()]
    while queues:
        left = []
        for queue in queues:
            for item in queue:
                yield item
                left.append(queue)
                break
        queues = left


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
