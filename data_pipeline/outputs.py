"""The files that the stage leaves in ``paths.chains``, each written as a whole or not at all, row by row."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.funnel import Funnel
from tagpr.errors import StageError
from tagpr.runs import file_hash, write_json_atomically
from tagpr.schema import Chain, Manifest, PreferencePair, Record
from tagpr.tags import format_response

MANIFEST = "manifest.json"
FILES = ("chains.jsonl", "sft.parquet", "prp.jsonl", "pqp.jsonl", "funnel.json")

SFT_COLUMNS = pa.schema([(name, pa.string()) for name in ("id", "task", "user_id", "prompt", "response")])
_GROUP_ROWS = 1000


def write_outputs(
    folder: Path,
    chains: Iterable[Chain],
    selected: Iterable[Chain],
    pairs: Callable[[str], Iterable[PreferencePair]],
    funnel: Funnel,
    manifest: Manifest,
) -> None:
    """Write all files; the manifest comes last and holds the others' hashes, so it is there only if they are.

    ``pairs`` yields those of one kind; the funnel may count while they are drawn, and is written after them.

    Raises:
        StageError: a file cannot be written, e.g. because the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        _write_lines(folder / "chains.jsonl", chains)
        _write_parquet(folder / "sft.parquet", selected)
        for kind in ("prp", "pqp"):
            _write_lines(folder / f"{kind}.jsonl", pairs(kind))
        write_json_atomically(folder / "funnel.json", funnel.as_dict())
        hashes = {name: file_hash(folder / name) for name in FILES}
        complete = manifest.model_copy(update={"notes": {**manifest.notes, "files": hashes}})
        write_json_atomically(folder / MANIFEST, complete.model_dump())
    except OSError as error:
        raise StageError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}). Make room, or set paths.chains, and "
            "run again: no reply is paid for twice."
        ) from error


def is_complete(folder: Path, fingerprint: str) -> bool:
    """Whether ``folder`` holds, unchanged, what a run with this fingerprint left."""
    try:
        notes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["notes"]
        return bool(notes["fingerprint"] == fingerprint) and all(
            file_hash(folder / name) == notes["files"][name] for name in FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A file that takes the place of ``path`` when all of it is on the disk."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        # What a killed run was writing.
        left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    with _partial(path) as partial, partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.model_dump_json())
            file.write("\n")
        file.flush()


def _write_parquet(path: Path, chains: Iterable[Chain]) -> None:
    rows = (
        {
            "id": chain.id,
            "task": chain.task,
            "user_id": chain.user_id,
            "prompt": chain.prompt,
            "response": format_response(chain.tagged or "", chain.answer),
        }
        for chain in chains
    )
    with _partial(path) as partial:
        with pq.ParquetWriter(partial, SFT_COLUMNS) as writer:
            while group := list(islice(rows, _GROUP_ROWS)):
                writer.write_table(pa.Table.from_pylist(group, schema=SFT_COLUMNS))
