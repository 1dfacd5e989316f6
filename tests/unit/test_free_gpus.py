"""A node whose GPUs Ray's head has lost count of is asked, and nobody is where the count is right."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tagpr.rl.waiting import free_gpus


class Books:
    """Ray's head: what it believes to be free, and what it learns when a node runs something."""

    def __init__(self, believed: float, true: float, silent: bool = False) -> None:
        self.believed, self.true, self.silent = believed, true, silent
        self.asked: list[str] = []
        self.cancelled = 0

    def task(self, node: str) -> Any:
        def remote() -> str:
            self.asked.append(node)
            if not self.silent:
                self.believed = self.true
            return node

        return SimpleNamespace(remote=remote)

    def wait(self, asked: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        return ([], asked) if self.silent else (asked, [])

    def cancel(self, each: str, force: bool) -> None:
        self.cancelled += 1


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def do(books: Books) -> None:
        ray, strategies = ModuleType("ray"), ModuleType("ray.util.scheduling_strategies")
        strategies.NodeAffinitySchedulingStrategy = lambda node_id, soft: node_id  # type: ignore[attr-defined]
        task = SimpleNamespace(options=lambda scheduling_strategy: books.task(scheduling_strategy))
        for name, value in {
            "available_resources": lambda: {"GPU": books.believed} if books.believed else {},
            "nodes": lambda: [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": True}, {"NodeID": "c", "Alive": False}],
            "remote": lambda **options: lambda function: task,
            "wait": books.wait, "cancel": books.cancel,
        }.items():  # fmt: skip
            setattr(ray, name, value)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
        monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)

    return do


def test_nobody_is_asked_where_there_are_enough(install: Any) -> None:
    books = Books(believed=2, true=2)
    install(books)
    assert free_gpus(2) == 2
    assert books.asked == []


def test_living_nodes_set_the_count_right(install: Any) -> None:
    books = Books(believed=1, true=2)
    install(books)
    assert free_gpus(2) == 2
    assert books.asked == ["a", "b"]


def test_gpus_that_somebody_has_stay_taken(install: Any) -> None:
    books = Books(believed=0, true=0)
    install(books)
    assert free_gpus(2) == 0


def test_a_node_that_does_not_answer_is_not_waited_for_for_ever(install: Any) -> None:
    books = Books(believed=1, true=2, silent=True)
    install(books)
    assert free_gpus(2) == 1
    assert books.cancelled == 2
