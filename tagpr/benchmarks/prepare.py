"""Stage prepare_data: raw benchmark files in, checked Examples of every task in one format out (S1-S3).

Files that are missing are written (MiniLaMP) or fetched from where the benchmark publishes them; without a network it says which
to put where. Rows are read, checked and written one by one, whatever the size of a file.
"""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from pydantic import ValidationError

from tagpr.benchmarks.counts import Counts
from tagpr.benchmarks.download import FetchError, Patience, downloaded, exclusive
from tagpr.benchmarks.minilamp import generate
from tagpr.benchmarks.sources import Source, source_of
from tagpr.benchmarks.storage import examples_file, write_examples
from tagpr.benchmarks.tasks import get_task
from tagpr.configuration import main
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.runs import file_hash, manifest, write_json_atomically, write_text_atomically
from tagpr.schema import Example, Manifest, Split

logger = logging.getLogger(__name__)

# Raised when the same input files would give other Examples: outputs of an older version are then made again.
FORMAT = 3

CHECK_COUNTS = ("downloaded", "always", "never")


def run(config: DictConfig) -> None:
    """Get, read and check every task's splits, write Examples and a manifest, unless up to date.

    Raises:
        ConfigError: unknown, repeated or no tasks, or a setting of the wrong type.
        DataError: missing, malformed or inconsistent files.
        StageError: the outputs cannot be written.
    """
    tasks = tasks_of(config)
    source = source_of(config)
    if not isinstance(config.prepare_data.users_across_tasks, bool):
        raise ConfigError("prepare_data.users_across_tasks: is not true or false. Set it to one of them.")
    patience = _patience(config.prepare_data.download)
    target = Path(config.paths.examples)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with exclusive(target / ".lock"):
            if config.benchmark.name == "minilamp":
                _make_minilamp(source, tasks, config.prepare_data.minilamp)
            inputs = _inputs(source, tasks, config.prepare_data.download.enabled, patience)
            settings = {
                "format": FORMAT,
                "benchmark": config.benchmark.name,
                "tasks": tasks,
                "users_across_tasks": config.prepare_data.users_across_tasks,
                **source.settings(),
            }
            if _up_to_date(target, source.splits, inputs, settings):
                logger.info("%s: up to date, nothing to do", target)
                return
            label = "SYNTHETIC users" if config.benchmark.synthetic else "users as given"
            logger.info(
                "reading %s (%s) from %s: %s", config.benchmark.name, label, source.folder, ", ".join(tasks)
            )
            _prepare(source, target, inputs, settings, config)
    except OSError as error:
        place = error.filename or target
        raise StageError(f"{place}: {error.strerror}. Make room there or set paths.examples.") from error


def tasks_of(config: DictConfig) -> list[str]:
    """The names in ``benchmark.tasks``.

    Raises:
        ConfigError: unknown, repeated or no tasks.
    """
    tasks = config.benchmark.tasks
    if not isinstance(tasks, ListConfig) or not tasks:
        raise ConfigError(f"benchmark.tasks={tasks}: is not a list of tasks. Write benchmark.tasks=[lamp3].")
    names = [get_task(str(name)).name for name in tasks]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"benchmark.tasks: {twice[0]} occurs twice. Name each task once.")
    return names


def _patience(settings: DictConfig) -> Patience:
    if not isinstance(settings.enabled, bool):
        raise ConfigError("prepare_data.download.enabled: is not true or false. Set it to one of them.")
    if settings.check_counts not in CHECK_COUNTS:
        raise ConfigError(
            f"prepare_data.download.check_counts={settings.check_counts}: is none of {', '.join(CHECK_COUNTS)}. "
            "Use one of them."
        )
    numbers = {name: settings[name] for name in ("attempts", "timeout_s", "backoff_s", "progress_every_s")}
    for name, value in numbers.items():
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or value < (1 if name == "attempts" else 0)
        ):
            raise ConfigError(f"prepare_data.download.{name}={value}: is not a positive number. Change it.")
    return Patience(**numbers)


def _make_minilamp(source: Source, tasks: list[str], sizes: DictConfig) -> None:
    """Write MiniLaMP if files are missing or were written with other sizes or another seed."""
    settings = {str(key): value for key, value in sizes.items()}
    for key, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and key != "seed"):
            raise ConfigError(
                f"prepare_data.minilamp.{key}={value}: is not a positive whole number. Change it."
            )
    stamp, written = source.folder / "settings.json", json.dumps(settings)
    # Complete but without our stamp: files that somebody put there. They are read, never overwritten.
    if not source.missing(tasks) and (not stamp.is_file() or stamp.read_bytes() == written.encode()):
        return
    logger.info("writing SYNTHETIC users to %s: %s", source.folder, written)
    stamp.unlink(missing_ok=True)
    generate.write(source.folder, **settings)
    write_text_atomically(stamp, written)


