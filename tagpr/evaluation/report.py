"""One self-contained page: figures, curves, chains side by side. Nothing untrusted reaches it unescaped."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tagpr.benchmarks.tasks import get_task
from tagpr.evaluation.rows import Row
from tagpr.evaluation.score import Summary, SweepPoint
from tagpr.evaluation.tables import MEASURE_NAMES, METRIC_NAMES, SYNTHETIC, Table, tables
from tagpr.page.document import document, filled
from tagpr.page.figures import Series, interval_chart
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
from tagpr.schema import RewardBreakdown

REWARDS = {
    "reward/total/mean": "reward (of its stage)",
    "reward/verifiable/mean": "R_v: verifiable",
    "reward/repetition/mean": "R_rep: repetition",
    "reward/format/mean": "R_f: format",
    "reward/tag/mean": "R_tag: tags",
    "reward/prmu/mean": "R_PRMU",
    "response_length/mean": "response tokens",
    "training/rollout_probs_diff_max": "rollout vs actor: largest difference of probabilities",
}


@dataclass(frozen=True)
class Case:
    """One row as every model answered it; ``prompt`` is what they all saw, ``rewards`` may be left out."""

    id: str
    prompt: str
    rows: Mapping[str, Row]
    rewards: Mapping[str, RewardBreakdown] = field(default_factory=dict)


def choose_cases(rows: Mapping[str, Sequence[Row]], number: int) -> list[str]:
    """Ids of the rows to show: of each task in turn the first on which the models' R_v differ, else its first.

    Shown for how the models reason, not as evidence: the rule looks at neither model with favour.
    """
    by_task: dict[str, list[str]] = {}
    scores: dict[str, set[float]] = {}
    for model in rows.values():
        for row in model:
            scores.setdefault(row.id, set()).add(row.verifiable)
    for row in next(iter(rows.values())):
        if row.id not in by_task.setdefault(row.task, []):
            by_task[row.task].append(row.id)
    ordered = [
        sorted(ids, key=lambda id_: (len(scores[id_]) == 1, id_)) for _, ids in sorted(by_task.items())
    ]
    deepest = max(map(len, ordered), default=0)
    return [ids[depth] for depth in range(deepest) for ids in ordered if depth < len(ids)][:number]


def render(summary: Summary, cases: Sequence[Case], metrics: Mapping[str, Path]) -> str:
    """The whole page as HTML.

    Args:
        summary: every figure.
        cases: what to show side by side.
        metrics: stage (sft, prmu, guided, exploratory) -> its metrics.jsonl, which may be missing.
    """
    title = f"TagPR on {summary.benchmark}"
    banner = f'<p class="banner">{html.escape(SYNTHETIC)}</p>' if summary.synthetic else ""
    body = filled(
        __package__,
        "report.html",
        title=html.escape(title),
        subtitle=html.escape(f"{summary.split} split, {summary.rows_selected:,} rows"),
        banner=banner,
        tables="".join(map(_table, tables(summary))),
        sweep=_sweep_charts(summary),
        rewards=_reward_curves(metrics),
        losses=_loss_curves(metrics),
        cases="".join(map(_case, cases)) or "<p>No rows to show.</p>",
        legend=legend(),
    )
    return document(title, body, style=style_sheet())


def _sweep_charts(summary: Summary) -> str:
    """Every measure over profile lengths, and over retrievers, with intervals (S36)."""
    if not summary.sweep:
        return "<p class='gap'>No sweep was asked for (evaluate.sweep).</p>"
    models = list(dict.fromkeys(point.model for point in summary.sweep))
    lengths = [point for point in summary.sweep if point.retriever == summary.retriever]
    retrievers = [point for point in summary.sweep if point.profile_size == summary.profile_size]
    charts = []
    for measure in dict.fromkeys(name for point in summary.sweep for name in point.intervals):
        task, _, metric = measure.partition("/")
        if measure != "task_score" and metric not in METRIC_NAMES:
            continue
        shown = f"{get_task(task).title} {METRIC_NAMES[metric]}" if metric else MEASURE_NAMES[measure]
        for points, axis, joined in (
            (lengths, "profile items", True),
            (retrievers, "retriever", False),
        ):
            keys = list(
                dict.fromkeys(
                    point.profile_size if joined else point.retriever
                    for point in sorted(points, key=lambda point: point.profile_size)
                )
            )
            if len(keys) < 2:
                continue
            series = [
                _swept(model, number, points, [str(key) for key in keys], measure, joined)
                for number, model in enumerate(models)
            ]
            chart = interval_chart(series, [str(key) for key in keys], f"{shown} by {axis}", joined)
            if chart:
                charts.append(
                    f"<figure><figcaption>{html.escape(shown)}<small>by {axis}</small></figcaption>{chart}</figure>"
                )
    key = " ".join(
        f'<span class="swatch c{number % COLOURS}"></span>{html.escape(model)}'
        for number, model in enumerate(models)
    )
    return f'<p class="key">{key}; whiskers: 95 % intervals over users</p><div class="charts">{"".join(charts)}</div>'


def _swept(
    model: str, number: int, points: Sequence[SweepPoint], keys: Sequence[str], measure: str, joined: bool
) -> Series:
    its = {
        str(point.profile_size if joined else point.retriever): point.intervals[measure]
        for point in points
        if point.model == model and measure in point.intervals
    }
    present = [(place, its[key]) for place, key in enumerate(keys) if key in its]
    bounded = all(each.low is not None and each.high is not None for _, each in present)
    return Series(
        model,
        [(float(place), each.mean) for place, each in present],
        number % COLOURS,
        [(each.low or 0.0, each.high or 0.0) for _, each in present] if bounded else (),
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.head)
    body = ""
    for first, *others in table.rows:
        figures = "".join(f"<td>{_strong(html.escape(cell.text), cell.bold)}</td>" for cell in others)
        body += f"<tr><th>{html.escape(first.text)}</th>{figures}</tr>"
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    title, body = (
        html.escape(table.title),
        f"<p class='note'>{html.escape(table.note)}</p><div class='scroll'>{grid}</div>",
    )
    if table.detail:
        return f"<details class='table'><summary>{title}</summary>{body}</details>"
    return f"<section><h2>{title}</h2>{body}</section>"


def _strong(text: str, bold: bool) -> str:
    return f"<strong>{text}</strong>" if bold else text


def _read(stage: str, metrics: Mapping[str, Path]) -> tuple[Curves, str]:
    """A stage's curves, or a sentence on why there are none."""
    path = metrics.get(stage)
    if path is None:
        return {}, f"{stage}: no metrics file is configured."
    if not path.is_file():
        return {}, f"{stage}: {path} is missing, so there is no curve."
    curves = read_metrics(path)
    return curves, "" if curves else f"{stage}: {path} holds no figures yet."


