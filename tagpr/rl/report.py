"""The page of one RL run: alerts, every chart of the layout, rollouts, what was configured otherwise.

``bash recipes/report.sh run.name=guided_rl`` writes ``<run.dir>/report.html`` at any time, while the run goes on as well; a run
writes it at its end by itself. Nothing that a model or a user wrote reaches the page unescaped.
"""

import html
import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import tagpr.config
from tagpr.configuration import compose, flat, main, resolve
from tagpr.errors import StageError
from tagpr.page.document import document, filled, read_part
from tagpr.page.figures import Series
from tagpr.page.parts import (
    COLOURS,
    Curves,
    escaped,
    figure,
    legend,
    marked,
    read_metrics,
    reasoning_blocks,
    style_sheet,
    thin,
)  # fmt: skip
from tagpr.rl.layout import LAYOUT, Chart, found
from tagpr.rl.monitors import Alert, read_alerts
from tagpr.rl.reward_metrics import NAMES, documented
from tagpr.runs import complete_lines, write_text_atomically
from tagpr.tags import split_response

logger = logging.getLogger(__name__)

SYNTHETIC = "SYNTHETIC users (MiniLaMP): nothing here says anything about LaMP."
SUMMARY = {
    "total reward": "reward/total/mean",
    "R_v": "reward/verifiable/mean",
    "R_PRMU": "reward/prmu/mean",
    "broken format": "failure/format/share",
    "valid tags": "tags/valid_frac",
    "segments a response": "tags/segments/mean",
    "reasoning tokens": "length/reasoning/mean",
    "answer tokens": "length/answer/mean",
    "use of the profile": "profile/use",
    "all-equal groups": "group/zero_spread_frac",
    "entropy of the policy": "actor/entropy",
    "rollout against actor, largest difference": "training/rollout_probs_diff_max",
    "PRMU, seconds to a score (p99)": "prmu/latency_p99_s",
    "scored as an unknown user": "prmu/unknown_user_frac",
    "seconds a step": "timing_s/step",
}
# Steps at each end of a run whose mean the table shows.
ENDS = 5
MOST_DIFFERENCES = 200
# What a run fills in itself.
FILLED_IN = {
    "actor_rollout_ref.rollout.max_model_len", "prmu_client.url", "prmu_client.token_file", "prmu_client.version",
    "trainer.resume_mode", "trainer.resume_from_path", "trainer.val_before_train", "transfer_queue.enable",
}  # fmt: skip


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a run; returns its path.

    Raises:
        StageError: there is no run.
        DataError: its metrics cannot be read.
    """
    if not (run_dir / "metrics.jsonl").is_file():
        raise StageError(f"{run_dir}: has no metrics.jsonl. Set run.name to an RL run that has begun.")
    path = run_dir / "report.html"
    write_text_atomically(path, render(run_dir))
    return path


def render(run_dir: Path) -> str:
    """The page as HTML."""
    curves = read_metrics(run_dir / "metrics.jsonl")
    config = _config(run_dir)
    synthetic = bool(OmegaConf.select(config, "benchmark.synthetic"))
    title = f"RL run {run_dir.name}"
    sections = "".join(_section(title, charts, curves) for title, charts in LAYOUT.items())
    body = filled(
        __package__,
        "report.html",
        title=html.escape(title),
        subtitle=html.escape(_state(run_dir, config, curves)),
        banner=f'<p class="banner">{SYNTHETIC}</p>' if synthetic else "",
        alerts=_alerts(read_alerts(run_dir / "alerts.jsonl"), curves),
        summary=_summary(curves),
        sections=sections or "<p class='gap'>metrics.jsonl holds no figures yet.</p>",
        legend=legend(),
        rollouts=_rollouts(run_dir / "rollouts"),
        configuration=_configuration(config),
    )
    return document(title, body, style=f"{style_sheet()}\n{read_part(__package__, 'report.css')}")


def _config(run_dir: Path) -> DictConfig:
    path = run_dir / "config.yaml"
    loaded = OmegaConf.load(path) if path.is_file() else OmegaConf.create({})
    assert isinstance(loaded, DictConfig)
    return loaded


def _state(run_dir: Path, config: DictConfig, curves: Curves) -> str:
    """What was trained, how far it is, and how it ended."""
    last = max((curve[-1][0] for curve in curves.values()), default=0)
    said = [f"{OmegaConf.select(config, 'objective.mode') or 'an'} RL", f"{last:g} steps"]
    switched = run_dir / "switched.json"
    if switched.is_file():
        why = json.loads(switched.read_text(encoding="utf-8"))
        said.append(f"ended early at step {why['step']} for the next stage (monitor {why['monitor']})")
    elif (run_dir / "finished.json").is_file():
        said.append("finished")
    else:
        stops = [alert for alert in read_alerts(run_dir / "alerts.jsonl") if alert.action == "stop"]
        stopped = bool(stops) and stops[-1].step + 1 >= last
        said.append(f"stopped by monitor {stops[-1].monitor}" if stopped else "not finished")
    start = OmegaConf.select(config, "actor_rollout_ref.model.path")
    if start:
        said.append(f"from {start}")
    if (run_dir / "manifest.json").is_file():
        record = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
        said.append(f"begun {record['created']}, sources {(record['git_revision'] or 'unknown')[:12]}")
    return "; ".join(said)


def _alerts(alerts: Sequence[Alert], curves: Curves) -> str:
    if not alerts:
        asked = found(Chart("", {"<name>": "monitor/<name>"}), curves)
        return (
            f"<p>None. Asked after every step: {html.escape(', '.join(asked))}.</p>"
            if asked
            else "<p class='gap'>This run had no monitors.</p>"
        )
    rows = "".join(
        f"<tr><td>{alert.step}</td><td>{html.escape(alert.monitor)}</td><td>{alert.action}</td>"
        f"<td>{escaped(alert.reason)}</td></tr>"
        for alert in alerts
    )
    head = "<tr><th>step</th><th>monitor</th><th>action</th><th>what it saw</th></tr>"
    return f"<div class='scroll'><table class='facts alert'><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


def _summary(curves: Curves) -> str:
    rows = ""
    for title, name in SUMMARY.items():
        values = [value for _, value in curves.get(name, [])]
        if values:
            ends = [sum(part) / len(part) for part in (values[:ENDS], values[-ENDS:])]
            cells = "".join(f"<td>{end:.4g}</td>" for end in ends)
            rows += f"<tr><th title='{html.escape(name)}'>{html.escape(title)}</th>{cells}</tr>"
    if not rows:
        return "<p class='gap'>No training step yet.</p>"
    head = f"<tr><th></th><th>first {ENDS} steps</th><th>last {ENDS} steps</th></tr>"
    return f"<div class='scroll'><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


def _section(title: str, charts: Sequence[Chart], curves: Curves) -> str:
    drawn = ""
    for chart in charts:
        there = found(chart, curves)
        if chart.rare:
            there = {label: name for label, name in there.items() if any(value for _, value in curves[name])}
        series = [
            Series(label, thin(curves[name]), number % COLOURS)
            for number, (label, name) in enumerate(there.items())
        ]
        notes = {NAMES[entry] for name in there.values() if (entry := documented(name))}
        drawn += figure(
            chart.title, ", ".join(there.values()), series, key=True, note="; ".join(sorted(notes))
        )
    if not drawn:
        return ""
    return f"<section><h2>{html.escape(title)}</h2><div class='charts'>{drawn}</div></section>"


def _rollouts(folder: Path) -> str:
    """One response of each task from the first and from the last step that has been dumped."""
    steps = sorted(folder.glob("[0-9]*.jsonl"))
    if not steps:
        return "<p class='gap'>No rollouts were dumped (trainer.rollout_data_dir).</p>"
    drawn: dict[str, list[dict[str, Any]]] = {}
    for path in (steps[0], steps[-1])[: len(steps)]:
        by_task: dict[str, list[dict[str, Any]]] = {}
        for line in complete_lines(path):
            row = json.loads(line)
            by_task.setdefault(row["task"], []).append(row)
        for task, rows in by_task.items():
            drawn.setdefault(task, []).append(random.Random(f"{path.name}/{task}").choice(rows))
    return "".join(_task(task, rows) for task, rows in sorted(drawn.items()))


def _task(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = "".join(map(_rollout, rows))
    return f"<article><h3>{html.escape(task)}</h3><div class='columns'>{columns}</div></article>"


def _rollout(row: Mapping[str, Any]) -> str:
    reward = row["reward"]
    facts = [f"reward {reward['total']:z.2f}", f"R_v {reward['verifiable']:.2f}"]
    if "prmu" in reward:
        facts.append(
            f"R_PRMU {reward['prmu']:.2f}{' (unknown user)' if reward.get('prmu_unknown_user') else ''}"
        )
    facts.append(f"{row['response_tokens']} tokens")
    if reward["failure"]:
        facts.append(reward["failure"])
    response = split_response(row["response"])
    body = (
        f"{reasoning_blocks(response.reasoning)}<p class='answer'>{escaped(response.answer) or '(no answer)'}</p>"
        if response.reasoning or response.answer
        else f"<div class='chain'>{marked(row['response']) or '(empty)'}</div>"
    )
    return (
        f"<div><h4>step {row['step']} <small>{html.escape(', '.join(facts))}</small></h4>"
        f"<p>User {escaped(str(row['user_id']))}, gold: <q>{escaped(row['gold'])}</q></p>"
        f"<details><summary>Prompt</summary><pre>{escaped(row['prompt'])}</pre></details>{body}</div>"
    )


def _configuration(config: DictConfig) -> str:
    if not config:
        return "<p class='gap'>config.yaml is missing.</p>"
    hardware, differences = config_differences(config)
    intro = f"Against the defaults of setting={config.setting}, {hardware}; every key is in config.yaml."
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td class='quiet'>{escaped(old)}</td><td>{escaped(new)}</td></tr>"
        for key, old, new in differences[:MOST_DIFFERENCES]
    )
    if not rows:
        return f"<p>{html.escape(intro)} Nothing differs.</p>"
    head = "<tr><th>key</th><th>default</th><th>here</th></tr>"
    more = len(differences) - MOST_DIFFERENCES
    rest = f"<p class='gap'>and {more} more</p>" if more > 0 else ""
    return (
        f"<p class='note'>{html.escape(intro)}</p><div class='scroll'><table class='facts'><thead>{head}</thead>"
        f"<tbody>{rows}</tbody></table></div>{rest}"
    )


def config_differences(config: DictConfig) -> tuple[str, list[tuple[str, str, str]]]:
    """(the hardware group it is nearest to, [(key, default, here)]) of a run's resolved configuration.

    Which hardware group was chosen is not in a configuration: the one with the fewest differences is taken. Paths count as
    equal where only one of them is absolute.
    """
    here = dict(flat(OmegaConf.to_container(config)))
    stage = f"{config.objective.mode}_rl"
    folder = Path(tagpr.config.__file__).parent / "rl_hardware"
    candidates = []
    on_cpu = config.trainer.device == "cpu"
    for path in sorted(folder.glob("cpu.yaml" if on_cpu else "gpu*.yaml")):
        choice = f"rl_hardware={path.stem}"
        # What later keys are derived from: else a run's name would differ in every path.
        given = [
            f"setting={config.setting}",
            choice,
            f"run.name={config.run.name}",
            f"run.outputs={config.run.outputs}",
        ]
        default = dict(flat(OmegaConf.to_container(resolve(compose(stage, given)))))
        changed = [
            (key, _shown(default, key), _shown(here, key))
            for key in {**default, **here}
            if key not in FILLED_IN and not _same(default.get(key), here.get(key))
        ]
        candidates.append((choice, changed))
    return min(candidates, key=lambda candidate: len(candidate[1]))


def _same(default: Any, here: Any) -> bool:
    if isinstance(default, str) and isinstance(here, str) and os.path.isabs(here):
        # As it would be from the folder that the run was started in.
        return here == default or here.endswith(f"/{os.path.normpath(default)}")
    return bool(default == here)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False, default=str) if key in values else "(no such key)"


def run(config: DictConfig) -> None:
    """The stage: ``python -m tagpr.rl.report run.name=...``."""
    logger.info("%s", write_report(Path(config.run.dir)))


if __name__ == "__main__":
    main("report", run)
