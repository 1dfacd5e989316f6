"""A selection of ``rl_monitors.py``: each seeded pathology is caught by its monitor, a healthy run raises nothing."""

from pathlib import Path

import pytest

from tests.faults.rl_monitors import PATHOLOGIES, eq5, judge, run


@pytest.mark.parametrize("name", PATHOLOGIES)
def test_pathology_is_caught(name: str, tmp_path: Path) -> None:
    pay, expected = PATHOLOGIES[name]
    alerts, _ = run(pay, seed=11, steps=22, folder=tmp_path)
    assert expected in [alert.monitor for alert in alerts]


def test_healthy_run_learns_and_raises_nothing(tmp_path: Path) -> None:
    alerts, verifiable = run(eq5, seed=11, steps=30, folder=tmp_path)
    assert alerts == []
    assert verifiable[-1] > verifiable[0] + 0.05


def test_judging_a_finished_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "broken"
    run_dir.mkdir()
    shares = [0.0] * 8 + [0.9] * 8
    (run_dir / "metrics.jsonl").write_text(
        "".join(
            f'{{"step": {step}, "data": {{"failure/format/share": {share}, "length/cut_frac": 0}}}}\n'
            for step, share in enumerate(shares, start=1)
        )
    )
    ((_, monitor, _),) = judge([run_dir])["broken"]["alerts"]
    assert monitor == "format_escape"
