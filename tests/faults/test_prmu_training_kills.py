"""A selection of prmu_training_kills.py."""

from pathlib import Path

import prmu_training_kills


def test_a_training_that_is_killed_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    figures = prmu_training_kills.run(tmp_path, 2, 1)
    assert figures["ok"], figures
