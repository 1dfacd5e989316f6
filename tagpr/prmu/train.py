"""Stage ``train_prmu``: preference pairs to a personalised reward model (S17-S19).

``python -m tagpr.prmu.train``. Bradley-Terry over model and user rows jointly (eq. 2):
loss = -log sigmoid(logit(chosen) - logit(rejected)), averaged over the pairs of a batch.
"""

import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from tagpr import runs
from tagpr.configuration import main
from tagpr.errors import ConfigError, StageError
from tagpr.prmu import model as prmu_model
from tagpr.prmu.encoding import Encoder, UserRows
from tagpr.prmu.model import Prmu, score_tokens
from tagpr.prmu.pairs import Split, accuracy_by_group, pair_files, read_pairs, split_pairs
from tagpr.schema import PreferencePair

logger = logging.getLogger("tagpr.prmu.train")

LINE_EVERY_S = 10.0
# Batches are cut from this many batches' worth of shuffled pairs sorted by length.
BUCKET_BATCHES = 16


class EncodedPair(NamedTuple):
    """Token ids of both inputs of a pair; they share the user row and the prompt."""

    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer input."""
        return max(len(self.chosen), len(self.rejected))

    def with_row(self, row: int) -> "EncodedPair":
        """The same pair as another user's."""
        return EncodedPair([row, *self.chosen[1:]], [row, *self.rejected[1:]])


def run(config: DictConfig) -> None:
    """Train PRMU, or say that it is there already.

    Raises:
        StageError: pairs or the base model are missing, or the loss is no number.
        DataError: a pair is malformed or longer than ``train_prmu.max_tokens``.
        ConfigError: settings contradict each other.
    """
    settings = config.train_prmu
    _check(settings)
    files = pair_files(Path(config.paths.chains))
    runs.check_tags_of(Path(config.paths.chains), "paths.chains")
    runs.check_model_folder(settings.init, "train_prmu.init", "base.sh", may_be_hub_id=True)
    inputs = {str(path): path for path in files} | {settings.init: Path(settings.init)}
    target = Path(config.paths.prmu)
    fingerprint = _fingerprint(inputs, settings, config.run.seed)
    if _made_from(target) == fingerprint:
        logger.info("%s: PRMU of these pairs and settings is there already", target)
        return

    torch.set_num_threads(settings.threads)
    torch.manual_seed(config.run.seed)
    device = (
        ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    )
    split = split_pairs(read_pairs(files), settings.unseen_users, settings.heldout_prompts, config.run.seed)
    user_ids = sorted({pair.user_id for pair in split.train})
    logger.info(
        "pairs: %d to train on (%d users), %d held out of the same users, %d of %d unseen users",
        len(split.train), len(user_ids), len(split.seen_users), len(split.unseen_users),
        len({pair.user_id for pair in split.unseen_users}),
    )  # fmt: skip
    model, tokenizer, users = prmu_model.build(
        settings.init, user_ids, row_std=settings.row_init_std, max_tokens=settings.max_tokens,
        seed=config.run.seed, dtype=getattr(torch, settings.dtype),
    )  # fmt: skip
    model.to(device)
    prmu = Prmu(model, tokenizer, Encoder(tokenizer, users, settings.max_tokens), version="untrained")

    metrics_path = Path(config.run.dir) / "metrics.jsonl"
    metrics_path.parent.mkdir(parents=True, exist_ok=True)
    with metrics_path.open("w", encoding="utf-8", buffering=1) as metrics:
        steps = train(prmu, split.train, settings, config.run.seed, metrics)
        accuracies = evaluate(prmu, split, settings.micro_batch_size)
        numbers = {f"prmu/accuracy/{name}": value for name, (value, _) in accuracies.items()}
        if "seen_users/all" in accuracies:
            numbers["prmu/accuracy"] = accuracies["seen_users/all"][0]
        _write(metrics, steps, numbers)
    for line in table(accuracies):
        logger.info(line)
    manifest = runs.manifest(
        "train_prmu", inputs, config.run.seed, fingerprint=fingerprint,
        settings=OmegaConf.to_container(settings), users=len(user_ids),
        accuracy={name: {"accuracy": value, "pairs": count} for name, (value, count) in accuracies.items()},
    )  # fmt: skip
    version = prmu_model.save(target, model, tokenizer, users, manifest.model_dump_json(indent=2))
    logger.info("%s: PRMU %s, %d user rows", target, version, len(user_ids))


