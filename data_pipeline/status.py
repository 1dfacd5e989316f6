"""What a run has done so far: ``python -m data_pipeline.status key=value ...``, while it runs or when it has stopped.

Reads the ledger and the results store and writes nothing; the run need not know.
"""

import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data_pipeline.cost import spent_dollars
from data_pipeline.eta import outlook
from data_pipeline.funnel import STAGES
from data_pipeline.ledger import LAYOUT, Pace, Spent, paces, spent
from data_pipeline.outputs import MANIFEST
from data_pipeline.progress import duration, time_left
from data_pipeline.settings import ChainSettings, read_settings
from data_pipeline.store import store_path
from tagpr.configuration import main
from tagpr.errors import StageError

# Replies of the last minutes give the rate.
RECENT_S = 300.0
# A run notes its progress every second; one that has not for so long has stopped.
SILENT_S = 30.0
MAIN_LINE = ("rollouts", "parsed", "distinct", "accurate", "judged", "tagged", "selected")


def show(config: DictConfig) -> None:
    """Print counts, survival rates, tokens, dollars, rate and time left.

    Raises:
        StageError: there is no ledger, or it cannot be read.
    """
    settings = read_settings(config)
    ledger = Path(settings.ledger)
    if not ledger.is_file():
        raise StageError(f"{ledger}: no such ledger. Start a run with `bash recipes/build_chains.sh`.")
    with _reading(ledger) as database:
        if database.execute("PRAGMA user_version").fetchone()[0] != LAYOUT:
            raise StageError(
                f"{ledger}: is a ledger of another version. Look at it with the version that wrote it."
            )
        rows = spent(database)
        known = paces(database)
        newest = database.execute("SELECT MAX(created) FROM unit").fetchone()[0] or 0.0
        recent = database.execute(
            "SELECT COUNT(*), MIN(created) FROM unit WHERE created > ?", (newest - RECENT_S,)
        ).fetchone()
    lines = list(_replies(rows, settings))
    if newest:
        rate = recent[0] / max(newest - recent[1], 1.0)
        lines.append(
            f"last reply {duration(max(0.0, time.time() - newest))} ago; before that {rate:.1f} a second"
        )
    funnel, progress = _results(Path(config.paths.chains), store_path(ledger))
    if progress is not None:
        lines.append(_progress(settings, progress, known))
    if funnel is not None:
        lines += _funnel(funnel, list(config.benchmark.tasks))
    sys.stdout.write("\n".join(lines) + "\n")


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(f"file:{path.absolute()}?mode=ro", uri=True, timeout=10.0)) as database:
            yield database
    except sqlite3.Error as error:
        raise StageError(
            f"{path}: cannot be read ({error}). Give the ledger of a run in chains.ledger."
        ) from error


def _replies(rows: list[Spent], settings: Any) -> Iterator[str]:
    yield f"{'':24}{'replies':>10}{'prompt':>14}{'cached':>14}{'reply tokens':>14}{'dollars':>10}"
    for row in [*rows, None]:
        own = rows if row is None else [row]
        name = "all" if row is None else f"{row.kind}{' (batch)' if row.batch else ''}"
        replies, prompt, cached, completion = (
            sum(getattr(each, field) for each in own)
            for field in ("replies", "prompt_tokens", "cached_prompt_tokens", "completion_tokens")
        )
        dollars = spent_dollars(own, settings.prices)
        yield f"{name:24}{replies:>10,}{prompt:>14,}{cached:>14,}{completion:>14,}{dollars:>10.2f}"


def _results(folder: Path, store: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Funnel and progress: of the run that is under way or has stopped, else the finished one's."""
    if store.is_file():
        with _reading(store) as database:
            notes = {
                name: json.loads(value)
                for name, value in database.execute(
                    "SELECT name, value FROM note WHERE name IN ('funnel', 'progress')"
                )
            }
        return notes.get("funnel"), notes.get("progress")
    if (folder / MANIFEST).is_file():
        return json.loads((folder / "funnel.json").read_text(encoding="utf-8")), None
    return None, None


def _progress(settings: ChainSettings, progress: dict[str, Any], known: dict[str, Pace]) -> str:
    line = f"{progress['stage']}: {progress['done']:,} of {progress['total']:,} {progress['what']}"
    made = outlook(settings, progress, known)
    left = time_left(made)
    silent = time.time() - progress["at"]
    if silent > SILENT_S:
        return f"{line}; stopped {duration(silent)} ago, the same command goes on; {left}"
    if made.seconds >= 1:
        left += f", until {time.strftime('%Y-%m-%d %H:%M', time.localtime(time.time() + made.seconds))}"
    return f"{line}; {left}"


def _funnel(funnel: dict[str, Any], tasks: list[str]) -> Iterator[str]:
    yield f"{'':18}{'all':>9}{'of before':>11}" + "".join(f"{task:>17}" for task in tasks)
    stages = funnel["stages"]
    for name in STAGES:
        counts = stages[name]
        before = None
        if name in MAIN_LINE[1:]:
            before = stages[MAIN_LINE[MAIN_LINE.index(name) - 1]]
        cells = "".join(f"{counts.get(task, 0):>9,}{_share(counts, before, task):>8}" for task in tasks)
        yield f"{name:18}{counts['all']:>9,}{_share(counts, before, 'all'):>11}{cells}"
    for stage, reasons in funnel["dropped"].items():
        yield f"dropped at {stage}: " + ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())


def _share(counts: dict[str, Any], before: dict[str, Any] | None, task: str) -> str:
    if before is None or not before.get(task):
        return ""
    return f"{100 * counts.get(task, 0) / before[task]:.0f} %"


if __name__ == "__main__":
    main("build_chains", show)
