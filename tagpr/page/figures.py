"""Line charts as inline SVG, instead of a plotting library. Colours come from the page's style sheet."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 26


@dataclass(frozen=True)
class Series:
    """A named curve of (x, y) points in x order; ``style`` is the number of its colour on the page.

    ``bounds``, where given, are (low, high) of every point, drawn as whiskers.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    bounds: Sequence[tuple[float, float]] = ()


def line_chart(series: Sequence[Series], label: str) -> str:
    """SVG of some curves with axes; non-finite points are left out, and one point alone is a dot.

    ``label`` is read out by screen readers; names are escaped.
    """
    curves = [
        (
            each.name,
            each.style,
            [point for point in each.points if math.isfinite(point[0]) and math.isfinite(point[1])],
        )
        for each in series
    ]
    points = [point for _, _, curve in curves for point in curve]
    if not points:
        return ""
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 4, whole=True)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points), 4)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:g}</text>'
            )
    for name, style, curve in curves:
        placed = [place(x, y) for x, y in curve]
        if len(placed) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline class="curve c{style}" points="{path}"/>')
        for (x, y), (step, value) in zip(placed, curve, strict=True):
            # Dots carry the exact value; on long curves they would only smear.
            if len(placed) <= 60:
                title = f"{html.escape(name)}: step {step:g}, {value:.4g}"
                dot = f'class="dot c{style}" cx="{x:.1f}" cy="{y:.1f}" r="2"'
                parts.append(f"<circle {dot}><title>{title}</title></circle>")
    parts.append("</svg>")
    return "".join(parts)


def interval_chart(series: Sequence[Series], categories: Sequence[str], label: str, joined: bool) -> str:
    """SVG of figures with their intervals by category: x of a point is the number of its category.

    Series stand side by side within a category; ``joined`` draws a line through each (for categories with an order).
    """
    heights = [y for each in series for _, y in each.points] + [
        bound for each in series for pair in each.bounds for bound in pair
    ]
    heights = [y for y in heights if math.isfinite(y)]
    if not heights:
        return ""
    y_ticks = ticks(min(heights), max(heights), 4)
    low, high = y_ticks[0], y_ticks[-1]
    width = (WIDTH - LEFT - RIGHT) / len(categories)

    def across(category: float, number: int) -> float:
        shift = (number - (len(series) - 1) / 2) * min(9.0, width / (len(series) + 1))
        return LEFT + (category + 0.5) * width + shift

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for number, name in enumerate(categories):
        x = LEFT + (number + 0.5) * width
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(name)}</text>'
        )
    for number, each in enumerate(series):
        colour = f"c{each.style}"
        places = [(across(x, number), up(y)) for x, y in each.points]
        if joined and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="curve {colour}" points="{path}"/>')
        for place, (bottom, top) in enumerate(each.bounds):
            x = places[place][0]
            parts.append(
                f'<line class="curve {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{up(bottom):.1f}" y2="{up(top):.1f}"/>'
            )
        for place, ((x, y), (category, value)) in enumerate(zip(places, each.points, strict=True)):
            title = f"{each.name}, {categories[int(category)]}: {value:.4g}"
            if each.bounds:
                bottom, top = each.bounds[place]
                title += f" [{bottom:.4g}, {top:.4g}]"
            dot = f'class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"'
            parts.append(f"<circle {dot}><title>{html.escape(title)}</title></circle>")
    parts.append("</svg>")
    return "".join(parts)


def ticks(low: float, high: float, wanted: int, whole: bool = False) -> list[float]:
    """About ``wanted`` + 1 round numbers from at most ``low`` to at least ``high``."""
    # Labels have six digits: less than that is a flat line.
    if high - low <= max(1e-6 * max(abs(low), abs(high)), 1e-290):
        margin = 0.1 * abs(low) if abs(low) > 1e-280 else 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    # Rounding makes 0.30000000000000004 0.3 again.
    digits = 2 - math.floor(math.log10(step))
    return [round(number * step, digits) for number in range(first, max(last, first + 1) + 1)]
