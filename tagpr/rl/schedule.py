"""The RL stages one after the other (S31): ``python -m tagpr.rl.schedule [key=value ...]``, or ``bash recipes/rl.sh``.

Each stage is a process and a folder of its own, and starts from the weights of the one before it, with a fresh optimizer. What
came of each stands in ``<run.dir>/schedule.json``; the same command goes on where it stopped.

Words of the command line go to every stage, but ``<name of a stage>.key=value`` to that one alone, and ``schedule.*`` and
``run.name`` to this.
"""

import ctypes
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, StageError, TagPRError
from tagpr.runs import folder_hash, write_json_atomically
from tagpr.schema import Record

logger = logging.getLogger("tagpr.rl.schedule")

# Where a stage looks for the weights that it starts from.
STARTS_FROM = {"guided_rl": "paths.sft", "exploratory_rl": "paths.guided"}
# Of the command line, what this configuration knows too.
SHARED = ("setting=", "benchmark=", "benchmark.", "run.outputs=", "run.seed=", "paths.", "tags.")
# What may differ between two starts of a schedule: where and how a stage runs, not what it learns.
HARMLESS = ("launch.", "watchdog.", "trainer.logger", "run.verbose", "prmu_client.")
ENDED_ON_PURPOSE = 3
STOP_S = 120.0


@dataclass(frozen=True)
class Planned:
    """One stage: ``name`` is its folder, ``stage`` what it is, ``before`` the one whose weights it takes."""

    name: str
    stage: str
    overrides: tuple[str, ...]
    before: str | None

    def command(self, outputs: str) -> list[str]:
        """Words after ``python -m tagpr``."""
        start = [] if self.before is None else [f"{STARTS_FROM[self.stage]}={outputs}/{self.before}/model"]
        return [self.stage, f"run.name={self.name}", *start, *self.overrides]


class Done(Record):
    """What came of a stage; ``status`` is its exit status, None while it runs or after this process was killed."""

    name: str
    stage: str
    overrides: list[str]
    started_from: str | None
    """Hash of the model folder that it began with; None: of the first stage."""
    status: int | None
    step: int | None = None
    switched: dict[str, Any] | None = None
    """Of a stage that a monitor ended early: step, monitor, reason."""
    began: str
    seconds: float | None = None


class Log(Record):
    """Content of ``schedule.json``."""

    stages: tuple[Done, ...] = ()


Runner = Callable[[Sequence[str]], int]
"""Runs ``python -m tagpr <words>`` to its end; returns the exit status."""


def plan(config: DictConfig, words: Sequence[str]) -> list[Planned]:
    """The stages of ``schedule.stages`` with the words that each of them gets, later ones counting more.

    Raises:
        ConfigError: no stage, an unknown one, or a name twice.
    """
    listed = OmegaConf.to_container(config.schedule.stages)
    assert isinstance(listed, list)
    planned: list[Planned] = []
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in listed]
    of_all = [word for word in words if not _bare(word).startswith(("schedule.", "run.name="))]
    shared = [word for word in of_all if not any(_bare(word).startswith(f"{name}.") for name in names)]
    for number, entry in enumerate(listed):
        key = f"schedule.stages[{number}]"
        if not isinstance(entry, dict) or not {"name", "stage"} <= set(entry) <= {
            "name",
            "stage",
            "overrides",
        }:
            raise ConfigError(
                f"{key}: is no stage. Write {{name: guided_rl, stage: guided_rl, overrides: []}}."
            )
        name, stage = str(entry["name"]), str(entry["stage"])
        if stage not in STARTS_FROM:
            raise ConfigError(f"{key}.stage={stage}: unknown. Use {' or '.join(STARTS_FROM)}.")
        if not name or "/" in name or names.count(entry["name"]) > 1 or name == config.run.name:
            raise ConfigError(f"{key}.name={name}: cannot be this stage's own folder. Give each its name.")
        own = [_without(word, name) for word in of_all if _bare(word).startswith(f"{name}.")]
        switch = (
            ["monitors.plateau.action=switch"]
            if config.schedule.switch_on_plateau and number < len(listed) - 1
            else []
        )
        overrides = [*switch, *(str(word) for word in entry.get("overrides") or []), *shared, *own]
        planned.append(Planned(name, stage, tuple(overrides), planned[-1].name if planned else None))
    if not planned:
        raise ConfigError("schedule.stages=[]: nothing to train. Name a stage.")
    return planned


