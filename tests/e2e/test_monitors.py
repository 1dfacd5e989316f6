"""A monitor ends a real run: status 3 with a checkpoint; started again with the action switch it counts as finished."""

import json

import pytest

from tests.e2e.conftest import Workplace

pytestmark = pytest.mark.slow

# Without PRMU, and with a threshold that rounding alone exceeds.
WATCHED = [
    "run.name=watched",
    "objective.gamma=0",
    "trainer.total_training_steps=6",
    "trainer.test_freq=-1",
    "trainer.val_before_train=false",
    "monitors.policy_gap.largest=0",
    "monitors.policy_gap.window=1",
    "monitors.policy_gap.patience=1",
]


def test_a_monitor_stops_a_run_and_a_switch_hands_it_over(tuned: Workplace) -> None:
    run = tuned.outputs / "watched"
    seen = tuned.run("guided_rl", *WATCHED, status=3)
    assert "stopped after step 2, checkpoint saved: monitor policy_gap" in seen
    (alert,) = [json.loads(line) for line in (run / "alerts.jsonl").read_text().splitlines()]
    assert (alert["step"], alert["monitor"], alert["action"]) == (1, "policy_gap", "stop")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps] == [1, 2]
    assert all(each["data"]["monitor/policy_gap"] == 1.0 for each in steps)
    for name in ("tags/entropy_bits", "length/reasoning/p50", "profile/use", "failure/format/share"):
        assert name in steps[0]["data"]
    assert not (run / "model").exists()
    assert "policy_gap" in (run / "report.html").read_text()

    # Nothing is left to train: the checkpoint of the step after the alert is there.
    tuned.run("guided_rl", *WATCHED, "monitors.policy_gap.action=switch")
    assert json.loads((run / "switched.json").read_text())["step"] == 2
    assert (run / "model" / "model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert "ended early at step 2" in (run / "report.html").read_text()
