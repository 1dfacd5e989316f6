"""The layout, what is made from it (dashboard, TensorBoard, gauges), and the page of a run."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_report import ATTACK, Page
from test_reward_metrics import everything

from tagpr.configuration import compose, resolve
from tagpr.errors import StageError
from tagpr.rl import dashboard
from tagpr.rl.gauges import STEP, Gauges
from tagpr.rl.layout import LAYOUT, Chart, found, in_layout, pattern, tensorboard_layout
from tagpr.rl.report import write_report
from tagpr.rl.reward_metrics import documented
from tagpr.tags import format_response

ROOT = Path(__file__).parents[2]
TAGGED = "<analyze_input> a </analyze_input> <make_decision> b </make_decision>"

# Names of verl's, and files of verl that say them; objective/ is the trainer's own.
VERLS = {
    "val-core/<task>/reward/mean@1": ("val-core", "trainer/ppo/v1/trainer_base.py"),
    "actor/entropy": ("actor/entropy", "trainer/ppo/v1/trainer_base.py"),
    "actor/pg_clipfrac": ("actor/pg_clipfrac", "trainer/ppo/core_algos.py"),
    "actor/grad_norm": ("grad_norm", "workers/engine_workers.py"),
    "objective/<name>": ("objective/", None),
    "training/rollout_probs_diff_max": ("training/rollout_probs_diff_max", "utils/debug/metrics.py"),
    "training/rollout_probs_diff_mean": ("training/rollout_probs_diff_mean", "utils/debug/metrics.py"),
    "training/rollout_actor_probs_pearson_corr": ("rollout_actor_probs_pearson_corr", "utils/debug/metrics.py"),
    "timing_s/step": ('"step"', "trainer/ppo/v1/trainer_base.py"),
    "timing_s/gen": ('"gen"', "trainer/ppo/v1/trainer_base.py"),
    "timing_s/old_log_prob": ('"old_log_prob"', "trainer/ppo/v1/trainer_base.py"),
    "timing_s/update_actor": ('"update_actor"', "trainer/ppo/v1/trainer_base.py"),
    "timing_s/update_weights": ('"update_weights"', "trainer/ppo/v1/trainer_sync.py"),
    "perf/throughput": ("perf/throughput", "trainer/ppo/metric_utils.py"),
    STEP: ("training/global_step", "trainer/ppo/v1/trainer_base.py"),
}  # fmt: skip


def names_of_layout() -> Iterator[tuple[str, Chart]]:
    for charts in LAYOUT.values():
        for chart in charts:
            for name in chart.names.values():
                yield name, chart


def test_every_name_of_the_layout_is_a_metric() -> None:
    real = {*everything(), *(f"failure/{check}/share" for _, c in names_of_layout() for check in c.only)}
    for name, chart in names_of_layout():
        if name in VERLS:
            continue
        assert any(re.fullmatch(pattern(name, chart.only), each) for each in real), name
        assert all(documented(each) for each in real if re.fullmatch(pattern(name, chart.only), each)), name


@pytest.mark.parametrize("name", VERLS)
def test_verl_still_says_its_names(name: str) -> None:
    said, file = VERLS[name]
    spec = importlib.util.find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / file if file else ROOT / "tagpr/rl/trainer.py"
    assert said in path.read_text(encoding="utf-8")


def test_what_a_person_must_see_is_in_the_layout() -> None:
    # Of our own metrics only statistics beside those shown are left out.
    left_out = [name for name in everything() if not in_layout(name)]
    shown_in_part = (
        "reward/",
        "t/reward/",
        "length/",
        "tags/segments/",
        "prmu/latency_le",
        "profile/use_sem",
        "a/reward/",
    )
    others = [name for name in left_out if not name.startswith(shown_in_part)]
    assert others == ["tags/readable_valid_frac"]


def test_the_dashboard_in_the_repository_is_the_one_that_is_made() -> None:
    path = ROOT / "recipes/cluster/grafana_dashboard.json"
    assert path.read_text(encoding="utf-8") == dashboard.text(), (
        "run `python -m tagpr.rl.dashboard > recipes/cluster/grafana_dashboard.json`"
    )


def expressions() -> list[str]:
    board = json.loads((ROOT / "recipes/cluster/grafana_dashboard.json").read_text(encoding="utf-8"))
    panels = [each for panel in board["panels"] for each in (panel, *panel.get("panels", []))]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_every_metric_of_the_dashboard_exists() -> None:
    real = {
        *everything(),
        *VERLS,
        "lamp1/reward/total/mean",
        "val-core/lamp1/reward/mean@1",
        "objective/alpha",
    }
    real |= {f"failure/{check}/share" for _, chart in names_of_layout() for check in chart.only}
    source = (ROOT / "reward_server/metrics.py").read_text(encoding="utf-8")
    served = {f"tagpr_prmu_{name}" for name in re.findall(r'f"\{prefix\}_(\w+)"', source)}
    seen = 0
    for expression in expressions():
        for name in re.findall(r"(?:ray_)?tagpr_\w+", expression):
            if name == "ray_tagpr_training":
                continue
            bare = re.sub(r"_(total|bucket|sum|count)$", "", name)
            assert bare in served, name
            seen += 1
        for operator, wanted in re.findall(r'metric(=~?)"((?:[^"\\]|\\.)*)"', expression):
            wanted = wanted.replace("\\\\", "\\")
            matching = [
                each for each in real if (re.fullmatch(wanted, each) if operator == "=~" else wanted == each)
            ]
            assert matching, expression
            seen += 1
    assert seen > 60


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    board = dashboard.dashboard()
    every = [each for panel in board["panels"] for each in (panel, *panel.get("panels", []))]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_patterns_match_their_part_only() -> None:
    chart = Chart("", {"<task>": "<task>/reward/total/mean"})
    names = [
        "lamp1/reward/total/mean",
        "reward/total/mean",
        "a/b/reward/total/mean",
        "lamp1/reward/totalxmean",
    ]
    assert found(chart, names) == {"lamp1": "lamp1/reward/total/mean"}
    only = Chart("", {"<check>": "failure/<check>/share"}, only=("no_think",))
    assert found(only, ["failure/no_think/share", "failure/tag_nested/share"]) == {
        "no_think": "failure/no_think/share"
    }


def test_tensorboard_takes_the_layout(tmp_path: Path) -> None:
    summary = pytest.importorskip("torch.utils.tensorboard")
    writer = summary.SummaryWriter(str(tmp_path))
    writer.add_custom_scalars(tensorboard_layout())
    writer.close()
    (file,) = tmp_path.iterdir()
    assert b"tags/coverage" in file.read_bytes()


def test_gauges_take_finite_numbers_of_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from ray.util import metrics

    set_: list[tuple[float, dict[str, str]]] = []

    class Fake:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert (name, tag_keys) == ("tagpr_training", ("run", "metric"))

        def set(self, value: float, tags: dict[str, str]) -> None:
            set_.append((value, tags))

    monkeypatch.setattr(metrics, "Gauge", Fake)
    data = {
        "reward/total/mean": np.float32(0.5),
        "actor/entropy": float("nan"),
        "perf/other": 1.0,
        "actor/loss": "x",
    }
    Gauges("a").log(data, step=3)
    assert set_ == [
        (0.5, {"run": "a", "metric": "reward/total/mean"}),
        (3.0, {"run": "a", "metric": STEP}),
    ]


def rollout(step: int, response: str, task: str = "lamp4", failure: str = "") -> dict[str, Any]:
    reward = {"total": 0.5, "verifiable": 1.0, "failure": failure, "prmu": 0.25, "prmu_unknown_user": 1.0}
    return {
        "step": step, "task": task, "user_id": ATTACK, "gold": ATTACK, "prompt": ATTACK, "query": ATTACK,
        "response": response, "response_tokens": 7, "reward": reward,
    }  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of three steps with an alert, two dumps of rollouts and a changed setting."""
    run = tmp_path / "outputs" / "mine"
    (run / "rollouts").mkdir(parents=True)
    config = resolve(
        compose("guided_rl", ["run.name=mine", f"run.outputs={tmp_path / 'outputs'}", "objective.gamma=0.4"])
    )
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (run / "finished.json").write_text('{"step": 3}')
    names = dict.fromkeys(everything(), 0.5) | {"monitor/length_drift": 0.0, "actor/entropy": 0.1}
    lines = [{"step": step, "data": {**names, "reward/total/mean": 0.1 * step}} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alert = {"step": 2, "monitor": "length_drift", "action": "warn", "reason": f"too long {ATTACK}"}
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    for step, response in ((1, format_response(TAGGED, "yes")), (3, f"no think {ATTACK}")):
        (run / "rollouts" / f"{step:06d}.jsonl").write_text(json.dumps(rollout(step, response)) + "\n")
    return run


def test_the_page_shows_the_run(finished: Path) -> None:
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    for text in (
        "RL run mine",
        "SYNTHETIC",
        "finished",
        "length_drift",
        "Total reward by task",
        "objective.gamma",
        "0.4",
    ):
        assert text in page.text, text
    assert "step 1" in page.text
    assert "step 3" in page.text
    assert page.text.count("objective.") == 1, "defaults are shown as differences"
    charts = sum(tag == "svg" for tag, _ in page.elements)
    assert charts >= 20
    assert sum(attrs.get("class") == "segment t0" for _, attrs in page.elements) == 1


def test_untrusted_text_stays_text_and_nothing_is_fetched(finished: Path) -> None:
    page = Page(write_report(finished).read_text(encoding="utf-8"))
    assert not [tag for tag, _ in page.elements if tag in ("script", "img", "link", "iframe", "b")]
    assert not [attrs for _, attrs in page.elements if attrs.keys() & {"src", "href", "onerror"}]
    assert "alert(1)" in page.text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "data": {"val-core/lamp1/reward/mean@1": 0.5}}\n{"step": 1, "da'
    )
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "not finished" in page.text
    assert "No rollouts" in page.text


def test_why_a_stage_ended_early_is_said(finished: Path) -> None:
    (finished / "switched.json").write_text('{"step": 3, "monitor": "plateau", "reason": "flat"}')
    assert "ended early at step 3" in Page(write_report(finished).read_text(encoding="utf-8")).text


def test_a_run_begins_without_ray() -> None:
    """Ray reads its token when it is imported: only after ``local_ray.prepare_environment``."""
    code = "import sys, tagpr.rl.launch, tagpr.rl.report; print([m for m in ('ray', 'verl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_that_a_monitor_stopped_it_is_said(finished: Path) -> None:
    (finished / "finished.json").unlink()
    alert = {"step": 2, "monitor": "policy_gap", "action": "stop", "reason": "no sync"}
    (finished / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    assert "stopped by monitor policy_gap" in Page(write_report(finished).read_text(encoding="utf-8")).text
    alert["step"] = 1  # it went on after that
    (finished / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    assert "not finished" in Page(write_report(finished).read_text(encoding="utf-8")).text