def run(config: DictConfig, words: Sequence[str], runner: Runner) -> int:
    """Run what is not done yet; 0, or the status of the stage that did not end well.

    Raises:
        ConfigError: the schedule cannot be meant, or a finished stage was run with other settings.
        StageError: a stage was trained from other weights than those that now stand before it; ``schedule.json`` is damaged.
    """
    outputs, file = str(config.run.outputs), Path(config.run.dir) / "schedule.json"
    planned = plan(config, words)
    log = _read(file)
    for number, stage in enumerate(planned):
        folder = Path(outputs) / stage.name
        before = None if stage.before is None else folder_hash(Path(outputs) / stage.before / "model")
        recorded = next((one for one in log.stages if one.name == stage.name), None)
        if recorded is not None and recorded.status == 0 and (folder / "finished.json").is_file():
            _check_same(stage, recorded, before, folder)
            logger.info("%s: is done (step %s)", stage.name, recorded.step)
            continue
        done = Done(
            name=stage.name, stage=stage.stage, overrides=list(stage.overrides), started_from=before, status=None,
            began=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        log = _with(log, done, file)
        logger.info("stage %d of %d: %s", number + 1, len(planned), " ".join(stage.command(outputs)))
        started = time.monotonic()
        status = runner(stage.command(outputs))
        done = done.model_copy(
            update={
                "status": status,
                "seconds": round(time.monotonic() - started, 1),
                **_outcome(folder, status),
            }
        )
        log = _with(log, done, file)
        if status == ENDED_ON_PURPOSE:
            logger.error(
                "%s: a monitor stopped it, and the schedule with it. Look at %s; the same command goes on.",
                stage.name,
                folder,
            )
        if status != 0:
            return status
        if done.switched:
            why = f"{done.switched.get('monitor')}: {done.switched.get('reason')}"
            logger.info("%s: ended early, at step %s, for the next stage (%s)", stage.name, done.step, why)
    for one in log.stages:
        logger.info(
            "%s: step %s, %s s%s", one.name, one.step, one.seconds, ", switched" if one.switched else ""
        )
    return 0


def _outcome(folder: Path, status: int) -> dict[str, Any]:
    if status != 0:
        return {}
    finished, switched = folder / "finished.json", folder / "switched.json"
    if not finished.is_file():
        raise StageError(
            f"{folder}: its stage ended well and left no finished.json. Is run.outputs the same place for all of them?"
        )
    return {
        "step": json.loads(finished.read_text(encoding="utf-8"))["step"],
        "switched": json.loads(switched.read_text(encoding="utf-8")) if switched.is_file() else None,
    }


def _check_same(stage: Planned, recorded: Done, before: str | None, folder: Path) -> None:
    new, old = (
        [word for word in words if not _bare(word).startswith(HARMLESS)]
        for words in (stage.overrides, recorded.overrides)
    )
    if new != old:
        changed = next((word for word in [*new, *old] if new.count(word) != old.count(word)), new[0])
        raise ConfigError(
            f"{changed}: {stage.name} is done with other settings ({' '.join(old) or 'none'}). Delete {folder} and the stages "
            "after it to train again, or give the stage another name."
        )
    if before != recorded.started_from:
        raise StageError(
            f"{folder}: was trained from other weights than those of {stage.before} now. Delete it to train it again."
        )


def _read(file: Path) -> Log:
    if not file.exists():
        return Log()
    try:
        return Log.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise StageError(
            f"{file}: cannot be read ({error.error_count()} errors). Delete it; finished stages are noticed by themselves."
        ) from None


def _with(log: Log, done: Done, file: Path) -> Log:
    """The log with one stage's entry replaced or added, on the disk."""
    stages = [one for one in log.stages if one.name != done.name]
    place = next((number for number, one in enumerate(log.stages) if one.name == done.name), len(stages))
    stages.insert(place, done)
    log = Log(stages=tuple(stages))
    write_json_atomically(file, log.model_dump())
    return log


def _bare(word: str) -> str:
    return word.lstrip("+~")


def _without(word: str, name: str) -> str:
    signs = word[: len(word) - len(_bare(word))]
    return signs + _bare(word).removeprefix(f"{name}.")


def start(words: Sequence[str]) -> int:
    """Run ``python -m tagpr <words>`` as a process that ends with this one; its exit status.

    An interrupt of this process is one of the stage; the stage is waited for.
    """
    process = subprocess.Popen([sys.executable, "-m", "tagpr", *words], preexec_fn=_die_with_parent)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def composed(stage: str, words: Sequence[str]) -> DictConfig:
    """Configuration of a sequence of stages, from those of its words that it knows.

    Raises:
        ConfigError: one of them is wrong.
    """
    own = [
        word
        for word in words
        if _bare(word).startswith((f"{stage}.", "schedule.", "grid.", "run.name=", *SHARED))
    ]
    return resolve(compose(stage, own))


def command_line(stage: str, run: Callable[[DictConfig, Sequence[str]], int], words: Sequence[str]) -> int:
    """What ``python -m`` does with a sequence of stages: configuration, one line for an error, an exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = composed(stage, [word for word in words if word != "--cfg"])
        if "--cfg" in words:
            sys.stdout.write(OmegaConf.to_yaml(config))
            return 0
        return run(config, words)
    except TagPRError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        return 130


def main(config: DictConfig, words: Sequence[str]) -> int:
    """The schedule, or with ``--dry-run`` what each of its stages would do."""
    if "--dry-run" in words:
        stages = plan(config, [word for word in words if word != "--dry-run"])
        return next(
            (
                status
                for stage in stages
                if (status := start([*stage.command(config.run.outputs), "--dry-run"]))
            ),
            0,
        )
    return run(config, words, start)


if __name__ == "__main__":
    sys.exit(command_line("rl", main, sys.argv[1:]))
