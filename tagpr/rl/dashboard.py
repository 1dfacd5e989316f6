"""The Grafana dashboard of RL runs and of the reward service, made from the layout.

python -m tagpr.rl.dashboard > recipes/cluster/grafana_dashboard.json
"""

import json
import sys
from typing import Any

from tagpr.rl.gauges import GAUGE, STEP
from tagpr.rl.layout import LAYOUT, Chart, pattern

COLUMNS, WIDTH, HEIGHT = 24, 8, 7
SOURCE = {"type": "prometheus", "uid": "${source}"}
# What the reward server says of itself (reward_server/metrics.py): title -> (unit, {label: expression}).
SERVICE: dict[str, tuple[str, dict[str, str]]] = {
    "Requests a second": (
        "reqps",
        {"{{route}} {{status}}": "sum by (route, status) (rate(tagpr_prmu_requests_total[1m]))"},
    ),
    "Seconds a request": (
        "s",
        {
            "p50": 'histogram_quantile(0.5, sum by (le) (rate(tagpr_prmu_request_seconds_bucket{route="/v1/score"}[1m])))',
            "p99": 'histogram_quantile(0.99, sum by (le) (rate(tagpr_prmu_request_seconds_bucket{route="/v1/score"}[1m])))',
        },
    ),
    "Items that wait": ("short", {"{{instance}}": "tagpr_prmu_queue_items"}),
    "Scored items a second": ("short", {"{{instance}}": "rate(tagpr_prmu_items_total[1m])"}),
    "Items of unknown users": (
        "percentunit",
        {"share": "sum(rate(tagpr_prmu_unknown_user_items_total[5m])) / sum(rate(tagpr_prmu_items_total[5m]))"},
    ),
    "Refused, by reason": ("short", {"{{code}}": "sum by (code) (rate(tagpr_prmu_refused_total[1m]))"}),
    "Engine": ("short", {"up: {{instance}}": "tagpr_prmu_engine_up"}),
    "Tokens that a shared prefix saved": ("percentunit", {"{{instance}}": "tagpr_prmu_cached_token_share"}),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Grafana's JSON: a row for each section, a panel for each chart."""
    panels: list[dict[str, Any]] = []
    top = 0

    def row(title: str, charts: list[dict[str, Any]], collapsed: bool) -> None:
        nonlocal top
        for place, chart in enumerate(charts):
            line, column = divmod(place, COLUMNS // WIDTH)
            chart |= {
                "id": 0,
                "gridPos": {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": top + 1 + line * HEIGHT},
            }
        head = {"type": "row", "title": title, "id": 0, "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top}}
        panels.append({**head, "collapsed": collapsed, "panels": charts if collapsed else []})
        panels.extend([] if collapsed else charts)
        top += 1 if collapsed else 1 + HEIGHT * -(-len(charts) * WIDTH // COLUMNS)

    row("Now", [_now("Step", STEP), _alarm()], collapsed=False)
    for number, (section, charts) in enumerate(LAYOUT.items()):
        row(
            section,
            [_panel(chart.title, chart.unit, _targets(chart)) for chart in charts],
            collapsed=number > 3,
        )
    row(
        "Reward service",
        [_panel(title, unit, lines) for title, (unit, lines) in SERVICE.items()],
        collapsed=True,
    )
    every = [each for panel in panels for each in (panel, *panel.get("panels", []))]
    for number, each in enumerate(every, start=1):
        each["id"] = number
    return {
        "title": "TagPR: RL runs",
        "uid": "tagpr-rl",
        "tags": ["tagpr"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-24h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                {
                    "name": "run",
                    "type": "query",
                    "label": "Run",
                    "datasource": SOURCE,
                    "query": {"query": f"label_values(ray_{GAUGE}, run)", "refId": "run"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "sort": 1,
                },
            ]
        },
        "panels": panels,
    }


def _targets(chart: Chart) -> dict[str, str]:
    """legend -> expression."""
    lines = {}
    for label, name in chart.names.items():
        if "<" in name:
            # The label is what stands in the name's place; the quotes are PromQL's, so backslashes are doubled.
            matching = pattern(name, chart.only).replace("\\", "\\\\")
            series = f'ray_{GAUGE}{{run=~"$run", metric=~"{matching}"}}'
            lines["{{run}} {{part}}"] = f'label_replace({series}, "part", "$1", "metric", "{matching}")'
        else:
            lines[f"{{{{run}}}} {label}"] = f'ray_{GAUGE}{{run=~"$run", metric="{name}"}}'
    return lines


def _panel(title: str, unit: str, lines: dict[str, str], kind: str = "timeseries") -> dict[str, Any]:
    return {
        "type": kind,
        "title": title,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"spanNulls": True}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "expr": expression,
                "legendFormat": legend,
                "refId": chr(ord("A") + number),
                "datasource": SOURCE,
            }
            for number, (legend, expression) in enumerate(lines.items())
        ],
    }


def _now(title: str, name: str) -> dict[str, Any]:
    return _panel(title, "short", {"{{run}}": f'ray_{GAUGE}{{run=~"$run", metric="{name}"}}'}, "stat")


def _alarm() -> dict[str, Any]:
    panel = _panel(
        "Monitors that see their fault",
        "short",
        {"{{run}}": f'sum by (run) (ray_{GAUGE}{{run=~"$run", metric=~"monitor/.+"}})'},
        "stat",
    )
    steps = [{"color": "green", "value": None}, {"color": "red", "value": 1}]
    panel["fieldConfig"]["defaults"] |= {"thresholds": {"mode": "absolute", "steps": steps}}
    return panel


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
