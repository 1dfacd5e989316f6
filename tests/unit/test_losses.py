"""A node or worker that a run has lost is named once, and nothing else is: with made-up records of Ray's."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from tagpr.rl.losses import Losses, Node, Worker, losses_named

HEAD, OTHER, IDLE = Node("10.0.0.1", True), Node("10.0.0.2", True), Node("10.0.0.3", True)
NODES = {"a": HEAD, "b": OTHER, "c": IDLE}
WORKERS = {
    "1": Worker("WorkerDict (process 1)", "a", True),
    "2": Worker("WorkerDict (process 2)", "b", True),
    "3": Worker("vLLMHttpServer (process 3)", "b", True),
}
GONE = Node("10.0.0.2", False, "missed too many heartbeats")


def dead(worker: Worker, died: bool, reason: str = "") -> Worker:
    return Worker(worker.name, worker.node, False, died, reason)


def test_a_dead_node_is_named_with_what_was_on_it() -> None:
    losses = Losses()
    assert losses.look(NODES, WORKERS) is None
    # Ray has both at once: the node is gone, and so are its workers.
    left = WORKERS | {number: dead(WORKERS[number], died=False) for number in ("2", "3")}
    assert losses.look(NODES | {"b": GONE}, left) == (
        "node 10.0.0.2 is gone (missed too many heartbeats), and with it WorkerDict (process 2), vLLMHttpServer (process 3)"
    )


def test_a_node_that_the_run_does_not_use_may_go() -> None:
    losses = Losses()
    assert losses.look(NODES, WORKERS) is None
    assert losses.look(NODES | {"c": Node("10.0.0.3", False)}, WORKERS) is None
    # One that was dead before the run began, too.
    assert Losses().look(NODES | {"b": GONE}, {"1": WORKERS["1"]}) is None


def test_a_node_that_the_run_has_left_may_go() -> None:
    losses = Losses()
    losses.look(NODES, WORKERS)
    ended = WORKERS | {number: dead(WORKERS[number], died=False) for number in ("2", "3")}
    assert losses.look(NODES, ended) is None
    assert losses.look(NODES | {"b": GONE}, ended) is None


def test_a_dead_worker_is_named_and_one_that_was_told_to_end_is_not() -> None:
    losses = Losses()
    losses.look(NODES, WORKERS)
    assert losses.look(NODES, WORKERS | {"1": dead(WORKERS["1"], died=False)}) is None
    assert losses.look(NODES, WORKERS | {"3": dead(WORKERS["3"], died=True, reason="out of memory")}) == (
        "worker vLLMHttpServer (process 3) on node 10.0.0.2 is dead (out of memory)"
    )


def test_the_watch_says_it_once_and_outlives_questions_that_fail() -> None:
    said, lines = threading.Event(), list[str]()
    answers: Iterator[dict[str, Node] | Exception] = iter(
        [NODES, ConnectionError("away"), ConnectionError("away"), NODES | {"b": GONE}]
    )

    def nodes() -> dict[str, Node]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def lost(line: str) -> None:
        lines.append(line)
        said.set()

    with losses_named(0.01, nodes=nodes, workers=lambda: WORKERS, lost=lost):
        assert said.wait(60)
    assert len(lines) == 1
    assert lines[0].startswith("node 10.0.0.2 is gone")


def test_what_ends_with_the_run_is_no_loss() -> None:
    looked, lines = threading.Event(), list[str]()
    state: dict[str, Callable[[], dict[str, Worker]]] = {"workers": lambda: WORKERS}

    def workers() -> dict[str, Worker]:
        looked.set()
        return state["workers"]()

    with losses_named(0.01, nodes=lambda: NODES, workers=workers, lost=lines.append):
        assert looked.wait(60)
    state["workers"] = lambda: WORKERS | {"3": dead(WORKERS["3"], died=True)}
    watching = [thread for thread in threading.enumerate() if thread.name == "losses"]
    for thread in watching:
        thread.join(60)
    assert lines == []


def test_nobody_looks_where_nobody_shall() -> None:
    with losses_named(0, nodes=lambda: NODES, workers=lambda: WORKERS):
        assert not [thread for thread in threading.enumerate() if thread.name == "losses"]


ENDING = """
import sys, time
sys.path[:0] = {path!r}
from tagpr.rl.losses import Node, Worker, losses_named
alive = iter([True, True])
nodes = lambda: {{"b": Node("10.0.0.2", next(alive, False))}}
with losses_named(0.05, nodes=nodes, workers=lambda: {{"1": Worker("WorkerDict (process 2)", "b", True)}}):
    time.sleep(600)
"""


def test_a_run_that_lost_a_node_ends_with_a_status_that_is_started_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(path=sys.path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert (
        "lost: node 10.0.0.2 is gone, and with it WorkerDict (process 2). Ending with status 75"
        in done.stderr
    )
