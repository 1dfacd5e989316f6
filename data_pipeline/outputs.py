"""The files that the stage leaves in ``paths.chains``, each written as a whole or not at all."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.build import Built
from data_pipeline.funnel import Funnel
from tagpr.runs import file_hash, write_json_atomically, write_text_atomically
from tagpr.schema import Chain, Manifest, Record
from tagpr.tags import format_response

MANIFEST = "manifest.json"
FILES = ("chains.jsonl", "sft.parquet", "prp.jsonl", "pqp.jsonl", "funnel.json")

SFT_COLUMNS = pa.schema([(name, pa.string()) for name in ("id", "task", "user_id", "prompt", "response")])


def write_outputs(folder: Path, built: Built, funnel: Funnel, manifest: Manifest) -> None:
    """Write all files; the manifest comes last and holds the others' hashes, so it is there only if they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_text_atomically(folder / "chains.jsonl", _lines(built.chains))
    _write_parquet(folder / "sft.parquet", built.selected)
    for kind in ("prp", "pqp"):
        write_text_atomically(
            folder / f"{kind}.jsonl", _lines([pair for pair in built.pairs if pair.kind == kind])
        )
    write_json_atomically(folder / "funnel.json", funnel.as_dict())
    hashes = {name: file_hash(folder / name) for name in FILES}
    complete = manifest.model_copy(update={"notes": {**manifest.notes, "files": hashes}})
    write_json_atomically(folder / MANIFEST, complete.model_dump())


def is_complete(folder: Path, fingerprint: str) -> bool:
    """Whether ``folder`` holds, unchanged, what a run with this fingerprint left."""
    try:
        notes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["notes"]
        return bool(notes["fingerprint"] == fingerprint) and all(
            file_hash(folder / name) == notes["files"][name] for name in FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lines(records: Sequence[Record]) -> str:
    return "".join(f"{record.model_dump_json()}\n" for record in records)


def _write_parquet(path: Path, chains: Sequence[Chain]) -> None:
    rows = [
        {
            "id": chain.id,
            "task": chain.task,
            "user_id": chain.user_id,
            "prompt": chain.prompt,
            "response": format_response(chain.tagged or "", chain.answer),
        }
        for chain in chains
    ]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=SFT_COLUMNS), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
