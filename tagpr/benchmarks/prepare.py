"""Stage prepare_data: raw benchmark files in, checked Examples of every task in one format out (S1-S3).

It makes MiniLaMP's files where they are missing. LaMP's have to be put in place by hand.
"""

import fcntl
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from pydantic import ValidationError

from tagpr.benchmarks.lamp import DERIVED_USER, iterate_split, official_name, split_files
from tagpr.benchmarks.minilamp import generate
from tagpr.benchmarks.storage import examples_file, write_examples
from tagpr.benchmarks.tasks import get_task
from tagpr.configuration import main
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.runs import file_hash, manifest, write_json_atomically, write_text_atomically
from tagpr.schema import Example, Manifest, Split

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "dev")

# Raised when the same input files would give other Examples: outputs of an older version are then made again.
FORMAT = 2

LAMP_ADDRESS = "https://ciir.cs.umass.edu/downloads/LaMP/time"


def run(config: DictConfig) -> None:
    """Read and check every task's train and dev split, write Examples and a manifest, unless up to date.

    Raises:
        ConfigError: unknown, repeated or no tasks, or a setting of the wrong type.
        DataError: missing, malformed or inconsistent files.
        StageError: the outputs cannot be written.
    """
    tasks = _tasks(config)
    if not config.benchmark.dir:
        raise ConfigError("benchmark.dir: is empty. Name the folder with the files.")
    if not isinstance(config.prepare_data.users_across_tasks, bool):
        raise ConfigError("prepare_data.users_across_tasks: is not true or false. Set it to one of them.")
    source, target = Path(config.benchmark.dir), Path(config.paths.examples)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _alone(target / ".lock"):
            if config.benchmark.name == "minilamp":
                _make_minilamp(source, tasks, config.prepare_data.minilamp)
            inputs = _inputs(source, tasks, config.benchmark.name)
            settings = {
                "format": FORMAT,
                "benchmark": config.benchmark.name,
                "tasks": tasks,
                "users_across_tasks": config.prepare_data.users_across_tasks,
            }
            if _up_to_date(target, inputs, settings):
                logger.info("%s: up to date, nothing to do", target)
                return
            label = "SYNTHETIC users" if config.benchmark.synthetic else "users as given"
            logger.info("reading %s (%s) from %s: %s", config.benchmark.name, label, source, ", ".join(tasks))
            _prepare(source, target, inputs, settings, config)
    except OSError as error:
        place = error.filename or target
        raise StageError(f"{place}: {error.strerror}. Make room there or set paths.examples.") from error


def _tasks(config: DictConfig) -> list[str]:
    tasks = config.benchmark.tasks
    if not isinstance(tasks, ListConfig) or not tasks:
        raise ConfigError(f"benchmark.tasks={tasks}: is not a list of tasks. Write benchmark.tasks=[lamp3].")
    names = [get_task(str(name)).name for name in tasks]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"benchmark.tasks: {twice[0]} occurs twice. Name each task once.")
    return names


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep a second run waiting; it then finds all up to date. The lock dies with its process."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_minilamp(directory: Path, tasks: list[str], sizes: DictConfig) -> None:
    """Write MiniLaMP if files are missing or were written with other sizes or another seed."""
    settings = {str(key): value for key, value in sizes.items()}
    for key, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and key != "seed"):
            raise ConfigError(
                f"prepare_data.minilamp.{key}={value}: is not a positive whole number. Change it."
            )
    stamp, written = directory / "settings.json", json.dumps(settings)
    # Complete but without our stamp: files that somebody put there. They are read, never overwritten.
    if not _missing(directory, tasks) and (not stamp.is_file() or stamp.read_bytes() == written.encode()):
        return
    logger.info("writing SYNTHETIC users to %s: %s", directory, written)
    stamp.unlink(missing_ok=True)
    generate.write(directory, **settings)
    write_text_atomically(stamp, written)


def _missing(directory: Path, tasks: list[str]) -> list[tuple[str, Split]]:
    missing: list[tuple[str, Split]] = []
    for task in tasks:
        for split in SPLITS:
            try:
                split_files(directory, task, split)
            except DataError:
                missing.append((task, split))
    return missing


def _inputs(directory: Path, tasks: list[str], name: str) -> dict[str, Path]:
    """Return every input file by its path below ``directory``, or say all that is missing at once."""
    missing = _missing(directory, tasks)
    if missing and name == "lamp":
        folders = ", ".join(f"{official_name(task)}/{split}" for task, split in missing)
        raise DataError(
            f"{directory}: lacks {folders} (each with <split>_questions.json and <split>_outputs.json). Put "
            f"LaMP's time-based split there (from {LAMP_ADDRESS}/LaMP_<n>/<split>/, that of LaMP_2 from "
            f"{LAMP_ADDRESS}/LaMP_2/new/<split>/), or set benchmark.dir and benchmark.tasks to what you have."
        )
    return {
        str(path.relative_to(directory)): path
        for task in tasks
        for split in SPLITS
        for path in split_files(directory, task, split)
    }


