"""Read the objects of a JSON file one by one: of one array (LaMP-3's training questions are 1.7 GB in one), or one a line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tagpr.errors import DataError

_CHUNK_CHARS = 1 << 20
# A token cut by the buffer's end (a number, a literal, an escape) is reported at most this far before it.
_CUT_TOKEN_CHARS = 16
_WHITESPACE = " \t\r\n"


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of the array in ``path`` in order; memory holds one buffer and one object at a time.

    Raises:
        DataError: the file is absent, HTML, not UTF-8, not an array of objects, malformed, or cut off.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from _Reader(path, stream.read).objects()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}). Download it again.") from error


def refuse_html(path: Path, beginning: str) -> None:
    """Raise a DataError if ``beginning`` is that of a web page.

    LaMP's server answers a wrong address with a page and status 200, so a download cannot tell.
    """
    if beginning.lstrip().startswith("<"):
        raise DataError(
            f"{path}: holds an HTML page, not JSON. The server answers a wrong address this way: "
            "check the address and download the file again."
        )


def read_json_lines(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file of JSON lines with the number of each, one in memory at a time; empty lines are passed over.

    Args:
        path: the file.
        remedy: what to do about a line that is no JSON.

    Raises:
        DataError: a line is no JSON object, or the file holds a web page.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                refuse_html(path, line[:100].decode("utf-8", errors="replace"))
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: is no JSON ({error}). {remedy}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: is no JSON object. Mend the line.")
            yield number, row


class _Reader:
    """A window over the text: ``buffer[position:]`` is what has been read and not yet been parsed."""

    def __init__(self, path: Path, read: Callable[[int], str]) -> None:
        self.path = path
        self.read = read
        self.buffer = ""
        self.position = 0
        self.at_end = False
        self.decode = json.JSONDecoder().raw_decode

    def objects(self) -> Iterator[dict[str, Any]]:
        opening = self.peek()
        refuse_html(self.path, self.buffer[self.position : self.position + 1])
        if opening != "[":
            raise DataError(f"{self.path}: is not a JSON array of objects. Put LaMP's own file there.")
        self.position += 1
        count = 0
        if self.peek() == "]":
            self.position += 1
        else:
            while True:
                yield self.object(count)
                count += 1
                separator = self.peek()
                self.position += 1
                if separator == "]":
                    break
                if separator != ",":
                    self.fail(count, separator)
        if self.peek():
            raise DataError(f"{self.path}: has text after the end of its JSON array. Download it again.")

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            while self.position < len(self.buffer):
                if self.buffer[self.position] not in _WHITESPACE:
                    return self.buffer[self.position]
                self.position += 1
            if self.at_end:
                return ""
            self.more()

    def more(self) -> None:
        # Doubling keeps the cost linear when one object outgrows a chunk and is parsed again from its start.
        rest = self.buffer[self.position :]
        chunk = self.read(max(_CHUNK_CHARS, len(rest)))
        self.at_end = not chunk
        self.buffer = rest + chunk
        self.position = 0

    def object(self, count: int) -> dict[str, Any]:
        opening = self.peek()
        if opening != "{":
            self.fail(count, opening)
        while True:
            try:
                value, self.position = self.decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.buffer) - _CUT_TOKEN_CHARS
                if cut and not self.at_end:
                    self.more()
                    continue
                if cut:
                    self.fail(count, "")
                raise DataError(
                    f"{self.path}: malformed JSON in element {count + 1} ({error.msg}). Download it again."
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}: unreadable JSON in element {count + 1} ({error}).") from None
            return dict(value)

    def fail(self, count: int, found: str) -> None:
        if not found:
            raise DataError(
                f"{self.path}: the JSON ends too early, after {count} complete elements. Download it again."
            )
        raise DataError(
            f"{self.path}: expected an object, ',' or ']' after element {count}, found {found!r}. "
            "Put LaMP's own file there."
        )