def train(
    prmu: Prmu, pairs: Sequence[PreferencePair], settings: DictConfig, seed: int, metrics: IO[str]
) -> int:
    """Train in place; returns the number of updates.

    Raises:
        StageError: the loss is not finite.
    """
    rng = random.Random(seed)
    if settings.max_training_pairs is not None and settings.max_training_pairs < len(pairs):
        logger.info("train_prmu.max_training_pairs: using %d of %d", settings.max_training_pairs, len(pairs))
        pairs = rng.sample(list(pairs), settings.max_training_pairs)
    encoded = encode_pairs(prmu.encoder, pairs)
    model, unknown_row = prmu.model, prmu.encoder.users.unknown_row
    optimizer = _optimizer(model, settings)
    steps_per_epoch = math.ceil(len(encoded) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, settings.epochs * steps_per_epoch, settings.warmup)
    )
    model.train()
    step, started = 0, time.monotonic()
    last_line, seen, loss_sum, hits = started, 0, 0.0, 0
    for epoch in range(settings.epochs):
        for batch in bucketed_batches(encoded, settings.batch_size, rng):
            shown = [p.with_row(unknown_row) if rng.random() < settings.id_dropout else p for p in batch]
            for first in range(0, len(shown), settings.micro_batch_size):
                margins = _margins(
                    model, shown[first : first + settings.micro_batch_size], prmu.encoder.pad_token_id
                )
                loss = -logsigmoid(margins).sum()
                (loss / len(shown)).backward()
                loss_sum += loss.item()
                hits += int((margins > 0).sum())
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm).item()
            if not math.isfinite(norm) or not math.isfinite(loss_sum):
                raise StageError(
                    f"train_prmu: loss or gradient is not finite at step {step + 1}. "
                    "Lower train_prmu.learning_rate."
                )
            _step(optimizer, model.get_input_embeddings().weight, prmu.encoder.users, settings)
            schedule.step()
            optimizer.zero_grad()
            step, seen = step + 1, seen + len(shown)
            last = step == settings.epochs * steps_per_epoch
            if last or time.monotonic() - last_line >= LINE_EVERY_S:
                last_line = time.monotonic()
                logger.info(
                    "epoch %d/%d step %d/%d: loss %.3f accuracy %.3f, %.0f pairs/s, %.0f s",
                    epoch + 1, settings.epochs, step, settings.epochs * steps_per_epoch, loss_sum / seen,
                    hits / seen, step * settings.batch_size / (last_line - started), last_line - started,
                )  # fmt: skip
                _write(
                    metrics, step,
                    {
                        "prmu/loss": loss_sum / seen, "prmu/train_accuracy": hits / seen,
                        "prmu/gradient_norm": norm, "prmu/learning_rate": schedule.get_last_lr()[-1],
                    },
                )  # fmt: skip
                seen, loss_sum, hits = 0, 0.0, 0
    return step


def evaluate(prmu: Prmu, split: Split, batch_size: int) -> dict[str, tuple[float, int]]:
    """Accuracy and number of held-out pairs, by group, under three names.

    ``seen_users/...``: with the user's row; ``unknown_row/...``: the same pairs with the unknown row;
    ``unseen_users/...``: pairs of users without a row.
    """
    found = {}
    seen = encode_pairs(prmu.encoder, split.seen_users)
    unknown = [pair.with_row(prmu.encoder.users.unknown_row) for pair in seen]
    unseen = encode_pairs(prmu.encoder, split.unseen_users)
    for name, pairs, encoded in (
        ("seen_users", split.seen_users, seen),
        ("unknown_row", split.seen_users, unknown),
        ("unseen_users", split.unseen_users, unseen),
    ):
        groups = accuracy_by_group(pairs, pair_margins(prmu, encoded, batch_size))
        found.update({f"{name}/{group}": value for group, value in groups.items()})
    return found


def table(accuracies: Mapping[str, tuple[float, int]]) -> list[str]:
    """Lines of a table: a row for each group of pairs, with and without the user's row, and for unseen
    users."""

    def cell(name: str) -> str:
        if name not in accuracies:
            return f"{'-':>16}"
        value, count = accuracies[name]
        return f"{value:>8.3f} ({count:>5})"

    groups = dict.fromkeys(name.split("/", 1)[1] for name in accuracies)
    width = max([len(group) for group in groups], default=0) + 2
    columns = ("seen_users", "unknown_row", "unseen_users")
    lines = ["held-out accuracy (pairs)".ljust(width) + "".join(f"{column:>16}" for column in columns)]
    for group in groups:
        cells = "".join(cell(f"{column}/{group}") for column in columns)
        lines.append("  " + group.ljust(max(width, 25) - 2) + cells)
    return lines


