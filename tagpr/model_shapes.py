"""How large a model is, from its description alone: no weights are loaded, and no framework is imported."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tagpr.errors import DataError

# Larger headers of a safetensors file are refused by its own readers too.
LARGEST_HEADER_BYTES = 100_000_000

# config.json of the paper's model (S22), for a machine that has not downloaded it.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
        "tie_word_embeddings": False, "max_position_embeddings": 40960,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama and Qwen families."""

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def kv_values(self) -> int:
        """Numbers that the attention cache holds for one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def lora_parameters(self, rank: int) -> int:
        """Parameters of adapters of this rank on all seven linear layers of every block."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = (self.hidden + query) * 2 + (self.hidden + key) * 2 + (self.hidden + self.intermediate) * 3
        return rank * self.layers * sides


def read_shape(model: str) -> Shape | None:
    """Shape of a model folder, of a model in the hub's cache on this machine, or of a known one; None where nobody knows.

    Raises:
        DataError: the folder's config.json cannot be read.
    """
    folder = Path(model)
    path = folder / "config.json"
    if path.is_file():
        try:
            described = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(
                f"{path}: is no JSON ({error}). Make the model again, or mend the file."
            ) from error
        counted = sum(count_weights(file) for file in sorted(folder.glob("*.safetensors")))
        return shape_of(described, counted or None)
    if folder.exists():
        return None
    cached = _cached(model)
    if cached is not None:
        return shape_of(json.loads(cached.read_text("utf-8")))
    return shape_of(KNOWN[model]) if model in KNOWN else None


def _cached(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def shape_of(described: Mapping[str, Any], counted: int | None = None) -> Shape | None:
    """Shape that a config.json describes; ``counted`` parameters are believed more than the formula. None for other families."""
    try:
        hidden, layers = described["hidden_size"], described["num_hidden_layers"]
        heads, vocabulary = described["num_attention_heads"], described["vocab_size"]
        intermediate = described["intermediate_size"]
    except KeyError:
        return None
    kv_heads = described.get("num_key_value_heads") or heads
    head_dim = described.get("head_dim") or hidden // heads
    if counted is None:
        if described.get("num_experts") or described.get("num_local_experts"):
            return None
        query, key = heads * head_dim, kv_heads * head_dim
        block = 2 * hidden * query + 2 * hidden * key + 3 * hidden * intermediate + 2 * hidden
        if described.get("model_type") == "qwen3":
            block += 2 * head_dim
        elif described.get("model_type") == "qwen2":
            block += query + 2 * key
        tables = 1 if described.get("tie_word_embeddings", False) else 2
        counted = tables * vocabulary * hidden + layers * block + hidden
    return Shape(counted, layers, hidden, vocabulary, heads, kv_heads, head_dim, intermediate)


def count_weights(file: Path) -> int:
    """Numbers in a safetensors file, from its header.

    Raises:
        DataError: the file is torn, or is something else.
    """
    return sum(prod(entry["shape"]) for entry in read_header(file).values())


def read_header(file: Path) -> dict[str, Any]:
    """Header of a safetensors file: tensor -> dtype, shape, offsets; checks that the file is as long as they say.

    Raises:
        DataError: the file is torn, or is something else.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < length <= min(LARGEST_HEADER_BYTES, size - 8):
            raise DataError(f"{file}: is no safetensors file, or a torn one. Make or download it again.")
        try:
            header: dict[str, Any] = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}: is no safetensors file, or a torn one. Make or download it again."
            ) from error
    if size != 8 + length + end:
        raise DataError(
            f"{file}: has {size} bytes, its header says {8 + length + end}. Make or download it again."
        )
    return header
