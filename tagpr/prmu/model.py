"""PRMU's model: a stock sequence classifier with one label and one added vocabulary row per user (S17).

Nothing but the size of the embedding table differs from the base model, so its logits for text without user
rows are unchanged, and every engine that serves the base architecture serves PRMU.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tagpr.errors import ConfigError, StageError
from tagpr.prmu.encoding import END_TOKEN, USERS_FILE, Encoder, Place, UserRows, rows_behind

logger = logging.getLogger(__name__)

VERSION_CHARACTERS = 16
HEAD_STD = 0.02
# Says how the checkpoint came to be, not what it computes.
NOT_HASHED = {"manifest.json"}


@dataclass(frozen=True)
class Prmu:
    """A loaded checkpoint. ``version`` is a hash of its content."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    version: str


def build(
    base: str,
    user_ids: Sequence[str],
    *,
    row_std: float,
    max_tokens: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    place: Place = "first",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, UserRows]:
    """Base model plus user rows, drawn from a normal distribution of standard deviation ``row_std``.

    With ``place`` "ends" they are drawn around the embedding of ``<|im_end|>``: a row then reads a response as that token would,
    which the base knows how to do, with something of its own. A base without a reward head (a language model) gets a new one.
    ``max_tokens`` raises the stated context length where the base's is shorter; rotary positions have no weights, so this
    changes no logit.

    Raises:
        StageError: ``base`` is no model folder (or hub name) with safetensors and a tokenizer.
        ConfigError: ``base`` has user rows already.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(base)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                base, num_labels=1, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise StageError(
            f"train_prmu.init={base}: is no Hugging Face model with safetensors and a tokenizer "
            f"({str(error).splitlines()[0][:160]}). Make the base model first, or point the key at one."
        ) from error
    if (Path(base) / USERS_FILE).exists():
        raise ConfigError(
            f"train_prmu.init={base}: has user rows already. Start from a model without, or add users with "
            "bash recipes/add_prmu_users.sh."
        )
    users = rows_behind(tokenizer, user_ids, place)
    make_room(model, users.end)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        rows = torch.randn(users.end - users.unknown_row, table.shape[1], generator=generator)
        table[users.unknown_row : users.end] = (rows * row_std).to(table.dtype) + centre(
            model, tokenizer, place
        )
        for name in report["missing_keys"]:
            head = model.get_parameter(name)
            head.copy_(torch.randn(head.shape, generator=generator) * HEAD_STD)
            logger.info("%s: %s has no %s, starting it anew", "train_prmu.init", base, name)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.config.max_position_embeddings < max_tokens:
        model.config.max_position_embeddings = max_tokens
    return model, tokenizer, users


def centre(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: Place) -> torch.Tensor:
    """Around what user rows are drawn, [hidden size]."""
    table: torch.Tensor = model.get_input_embeddings().weight.detach()
    if place == "first":
        return table.new_zeros(table.shape[1])
    return table[tokenizer.convert_tokens_to_ids(END_TOKEN)].clone()


def make_room(model: PreTrainedModel, size: int) -> None:
    """Let the embedding table have at least ``size`` rows; those that are there stay, new ones are whatever."""
    if size > len(model.get_input_embeddings().weight):
        with _quiet():
            model.resize_token_embeddings(size, mean_resizing=False)


def saved_dtype(folder: Path) -> torch.dtype:
    """In which precision a checkpoint's weights are kept."""
    dtype = transformers.AutoConfig.from_pretrained(folder).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def score_tokens(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_token_id: int
) -> torch.Tensor:
    """Logits, float32 ``[n]``, of token sequences as one right-padded batch.

    No attention mask is needed: the model is causal and the logit is read at the last token that is not
    padding, so padding is never looked at (and the masked attention kernel, slower on CPUs, is not taken).
    """
    longest = max(map(len, sequences))
    padded = [[*sequence, *[pad_token_id] * (longest - len(sequence))] for sequence in sequences]
    input_ids = torch.tensor(padded, device=model.device)
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits[:, 0].float()


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, users: UserRows, manifest: str
) -> str:
    """Write a checkpoint beside ``folder`` and move it there in one step; returns its version."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    with _quiet():
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    users.write(fresh)
    (fresh / "manifest.json").write_text(manifest, "utf-8")
    version = content_version(fresh)
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return version


def load(
    folder: Path | str, *, max_tokens: int | None = None, device: str = "cpu", dtype: str = "auto"
) -> Prmu:
    """Load a checkpoint for scoring.

    Args:
        folder: of a checkpoint that ``save`` wrote.
        max_tokens: of one input; ``None`` takes the model's context length.
        device: where the model goes.
        dtype: ``auto`` (as saved), ``float32`` or ``bfloat16``.

    Raises:
        StageError: the folder holds no PRMU, or its user rows lie outside its embedding table.
        ConfigError: ``max_tokens`` is more than the model's context.
    """
    folder = Path(folder)
    encoder, tokenizer, version = load_encoder(folder, max_tokens)
    try:
        with _quiet():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise StageError(
            f"{folder}: its weights cannot be loaded ({str(error).splitlines()[0][:160]}). "
            "Run bash recipes/train_prmu.sh again."
        ) from error
    if report["missing_keys"]:
        raise StageError(
            f"{folder}: lacks {sorted(report['missing_keys'])[0]}. Run bash recipes/train_prmu.sh again."
        )
    return Prmu(model.to(device).eval(), tokenizer, encoder, version)


def load_encoder(folder: Path, max_tokens: int | None = None) -> tuple[Encoder, PreTrainedTokenizerBase, str]:
    """What scoring needs beside the weights: encoder, tokenizer, version. Raises as ``load``."""
    users = UserRows.read(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{folder}: is no checkpoint ({str(error).splitlines()[0][:160]}). "
            "Run bash recipes/train_prmu.sh again."
        ) from error
    if config.num_labels != 1 or users.end > config.vocab_size or config.pad_token_id is None:
        raise StageError(
            f"{folder}: is no PRMU ({config.num_labels} labels, rows up to {users.end} of "
            f"{config.vocab_size}, padding {config.pad_token_id}). Run bash recipes/train_prmu.sh again."
        )
    context: int = config.max_position_embeddings
    if max_tokens is not None and max_tokens > context:
        raise ConfigError(
            f"server.max_tokens={max_tokens}: the model's context is {context}. Set no more, or null."
        )
    return Encoder(tokenizer, users, max_tokens or context), tokenizer, content_version(folder)


def content_version(folder: Path) -> str:
    """Short hash over names and contents of a checkpoint's files, apart from its manifest."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in NOT_HASHED and not path.name.startswith("."):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:VERSION_CHARACTERS]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on a new head and its progress bars: what matters of it is checked
    here."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
