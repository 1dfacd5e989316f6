"""The finished chains of ``paths.chains``, for the stages that come after the pipeline: review and publication."""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from tagpr.errors import DataError, StageError
from tagpr.runs import file_hash
from tagpr.schema import Chain, Manifest, PreferencePair, Record

REMEDY = (
    "Make it with `bash recipes/build_chains.sh` (replies that were paid for are kept), or set paths.chains."
)
_BATCH_ROWS = 256
Form = TypeVar("Form", bound=Record)


@dataclass(frozen=True)
class Finished:
    """A chain that was chosen for SFT: the row of ``sft.parquet`` with what the pipeline knows of it."""

    id: str
    example_id: str
    task: str
    user_id: str
    prompt: str
    response: str
    gold: str
    judge_scores: tuple[int, int, int, int] | None


def read_manifest(folder: Path) -> Manifest:
    """The manifest that the pipeline writes last, so that it is there only if everything else is.

    Raises:
        StageError: there is none.
        DataError: it cannot be read.
    """
    path = folder / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such file, so there are no finished chains. {REMEDY}") from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise DataError(f"{path}: is no manifest ({type(error).__name__}). {REMEDY}") from error


def check_unchanged(folder: Path, manifest: Manifest, names: Container[str]) -> None:
    """Refuse files that are not those the manifest was written for.

    Raises:
        StageError: naming the file.
    """
    for name, expected in manifest.notes.get("files", {}).items():
        if name not in names:
            continue
        path = folder / name
        if not path.is_file() or file_hash(path) != expected:
            raise StageError(f"{path}: is missing, or is not the file that manifest.json describes. {REMEDY}")


def sft_column(folder: Path, *names: str) -> list[tuple[str, ...]]:
    """Columns of ``sft.parquet``, row by row.

    Raises:
        DataError: the file is missing or has no such columns.
    """
    table = _parquet(folder / "sft.parquet").read(columns=list(names))
    missing = set(names) - set(table.schema.names)
    if missing:
        raise DataError(f"{folder / 'sft.parquet'}: has no column {min(missing)}. {REMEDY}")
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def iterate_finished(folder: Path, only: Container[str] | None = None) -> Iterator[Finished]:
    """Yield the chains of ``sft.parquet`` in its order, ``only`` those ids where given.

    Memory holds one batch of texts, and gold answers and scores of all.

    Raises:
        DataError: a file is missing or damaged, or a chain of ``sft.parquet`` is not among all chains.
    """
    ids = {row[0] for row in sft_column(folder, "id") if only is None or row[0] in only}
    known: dict[str, tuple[str, str, tuple[int, int, int, int] | None]] = {}
    for chain in iterate_chains(folder):
        if chain.id in ids:
            known[chain.id] = (chain.example_id, chain.gold, chain.judge_scores)
    for batch in _parquet(folder / "sft.parquet").iter_batches(batch_size=_BATCH_ROWS):
        for row in batch.to_pylist():
            if row["id"] not in ids:
                continue
            if row["id"] not in known:
                raise DataError(
                    f"{folder / 'sft.parquet'}: chain {row['id']} is not among all chains. {REMEDY}"
                )
            example_id, gold, scores = known[row["id"]]
            yield Finished(**row, example_id=example_id, gold=gold, judge_scores=scores)


def iterate_chains(folder: Path) -> Iterator[Chain]:
    """Yield every usable rollout.

    Raises:
        DataError: ``chains.jsonl`` is missing or damaged; naming file and line.
    """
    return _records(folder / "chains.jsonl", Chain)


def iterate_pairs(folder: Path, kind: str) -> Iterator[PreferencePair]:
    """Yield the pairs of one kind.

    Raises:
        DataError: the file is missing or damaged; naming file and line.
    """
    return _records(folder / f"{kind}.jsonl", PreferencePair)


def _records(path: Path, form: type[Form]) -> Iterator[Form]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                yield _record(f"{path}:{number}", line, form)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}). {REMEDY}") from error


def _record(place: str, line: str, form: type[Form]) -> Form:
    try:
        return form.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or form.__name__
        raise DataError(f"{place}: {where}: {problem['msg']}. {REMEDY}") from error


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet ({type(error).__name__}). {REMEDY}") from error
