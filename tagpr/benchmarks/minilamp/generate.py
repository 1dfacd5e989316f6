"""Write MiniLaMP: six tasks of SYNTHETIC users in LaMP's time-split file format."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from tagpr.benchmarks.minilamp.world import OFF_TRAIT, TASK_NAMES, User, history, population, question
from tagpr.benchmarks.tasks import render_prompt
from tagpr.errors import ConfigError
from tagpr.runs import write_text_atomically
from tagpr.schema import ProfileItem

PROFILE_ITEMS = 16
NEWEST = 8
"""Items that recency shows at the paper's profile size (S3); the older ones give the closing word away."""
CLOSING_SHARE = 0.3
"""Share of gold answers in lamp4/5/7 that end on the user's closing word."""

_README = f"""SYNTHETIC. MiniLaMP: made-up users with hidden preferences, in the files of LaMP's time split.

No number measured on these files belongs beside one measured on LaMP.

LaMP_<n>/<split>/<split>_questions.json  [{{id, input, profile, user_id}}], {PROFILE_ITEMS} dated items
LaMP_<n>/<split>/<split>_outputs.json    {{task, golds: [{{id, output}}]}}
traits.json                              what each user prefers: for tests and analysis, never for training

What the {NEWEST} newest items show (about {OFF_TRAIT:.0%} of the items are off-trait):
  LaMP_1      the author's field
  LaMP_2      whether the user tags films by genre or by aspect
  LaMP_3      how harshly the user rates
  LaMP_4/5/7  the word that a headline, title or tweet starts with
What they hide: the closing word of headlines, titles and tweets. Older items end on it, and so do about
{CLOSING_SHARE:.0%} of the gold answers.
"""


def write(
    directory: Path,
    seed: int,
    train_users: int = 80,
    dev_seen_users: int = 20,
    dev_unseen_users: int = 20,
    train_rows_per_task: int = 340,
    dev_rows_per_task: int = 40,
) -> None:
    """Write every file of MiniLaMP below ``directory``; the same arguments give the same bytes.

    Users "0", "1", ... are the training users. Every other dev row of a task belongs to one of the first
    ``dev_seen_users`` of them, the rest to ``dev_unseen_users`` that training never sees. Files that are
    there are overwritten, each atomically.

    Raises:
        ConfigError: more seen users than training users, or no users for rows that are asked for.
    """
    if not 0 < dev_seen_users <= train_users or dev_unseen_users < 1:
        raise ConfigError(
            f"dev_seen_users={dev_seen_users}, dev_unseen_users={dev_unseen_users}: must be at least 1, and "
            f"the seen ones among the {train_users} training users. Change them."
        )
    training = population(seed, train_users)
    unseen = population(seed, dev_unseen_users, first=train_users)
    for task in TASK_NAMES:
        train = [training[row % train_users] for row in range(train_rows_per_task)]
        dev = [
            unseen[row // 2 % dev_unseen_users] if row % 2 else training[row // 2 % dev_seen_users]
            for row in range(dev_rows_per_task)
        ]
        _write_split(directory, task, "train", train, seed)
        _write_split(directory, task, "dev", dev, seed)
    traits = {
        user.user_id: asdict(user) | {"openings": dict(user.openings), "in_training": user in training}
        for user in training + unseen
    }
    write_text_atomically(directory / "traits.json", json.dumps(traits, indent=1))
    write_text_atomically(directory / "README.txt", _README)


def draw(task: str, user: User, rng: random.Random, items: int = NEWEST) -> tuple[str, str]:
    """A fresh row as a model sees it: LaMP's prompt with the ``items`` newest profile items, and the gold."""
    query, gold = question(task, user, rng, CLOSING_SHARE)
    newest_first = reversed(history(task, user, rng, items, NEWEST))
    profile = [ProfileItem(id=str(place), fields=fields) for place, fields in enumerate(newest_first)]
    return render_prompt(task, query, profile), gold


def _write_split(directory: Path, task: str, split: str, users: Sequence[User], seed: int) -> None:
    rng = random.Random(f"minilamp {task} {split} of world {seed}")
    number = task.removeprefix("lamp")
    questions, golds = [], []
    for index, user in enumerate(users):
        row_id = f"{number}{1 if split == 'train' else 2}{index:05d}"
        query, gold = question(task, user, rng, CLOSING_SHARE)
        profile = _dated(row_id, history(task, user, rng, PROFILE_ITEMS, NEWEST), rng)
        questions.append({"id": row_id, "input": query, "profile": profile, "user_id": user.user_id})
        golds.append({"id": row_id, "output": gold})
    folder = directory / f"LaMP_{number}" / split
    write_text_atomically(folder / f"{split}_questions.json", json.dumps(questions))
    write_text_atomically(
        folder / f"{split}_outputs.json", json.dumps({"task": f"LaMP_{number}", "golds": golds})
    )


def _dated(row_id: str, items: Sequence[dict[str, str]], rng: random.Random) -> list[dict[str, Any]]:
    """Give every item an id and a later date than the one before, then shuffle them as a file may."""
    day = date(2015, 1, 1) + timedelta(days=rng.randrange(1000))
    profile = []
    for index, item in enumerate(items):
        day += timedelta(days=rng.randrange(1, 60))
        profile.append({"id": f"{row_id}{index:02d}", **item, "date": day.isoformat()})
    rng.shuffle(profile)
    return profile
