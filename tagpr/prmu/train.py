"""Stage ``train_prmu``: preference pairs to a personalised reward model (S17-S19).

``python -m tagpr.prmu.train``. Bradley-Terry over model and user rows jointly (eq. 2):
loss = -log sigmoid(logit(chosen) - logit(rejected)), averaged over the pairs of a batch.
"""

import hashlib
import json
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from tagpr import runs
from tagpr.configuration import main
from tagpr.errors import ConfigError, StageError
from tagpr.prmu import model as prmu_model
from tagpr.prmu.batches import bucketed_batches, drop_ids, micro_batches, share_of
from tagpr.prmu.encoding import PLACES, Encoder
from tagpr.prmu.figures import Figures, figures_by_group, table
from tagpr.prmu.model import Prmu
from tagpr.prmu.packing import PACKINGS, EncodedPair, Packing, logits, pack, use_packing
from tagpr.prmu.pairs import Split, pair_files, read_pairs, split_pairs
from tagpr.prmu.peers import Peers, run_together
from tagpr.prmu.rows import NOISE, RowTable, preferred, put_back, take_out
from tagpr.prmu.state import latest_state, restore_state, save_state
from tagpr.schema import PreferencePair

logger = logging.getLogger("tagpr.prmu.train")

LINE_EVERY_S = 10.0
ROW_INITS = ("preferences", "random")
USER_ROWS = ("learned", "frozen", "none")

RowsOf = Callable[[torch.Tensor], torch.Tensor]
"""Ids of user rows [k] -> their embeddings [k, hidden size]."""


