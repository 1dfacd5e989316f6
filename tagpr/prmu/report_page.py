"""The report on what PRMU knows of its users as one page: charts with intervals, above the tables they are drawn from."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tagpr.page.document import document
from tagpr.page.figures import Series, interval_chart
from tagpr.page.parts import style_sheet

# Under a chart there is room for a word or two.
SHORT = {
    "swapped id": "other id", "unknown id": "no id", "others' profile": "other prof.", "no profile": "no prof.",
    "without_user_rows": "no rows", "frozen_random_rows": "frozen",
}  # fmt: skip
Rows = Sequence[Mapping[str, Any]]


def render(made: Mapping[str, Any], lines: Sequence[str], synthetic: bool) -> str:
    """The page of what ``prmu_report`` made (its report.json and the lines of its report.md); the verdict is the heading."""
    verdict, *rest = lines
    note = "SYNTHETIC users: no number here belongs beside the paper's." if synthetic else ""
    sections = [
        ("Held-out pairs of users with a row", _charts(made["rows"], "condition")),
        (
            "The variants on the same pairs, over training seeds",
            _charts([row for row in _variants(made) if row["part"] == "seen_users"], "variant"),
        ),
        (
            "Users without a row: after one was fitted to so many of their pairs",
            _charts(made.get("cold_start", []), "pairs_to_fit", joined=True),
        ),
    ]
    body = "".join(
        f"<section><h2>{html.escape(title)}</h2><div class='charts'>{charts}</div></section>"
        for title, charts in sections
        if charts
    )
    banner = f'<p class="banner">{note}</p>' if note else ""
    return document(
        "PRMU and its users",
        f"<main><h1>{html.escape(verdict)}</h1>"
        f'<p class="note">Accuracy with 95 % intervals over users (and seeds); PRMU {html.escape(made["version"])}</p>'
        f"{banner}{body}<section><h2>Tables</h2>{_tables(rest)}</section></main>",
        style=style_sheet(),
    )


def _variants(made: Mapping[str, Any]) -> Rows:
    return [row for row in made.get("variants", {}).get("rows", []) if row["variant"] != "none"]


def _charts(rows: Rows, by: str, *, joined: bool = False) -> str:
    """A chart for all pairs and for each rule that pairs were made by: what differs by design differs there."""
    charts = ""
    for group in dict.fromkeys(row["group"] for row in rows):
        if group != "all" and not group.startswith("rule "):
            continue
        own = [row for row in rows if row["group"] == group]
        series = Series(
            group,
            [(place, row["accuracy"]) for place, row in enumerate(own)],
            bounds=[(row["low"], row["high"]) for row in own],
        )
        names = [str(row[by]) for row in own]
        title = f"{group.removeprefix('rule ')} ({own[0]['pairs']} pairs)"
        chart = interval_chart(
            [series], [SHORT.get(name, name) for name in names], f"accuracy, {title}", joined
        )
        charts += f"<figure><figcaption>{html.escape(title)}</figcaption>{chart}</figure>"
    return charts


def _tables(lines: Sequence[str]) -> str:
    """Markdown's headings, tables and lines of text, as the report has them."""
    found = ""
    table: list[list[str]] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append([html.escape(cell.strip()) for cell in line.strip().strip("|").split(" | ")])
            continue
        if table:
            head, _, *body = table
            rows = "".join(f"<tr><th>{row[0]}</th>{_cells(row[1:], 'td')}</tr>" for row in body)
            found += f"<div class='scroll'><table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{rows}</tbody></table></div>"
            table = []
        if line.startswith("# "):
            found += f"<h3>{html.escape(line[2:])}</h3>"
        elif line:
            found += f'<p class="note">{html.escape(line)}</p>'
    return found


def _cells(cells: Sequence[str], kind: str) -> str:
    return "".join(f"<{kind}>{cell}</{kind}>" for cell in cells)
