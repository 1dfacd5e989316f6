"""Preference pairs: reading, holding out by user and by prompt (S15, S16, S19)."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tagpr.errors import DataError, StageError
from tagpr.schema import PreferencePair

KINDS = ("prp", "pqp")


@dataclass(frozen=True)
class Split:
    """Pairs to train on, and what is held out: prompts of users that are trained on, and whole users."""

    train: list[PreferencePair]
    seen_users: list[PreferencePair]
    unseen_users: list[PreferencePair]


def pair_files(folder: Path) -> list[Path]:
    """The files of ``paths.chains`` that hold pairs.

    Raises:
        StageError: one is missing.
    """
    files = [folder / f"{kind}.jsonl" for kind in KINDS]
    for path in files:
        if not path.is_file():
            raise StageError(f"{path}: no preference pairs there. Run `bash recipes/build_chains.sh` first.")
    return files


def read_pairs(files: Iterable[Path]) -> list[PreferencePair]:
    """Read pairs from JSONL files.

    Raises:
        DataError: a line is no pair, prefers a response to itself, or repeats an id; or there is no pair at
        all.
    """
    pairs: dict[str, PreferencePair] = {}
    for path in files:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    pair = PreferencePair.model_validate_json(line)
                except ValidationError as error:
                    first = error.errors(include_input=False, include_url=False)[0]
                    field = ".".join(map(str, first["loc"])) or "line"
                    raise DataError(
                        f"{path}:{number}: {field}: {first['msg']}. Run `bash recipes/build_chains.sh` again."
                    ) from None
                if pair.chosen == pair.rejected or pair.id in pairs:
                    problem = "is there twice" if pair.id in pairs else "prefers a response to itself"
                    raise DataError(
                        f"{path}:{number}: pair {pair.id} {problem}. "
                        "Run `bash recipes/build_chains.sh` again."
                    )
                pairs[pair.id] = pair
    if not pairs:
        raise DataError(
            "paths.chains: prp.jsonl and pqp.jsonl hold no pair. Run `bash recipes/build_chains.sh` again."
        )
    return list(pairs.values())


def split_pairs(
    pairs: Sequence[PreferencePair], unseen_users: float, heldout_prompts: float, seed: int
) -> Split:
    """Hold out a share of the users, and a share of the other users' prompts (never a user's last one).

    A prompt's pairs stay together: they share responses.
    """
    rng = random.Random(seed)
    users = sorted({pair.user_id for pair in pairs})
    unseen = set(rng.sample(users, round(len(users) * unseen_users)))
    prompts: dict[tuple[str, str], list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        if pair.user_id not in unseen:
            prompts[pair.user_id, pair.prompt].append(pair)
    left: dict[str, int] = defaultdict(int)
    for user, _ in prompts:
        left[user] += 1
    order = sorted(prompts)
    rng.shuffle(order)
    train: list[PreferencePair] = []
    seen: list[PreferencePair] = []
    wanted = round(len(order) * heldout_prompts)
    for user, prompt in order:
        if wanted > 0 and left[user] > 1:
            seen += prompts[user, prompt]
            left[user] -= 1
            wanted -= 1
        else:
            train += prompts[user, prompt]
    return Split(train, seen, [pair for pair in pairs if pair.user_id in unseen])
