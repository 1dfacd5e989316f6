"""A small selection of the downloads' fault script."""

from pathlib import Path

import pytest

from tests.faults import downloading


@pytest.mark.slow
def test_killed_while_downloading(tmp_path: Path) -> None:
    figures = downloading.run(tmp_path, kills=2, seed=1, megabytes=6)
    assert figures["killed"]
    assert figures["faults"]
