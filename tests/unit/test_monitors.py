"""Each monitor on made-up streams of metrics: silent on noise, speaks of its fault and of no other; resume changes nothing."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError
from tagpr.rl.monitors import MONITORS, Alert, Watch, build, read_alerts

Stream = list[dict[str, float]]
Fault = Callable[[int, dict[str, float]], None]

FAULT_AT = 9  # step where a fault begins


@lru_cache
def composed(setting: str) -> DictConfig:
    return resolve(compose("guided_rl", [f"setting={setting}"])).monitors


def configured(setting: str = "minilamp", **actions: str) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(composed(setting))
    for name, action in actions.items():
        config[name]["action"] = action
    return config


def healthy(steps: int, seed: int = 0) -> Stream:
    """Means and scatter as in a guided run of the embedded default: rewards rise, the rest is noise."""
    rng = np.random.default_rng(seed)
    stream = []
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-step / 10)

        def noisy(mean: float, scatter: float) -> float:
            return float(rng.normal(mean, scatter))

        stream.append(
            {
                "tags/entropy_bits": noisy(2.69, 0.05),
                "tags/transition_entropy_bits": noisy(0.73, 0.08),
                "tags/readable_valid_frac": min(1.0, noisy(0.96, 0.012)),
                "tags/segments/mean": noisy(3.9, 0.04),
                "tags/segment_tokens/mean": noisy(8.1, 0.12),
                "tags/empty_frac": 0.0,
                "tags/repeated_frac": abs(noisy(0.0, 0.002)),
                "failure/format/share": abs(noisy(0.005, 0.005)),
                "length/reasoning/mean": noisy(32, 0.4),
                "length/reasoning/p90": noisy(35, 0.8),
                "length/answer/mean": noisy(5.5, 0.25),
                "length/cut_frac": abs(noisy(0.0, 0.002)),
                "reward/verifiable/mean": noisy(0.83 + 0.08 * progress, 0.025),
                "reward/prmu/mean": noisy(0.45 + 0.3 * progress, 0.04),
                "reward/total/mean": noisy(0.71 + 0.13 * progress, 0.03),
                "profile/use": noisy(0.018 + 0.02 * progress, 0.006),
                "training/rollout_probs_diff_mean": 4e-7,
            }
        )
    return stream


def ramp(step: int, steps: int = 6) -> float:
    """0 before the fault, 1 some steps later."""
    return min(1.0, max(0.0, (step - FAULT_AT) / steps))


def toward(name: str, value: float) -> Fault:
    def fault(step: int, metrics: dict[str, float]) -> None:
        metrics[name] += ramp(step) * (value - metrics[name])

    return fault


def several(*faults: Fault) -> Fault:
    def fault(step: int, metrics: dict[str, float]) -> None:
        for each in faults:
            each(step, metrics)

    return fault


FAULTS: dict[str, tuple[str, Fault]] = {
    "one tag is left": ("tag_collapse", toward("tags/entropy_bits", 0.3)),
    "every chain takes one path": ("tag_collapse", toward("tags/transition_entropy_bits", 0.05)),
    "tags are dropped": ("tag_collapse", toward("tags/readable_valid_frac", 0.3)),
    "empty segments": ("tag_stuffing", toward("tags/empty_frac", 0.4)),
    "the same tag again": ("tag_stuffing", toward("tags/repeated_frac", 0.4)),
    "many small segments": (
        "tag_stuffing",
        several(toward("tags/segments/mean", 8), toward("tags/segment_tokens/mean", 4)),
    ),
    "no readable responses": ("format_escape", toward("failure/format/share", 0.6)),
    "rambling": ("length_drift", toward("length/reasoning/mean", 70)),
    "some ramble": ("length_drift", toward("length/reasoning/p90", 70)),
    "the token limit is met": (
        "length_drift",
        several(toward("length/cut_frac", 0.5), toward("failure/format/share", 0.5)),
    ),
    "no reasoning": ("length_drift", toward("length/reasoning/mean", 4)),
    "chains in the answer": ("length_drift", toward("length/answer/mean", 40)),
    "PRMU is flattered": (
        "prmu_hacking",
        several(toward("reward/prmu/mean", 0.95), toward("reward/verifiable/mean", 0.5)),
    ),
    "one answer for everybody": ("profile_ignored", toward("profile/use", 0.0)),
    "weights stay behind": ("policy_gap", toward("training/rollout_probs_diff_mean", 0.3)),
}  # fmt: skip


def watched(stream: Stream, folder: Path, config: dict[str, Any] | None = None) -> list[Alert]:
    watch = Watch(build(config or configured()), folder)
    return [
        alert for step, metrics in enumerate(stream, start=1) for alert in watch.observe(step, dict(metrics))
    ]


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_fault_is_caught_by_its_monitor_and_by_no_other(name: str, seed: int, tmp_path: Path) -> None:
    expected, fault = FAULTS[name]
    stream = healthy(24, seed)
    for step, metrics in enumerate(stream, start=1):
        fault(step, metrics)
    alerts = watched(stream, tmp_path)
    assert [alert.monitor for alert in alerts] == [expected]
    assert FAULT_AT < alerts[0].step <= FAULT_AT + 10
    assert "\n" not in alerts[0].reason


def test_every_monitor_has_a_fault_that_it_catches() -> None:
    assert {monitor for monitor, _ in FAULTS.values()} | {"plateau"} == set(MONITORS)


@pytest.mark.parametrize(("setting", "steps", "runs"), [("minilamp", 24, 200), ("paper", 845, 4)])
def test_a_healthy_run_raises_none(setting: str, steps: int, runs: int, tmp_path: Path) -> None:
    config = configured(setting, plateau="off") if setting == "paper" else configured(setting)
    alerts = [
        alert for seed in range(runs) for alert in watched(healthy(steps, seed + 100), tmp_path, config)
    ]
    assert alerts == []


def test_plateau_needs_its_patience(tmp_path: Path) -> None:
    flat = [{"reward/total/mean": 0.5 + 0.01 * min(step, 20)} for step in range(80)]
    alerts = watched(flat, tmp_path)
    assert [alert.monitor for alert in alerts] == ["plateau"]
    # The best window ends at step 25 (the value of step 21 on is the last); 40 steps without a gain follow.
    assert 60 <= alerts[0].step <= 66
    rising = [{"reward/total/mean": 0.01 * step} for step in range(200)]
    assert watched(rising, tmp_path / "rising") == []


def test_an_alert_is_told_once_and_again_after_a_recovery(tmp_path: Path) -> None:
    stream = healthy(30)
    for step in (*range(9, 15), *range(20, 26)):
        stream[step]["failure/format/share"] = 0.5
    alerts = watched(stream, tmp_path)
    assert [alert.step for alert in alerts] == sorted({alert.step for alert in alerts})
    assert [alert.monitor for alert in alerts] == ["format_escape"] * 2
    assert read_alerts(tmp_path / "alerts.jsonl") == alerts


def test_alert_is_a_line_a_row_and_a_metric(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(build(configured()), tmp_path)
    shown = []
    with caplog.at_level(logging.WARNING, logger="tagpr"):
        for step, metrics in enumerate(healthy(20), start=1):
            if 10 <= step < 14:
                metrics["failure/format/share"] = 0.5
            watch.observe(step, metrics)
            shown.append(metrics["monitor/format_escape"])
            assert metrics["monitor/length_drift"] == 0.0
    assert set(shown) == {0.0, 1.0}
    assert shown[-1] == 0.0
    assert len(caplog.records) == 1
    (row,) = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert row["monitor"] == "format_escape"
    assert row["action"] == "warn"
    assert row["reason"] in caplog.text
    assert row["step"] == shown.index(1.0) + 1


def logged(folder: Path, stream: Stream) -> None:
    lines = [json.dumps({"step": step, "data": data}) for step, data in enumerate(stream, start=1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("name", FAULTS)
def test_resuming_anywhere_gives_the_same_alerts(name: str, tmp_path: Path) -> None:
    config = configured(policy_gap="warn")  # a run that it has stopped is another matter, see below
    stream = healthy(24, seed=7)
    for step, metrics in enumerate(stream, start=1):
        FAULTS[name][1](step, metrics)
    whole = watched(stream, tmp_path / "undisturbed", config)
    assert len(whole) == 1
    logged(tmp_path, stream)
    for resumed in range(24):
        # Killed at the end, resumed earlier: the alerts of steps that are done again are on the disk already.
        (tmp_path / "alerts.jsonl").write_text((tmp_path / "undisturbed" / "alerts.jsonl").read_text())
        watch = Watch(build(config), tmp_path, resumed_step=resumed)
        for step, metrics in list(enumerate(stream, start=1))[resumed:]:
            watch.observe(step, dict(metrics))
        assert read_alerts(tmp_path / "alerts.jsonl") == whole


def escaping(steps: int = 24) -> Stream:
    stream = healthy(steps)
    for step, metrics in enumerate(stream, start=1):
        FAULTS["no readable responses"][1](step, metrics)
    return stream


@pytest.mark.parametrize("action", ["stop", "switch"])
def test_stop_and_switch_end_the_run(action: str, tmp_path: Path) -> None:
    watch = Watch(build(configured(format_escape=action)), tmp_path)
    for step, metrics in enumerate(escaping(), start=1):
        watch.observe(step, metrics)
    (alert,) = read_alerts(tmp_path / "alerts.jsonl")
    assert watch.ending == alert
    assert alert.action == action


def test_a_stopped_run_that_is_started_again_goes_on_until_the_fault_has_lasted_as_long_again(
    tmp_path: Path,
) -> None:
    stream, config = escaping(), configured(format_escape="stop")
    first = watched(stream, tmp_path, config)[0].step
    logged(tmp_path, stream)
    watch = Watch(build(config), tmp_path, resumed_step=first + 1)
    assert watch.ending is None
    for step, metrics in list(enumerate(stream, start=1))[first + 1 :]:
        watch.observe(step, metrics)
    assert watch.ending is not None
    assert watch.ending.step == first + 1 + config["format_escape"]["patience"]


def test_a_switch_that_was_not_carried_out_is_carried_out(tmp_path: Path) -> None:
    stream, config = escaping(), configured(format_escape="switch")
    first = watched(stream, tmp_path, config)[0]
    logged(tmp_path, stream)
    assert Watch(build(config), tmp_path, resumed_step=first.step).ending == first
    assert Watch(build(config), tmp_path, resumed_step=first.step - 1).ending is None


def test_metrics_that_are_missing_or_not_finite_are_not_seen(tmp_path: Path) -> None:
    stream = healthy(24)
    for metrics in stream[::3]:
        metrics["failure/format/share"] = math.nan
        del metrics["profile/use"]
    assert watched(stream, tmp_path) == []
    assert watched([{} for _ in range(50)], tmp_path) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tag_collapse.action", "shout"),
        ("length_drift.window", 0),
        ("length_drift.reference", 1),
        ("prmu_hacking.patience", 1.5),
        ("format_escape.rise", -1),
        ("format_escape.rise", "much"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(key: str, value: object) -> None:
    config = configured()
    name, setting = key.split(".")
    config[name][setting] = value
    with pytest.raises(ConfigError, match=rf"^monitors\.{key}="):
        build(config)


def test_off_is_not_asked() -> None:
    config = configured(plateau="off", length_drift="off")
    assert set(build(config)) == set(MONITORS) - {"plateau", "length_drift"}
    config["tag_collapse"]["action"] = False  # a bare off in YAML
    assert "tag_collapse" not in build(config)


def test_alert_round_trip(tmp_path: Path) -> None:
    alert = Alert(3, "plateau", "warn", "too flat")
    (tmp_path / "alerts.jsonl").write_text(json.dumps(asdict(alert)) + '\n{"step": 4, "mon')
    assert read_alerts(tmp_path / "alerts.jsonl") == [alert]
    assert read_alerts(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("lately", "caught"), [([0.43] * 6, True), ([0.9, -0.5, 0.9] * 2, False)])
def test_a_fall_within_the_scatter_is_none(lately: list[float], caught: bool, tmp_path: Path) -> None:
    """The same mean of every three steps, 0.43 after 1.0: without scatter a fault, with much of it nothing is known."""
    stream = [{"profile/use": value} for value in [1.0, 1.1, 0.9, 1.0, *lately]]
    assert bool(watched(stream, tmp_path)) is caught
