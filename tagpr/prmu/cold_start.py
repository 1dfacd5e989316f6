"""New users without training again: a row of their own, fitted to a few of their preferences, the model left as it is (S40).

    python -m tagpr.prmu.cold_start cold_start.pairs=new_users.jsonl

makes a new checkpoint with a row more for each new user in that file (and refits nobody else's). A row starts where
``train_prmu`` would have started it (from the words that set the user's chosen responses apart), beside the unknown row, and
takes a few steps of Adam on the user's own pairs. Rows do not touch each other, so many users are fitted at once.
"""

import json
import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.nn.functional import logsigmoid

from tagpr.configuration import main
from tagpr.errors import ConfigError, DataError
from tagpr.prmu import model as prmu_model
from tagpr.prmu.encoding import UserRows
from tagpr.prmu.model import Prmu
from tagpr.prmu.packing import EncodedPair, Packing, logits, pack, use_packing
from tagpr.prmu.pairs import read_pairs
from tagpr.prmu.rows import RowTable, preferred
from tagpr.schema import PreferencePair

logger = logging.getLogger("tagpr.prmu.cold_start")


def run(config: DictConfig) -> None:
    """Add the users of ``cold_start.pairs`` to the PRMU at ``paths.prmu``.

    Raises:
        ConfigError: no pairs are named.
        DataError: a pair is malformed or too long, or all their users have rows already.
        StageError: there is no PRMU.
    """
    settings = config.cold_start
    if not settings.pairs:
        raise ConfigError(
            "cold_start.pairs: names no file. Set it to a JSONL file of preference pairs of new users."
        )
    torch.set_num_threads(settings.threads)
    pairs = read_pairs([Path(settings.pairs)])
    prmu = prmu_model.load(config.paths.prmu, device=settings.device, dtype="float32")
    new = [pair for pair in pairs if pair.user_id not in prmu.encoder.users.rows]
    if not new:
        raise DataError(f"{settings.pairs}: all its users have rows already. Nothing to add.")
    by_user = _by_user(new)
    rows = fit_rows(prmu, by_user, settings)
    target = Path(settings.target or config.paths.prmu)
    before = prmu.version
    version = add_users(prmu, Path(config.paths.prmu), rows, target)
    logger.info(
        "%s: PRMU %s, %d user rows more (from %d pairs) than %s; servers have to load it", target, version, len(rows),
        len(new), before,
    )  # fmt: skip


def fit_rows(
    prmu: Prmu, pairs: Mapping[str, Sequence[PreferencePair]], settings: DictConfig
) -> dict[str, torch.Tensor]:
    """A row, float32 [hidden size], for each user, from that user's pairs alone; the model is not changed.

    minimises, for each user, the mean over the user's pairs of -log sigmoid(margin), plus ``decay`` / 2 times the squared
    distance from the start, divided by the number of pairs: few pairs move a row little.

    Raises:
        DataError: a pair is too long.
    """
    encoder, model = prmu.encoder, prmu.model.eval()
    users = list(pairs)
    encoded, owner = [], []
    for place, user in enumerate(users):
        for pair in pairs[user]:
            chosen, rejected = (
                encoder.encode(pair.id, user, pair.prompt, text).token_ids
                for text in (pair.chosen, pair.rejected)
            )
            encoded.append(EncodedPair(chosen, rejected).with_row(encoder.users.end + place))
            owner.append(place)
    owners = torch.tensor(owner, device=model.device)
    counts = torch.bincount(owners, minlength=len(users)).float()
    table = RowTable(starts(prmu, encoded, len(users)).to(model.device), 0)
    begin = table.rows.clone()
    packing: Packing = settings.packing
    use_packing(model, packing)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    everyone = torch.arange(len(users), device=model.device)
    try:
        for _ in range(settings.steps):
            leaf = table.rows.clone().requires_grad_()
            for first in range(0, len(encoded), settings.micro_batch_size):
                part = encoded[first : first + settings.micro_batch_size]
                batch = pack(part, packing, encoder.pad_token_id).to(model.device)
                values = logits(model, batch, leaf[batch.users - encoder.users.end])
                margins = values[: len(part)] - values[len(part) :]
                weight = 1 / counts[owners[first : first + len(part)]]
                (-logsigmoid(margins) * weight).sum().backward()
            assert leaf.grad is not None
            gradient = leaf.grad + settings.decay * (table.rows - begin) / counts[:, None]
            table.step(everyone, gradient, settings.learning_rate)
    finally:
        use_packing(model, "padded")
        for parameter in trainable:
            parameter.requires_grad_(True)
    return dict(zip(users, table.rows, strict=True))


def starts(prmu: Prmu, encoded: Sequence[EncodedPair], count: int) -> torch.Tensor:
    """Rows before fitting, [count, hidden size]: as far from the mean row as the learned ones, along what the pairs prefer."""
    weight = prmu.model.get_input_embeddings().weight.detach().float()
    users = prmu.encoder.users
    learned = weight[users.unknown_row + 1 : users.end]
    unknown = weight[users.unknown_row]
    # ``preferred`` keeps its row 0 for an unknown user, who has no pairs here.
    directions = preferred(weight, encoded, users.end - 1, count + 1, centred=False)[1:].to(weight.device)
    if len(learned) < 2:
        return unknown.norm() * directions + unknown
    centre = learned.mean(0)
    return (learned - centre).norm(dim=1).mean() * directions + centre


