"""What our pages share: curves of a run's metrics, figures, tagged text. Nothing untrusted leaves here unescaped."""

import html
import json
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tagpr.errors import DataError
from tagpr.page.document import read_part
from tagpr.page.figures import Series, line_chart
from tagpr.tags import parse_segments
from tagpr.vocabulary import vocabulary

# Curves' colours in the page's style sheet: c0, c1, ...
COLOURS = 12

# A page must open on any machine: longer texts are cut here (and say so), never in the rows' files.
LONGEST_TEXT = 20_000
MOST_POINTS = 400

# Colours of the tags: chosen for the paper's nine, after them as far apart as the golden angle puts them.
_HUES = (210, 170, 130, 70, 40, 15, 340, 300, 260)


Curves = dict[str, list[tuple[float, float]]]


def read_metrics(path: Path) -> Curves:
    """Curves of a ``metrics.jsonl``, name -> (step, value) by step.

    Its lines are ``{"step": int, "data": {name: number}}``. A step that occurs again, after a resume, counts as
    it was last; values that are not finite numbers and a last line torn by a kill are left out.

    Raises:
        DataError: another line is not of that form.
    """
    curves: dict[str, dict[float, float]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step, data = float(entry["step"]), dict(entry["data"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise DataError(
                f'{path}:{number}: is not {{"step": ..., "data": {{...}}}}. Move the file away.'
            ) from None
        for name, value in data.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                curves.setdefault(name, {})[step] = float(value)
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def figure(title: str, name: str, series: Sequence[Series], key: bool = False, note: str = "") -> str:
    """A chart with its title and first and last values; empty without points.

    Args:
        title: above the chart.
        name: of the metric, as a tooltip.
        series: its curves.
        key: name the curves by colour; else the page does.
        note: in place of the tooltip's name, what the chart shows.
    """
    chart = line_chart(series, title)
    if not chart:
        return ""

    def ends(each: Series) -> str:
        return f"{each.name} {_brief(each.points[0][1])} → {_brief(each.points[-1][1])}"

    drawn = [each for each in series if each.points]
    if key and len(drawn) > 1:
        below = "".join(
            f'<span class="entry"><span class="swatch c{each.style}"></span>{html.escape(ends(each))}</span>'
            for each in drawn
        )
    else:
        below = html.escape("; ".join(map(ends, drawn)))
    return (
        f"<figure><figcaption title='{html.escape(note or name)}'>{html.escape(title)}"
        f"<small>{below}</small></figcaption>{chart}</figure>"
    )


def _brief(value: float) -> str:
    return format(value, ".3g")


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about ``MOST_POINTS`` of a curve's points, evenly; the last one stays."""
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    kept = list(points[::stride])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def style_sheet() -> str:
    """The style sheet of our pages, with the colours of the tags in use."""
    return read_part(__package__, "style.css") + tag_hues(len(vocabulary()))


def legend() -> str:
    """The tags in use, each in its colour."""
    return " ".join(f'<span class="pill t{number}">{tag}</span>' for number, tag in enumerate(vocabulary()))


def reasoning_blocks(reasoning: str) -> str:
    """Segments as blocks where the tags parse; else the text as it is, with the tags it has marked."""
    parsed = parse_segments(reasoning)
    if parsed.problem or not parsed.segments:
        return f"<div class='chain'>{marked(reasoning)}</div>"
    tags = list(vocabulary())
    blocks = ""
    for tag, text in parsed.segments:
        hue = f"t{tags.index(tag)}"
        blocks += f'<div class="segment {hue}"><span class="pill {hue}">{tag}</span> {escaped(text)}</div>'
    return f"<div class='chain'>{blocks}</div>"


def marked(text: str) -> str:
    """Text with the tags of the vocabulary set off, whether or not they parse."""
    tags = list(vocabulary())
    parts = []
    for number, part in enumerate(_tag_marks(tuple(tags)).split(_cut(text))):
        if number % 2:
            number = tags.index(part.strip("</>"))
            parts.append(f'<span class="pill t{number}">{html.escape(part)}</span>')
        else:
            parts.append(html.escape(part))
    return "".join(parts)


@lru_cache(maxsize=8)
def _tag_marks(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(</?(?:{'|'.join(map(re.escape, tags))})>)")


def tag_hues(tags: int) -> str:
    """Style sheet of the first ``tags`` tags' colours."""
    hues = [*_HUES, *(round(number * 137.5) % 360 for number in range(len(_HUES), tags))]
    return " ".join(f".t{number} {{ --hue: {hue}; }}" for number, hue in enumerate(hues[:tags]))


def escaped(text: str) -> str:
    """Text that may be anybody's, cut and safe inside an element."""
    return html.escape(_cut(text))


def _cut(text: str) -> str:
    # Half a surrogate pair cannot be written as UTF-8.
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters in the rows' file)"
