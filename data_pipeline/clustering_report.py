"""The clusters of proposed tags as one HTML page: sizes, silhouettes, a picture, members with examples (S10)."""

import html
import math

from data_pipeline.clustering import Cluster, Clustering, ProposedTag
from tagpr.page.document import document, filled, read_part
from tagpr.page.figures import Series, line_chart

WIDTH, HEIGHT, SIDE, MARGIN = 640, 420, 70, 34
LINE, LETTER = 11.0, 6.0
LARGEST_RADIUS = 26.0
EXAMPLES = 4
MEMBERS_SHOWN = 60
LONGEST_TEXT = 300
SYNTHETIC = "SIMULATED: these tags come from a simulated tagger on synthetic chains. They say nothing about a real model."


def render(clustering: Clustering, chains: int, synthetic: bool) -> str:
    """The page. All text of models is escaped."""
    proposals = sum(tag.count for tag in clustering.tags)
    k = len(clustering.clusters)
    body = filled(
        __package__,
        "clusters.html",
        subtitle=html.escape(
            f"{chains:,} chains, {proposals:,} tagged segments, {len(clustering.tags):,} distinct tags; K-means, K = {k}, "
            f"silhouette {clustering.silhouette:.3f}, seed {clustering.seed}; embedder: {clustering.embedder}"
        ),
        banner=f'<p class="banner">{SYNTHETIC}</p>' if synthetic else "",
        table=_table(clustering),
        map_caption=html.escape(
            "Distinct tags, each as large as it is frequent, in the two directions in which they differ most "
            f"({clustering.explained:.0%} of the variance)"
        ),
        map=_map(clustering),
        sweep_caption=f"Silhouette by number of clusters; K = {k} was chosen",
        sweep=line_chart(
            [
                Series(
                    "silhouette", [(candidate.k, candidate.silhouette) for candidate in clustering.sweep], 0
                ),
                Series("chosen", [(k, clustering.silhouette)], 1),
            ],
            "Silhouette by number of clusters",
        ),
        members="".join(_members(number, cluster) for number, cluster in enumerate(clustering.clusters)),
    )
    return document("Clusters of proposed tags", body, style=read_part(__package__, "clusters.css"))


def _hue(number: int) -> str:
    """Neighbours in rank far apart on the colour circle: steps of the golden angle."""
    return f"--hue: {round(210 + number * 137.5) % 360}"


def _table(clustering: Clustering) -> str:
    rows = "".join(
        f'<tr><th class="name"><span class="swatch" style="{_hue(number)}"></span><code>{html.escape(cluster.name)}</code></th>'
        f'<td class="text">{_text(cluster.definition)}</td><td>{cluster.share:.1%}</td><td>{len(cluster.members):,}</td>'
        f"<td>{cluster.silhouette:.2f}</td></tr>"
        for number, cluster in enumerate(clustering.clusters)
    )
    return (
        '<table><thead><tr><th>proposed name</th><th class="text">what it is for, in the tagger\'s words</th><th>share</th>'
        f"<th>distinct tags</th><th>silhouette</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _map(clustering: Clustering) -> str:
    """SVG of the tags as circles, the most frequent of each cluster with its name."""
    points = clustering.points.tolist()
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across, up = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    largest = max(tag.count for tag in clustering.tags)
    of = clustering.cluster_of()
    circles: list[str] = []
    labels: dict[int, tuple[float, float]] = {}
    # Frequent tags come first, so that rare ones lie on top of them.
    for tag, (x, y) in zip(clustering.tags, points, strict=True):
        number = of[tag.key]
        left = SIDE + (x - min(xs)) / across * (WIDTH - 2 * SIDE)
        top = HEIGHT - MARGIN - (y - min(ys)) / up * (HEIGHT - 2 * MARGIN)
        radius = max(2.0, LARGEST_RADIUS * math.sqrt(tag.count / largest))
        title = html.escape(f"{tag.name}: {tag.count:,} times, in {clustering.clusters[number].name}")
        circles.append(
            f'<circle class="bubble" style="{_hue(number)}" cx="{left:.1f}" cy="{top:.1f}" r="{radius:.1f}">'
            f"<title>{title}</title></circle>"
        )
        labels.setdefault(number, (left, top + 3.5))
    texts = "".join(
        f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{html.escape(name)}</text>'
        for name, x, y in _apart(
            [(clustering.clusters[number].name, *place) for number, place in labels.items()]
        )
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Map of the proposed tags">'
        f"{''.join(circles)}{texts}</svg>"
    )


def _apart(labels: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Names at their places, from the top; one that would lie on another moves down by lines until it is free."""
    placed: list[tuple[str, float, float]] = []
    for name, x, y in sorted(labels, key=lambda label: label[2]):
        while any(
            abs(y - other_y) < LINE and abs(x - other_x) < LETTER * (len(name) + len(other)) / 2
            for other, other_x, other_y in placed
        ):
            y += LINE / 2
        placed.append((name, x, y))
    return placed


def _members(number: int, cluster: Cluster) -> str:
    tags = ", ".join(
        f'<span class="tag">{html.escape(tag.name)}</span> {tag.count:,}'
        for tag in cluster.members[:MEMBERS_SHOWN]
    )
    more = len(cluster.members) - MEMBERS_SHOWN
    examples = "".join(f"<li><q>{_text(text)}</q></li>" for text in _examples(cluster.members))
    return (
        f'<article><h3><span class="swatch" style="{_hue(number)}"></span><code>{html.escape(cluster.name)}</code></h3>'
        f"<p>{tags}{f', and {more:,} more' if more > 0 else ''}</p><ul>{examples}</ul></article>"
    )


def _examples(members: tuple[ProposedTag, ...]) -> list[str]:
    """The most frequent segments of the first members, each member's in turn."""
    found: list[str] = []
    for depth in range(EXAMPLES):
        for tag in members:
            if len(found) < EXAMPLES and depth < len(tag.segments) and tag.segments[depth] not in found:
                found.append(tag.segments[depth])
    return found


def _text(text: str) -> str:
    # Half a surrogate pair cannot be written as UTF-8.
    text = " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())
    return html.escape(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …")