def add_users(prmu: Prmu, source: Path, rows: Mapping[str, torch.Tensor], target: Path) -> str:
    """Write a checkpoint with these rows behind the others; returns its version. ``prmu`` is changed with it.

    Raises:
        DataError: a user has a row already.
    """
    users = prmu.encoder.users
    for user in rows:
        if user in users.rows:
            raise DataError(f"user {user}: has a row already. Leave it out.")
    more = UserRows(
        unknown_row=users.unknown_row,
        place=users.place,
        rows={**users.rows, **{user: users.end + place for place, user in enumerate(rows)}},
    )
    prmu_model.make_room(prmu.model, more.end)
    weight = prmu.model.get_input_embeddings().weight
    with torch.no_grad():
        for user, row in rows.items():
            weight[more.rows[user]] = row.to(weight)
    prmu.encoder.users = more
    old = json.loads((source / "manifest.json").read_text("utf-8"))
    notes = old.get("notes", {})
    notes["added_users"] = [*notes.get("added_users", []), {"from_version": prmu.version, "users": len(rows)}]
    # With more users than the training pairs have, the training stage must not take it for its own product.
    notes.pop("fingerprint", None)
    prmu.model.to(prmu_model.saved_dtype(source))
    return prmu_model.save(
        target, prmu.model, prmu.tokenizer, more, json.dumps({**old, "notes": notes}, indent=2)
    )


def curve(
    prmu: Prmu,
    pairs: Sequence[PreferencePair],
    sizes: Sequence[int],
    draws: int,
    settings: DictConfig,
    seed: int,
) -> tuple[list[PreferencePair], dict[int, list[list[float]]]]:
    """Margins of unseen users' pairs after fitting a row to 0, 1, 2, ... others of theirs.

    Each user's pairs are divided once a draw, by prompt: those to fit on come first, at most half of them; the rest is tried,
    the same for every size. Users who have fewer pairs than a size give what they have. Size 0 is the unknown row.

    Returns:
        The pairs, and for each size and draw their margins; NaN where a pair was not tried in that draw.
    """
    sizes = sorted(set(sizes))
    by_user = _by_user(pairs)
    places = {pair.id: place for place, pair in enumerate(pairs)}
    found: dict[int, list[list[float]]] = {size: [] for size in sizes}
    for draw in range(draws):
        support, tried = {}, []
        for user, own in sorted(by_user.items()):
            rng = random.Random(f"cold start {user} {draw} {seed}")
            prompts = sorted({pair.prompt for pair in own})
            rng.shuffle(prompts)
            first, rest = _halves(
                [[pair for pair in own if pair.prompt == prompt] for prompt in prompts], max(sizes)
            )
            if first and rest:
                rng.shuffle(first)
                support[user] = first
                tried += rest
        for size in sizes:
            rows = (
                fit_rows(prmu, {user: own[:size] for user, own in support.items()}, settings) if size else {}
            )
            margins = [float("nan")] * len(pairs)
            for pair, margin in zip(tried, margins_with(prmu, tried, rows, settings), strict=True):
                margins[places[pair.id]] = margin
            found[size].append(margins)
            logger.info(
                "draw %d/%d: rows of %d users fitted to %d pairs each", draw + 1, draws, len(support), size
            )
    return list(pairs), found


def margins_with(
    prmu: Prmu, pairs: Sequence[PreferencePair], rows: Mapping[str, torch.Tensor], settings: DictConfig
) -> list[float]:
    """Margins of pairs, with these rows for the users that have one here, else the checkpoint's own or the unknown one."""
    model, encoder = prmu.model.eval(), prmu.encoder
    weight = model.get_input_embeddings().weight
    names, end = list(rows), encoder.users.end
    packing: Packing = settings.packing
    use_packing(model, packing)
    margins: list[float] = []
    try:
        with torch.no_grad():
            for first in range(0, len(pairs), settings.micro_batch_size):
                part = pairs[first : first + settings.micro_batch_size]
                encoded = []
                for pair in part:
                    chosen, rejected = (
                        encoder.encode(pair.id, pair.user_id, pair.prompt, text).token_ids
                        for text in (pair.chosen, pair.rejected)
                    )
                    each = EncodedPair(chosen, rejected)
                    # Given rows stand behind the checkpoint's, for as long as this takes.
                    given = pair.user_id in rows
                    encoded.append(each.with_row(end + names.index(pair.user_id)) if given else each)
                batch = pack(encoded, packing, encoder.pad_token_id).to(model.device)
                own = torch.stack(
                    [
                        rows[names[number - end]].to(weight) if number >= end else weight[number]
                        for number in batch.users.tolist()
                    ]
                )
                values = logits(model, batch, own)
                margins += (values[: len(part)] - values[len(part) :]).tolist()
    finally:
        use_packing(model, "padded")
    return margins


def _halves(
    prompts: Sequence[Sequence[PreferencePair]], most: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Pairs to fit on and pairs to try: whole prompts, at most half of the pairs and ``most`` or a little more of them."""
    total = sum(map(len, prompts))
    first: list[PreferencePair] = []
    rest: list[PreferencePair] = []
    for own in prompts:
        (first if len(first) < min(most, total // 2) else rest).extend(own)
    return first, rest


def _by_user(pairs: Sequence[PreferencePair]) -> dict[str, list[PreferencePair]]:
    found: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        found[pair.user_id].append(pair)
    return dict(found)


def table(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: accuracy after each number of pairs, for each group."""
    sizes = sorted({each["pairs_to_fit"] for each in figures})
    lines = [
        "| pairs tried | users | " + " | ".join(f"{size} pairs" for size in sizes) + " |",
        "|---|---|" + "---|" * len(sizes),
    ]
    for group in dict.fromkeys(each["group"] for each in figures):
        own = {each["pairs_to_fit"]: each for each in figures if each["group"] == group}
        cells = [f"{own[s]['accuracy']:.3f} [{own[s]['low']:.3f}, {own[s]['high']:.3f}]" for s in sizes]
        lines.append(f"| {group} | {own[sizes[0]]['users']} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main("add_prmu_users", run)
