"""Clustering of freely proposed tags: normalised names with their contexts -> embeddings -> K-means over a sweep of K (S10).

What is clustered are distinct tags, each as heavy as it is frequent. A tag is described by up to three things: its own
wording, what the tagger said that it is for, and the segments that bear it. Each is the mean of its texts' embeddings, less
the mean over all tags, so that what every tag has in common does not count. Two names for one kind of step share no letters,
but what they are for and where they are used agree.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from nltk.stem.snowball import SnowballStemmer
from numpy.typing import NDArray

from data_pipeline.exploratory import Proposal
from data_pipeline.settings import ContextWeights, ExploratorySettings
from tagpr.embedding import Embedder, load_embedder
from tagpr.errors import StageError
from tagpr.vocabulary import name_problem

Features = NDArray[np.float64]

# So many different texts describe a tag well enough; a frequent one could have thousands.
MOST_TEXTS = 64
KMEANS_STARTS = 10
# Up to so many tags the dimensions are rotated, not cut; from so many on, the rotation is an approximation.
MOST_DIMENSIONS, EXACT_TAGS = 256, 2000
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")
_SEPARATORS = re.compile(r"[\s_\-]+")
_ARTICLES = frozenset({"the", "a", "an"})


@dataclass(frozen=True)
class ProposedTag:
    """A distinct tag. ``name`` is its most frequent spelling, normalised; texts are distinct, most frequent first."""

    key: str
    name: str
    count: int
    spellings: tuple[str, ...]
    purposes: tuple[str, ...]
    segments: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """One K of the sweep. ``silhouette`` in [-1, 1] is the mean over proposals; ``inertia`` is what K-means minimises."""

    k: int
    silhouette: float
    inertia: float


@dataclass(frozen=True)
class Cluster:
    """Tags that seem to mean one thing, most frequent first. ``share`` of all proposals, in [0, 1]."""

    name: str
    definition: str
    members: tuple[ProposedTag, ...]
    share: float
    silhouette: float


@dataclass(frozen=True)
class Clustering:
    """The chosen clusters, the largest first. ``points``: place of each tag in two dimensions, [tags, 2].

    ``explained`` is the share of the variance that these two dimensions show.
    """

    tags: tuple[ProposedTag, ...]
    clusters: tuple[Cluster, ...]
    sweep: tuple[Candidate, ...]
    silhouette: float
    embedder: str
    points: NDArray[np.float64]
    explained: float
    seed: int

    def cluster_of(self) -> dict[str, int]:
        """Key of a tag -> index of its cluster."""
        return {tag.key: number for number, cluster in enumerate(self.clusters) for tag in cluster.members}


def normalise(tag: str) -> str:
    """A tag in lower-case words with single spaces, without articles: ``Identify_the-Pattern`` -> ``identify pattern``."""
    words = _SEPARATORS.split(_CAMEL.sub(" ", unicodedata.normalize("NFKC", tag)).casefold().strip(" _-"))
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words)


def merge_spellings(proposals: Sequence[Proposal]) -> tuple[ProposedTag, ...]:
    """Distinct tags, most frequent first: spellings with the same word stems are one (``patterns``, ``Pattern``)."""
    stem = SnowballStemmer("english").stem
    groups: dict[str, list[Proposal]] = {}
    for proposal in proposals:
        key = " ".join(stem(word) for word in normalise(proposal.tag).split())
        groups.setdefault(key, []).append(proposal)
    tags = [
        ProposedTag(
            key=key,
            name=_by_frequency(normalise(proposal.tag) for proposal in group)[0],
            count=len(group),
            spellings=_by_frequency(proposal.tag for proposal in group),
            purposes=_by_frequency(proposal.purpose for proposal in group),
            segments=_by_frequency(proposal.segment for proposal in group),
        )
        for key, group in groups.items()
    ]
    return tuple(sorted(tags, key=lambda tag: (-tag.count, tag.key)))


def _by_frequency(texts: Iterable[str]) -> tuple[str, ...]:
    counts = Counter(texts)
    return tuple(sorted(counts, key=lambda text: (-counts[text], text)))


def features(tags: Sequence[ProposedTag], embedder: Embedder, weights: ContextWeights) -> Features:
    """What tags are compared by: float64 [tags, dimensions of all contexts together], rows of length 1."""
    mass = np.array([tag.count for tag in tags], dtype=np.float64)
    texts: Mapping[str, Sequence[Sequence[str]]] = {
        "name": [(tag.name,) for tag in tags],
        "purposes": [tag.purposes[:MOST_TEXTS] for tag in tags],
        "segments": [tag.segments[:MOST_TEXTS] for tag in tags],
    }
    blocks = []
    for context, described in texts.items():
        weight = getattr(weights, context)
        if not weight:
            continue
        distinct = sorted({text for group in described for text in group})
        row = {text: number for number, text in enumerate(distinct)}
        vectors = _unit(embedder.encode(distinct).astype(np.float64))
        means = np.stack([vectors[[row[text] for text in group]].mean(axis=0) for group in described])
        centred = means - np.average(means, axis=0, weights=mass)
        blocks.append(weight * _unit(centred))
    return _unit(np.concatenate(blocks, axis=1))


def _unit(vectors: Features) -> Features:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def cluster(proposals: Sequence[Proposal], settings: ExploratorySettings, seed: int) -> Clustering:
    """Cluster proposed tags with the K of the best silhouette; the same proposals and seed give the same clusters.

    Silhouettes are means over proposals, so that a tag counts as often as it was proposed. Equal ones: the smaller K.

    Raises:
        ConfigError: the embedder cannot be loaded.
        StageError: there are fewer distinct tags than clusters asked for.
    """
    from sklearn.metrics import silhouette_samples

    tags = merge_spellings(proposals)
    embedder = load_embedder(settings.embedder, key="chains.exploratory.embedder")
    points = _reduced(features(tags, embedder, settings.weights), seed)
    mass = np.array([tag.count for tag in tags], dtype=np.float64)
    # K-means finds no more clusters than there are different points, and a silhouette needs one point more than that.
    most = min(settings.most_clusters, len(np.unique(points.round(6), axis=0)) - 1)
    if most < settings.fewest_clusters:
        raise StageError(
            f"chains.exploratory.fewest_clusters={settings.fewest_clusters}: only {len(tags)} distinct tags were proposed. "
            "Tag more chains (chains.exploratory.chains), or lower it."
        )
    sweep: list[Candidate] = []
    best: tuple[float, NDArray[np.int32]] | None = None
    for k in range(settings.fewest_clusters, most + 1):
        labels, inertia = _k_means(points, mass, k, seed)
        silhouette = float(np.average(silhouette_samples(points, labels), weights=mass))
        sweep.append(Candidate(k, silhouette, inertia))
        if best is None or silhouette > best[0]:
            best = silhouette, labels
    assert best is not None
    silhouette, labels = best
    flat, explained = _flat(points, mass)
    return Clustering(
        tags=tags,
        clusters=_describe(tags, labels, silhouette_samples(points, labels), embedder),
        sweep=tuple(sweep),
        silhouette=silhouette,
        embedder=embedder.name,
        points=flat,
        explained=explained,
        seed=seed,
    )


def _reduced(vectors: Features, seed: int) -> Features:
    """The same distances, or for many tags nearly so, in fewer dimensions: the sweep takes minutes otherwise."""
    from sklearn.decomposition import PCA

    dimensions = min(MOST_DIMENSIONS, *vectors.shape)
    solver = "full" if len(vectors) <= EXACT_TAGS else "randomized"
    reduced: Features = PCA(dimensions, svd_solver=solver, random_state=seed).fit_transform(vectors)
    return reduced


def _k_means(points: Features, mass: Features, k: int, seed: int) -> tuple[NDArray[np.int32], float]:
    from sklearn.cluster import KMeans

    fitted = KMeans(k, n_init=KMEANS_STARTS, random_state=seed).fit(points, sample_weight=mass)
    return fitted.labels_, float(fitted.inertia_)


def _flat(points: Features, mass: Features) -> tuple[Features, float]:
    """The two directions in which the proposals differ most, [tags, 2], and their share of the variance."""
    centred = points - np.average(points, axis=0, weights=mass)
    _, lengths, directions = np.linalg.svd(centred * np.sqrt(mass)[:, None], full_matrices=False)
    variance = lengths**2
    return centred @ directions[:2].T, float(variance[:2].sum() / max(variance.sum(), 1e-12))


def _describe(
    tags: Sequence[ProposedTag], labels: NDArray[np.int32], silhouettes: Features, embedder: Embedder
) -> tuple[Cluster, ...]:
    """Clusters with a name that is free and a definition, the largest first."""
    total = sum(tag.count for tag in tags)
    groups: dict[int, list[int]] = {}
    for number, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(number)
    names: list[str] = []
    clusters: list[Cluster] = []
    for group in sorted(groups.values(), key=lambda group: (-sum(tags[n].count for n in group), group)):
        members = [tags[number] for number in group]
        size = sum(tag.count for tag in members)
        names.append(_free_name(members, names))
        clusters.append(
            Cluster(
                name=names[-1],
                definition=_definition(members, embedder),
                members=tuple(members),
                share=size / total,
                silhouette=sum(silhouettes[number] * tags[number].count for number in group) / size,
            )
        )
    return tuple(clusters)


def _free_name(members: Sequence[ProposedTag], taken: Sequence[str]) -> str:
    """The most frequent member's wording as a tag, or the first after it that can be one; a person may know better."""
    for member in members:
        name = member.name.replace(" ", "_").replace("-", "_")
        if not name_problem(name, taken):
            return name
    return next(name for number in count(1) if not name_problem(name := f"step_{number}", taken))


def _definition(members: Sequence[ProposedTag], embedder: Embedder) -> str:
    """Of what the tagger said the members are for, that which is nearest to all of it."""
    purposes = sorted({purpose for member in members for purpose in member.purposes[:MOST_TEXTS]})
    vectors = _unit(embedder.encode(purposes).astype(np.float64))
    row = {purpose: number for number, purpose in enumerate(purposes)}
    mean = sum(
        member.count * vectors[[row[text] for text in member.purposes[:MOST_TEXTS]]].mean(axis=0)
        for member in members
    )
    nearest = purposes[int(np.argmax(vectors @ mean))]
    return " ".join(nearest.translate({ord("<"): "‹", ord(">"): "›"}).split())
