"""The retriever ``contriever``: items whose embeddings are nearest to the query's (S36).

The official code uses facebook/contriever with mean pooling and the dot product; any sentence-transformers model will do
(``tagpr.embedding``).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tagpr.embedding import Embedder, load_embedder
from tagpr.errors import ConfigError
from tagpr.retrieval import DENSE, RETRIEVERS, Request, best_first
from tagpr.schema import ProfileItem

KEY = "benchmark.retriever_model"

# Embeddings kept: a user's rows share most of their profile, and every condition of a sweep asks for the same. At
# Contriever's 768 dimensions 150 MB.
_KEPT = 50_000


class DenseRetriever:
    """Ranks items by the dot product of embeddings; those of items are remembered, the longest unused go first."""

    def __init__(self, embedder: Embedder, kept: int = _KEPT) -> None:
        self.embedder = embedder
        self._kept = kept
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __call__(self, items: Sequence[ProfileItem], size: int, request: Request) -> list[ProfileItem]:
        """Return the ``size`` nearest items, nearest first."""
        texts = [request.item_text(item.fields) for item in items]
        query, vectors = self._embed(request.query_text, texts)
        return best_first(items, vectors.astype(np.float64) @ query.astype(np.float64), size)

    def _embed(self, query: str, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The query's vector [d] and the items' [n, d], from one call of the model at most."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        fresh = self.embedder.encode([query, *new.values()])
        found = dict(zip(new, fresh[1:], strict=True))
        for key in dict.fromkeys(keys):
            if key in found:
                self._known[key] = found[key].copy()  # a view would keep the whole batch
            else:
                found[key] = self._known[key]
                self._known.move_to_end(key)
        while len(self._known) > self._kept:
            self._known.popitem(last=False)
        return fresh[0], np.stack([found[key] for key in keys])


_installed: tuple[str, str | None] | None = None


def install(retriever: str, model: str | None, device: str | None = None) -> None:
    """Make ``retriever`` ready to use in this process: loads the model of ``contriever``, does nothing for any other.

    Installing the same again keeps what is there.

    Raises:
        ConfigError: no model is given, or it cannot be loaded.
    """
    global _installed
    if retriever != DENSE or _installed == (model, device):
        return
    if not model:
        raise ConfigError(
            f"{KEY}: is not set, and benchmark.retriever={DENSE} needs it. "
            "Give a sentence-transformers folder, facebook/contriever, or offline."
        )
    RETRIEVERS[DENSE] = DenseRetriever(load_embedder(model, device, key=KEY))
    _installed = (model, device)
