"""Examples on disk: parquet for what a stage prepared, JSON lines for what a person writes (S1-S3).

Both are read and written row by row: LaMP-3's training split is 1.7 GB, and memory holds one row group of it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from tagpr.errors import DataError
from tagpr.schema import Example, ProfileItem

_ITEM = pa.struct([("id", pa.string()), ("fields", pa.map_(pa.string(), pa.string())), ("date", pa.string())])
COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "task", "split", "user_id", "query")),
        ("profile", pa.list_(_ITEM)),
        ("gold", pa.string()),
    ]
)

# A row group ends at either: what a reader holds in memory at a time.
_GROUP_ROWS = 1000
_GROUP_CHARACTERS = 8_000_000


def examples_file(folder: str | Path, split: str) -> Path:
    """Where a prepared split lies in ``paths.examples``."""
    return Path(folder) / f"{split}.parquet"


def read_examples(path: Path) -> list[Example]:
    """Read a file of Examples into memory, see :func:`iterate_examples`."""
    return list(iterate_examples(path))


def iterate_examples(path: Path) -> Iterator[Example]:
    """Yield the Examples of a ``.parquet`` or ``.jsonl`` file in order; blank lines are skipped.

    Raises:
        DataError: the file is absent or damaged, a row is no Example, or two rows have one id; the message names the
            file and the line (JSON lines) or row (parquet).
    """
    path = Path(path)
    first: dict[str, int] = {}
    try:
        for number, read in _rows(path):
            try:
                example = read()
            except ValidationError as error:
                problem = error.errors()[0]
                place = ".".join(map(str, problem["loc"]))
                what = f"{place}: {problem['msg']}" if place else problem["msg"]
                raise DataError(f"{path}:{number}: {what}. Mend the row.") from None
            if example.id in first:
                raise DataError(
                    f"{path}:{number}: id {example.id!r} is that of row {first[example.id]} too. "
                    "Give each row its own id."
                )
            first[example.id] = number
            yield example
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Make it with `bash recipes/prepare_data.sh`."
        ) from error
    except pa.ArrowException as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{path}: is no parquet file of examples ({reason}). Make it with `bash recipes/prepare_data.sh`."
        ) from error


def _rows(path: Path) -> Iterator[tuple[int, Callable[[], Example]]]:
    """Number of each row from 1, and how to read it."""
    if path.suffix == ".jsonl":
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, lambda line=line: Example.model_validate_json(line)  # type: ignore[misc]
        return
    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=200)
        rows = chain.from_iterable(batch.to_pylist(maps_as_pydicts="strict") for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield number, lambda row=row: Example.model_validate(row)  # type: ignore[misc]


def read_users(path: Path) -> frozenset[str]:
    """The users of a prepared split; reads this column only.

    Raises:
        DataError: the file is absent or damaged.
    """
    try:
        table = pq.read_table(path, columns=["user_id"])
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}). Make it with `bash recipes/prepare_data.sh`."
        ) from error
    return frozenset(table["user_id"].unique().to_pylist())


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Write Examples (``.parquet`` or ``.jsonl``) and return their number; a reader sees the old file or the whole new one.

    The rows are consumed one by one. If one raises, the target is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        count = (_write_lines if path.suffix == ".jsonl" else _write_parquet)(partial, examples)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write_lines(path: Path, examples: Iterable[Example]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for example in examples:
            stream.write(example.model_dump_json())
            stream.write("\n")
            count += 1
    return count


def _write_parquet(path: Path, examples: Iterable[Example]) -> int:
    count = characters = 0
    group: list[dict[str, object]] = []
    with ExitStack() as stack:
        writer = stack.enter_context(pq.ParquetWriter(path, COLUMNS, compression="zstd"))

        def flush() -> None:
            nonlocal characters
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=COLUMNS))
            group.clear()
            characters = 0

        for example in examples:
            row = example.model_dump()
            row["profile"] = [_item(item) for item in example.profile]
            group.append(row)
            characters += len(example.query) + sum(
                len(text) for item in example.profile for text in item.fields.values()
            )
            count += 1
            if len(group) >= _GROUP_ROWS or characters >= _GROUP_CHARACTERS:
                flush()
        flush()
    return count


def _item(item: ProfileItem) -> dict[str, object]:
    return {"id": item.id, "fields": list(item.fields.items()), "date": item.date}
