"""A few of the kills of :mod:`pipeline_kills`, for every run of the tests; the script does them by the dozen."""

import random
from pathlib import Path

import pytest
from pipeline_kills import Bench, kill_batches, kill_drivers, kill_workers


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Path(tmp_path_factory.mktemp("kills")))


def test_a_killed_driver_loses_and_changes_nothing(bench: Bench) -> None:
    figures = kill_drivers(bench, 2, random.Random(1))
    assert figures["driver_kills"] == 2
    assert figures["driver_billed_again"] <= figures["driver_in_flight"]


def test_a_killed_worker_is_replaced(bench: Bench) -> None:
    figures = kill_workers(bench, 1, random.Random(2))
    assert figures["worker_kills"] == 1
    assert figures["worker_billed_again"] <= figures["worker_in_flight"]


def test_batches_are_submitted_once_and_collected_by_whoever_comes(bench: Bench) -> None:
    figures = kill_batches(bench, 2, random.Random(3))
    assert figures["batch_kills"] == 2
    assert figures["batch_requests"] > 0