def _reward_curves(metrics: Mapping[str, Path]) -> str:
    """Guided and exploratory RL on one axis of steps, exploratory after guided's last."""
    guided, no_guided = _read("guided", metrics)
    exploratory, no_exploratory = _read("exploratory", metrics)
    offset = max((curve[-1][0] for curve in guided.values()), default=0.0)
    stages = [("guided", guided, 0.0), ("exploratory", exploratory, offset)]
    validation = sorted({name for _, curves, _ in stages for name in curves if name.startswith("val-core/")})[
        :12
    ]
    charts = []
    for name in [*REWARDS, *validation]:
        series = [
            Series(stage, thin([(step + shift, value) for step, value in curves[name]]), number)
            for number, (stage, curves, shift) in enumerate(stages)
            if name in curves
        ]
        charts.append(figure(REWARDS.get(name, name), name, series))
    key = (
        '<p class="key"><span class="swatch c0"></span>guided <span class="swatch c1"></span>exploratory '
        f"(its step 0 is guided's last, {offset:g}); across: training steps</p>"
    )
    return _gaps([no_guided, no_exploratory]) + (
        key + f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    )


def _loss_curves(metrics: Mapping[str, Path]) -> str:
    charts: list[str] = []
    gaps: list[str] = []
    for number, stage in enumerate(("sft", "prmu"), start=2):
        curves, gap = _read(stage, metrics)
        gaps.append(gap)
        shown = [name for name in curves if name.endswith("loss") or "accuracy" in name][:8]
        if curves and not shown:
            gaps.append(f"{stage}: its metrics name neither a loss nor an accuracy.")
        charts += [
            figure(f"{stage}: {name}", name, [Series(stage, thin(curves[name]), number)]) for name in shown
        ]
    return _gaps(gaps) + (f'<div class="charts">{"".join(charts)}</div>' if charts else "")


def _gaps(sentences: Sequence[str]) -> str:
    return "".join(f'<p class="gap">{html.escape(sentence)}</p>' for sentence in sentences if sentence)


def _case(case: Case) -> str:
    some = next(iter(case.rows.values()))
    columns = "".join(_column(label, row, case.rewards.get(label)) for label, row in case.rows.items())
    return (
        f"<article><h3>{html.escape(case.id)} <small>user {html.escape(some.user_id)}</small></h3>"
        f"<p>Gold: <q>{escaped(some.gold)}</q></p>"
        f"<details><summary>Prompt ({some.prompt_tokens:,} tokens, {some.items_used} profile items)</summary>"
        f"<pre>{escaped(case.prompt)}</pre></details><div class='columns'>{columns}</div></article>"
    )


def _column(label: str, row: Row, reward: RewardBreakdown | None) -> str:
    facts = [f"R_v {row.verifiable:.2f}"]
    if reward is not None:
        facts.append(f"reward {reward.reward:z.2f}")
        if reward.prmu is not None:
            facts.append(f"R_PRMU {reward.prmu:.2f}{' (unknown user)' if reward.prmu_unknown_user else ''}")
    facts.append(f"{row.response_tokens:,} tokens")
    if row.finish_reason == "length":
        facts.append("truncated")
    if row.failure:
        facts.append(row.failure)
    told = row.format == 1.0 or row.reasoning or row.answer
    body = (
        f"{reasoning_blocks(row.reasoning)}<p class='answer'>{escaped(row.answer) or '(no answer)'}</p>"
        if told
        else f"<div class='chain'>{marked(row.response) or '(empty)'}</div>"
    )
    return f"<div><h4>{html.escape(label)} <small>{html.escape(', '.join(facts))}</small></h4>{body}</div>"
