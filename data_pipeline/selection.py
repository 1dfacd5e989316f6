"""Which rows and chains are taken when there are more than needed: seeded, balanced, independent of arrival order."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from tagpr.schema import Chain, Example

Item = TypeVar("Item")


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


def draw_instances(
    examples: Sequence[Example], tasks: Sequence[str], per_task: int, seed: int
) -> list[Example]:
    """``per_task`` random instances of each task, all of them where there are fewer (S5); users take turns."""
    drawn: list[Example] = []
    for task in tasks:
        rows = shuffled((row for row in examples if row.task == task), lambda row: row.id, seed)
        drawn += interleave(rows, lambda row: row.user_id)[:per_task]
    return drawn


def select_chains(chains: Sequence[Chain], size: int, per_instance: int, seed: int) -> list[Chain]:
    """At most ``size`` chains for SFT, at most ``per_instance`` of an instance, tasks and instances in turn (S14).

    Among the chains of an instance the choice is random, not by the judge's total: all have passed, and taking the best
    would undo what the teacher's distribution is.
    """
    order = shuffled(chains, lambda chain: chain.id, seed)
    capped: list[Chain] = []
    taken: dict[str, int] = {}
    for chain in order:
        taken[chain.example_id] = taken.get(chain.example_id, 0) + 1
        if taken[chain.example_id] <= per_instance:
            capped.append(chain)
    return interleave(capped, lambda chain: chain.task, lambda chain: chain.example_id)[:size]
