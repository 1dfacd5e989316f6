"""What can go wrong with the SQLite files of a run, as one line each."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tagpr.errors import StageError


@contextmanager
def naming(path: Path, remedy: str) -> Iterator[None]:
    """SQLite's errors in the body as a line that names the file and says what to do.

    Raises:
        StageError: SQLite could not use the file.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise StageError(f"{path}: SQLite cannot use this file ({error}). {remedy}") from error