def _up_to_date(target: Path, inputs: dict[str, Path], settings: dict[str, Any]) -> bool:
    try:
        made = Manifest.model_validate_json((target / "manifest.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    outputs = {f"{split}.parquet": examples_file(target, split) for split in SPLITS}
    return (
        made.notes.get("settings") == settings
        and all(path.is_file() for path in outputs.values())
        and made.notes.get("outputs") == {name: file_hash(path) for name, path in outputs.items()}
        and made.inputs == {name: file_hash(path) for name, path in inputs.items()}
    )


def _prepare(
    source: Path, target: Path, inputs: dict[str, Path], settings: dict[str, Any], config: DictConfig
) -> None:
    # Both splits are checked to the last row before the first file of an earlier run is touched.
    staging = target / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    counts = _Counts()
    try:
        for split in SPLITS:
            examples = _read(source, settings["tasks"], split, settings["users_across_tasks"])
            write_examples(examples_file(staging, split), counts.watch(examples))
        (target / "manifest.json").unlink(missing_ok=True)
        for split in SPLITS:
            examples_file(staging, split).replace(examples_file(target, split))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    made = manifest(
        "prepare_data",
        inputs,
        config.run.seed,
        synthetic=config.benchmark.synthetic,
        settings=settings,
        outputs={f"{split}.parquet": file_hash(examples_file(target, split)) for split in SPLITS},
        **counts.notes(),
    )
    write_json_atomically(target / "manifest.json", made.model_dump())
    for line in counts.table():
        logger.info("%s", line)
    logger.info("wrote train.parquet, dev.parquet and manifest.json to %s", target)


def _read(source: Path, tasks: list[str], split: Split, users_across_tasks: bool) -> Iterator[Example]:
    for task in tasks:
        for example in iterate_split(source, task, split):
            if users_across_tasks:
                yield example
            else:
                yield example.model_copy(update={"user_id": f"{task}:{example.user_id}"})


class _Counts:
    """What the manifest says of the data: rows, users, dates, dev users seen in training (S1-S3)."""

    def __init__(self) -> None:
        self.users: dict[tuple[str, Split], Counter[str]] = {}
        self.items: Counter[tuple[str, Split]] = Counter()
        self.dated: Counter[tuple[str, Split]] = Counter()
        self.derived: Counter[tuple[str, Split]] = Counter()

    def watch(self, examples: Iterator[Example]) -> Iterator[Example]:
        for example in examples:
            key = example.task, example.split
            self.users.setdefault(key, Counter())[example.user_id] += 1
            self.items[key] += len(example.profile)
            self.dated[key] += sum(item.date is not None for item in example.profile)
            self.derived[key] += example.user_id.split(":")[-1].startswith(DERIVED_USER)
            yield example

    def notes(self) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        for (task, split), users in self.users.items():
            key = task, split
            rows.setdefault(task, {})[split] = {
                "rows": users.total(),
                "users": len(users),
                "rows_per_user": {
                    "min": min(users.values()),
                    "mean": round(users.total() / len(users), 2),
                    "max": max(users.values()),
                },
                "profile_items_per_row": round(self.items[key] / users.total(), 2),
                "profile_items_with_date": self.dated[key],
                "rows_with_derived_user_id": self.derived[key],
            }
            if split != "train":
                seen = users.keys() & self.users[task, "train"].keys()
                rows[task][split]["users_seen_in_train"] = len(seen)
                rows[task][split]["rows_of_users_seen_in_train"] = sum(users[user] for user in seen)
        undated = sorted({task for task, split in self.users if not self.dated[task, split]})
        return {"counts": rows, "tasks_without_dates_use_file_order": undated}

    def table(self) -> Iterator[str]:
        head = "".join(f"{name:>7}" for name in ("train", "users", "dev", "users"))
        yield f"{'task':<7}{head}{'in train':>10}{'items/row':>11}  dates"
        for task, splits in self.notes()["counts"].items():
            train, dev = splits["train"], splits["dev"]
            derived = train["rows_with_derived_user_id"] + dev["rows_with_derived_user_id"]
            dates = "yes" if train["profile_items_with_date"] else "no, file order"
            yield (
                f"{task:<7}{train['rows']:>7}{train['users']:>7}{dev['rows']:>7}{dev['users']:>7}"
                f"{dev['users_seen_in_train']:>10}{train['profile_items_per_row']:>11}  {dates}"
                f"{f'; {derived} user ids derived from profiles' if derived else ''}"
            )


if __name__ == "__main__":
    main("prepare_data", run)