def _inputs(source: Source, tasks: list[str], fetch: bool, patience: Patience) -> dict[str, Path]:
    """Every input file by its path below the source's folder, fetched where it is missing.

    Raises:
        DataError: files are missing and cannot be fetched; the message says all at once what to put where.
    """
    missing = source.missing(tasks)
    try:
        if missing and not (fetch and source.fetch(missing, patience)):
            raise DataError(source.instructions(missing))
    except FetchError as error:
        by_hand = source.instructions(source.missing(tasks))
        raise DataError(f"{error} Or put the files there by hand: {by_hand}") from error
    paths = dict.fromkeys(
        path for task in tasks for split in source.splits for path in source.files(task, split)
    )
    return {_name(source.folder, path): path for path in paths}


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _up_to_date(
    target: Path, splits: tuple[Split, ...], inputs: dict[str, Path], settings: dict[str, Any]
) -> bool:
    try:
        made = Manifest.model_validate_json((target / "manifest.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    outputs = {f"{split}.parquet": examples_file(target, split) for split in splits}
    return (
        made.notes.get("settings") == settings
        and all(path.is_file() for path in outputs.values())
        and made.notes.get("outputs") == {name: file_hash(path) for name, path in outputs.items()}
        and made.inputs == {name: file_hash(path) for name, path in inputs.items()}
    )


def _prepare(
    source: Source, target: Path, inputs: dict[str, Path], settings: dict[str, Any], config: DictConfig
) -> None:
    # All splits are checked to the last row before the first file of an earlier run is touched.
    staging = target / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    counts, began = Counts(), time.monotonic()
    try:
        for split in source.splits:
            examples = _read(source, settings["tasks"], split, settings["users_across_tasks"], counts)
            write_examples(examples_file(staging, split), counts.watch(examples))
        for task in settings["tasks"]:
            if not any(counts.rows(task, split) for split in source.splits):
                raise DataError(
                    f"{source.folder}: has no row of task {task}. Add some, or take it out of benchmark.tasks."
                )
        provenance = downloaded(
            source.folder, [path for path in inputs.values() if path.is_relative_to(source.folder)]
        )
        expected = _check_rows(source, settings["tasks"], counts, set(provenance), config)
        (target / "manifest.json").unlink(missing_ok=True)
        for old in target.glob("*.parquet"):
            old.unlink()
        for split in source.splits:
            examples_file(staging, split).replace(examples_file(target, split))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    seconds = time.monotonic() - began
    made = manifest(
        "prepare_data",
        inputs,
        config.run.seed,
        synthetic=config.benchmark.synthetic,
        settings=settings,
        outputs={f"{split}.parquet": file_hash(examples_file(target, split)) for split in source.splits},
        downloads=provenance,
        **expected,
        **counts.notes(),
    )
    write_json_atomically(target / "manifest.json", made.model_dump())
    for line in counts.table():
        logger.info("%s", line)
    for line in counts.remarks():
        logger.warning("%s", line)
    rows = counts.total()
    logger.info(
        "wrote %s and manifest.json to %s: %d rows in %.1f s, %.2f ms each",
        ", ".join(f"{split}.parquet" for split in source.splits), target, rows, seconds, 1000 * seconds / max(rows, 1),
    )  # fmt: skip


def _check_rows(
    source: Source, tasks: list[str], counts: Counts, fetched: set[str], config: DictConfig
) -> dict[str, Any]:
    """Compare row counts with the published ones (S1); returns what the manifest says of it.

    Raises:
        DataError: they differ, and ``prepare_data.download.check_counts`` says that they must not.
    """
    when = config.prepare_data.download.check_counts
    other = {}
    for task in tasks:
        for split in source.splits:
            expected, found = source.expected_rows(task, split), counts.rows(task, split)
            if expected is None or expected == found or when == "never":
                continue
            other[f"{task}/{split}"] = {"rows": found, "published": expected}
            paths = source.files(task, split)
            what = f"{paths[0]}: {found} rows, the published split has {expected}"
            ours = all(_name(source.folder, path) in fetched for path in paths)
            if when == "always" or ours:
                raise DataError(
                    f"{what}. Remove the file and run this again to fetch it anew, or set "
                    "prepare_data.download.check_counts=never if it is meant to differ."
                )
            logger.warning("%s: figures from it do not compare with the paper's", what)
    return {"other_than_published": other} if other else {}


def _read(
    source: Source, tasks: list[str], split: Split, users_across_tasks: bool, counts: Counts
) -> Iterator[Example]:
    for task in tasks:
        for example in source.rows(task, split, counts.reader(task, split)):
            if users_across_tasks:
                yield example
            else:
                yield example.model_copy(update={"user_id": f"{task}:{example.user_id}"})


if __name__ == "__main__":
    main("prepare_data", run)
