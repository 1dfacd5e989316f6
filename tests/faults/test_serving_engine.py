"""The endpoint of a model while its engine is killed; serving_engine.py runs both kills and prints figures."""

from pathlib import Path

import pytest
import serving_engine


@pytest.mark.slow
def test_a_killed_engine_core_ends_the_service_and_hangs_nobody(tmp_path: Path) -> None:
    figures = serving_engine.kill(tmp_path, "core")
    assert figures["ok"], figures
    assert "EngineDeadError" in figures["said"]