@dataclass
class Training:
    """A model in training, its user rows apart."""

    prmu: Prmu
    rows: RowTable
    device: torch.device
    precision: AbstractContextManager[Any]

    def margins(self, pairs: Sequence[EncodedPair], packing: Packing, rows_of: RowsOf) -> torch.Tensor:
        """logit(chosen) - logit(rejected), float32 [n], of pairs in one forward pass."""
        return _margins(
            self.prmu.model, pairs, packing, self.prmu.encoder.pad_token_id, rows_of, self.precision
        )

    def current(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of user rows, without gradient."""
        return self.rows.rows[self.rows.index(ids)]


def run(config: DictConfig) -> None:
    """Train PRMU, or say that it is there already.

    Raises:
        StageError: pairs or the base model are missing, or the loss is no number.
        DataError: a pair is malformed or longer than ``train_prmu.max_tokens``.
        ConfigError: settings contradict each other.
    """
    settings = config.train_prmu
    _check(settings)
    pair_files(Path(config.paths.chains))
    runs.check_tags_of(Path(config.paths.chains), "paths.chains")
    runs.check_model_folder(settings.init, "train_prmu.init", "base.sh", may_be_hub_id=True)
    target = Path(config.paths.prmu)
    if _made_from(target) == fingerprint(config):
        logger.info("%s: PRMU of these pairs and settings is there already", target)
        return
    run_together("tagpr.prmu.train:work", config, gpus=_device(settings.device) == "cuda")


def work(config: DictConfig) -> None:
    """What each of the processes does that train together; the first one writes. Raises as :func:`run`."""
    settings, seed, peers = config.train_prmu, config.run.seed, Peers()
    torch.set_num_threads(settings.threads)
    inputs = _inputs(config)
    made_from = fingerprint(config)
    split = split_pairs(
        read_pairs(pair_files(Path(config.paths.chains))),
        settings.unseen_users,
        settings.heldout_prompts,
        seed,
    )
    user_ids = sorted({pair.user_id for pair in split.train})
    if peers.first:
        logger.info(
            "pairs: %d to train on (%d users), %d held out of the same users, %d of %d unseen users",
            len(split.train), len(user_ids), len(split.seen_users), len(split.unseen_users),
            len({pair.user_id for pair in split.unseen_users}),
        )  # fmt: skip
    training = prepare(settings, split.train, seed)
    folder = Path(config.run.dir)
    checkpoints = folder / "checkpoints"
    found = latest_state(checkpoints, made_from)
    metrics = runs.MetricsLog(folder / "metrics.jsonl", found[0] if found else 0) if peers.first else None
    steps = train(training, split.train, settings, seed, metrics, peers, checkpoints, made_from)
    held_out = evaluate(training, split, settings.micro_batch_size, settings.packing, peers)
    if metrics is None:
        peers.barrier()
        return
    numbers: dict[str, float] = {}
    for name, value in held_out.items():
        numbers |= {
            f"prmu/accuracy/{name}": value.accuracy, f"prmu/margin/{name}": value.margin, f"prmu/ece/{name}": value.ece,
        }  # fmt: skip
    if "seen_users/all" in held_out:
        numbers["prmu/accuracy"] = held_out["seen_users/all"].accuracy
    metrics.log(numbers, steps)
    metrics.finish()
    for line in table(held_out):
        logger.info(line)
    runs.write_json_atomically(
        folder / "held_out.json", {name: value.as_json() for name, value in held_out.items()}
    )
    manifest = runs.manifest(
        "train_prmu", inputs, seed, fingerprint=made_from, settings=OmegaConf.to_container(settings),
        users=len(user_ids),
        accuracy={name: {"accuracy": value.accuracy, "pairs": value.pairs} for name, value in held_out.items()},
    )  # fmt: skip
    version = finish(training, settings, Path(config.paths.prmu), manifest.model_dump_json(indent=2))
    shutil.rmtree(checkpoints, ignore_errors=True)
    logger.info("%s: PRMU %s, %d user rows", config.paths.prmu, version, len(user_ids))
    peers.barrier()


def prepare(settings: DictConfig, pairs: Sequence[PreferencePair], seed: int) -> Training:
    """The model before its first update on these pairs, on its device; weights are float32 whatever ``dtype``.

    bfloat16 is the precision of the forward and backward pass (autocast): with weights in bfloat16, updates of usual size
    would be lost in rounding.
    """
    torch.manual_seed(seed)
    user_ids = sorted({pair.user_id for pair in pairs})
    device = torch.device(_device(settings.device))
    model, tokenizer, users = prmu_model.build(
        settings.init, [] if settings.user_rows == "none" else user_ids, row_std=settings.row_init_std,
        max_tokens=settings.max_tokens, seed=seed, place=settings.row_place,
    )  # fmt: skip
    model.to(device)
    rows = take_out(model, users, settings.betas)
    use_packing(model, settings.packing)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    precision = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")
    prmu = Prmu(model, tokenizer, Encoder(tokenizer, users, settings.max_tokens), version="untrained")
    if settings.row_init == "preferences" and settings.user_rows == "learned":
        start_from_preferences(rows, prmu, pairs, settings.row_init_std)
    return Training(prmu, rows, device, precision)


def start_from_preferences(
    rows: RowTable, prmu: Prmu, pairs: Sequence[PreferencePair], row_std: float
) -> None:
    """Replace random parts of rows by :func:`tagpr.prmu.rows.preferred` ones of the same length, with some randomness left."""
    words = prmu.model.get_input_embeddings().weight
    directions = preferred(words, encode_pairs(prmu.encoder, pairs), rows.first, len(rows.rows))
    length = row_std * math.sqrt(rows.rows.shape[1])
    known = directions.norm(dim=1) > 0
    centre = prmu_model.centre(prmu.model, prmu.tokenizer, prmu.encoder.users.place)
    drawn = rows.rows[known] - centre
    rows.rows[known] = centre + length * directions[known].to(rows.rows.device) + NOISE * drawn


def finish(training: Training, settings: DictConfig, target: Path, manifest: str) -> str:
    """Save the model with its rows as a checkpoint; returns its version."""
    prmu = training.prmu
    put_back(prmu.model, prmu.encoder.users, training.rows.rows)
    use_packing(prmu.model, "padded")
    prmu.model.to(getattr(torch, settings.dtype))
    return prmu_model.save(target, prmu.model, prmu.tokenizer, prmu.encoder.users, manifest)


def train(
    training: Training,
    pairs: Sequence[PreferencePair],
    settings: DictConfig,
    seed: int,
    metrics: runs.MetricsLog | None = None,
    peers: Peers | None = None,
    checkpoints: Path | None = None,
    made_from: str = "",
) -> int:
    """Train in place; returns the number of updates.

    Order of pairs and dropped ids depend on the seed and the step alone, so a run that goes on from a checkpoint (in
    ``checkpoints``, by the same ``made_from``) does what one that was never stopped does. Several processes divide each batch;
    gradients are summed, so their number changes rounding only.

    Raises:
        StageError: the loss is not finite, or a checkpoint is damaged.
    """
    peers = peers or Peers()
    if settings.max_training_pairs is not None and settings.max_training_pairs < len(pairs):
        logger.info("train_prmu.max_training_pairs: using %d of %d", settings.max_training_pairs, len(pairs))
        pairs = random.Random(seed).sample(list(pairs), settings.max_training_pairs)
    prmu, rows, model = training.prmu, training.rows, training.prmu.model
    encoded = encode_pairs(prmu.encoder, pairs)
    unknown = prmu.encoder.users.unknown_row
    optimizer = _optimizer(model, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps_per_epoch = math.ceil(len(encoded) / settings.batch_size)
    steps = settings.epochs * steps_per_epoch
    step = 0
    if checkpoints and (found := latest_state(checkpoints, made_from)):
        restore_state(found[1], model, optimizer, rows)
        step = found[0]
        logger.info("going on after step %d of %d", step, steps)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    started = last_line = time.monotonic()
    first_step = step
    seen, loss_sum, hits, margin_sum = 0, 0.0, 0, 0.0
    batches: list[list[EncodedPair]] = []
    while step < steps:
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 or not batches:
            order = random.Random(f"order of epoch {epoch}, {seed}")
            batches = bucketed_batches(encoded, settings.batch_size, order, settings.by_prompt)
        dropped = random.Random(f"dropped ids of step {step}, {seed}")
        batch = drop_ids(batches[place], settings.id_dropout, unknown, dropped, settings.by_prompt)
        share = _rate(step, steps, settings.warmup)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        own = share_of(batch, peers.rank, peers.world)
        index, gradient = [], []
        for part in micro_batches(own, settings.micro_batch_size, settings.by_prompt):
            leaf = _Leaf(training)
            margins = training.margins(part, settings.packing, leaf.rows_of)
            loss = -logsigmoid(margins).sum()
            (loss / len(batch)).backward()
            index.append(leaf.index)
            gradient.append(leaf.gradient())
            loss_sum += loss.item()
            hits += int((margins > 0).sum())
            margin_sum += margins.sum().item()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        peers.add_up(gradients)
        touched, by_row = peers.add_up_rows(
            torch.cat(index) if index else torch.zeros(0, dtype=torch.int64, device=training.device),
            torch.cat(gradient) if gradient else rows.rows.new_zeros(0, rows.rows.shape[1]),
        )
        total = torch.nn.utils.get_total_norm([*gradients, by_row])
        norm = total.item()
        if not math.isfinite(norm) or not math.isfinite(loss_sum):
            raise StageError(
                f"train_prmu: loss or gradient is not finite at step {step + 1}. Lower train_prmu.learning_rate."
            )
        scale = min(1.0, settings.max_gradient_norm / (norm + 1e-6))
        for each in gradients:
            each.mul_(scale)
        optimizer.step()
        if settings.user_rows != "frozen":
            rows.step(touched, by_row * scale, settings.row_learning_rate * share)
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + len(own)
        # Every so many steps, not seconds: several processes have to add up at the same steps.
        if step == steps or step % settings.log_every == 0:
            loss_sum, hits_sum, margin_sum, seen_sum = peers.sums(loss_sum, hits, margin_sum, seen)
            if metrics is not None:
                metrics.log(
                    {
                        "prmu/loss": loss_sum / seen_sum, "prmu/train_accuracy": hits_sum / seen_sum,
                        "prmu/train_margin": margin_sum / seen_sum, "prmu/gradient_norm": norm,
                        "prmu/learning_rate": settings.learning_rate * share,
                    },
                    step,
                )  # fmt: skip
            now = time.monotonic()
            if peers.first and (step == steps or now - last_line >= LINE_EVERY_S):
                last_line = now
                logger.info(
                    "epoch %d/%d step %d/%d: loss %.3f accuracy %.3f, %.0f pairs/s, %.0f s",
                    epoch + 1, settings.epochs, step, steps, loss_sum / seen_sum, hits_sum / seen_sum,
                    (step - first_step) * settings.batch_size / (now - started), now - started,
                )  # fmt: skip
            seen, loss_sum, hits, margin_sum = 0, 0.0, 0, 0.0
        # After the figures of this step: a run that goes on from here does not write them again.
        if (
            checkpoints
            and settings.checkpoint_every
            and step % settings.checkpoint_every == 0
            and step < steps
        ):
            if peers.first:
                save_state(checkpoints, step, made_from, model, optimizer, rows)
            peers.barrier()
    return step


class _Leaf:
    """User rows of one forward pass, as a leaf of autograd."""

    def __init__(self, training: Training) -> None:
        self._rows = training.rows
        self.index = torch.zeros(0, dtype=torch.int64)
        self._leaf = torch.zeros(0)

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        self.index, place = self._rows.index(ids).unique(return_inverse=True)
        self._leaf = self._rows.rows[self.index].requires_grad_()
        return self._leaf[place]

    def gradient(self) -> torch.Tensor:
        assert self._leaf.grad is not None
        return self._leaf.grad


def evaluate(
    training: Training, split: Split, batch_size: int, packing: Packing, peers: Peers | None = None
) -> dict[str, Figures]:
    """Figures of held-out pairs, by group, under three names.

    ``seen_users/...``: with the user's row; ``unknown_row/...``: the same pairs with the unknown row;
    ``unseen_users/...``: pairs of users without a row.
    """
    found = {}
    encoder = training.prmu.encoder
    seen = encode_pairs(encoder, split.seen_users)
    unknown = [pair.with_row(encoder.users.unknown_row) for pair in seen]
    unseen = encode_pairs(encoder, split.unseen_users)
    for name, pairs, encoded in (
        ("seen_users", split.seen_users, seen),
        ("unknown_row", split.seen_users, unknown),
        ("unseen_users", split.unseen_users, unseen),
    ):
        margins = margins_of(training, encoded, batch_size, packing, peers)
        groups = figures_by_group(pairs, margins)
        found.update({f"{name}/{group}": value for group, value in groups.items()})
    return found


def encode_pairs(encoder: Encoder, pairs: Sequence[PreferencePair]) -> list[EncodedPair]:
    """Token ids of pairs; users without a row get the unknown one.

    Raises:
        DataError: a pair is too long; names it.
    """
    encoded = []
    for pair in pairs:
        chosen = encoder.encode(pair.id, pair.user_id, pair.prompt, pair.chosen)
        rejected = encoder.encode(pair.id, pair.user_id, pair.prompt, pair.rejected)
        encoded.append(EncodedPair(chosen.token_ids, rejected.token_ids, chosen.prefix_tokens))
    return encoded


def margins_of(
    training: Training,
    encoded: Sequence[EncodedPair],
    batch_size: int,
    packing: Packing,
    peers: Peers | None = None,
) -> list[float]:
    """Margins of pairs by a model in training, without gradient; processes divide them."""
    peers = peers or Peers()
    training.prmu.model.eval()
    order = sorted(range(len(encoded)), key=lambda place: encoded[place].length)[peers.rank :: peers.world]
    own: dict[int, float] = {}
    with torch.no_grad():
        for first in range(0, len(order), batch_size):
            chunk = order[first : first + batch_size]
            values = training.margins([encoded[place] for place in chunk], packing, training.current)
            own.update(zip(chunk, values.tolist(), strict=True))
    return peers.collect(own, len(encoded))


def pair_margins(prmu: Prmu, encoded: Sequence[EncodedPair], batch_size: int) -> list[float]:
    """logit(chosen) - logit(rejected) of each pair by a loaded checkpoint, without gradient."""
    model = prmu.model.eval()
    weight = model.get_input_embeddings().weight
    order = sorted(range(len(encoded)), key=lambda place: encoded[place].length)
    margins = [0.0] * len(encoded)
    no_change = torch.autocast(model.device.type, enabled=False)
    with torch.no_grad():
        for first in range(0, len(order), batch_size):
            chunk = order[first : first + batch_size]
            values = _margins(
                model, [encoded[place] for place in chunk], "padded", prmu.encoder.pad_token_id,
                lambda ids: weight[ids], no_change,
            )  # fmt: skip
            for place, value in zip(chunk, values.tolist(), strict=True):
                margins[place] = value
    return margins


def fingerprint(config: DictConfig) -> str:
    """What determines the model: contents of the inputs (a hub model by its name), settings, seed."""
    hashes = runs.manifest("train_prmu", _inputs(config), config.run.seed).inputs
    settings: Any = OmegaConf.to_container(config.train_prmu)
    for name in ("threads", "workers", "ray", "checkpoint_every", "log_every"):  # how, not what
        settings.pop(name)
    text = json.dumps([list(hashes.values()), settings, config.run.seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _margins(
    model: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    packing: Packing,
    pad_token_id: int,
    rows_of: RowsOf,
    precision: AbstractContextManager[Any],
) -> torch.Tensor:
    batch = pack(pairs, packing, pad_token_id).to(model.device)
    with precision:
        values = logits(model, batch, rows_of(batch.users))
    return values[: len(pairs)] - values[len(pairs) :]


def _optimizer(model: PreTrainedModel, settings: DictConfig) -> torch.optim.AdamW:
    embedding = model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not embedding]
    groups = [
        {"params": [embedding], "lr": settings.embedding_learning_rate, "weight_decay": 0.0},
        {"params": others, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
    ]
    return torch.optim.AdamW(groups, betas=tuple(settings.betas))


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at an update (from 0): linear warm-up, then cosine to 5 %."""
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))))


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _check(settings: DictConfig) -> None:
    for key in ("unseen_users", "heldout_prompts", "id_dropout"):
        if not 0.0 <= settings[key] < 1.0:
            raise ConfigError(f"train_prmu.{key}={settings[key]}: is no share. Set 0 or more, less than 1.")
    positive = ("epochs", "batch_size", "micro_batch_size", "threads", "max_tokens", "workers", "log_every")
    for key in positive:
        if not isinstance(settings[key], int) or settings[key] < 1:
            raise ConfigError(
                f"train_prmu.{key}={settings[key]}: is no positive whole number. Set 1 or more."
            )
    for key, values in (
        ("dtype", ("float32", "bfloat16")),
        ("packing", PACKINGS),
        ("user_rows", USER_ROWS),
        ("row_init", ROW_INITS),
        ("row_place", PLACES),
    ):
        if settings[key] not in values:
            raise ConfigError(f"train_prmu.{key}={settings[key]}: unknown. Set one of {', '.join(values)}.")
    if settings.workers > settings.batch_size:
        raise ConfigError(
            f"train_prmu.workers={settings.workers}: more than train_prmu.batch_size={settings.batch_size}. Set fewer."
        )


def _inputs(config: DictConfig) -> dict[str, Path]:
    files = pair_files(Path(config.paths.chains))
    return {str(path): path for path in files} | {config.train_prmu.init: Path(config.train_prmu.init)}


def _made_from(target: Path) -> str | None:
    """Fingerprint in the manifest of an existing PRMU."""
    try:
        notes = json.loads((target / "manifest.json").read_text("utf-8"))["notes"]
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError):
        return None
    return str(notes.get("fingerprint"))


if __name__ == "__main__":
    main("train_prmu", run)