def encode_pairs(encoder: Encoder, pairs: Sequence[PreferencePair]) -> list[EncodedPair]:
    """Token ids of pairs; users without a row get the unknown one.

    Raises:
        DataError: a pair is too long; names it.
    """
    return [
        EncodedPair(
            encoder.encode(pair.id, pair.user_id, pair.prompt, pair.chosen).token_ids,
            encoder.encode(pair.id, pair.user_id, pair.prompt, pair.rejected).token_ids,
        )
        for pair in pairs
    ]


def pair_margins(prmu: Prmu, encoded: Sequence[EncodedPair], batch_size: int) -> list[float]:
    """logit(chosen) - logit(rejected) of each pair, without gradient."""
    prmu.model.eval()
    order = sorted(range(len(encoded)), key=lambda index: encoded[index].length)
    margins = [0.0] * len(encoded)
    with torch.no_grad():
        for first in range(0, len(order), batch_size):
            chunk = order[first : first + batch_size]
            values = _margins(prmu.model, [encoded[i] for i in chunk], prmu.encoder.pad_token_id)
            for index, value in zip(chunk, values.tolist(), strict=True):
                margins[index] = value
    return margins


def bucketed_batches(
    pairs: Sequence[EncodedPair], batch_size: int, rng: random.Random
) -> Iterator[list[EncodedPair]]:
    """Every pair once, in random batches of pairs of similar length (less padding)."""
    order = list(pairs)
    rng.shuffle(order)
    batches = []
    for first in range(0, len(order), batch_size * BUCKET_BATCHES):
        bucket = sorted(order[first : first + batch_size * BUCKET_BATCHES], key=lambda pair: pair.length)
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    rng.shuffle(batches)
    yield from batches


def _margins(model: PreTrainedModel, pairs: Sequence[EncodedPair], pad_token_id: int) -> torch.Tensor:
    """Margins ``[n]`` of pairs, both inputs of all pairs in one forward pass."""
    logits = score_tokens(
        model, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], pad_token_id
    )
    return logits[: len(pairs)] - logits[len(pairs) :]


def _optimizer(model: PreTrainedModel, settings: DictConfig) -> torch.optim.AdamW:
    embedding = model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not embedding]
    groups = [
        {"params": [embedding], "lr": settings.embedding_learning_rate, "weight_decay": 0.0},
        {"params": others, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
    ]
    return torch.optim.AdamW(groups, betas=tuple(settings.betas))


def _step(
    optimizer: torch.optim.Optimizer, table: torch.Tensor, users: UserRows, settings: DictConfig
) -> None:
    """One update; user rows move by their own learning rate.

    They are part of the embedding table, one tensor with one rate. AdamW's step is proportional to the rate, and the
    table has no weight decay, so scaling what a step did to the rows is exactly a step with another rate.
    """
    rows = table.detach()[users.unknown_row : users.end]
    before = rows.clone()
    optimizer.step()
    rows.copy_(before + (rows - before) * (settings.row_learning_rate / settings.embedding_learning_rate))


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at an update (from 0): linear warm-up, then cosine to 5 %."""
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))))


def _check(settings: DictConfig) -> None:
    for key in ("unseen_users", "heldout_prompts", "id_dropout"):
        if not 0.0 <= settings[key] < 1.0:
            raise ConfigError(f"train_prmu.{key}={settings[key]}: is no share. Set 0 or more, less than 1.")
    for key in ("epochs", "batch_size", "micro_batch_size", "threads", "max_tokens"):
        if not isinstance(settings[key], int) or settings[key] < 1:
            raise ConfigError(
                f"train_prmu.{key}={settings[key]}: is no positive whole number. Set 1 or more."
            )
    if settings.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"train_prmu.dtype={settings.dtype}: unknown. Set float32 or bfloat16.")


def _fingerprint(inputs: Mapping[str, Path], settings: DictConfig, seed: int) -> str:
    """What determines the model: contents of the inputs (a hub model by its name), settings, seed."""
    hashes = runs.manifest("train_prmu", inputs, seed).inputs
    text = json.dumps(
        [list(hashes.values()), OmegaConf.to_container(settings), seed], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _made_from(target: Path) -> str | None:
    """Fingerprint in the manifest of an existing PRMU."""
    try:
        notes = json.loads((target / "manifest.json").read_text("utf-8"))["notes"]
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError):
        return None
    return str(notes.get("fingerprint"))


def _write(metrics: IO[str], step: int, data: Mapping[str, Any]) -> None:
    metrics.write(json.dumps({"step": step, "data": data}) + "\n")


if __name__ == "__main__":
    main("train_prmu", run)
