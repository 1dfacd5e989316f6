"""A selection of the reward service's fault runs; prmu_replicas.py and prmu_fuzz.py run all of them."""

from pathlib import Path

import prmu_fuzz
import prmu_replicas
import pytest


def test_attacks_are_refused_or_harmless(tmp_path: Path) -> None:
    figures = prmu_fuzz.run(tmp_path, 300, 1)
    assert figures["ok"], figures
    assert figures["inputs"] == 300


def test_a_refused_response_is_named_after_one_attempt(tmp_path: Path) -> None:
    figures = prmu_replicas.refused(tmp_path)
    assert figures["ok"], figures


def test_nothing_hangs_when_the_engine_is_killed(tmp_path: Path) -> None:
    figures = prmu_replicas.engine(tmp_path)
    assert figures["ok"], figures


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["hang", "swap"])
def test_replicas_under_load(tmp_path: Path, scenario: str) -> None:
    figures = prmu_replicas.SCENARIOS[scenario](tmp_path)
    assert figures["ok"], figures


@pytest.mark.slow
def test_a_killed_replica_costs_no_sample(tmp_path: Path) -> None:
    figures = prmu_replicas.kill(tmp_path, 1)
    assert figures["ok"], figures
