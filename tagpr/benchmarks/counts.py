"""What the manifest says of a benchmark's rows: how many, of whom, with what dates, who was seen before (S1-S3)."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tagpr.benchmarks.rows import DERIVED_USER
from tagpr.benchmarks.tasks import get_task
from tagpr.schema import Example, ProfileItem, Split

LONG_ITEM_CHARACTERS = 100_000

_RATING_FIELDS = ("score", "rating", "overall")


@dataclass
class _Tally:
    """One task's split."""

    users: Counter[str] = field(default_factory=Counter)
    items: int = 0
    fewest: int | None = None
    most: int = 0
    dated: int = 0
    derived: int = 0
    longest: int = 0
    reader: Counter[str] = field(default_factory=Counter)
    """What the reader left out or mended, by its own names."""
    odd: Counter[str] = field(default_factory=Counter)
    """What is kept as it is although it may be a mistake."""

    def add(self, example: Example, labels: tuple[str, ...]) -> None:
        profile = example.profile
        self.users[example.user_id] += 1
        self.items += len(profile)
        self.fewest = len(profile) if self.fewest is None else min(self.fewest, len(profile))
        self.most = max(self.most, len(profile))
        self.dated += sum(item.date is not None for item in profile)
        self.derived += example.user_id.split(":")[-1].startswith(DERIVED_USER)
        longest = max((len(text) for item in profile for text in item.fields.values()), default=0)
        self.longest = max(self.longest, longest)
        self.odd["rows with an empty profile"] += not profile
        self.odd["rows whose dates differ in precision"] += mixed_precision(profile)
        self.odd[f"rows with an item of over {LONG_ITEM_CHARACTERS:,} characters"] += (
            longest > LONG_ITEM_CHARACTERS
        )
        if labels:
            self.odd["profile ratings off the scale"] += sum(off_scale(item, labels) for item in profile)


def mixed_precision(profile: tuple[ProfileItem, ...]) -> bool:
    """Whether some dates are years and others days, say: they sort by what they have in common, years before days."""
    return len({item.date.count("-") for item in profile if item.date is not None}) > 1


def off_scale(item: ProfileItem, labels: tuple[str, ...]) -> bool:
    """Whether an item carries a rating that the task's scale does not have."""
    return any(
        item.fields[name].strip().removesuffix(".0") not in labels
        for name in _RATING_FIELDS
        if name in item.fields
    )


class Counts:
    """Tallies of every task and split, filled while rows go by."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, Split], _Tally] = {}

    def _tally(self, task: str, split: Split) -> _Tally:
        return self._tallies.setdefault((task, split), _Tally())

    def reader(self, task: str, split: Split) -> Counter[str]:
        """Where a reader counts what it leaves out."""
        return self._tally(task, split).reader

    def watch(self, examples: Iterator[Example]) -> Iterator[Example]:
        """Pass rows on, counting them."""
        for example in examples:
            task = get_task(example.task)
            self._tally(example.task, example.split).add(
                example, task.labels if task.kind == "rating" else ()
            )
            yield example

    def rows(self, task: str, split: Split) -> int:
        """Rows of one task's split."""
        return self._tally(task, split).users.total()

    def total(self) -> int:
        """Rows in all."""
        return sum(tally.users.total() for tally in self._tallies.values())

    def notes(self) -> dict[str, Any]:
        """The manifest's ``counts`` and the tasks whose profiles have no dates (S3)."""
        rows: dict[str, dict[str, Any]] = {}
        for (task, split), tally in self._tallies.items():
            users, total = tally.users, tally.users.total()
            rows.setdefault(task, {})[split] = {
                "rows": total,
                "users": len(users),
                "rows_per_user": {
                    "min": min(users.values(), default=0),
                    "mean": round(total / max(len(users), 1), 2),
                    "max": max(users.values(), default=0),
                },
                "profile_items_per_row": round(tally.items / max(total, 1), 2),
                "fewest_profile_items": tally.fewest or 0,
                "most_profile_items": tally.most,
                "profile_items_with_date": tally.dated,
                "longest_profile_text": tally.longest,
                "rows_with_derived_user_id": tally.derived,
                **{
                    f"{what}_seen_in_{other}": count
                    for other in ("train", "dev")
                    if other != split and (split, other) != ("train", "dev")
                    for what, count in self._seen(task, split, other).items()
                },
                "reader": dict(sorted(tally.reader.items())),
                "kept_as_they_are": {name: count for name, count in tally.odd.items() if count},
            }
        undated = sorted(
            {task for (task, split), tally in self._tallies.items() if tally.items and not tally.dated}
        )
        return {"counts": rows, "tasks_without_dates_use_file_order": undated}

    def _seen(self, task: str, split: Split, other: Split) -> dict[str, int]:
        """Users of ``split``, and rows of theirs, that ``other`` has too; nothing where there is no such split."""
        if (task, other) not in self._tallies:
            return {}
        users = self._tallies[task, split].users
        seen = users.keys() & self._tallies[task, other].users.keys()
        return {"users": len(seen), "rows_of_users": sum(users[user] for user in seen)}

    def table(self) -> Iterator[str]:
        """Lines for a person."""
        width = max([len("task"), *(len(task) for task, _ in self._tallies)])
        yield (
            f"{'task':<{width}}  {'split':<5}{'rows':>8}{'users':>8}{'rows/user':>11}{'users seen in train':>21}"
            f"{'items/row':>11}  dates"
        )
        for task, splits in self.notes()["counts"].items():
            for split, row in splits.items():
                dates = "yes" if row["profile_items_with_date"] else "no, file order"
                derived = row["rows_with_derived_user_id"]
                yield (
                    f"{task:<{width}}  {split:<5}{row['rows']:>8}{row['users']:>8}{row['rows_per_user']['mean']:>11}"
                    f"{row.get('users_seen_in_train', '-'):>21}{row['profile_items_per_row']:>11}  {dates}"
                    f"{f'; {derived} user ids derived from profiles' if derived else ''}"
                )

    def remarks(self) -> Iterator[str]:
        """One line for everything that was left out, mended, or kept although it may be a mistake."""
        for (task, split), tally in self._tallies.items():
            for name, count in sorted(tally.reader.items()):
                if count and not name.endswith("_in_file"):
                    yield f"{task} {split}: {count} {name.replace('_', ' ')}"
            for name, count in tally.odd.items():
                if count:
                    yield f"{task} {split}: {count} {name}; kept as they are"
