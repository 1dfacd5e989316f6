"""Sentence embeddings, for the dense retriever and for clustering tags (S10, S36).

``offline`` needs no model: hashed character n-grams, good enough to bring spellings of one word together, and
said to be just that in :attr:`Embedder.name`. Anything else is a sentence-transformers model.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
from numpy.typing import NDArray

from tagpr.errors import ConfigError

OFFLINE = "offline"

# Columns of the offline embedding: 8 KB a text, with few collisions at the hundred or so n-grams of a sentence.
_HASHED = 2048
# What a model's folder holds at least: the list of modules, or the configuration of a plain transformer.
_MODEL_FILES = ("modules.json", "config.json")


class Embedder(Protocol):
    """Text to vectors; the dot product of two says how near they are."""

    @property
    def name(self) -> str:
        """What it is, for manifests and reports."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one row per text, float32 [texts, dimensions]; equal texts in one call may differ in the last bits."""


def load_embedder(
    name: str, device: str | None = None, *, key: str = "benchmark.retriever_model"
) -> Embedder:
    """Make an embedder.

    Args:
        name: ``offline``, a sentence-transformers folder, or a model id of the Hugging Face hub. A plain
            transformer (``facebook/contriever``) gets mean pooling, as its authors use it.
        device: ``cpu``, ``cuda:0``, ...; None: a GPU where there is one.
        key: the setting that ``name`` comes from, for messages.

    Raises:
        ConfigError: no such folder, a folder without a model, or an id that neither the hub nor its cache gives.
    """
    if name == OFFLINE:
        return _HashedNgrams()
    return _SentenceTransformer(name, device, key)


class _HashedNgrams:
    """Character 3- to 5-grams within words, hashed, of length 1: a dot product is a cosine."""

    name = "hashed character n-grams (offline, no model)"

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._vectorizer = HashingVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), n_features=_HASHED, norm="l2", dtype=np.float32
        )

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not texts:
            return np.zeros((0, _HASHED), dtype=np.float32)
        vectors: NDArray[np.float32] = self._vectorizer.transform(texts).toarray()
        return vectors


def _load(name: str, device: str | None, on_disk: bool) -> Any:
    """Load from the folder, the hub's cache or the hub, in this order.

    Without a network the hub's client tries each file for half a minute, so it is asked once whether it is there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(name, device=device, local_files_only=True)
    except OSError:
        if on_disk:
            raise
    # A bare name is completed by sentence-transformers: the hub not knowing it as it stands means nothing yet.
    with suppress(RepositoryNotFoundError):
        HfApi().model_info(name, timeout=10)
    return SentenceTransformer(name, device=device)


class _SentenceTransformer:
    """A sentence-transformers model; vectors as the model gives them, not normalised."""

    def __init__(self, name: str, device: str | None, key: str) -> None:
        folder = Path(name).expanduser()
        if folder.is_dir():
            if not any((folder / file).is_file() for file in _MODEL_FILES):
                raise ConfigError(
                    f"{key}={name}: this folder holds no model (none of {', '.join(_MODEL_FILES)}). "
                    f"Give a sentence-transformers folder or {OFFLINE}."
                )
            name = str(folder)
        elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ConfigError(
                f"{key}={name}: no such folder. Give a sentence-transformers folder or {OFFLINE}."
            )
        # A transformer without a list of modules gets mean pooling, which is what is wanted and not worth a warning.
        chatty = logging.getLogger("sentence_transformers")
        level = chatty.level
        chatty.setLevel(logging.ERROR)
        try:
            self._model = _load(name, device, on_disk=folder.is_dir())
        except (OSError, ValueError, KeyError, RuntimeError, httpx.HTTPError) as error:
            # The hub raises OSErrors, its absence httpx errors, a damaged folder any of the others.
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise ConfigError(
                f"{key}={name}: cannot be loaded ({type(error).__name__}: {reason[:200]}). "
                f"Give the folder of a downloaded model, or {OFFLINE}."
            ) from error
        finally:
            chatty.setLevel(level)
        self.name = name
        self._model.eval()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not texts:
            return np.zeros((0, self._dimensions()), dtype=np.float32)
        vectors = self._model.encode(
            list(texts), show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=False
        )
        return np.asarray(vectors, dtype=np.float32)

    def _dimensions(self) -> int:
        return int(self._model.get_embedding_dimension() or 0)
