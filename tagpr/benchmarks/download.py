"""Benchmark files over HTTP: resumed where a download broke off, and checked before they count as there (S1).

A file is written to ``<name>.part`` beside its place and renamed when it is whole, so a file under its own name is complete
whatever was killed before. ``<name>.part.json`` says which version of the file the part belongs to.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from tagpr.errors import DataError, StageError
from tagpr.runs import file_hash, write_json_atomically

logger = logging.getLogger(__name__)

RECORD = "downloads.json"
"""In the folder of the raw files: where each downloaded file came from, its size and SHA-256."""

# A broken connection that brought this much was no failure of the server: the count of attempts begins anew.
_PROGRESS_BYTES = 1 << 20
# A server that was never reached is not waited for as long as one that answered before.
_ATTEMPTS_UNREACHED = 3
_LONGEST_WAIT_S = 120.0
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# What begins and ends a file of a kind; white space around JSON does not count.
_ENDS: dict[str, tuple[bytes, bytes, str]] = {
    ".json": (b"[{", b"]}", "JSON"),
    ".parquet": (b"P", b"1", "parquet"),
}


class FetchError(DataError):
    """A file cannot be had from its server; a person may put it in place by hand."""


@dataclass(frozen=True)
class Remote:
    """One file on a server and its place here; ``key`` is the setting that its address comes from."""

    address: str
    target: Path
    key: str

    @property
    def shown(self) -> str:
        """The address without user name, password and query, which may be secret."""
        url = httpx.URL(self.address)
        return str(url.copy_with(username=None, password=None, query=None, fragment=None))


@dataclass(frozen=True)
class Patience:
    """How long a faulty server is put up with; times in seconds."""

    attempts: int = 6
    timeout_s: float = 60.0
    backoff_s: float = 1.0
    progress_every_s: float = 5.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)


class _TransientError(Exception):
    """Worth another attempt; ``wait_s`` is what the server asked for."""

    def __init__(self, problem: str, wait_s: float | None = None, reached: bool = True) -> None:
        super().__init__(problem)
        self.wait_s = wait_s
        self.reached = reached


def download(remotes: Sequence[Remote], folder: Path, patience: Patience) -> None:
    """Fetch files one after the other and note each in ``folder``'s record; files that are there are kept.

    A second process that downloads into the same folder waits for the first.

    Raises:
        FetchError: a file cannot be had (wrong address, no network, a server that keeps failing) or is not what it
            should be; the message names the address. What was fetched stays, and the same call goes on from there.
        StageError: the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timeout = httpx.Timeout(patience.timeout_s, connect=min(20.0, patience.timeout_s))
    # No compression: offsets and lengths are then those of the file itself.
    headers = {"accept-encoding": "identity", "user-agent": "tagpr"}
    with (
        exclusive(folder / ".lock"),
        httpx.Client(timeout=timeout, headers=headers, follow_redirects=True) as client,
    ):
        missing = [remote for remote in remotes if not remote.target.is_file()]
        for number, remote in enumerate(missing, start=1):
            logger.info("%d of %d: %s -> %s", number, len(missing), remote.shown, remote.target)
            remote.target.parent.mkdir(parents=True, exist_ok=True)
            source = _Transfer(client, remote, patience).fetch()
            _note(folder, remote.target, remote.shown, source)


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Keep a second process waiting; it then finds all done. The lock dies with its process."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is at work here, waiting for it", lock.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def downloaded(folder: Path, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What the record of ``folder`` says of those of ``paths`` that still have the size they were downloaded with."""
    record = _read_json(folder / RECORD)
    found = {}
    for path in paths:
        name = _name(folder, path)
        entry = record.get(name)
        if entry is not None and path.is_file() and path.stat().st_size == entry["bytes"]:
            found[name] = entry
    return found


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _read_json(path: Path) -> dict[str, Any]:
    """What we wrote there; {} where it is absent or was not written by us."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _note(folder: Path, path: Path, address: str, version: Mapping[str, Any]) -> None:
    record = _read_json(folder / RECORD)
    record[_name(folder, path)] = {
        "address": address,
        **version,
        "bytes": path.stat().st_size,
        "sha256": file_hash(path),
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json_atomically(folder / RECORD, record)


class _Transfer:
    """One file, over as many attempts as it takes."""

    def __init__(self, client: httpx.Client, remote: Remote, patience: Patience) -> None:
        self.client = client
        self.remote = remote
        self.patience = patience
        self.part = remote.target.with_name(f"{remote.target.name}.part")
        self.version_file = remote.target.with_name(f"{remote.target.name}.part.json")
        self.meter = _Meter(remote.target.name, patience.progress_every_s)

    def fetch(self) -> dict[str, Any]:
        """Bring the file to its place; returns what the server said of its version."""
        failures, reached, most = 0, False, self.size()
        while True:
            try:
                version = self.attempt()
                break
            except _TransientError as error:
                reached = reached or error.reached
                if self.size() >= most + _PROGRESS_BYTES:
                    failures, most = 0, self.size()
                failures += 1
                if failures >= (
                    self.patience.attempts if reached else min(self.patience.attempts, _ATTEMPTS_UNREACHED)
                ):
                    raise FetchError(
                        f"{self.remote.shown}: {error}, after {failures} attempts. Check the network and "
                        f"{self.remote.key}."
                    ) from error
                wait = self.patience.backoff_s * 2 ** (failures - 1) if error.wait_s is None else error.wait_s
                wait = min(wait, _LONGEST_WAIT_S)
                logger.warning(
                    "%s: %s; again in %.0f s from byte %d", self.remote.target.name, error, wait, self.size()
                )
                self.patience.sleep(wait)
        self.check_end()
        with self.part.open("rb+") as stream:
            os.fsync(stream.fileno())
        self.part.replace(self.remote.target)
        self.version_file.unlink(missing_ok=True)
        return {name: version.get(name) for name in ("etag", "last_modified")}

    def size(self) -> int:
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0

    def attempt(self) -> dict[str, Any]:
        """One request; returns when the part is whole."""
        have, version = self.size(), _read_json(self.version_file)
        headers = {}
        if have and version.get("address") == self.remote.address:
            if version.get("total") == have:
                return version
            if validator := _validator(version):
                headers = {"range": f"bytes={have}-", "if-range": validator}
        try:
            with self.client.stream("GET", self.remote.address, headers=headers) as response:
                self.refuse(response)
                if response.status_code == 206 and headers:
                    total = self.continues(response, have, version)
                else:
                    if have:
                        logger.info("%s: begins anew, the server does not resume it", self.remote.target.name)
                    have, total = 0, _length(response)
                    version = self.begin(response, total)
                self.room_for(None if total is None else total - have)
                self.write(response, have, total)
        except httpx.InvalidURL as error:
            raise FetchError(f"{self.remote.key}: {error}. Correct the address.") from error
        except httpx.UnsupportedProtocol as error:
            raise FetchError(
                f"{self.remote.key}: {self.remote.shown} is no http address. Correct it."
            ) from error
        except httpx.TooManyRedirects as error:
            raise FetchError(
                f"{self.remote.shown}: redirects in a circle. Check {self.remote.key}."
            ) from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise _TransientError(
                f"{_reason(error)} ({self.size():,} bytes so far)",
                reached=not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout),
            ) from error
        if total is not None and self.size() != total:
            raise _TransientError(f"{self.size():,} of {total:,} bytes arrived")
        return version

    def refuse(self, response: httpx.Response) -> None:
        """Raise unless the answer holds file content."""
        status = response.status_code
        if status == 416:
            # What is here is longer than what is there: of no use.
            self.forget()
            raise _TransientError("the file there is shorter than the part here (HTTP 416)")
        if status in _TRANSIENT_STATUS:
            raise _TransientError(f"the server answers HTTP {status}", _retry_after(response))
        if status not in (200, 206):
            raise FetchError(
                f"{self.remote.shown}: the server answers HTTP {status}. Check {self.remote.key}."
            )
        if status == 206 and "range" not in response.request.headers:
            raise FetchError(
                f"{self.remote.shown}: the server sends a part of the file unasked. Check {self.remote.key}."
            )
        if response.headers.get("content-type", "").partition(";")[0].strip().lower() in (
            "text/html",
            "application/xhtml+xml",
        ):
            self.forget()
            raise self.html()
        if response.headers.get("content-encoding", "identity") != "identity":
            raise FetchError(
                f"{self.remote.shown}: the server sends compressed data unasked. Check {self.remote.key}."
            )

    def html(self) -> FetchError:
        # LaMP's server answers a wrong address this way, with status 200.
        return FetchError(
            f"{self.remote.shown}: is an HTML page, not the file. Check {self.remote.key}, and that no log-in page "
            "is in between."
        )

    def continues(self, response: httpx.Response, have: int, version: dict[str, Any]) -> int | None:
        """Check that a 206 goes on exactly where the part ends; returns the size of the whole file."""
        span, _, total = response.headers.get("content-range", "").removeprefix("bytes ").partition("/")
        etag = response.headers.get("etag")
        changed = etag is not None and version.get("etag") is not None and etag != version["etag"]
        whole = int(total) if total.isdecimal() else None
        if (
            span.partition("-")[0] != str(have)
            or changed
            or (whole is not None and version.get("total") not in (None, whole))
        ):
            self.forget()
            raise _TransientError("the file there changed meanwhile")
        return whole

    def begin(self, response: httpx.Response, total: int | None) -> dict[str, Any]:
        """Start from the first byte."""
        self.forget()
        version = {
            "address": self.remote.address,
            "etag": response.headers.get("etag"),
            "last_modified": response.headers.get("last-modified"),
            "total": total,
        }
        write_json_atomically(self.version_file, version)
        return version

    def forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.version_file.unlink(missing_ok=True)

    def room_for(self, missing: int | None) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if missing is not None and missing > free:
            raise StageError(
                f"{self.remote.target}: needs {missing:,} bytes, {free:,} are free. Make room there or set benchmark.dir."
            )

    def write(self, response: httpx.Response, have: int, total: int | None) -> None:
        beginning = b"" if have == 0 else None
        self.meter.start(have, total)
        with self.part.open("ab") as stream:
            for chunk in response.iter_raw():
                if beginning is not None:
                    beginning = (beginning + chunk)[:64]
                    if self.check_beginning(beginning):
                        beginning = None
                stream.write(chunk)
                self.meter.add(len(chunk))
        self.meter.end()

    def check_beginning(self, beginning: bytes) -> bool:
        """Whether enough was seen to tell that the file is of its kind; raises where it is not."""
        text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not text:
            return len(beginning) >= 64
        if text.startswith(b"<"):
            self.forget()
            raise self.html()
        opens, _, kind = _ENDS.get(self.remote.target.suffix, (None, None, ""))
        if opens and text[:1] not in [opens[i : i + 1] for i in range(len(opens))]:
            self.forget()
            raise FetchError(
                f"{self.remote.shown}: is no {kind} file, it begins with {text[:20]!r}. Check {self.remote.key}."
            )
        return True

    def check_end(self) -> None:
        """Raise where the file ends early although the server called it whole."""
        _, closes, kind = _ENDS.get(self.remote.target.suffix, (None, None, ""))
        with self.part.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 4096))
            end = stream.read().rstrip()
        if not end or (closes and end[-1] not in closes):
            self.forget()
            raise FetchError(
                f"{self.remote.shown}: {'is empty' if not size else f'ends in the middle of its {kind}'} although the "
                f"server calls it whole ({size:,} bytes). Try again later, or check {self.remote.key}."
            )


class _Meter:
    """A line on progress every few seconds."""

    def __init__(self, name: str, every_s: float) -> None:
        self.name = name
        self.every_s = every_s

    def start(self, have: int, total: int | None) -> None:
        self.have, self.total, self.fresh = have, total, 0
        self.began = self.said = time.monotonic()

    def add(self, count: int) -> None:
        self.fresh += count
        if time.monotonic() - self.said >= self.every_s:
            self.said = time.monotonic()
            self.say()

    def say(self) -> None:
        rate = self.fresh / max(time.monotonic() - self.began, 1e-6)
        here = self.have + self.fresh
        if self.total is None:
            logger.info("%s: %s at %s/s", self.name, _size(here), _size(rate))
        else:
            left = (self.total - here) / rate if rate else 0
            logger.info(
                "%s: %s of %s (%.0f %%) at %s/s, %.0f s left",
                self.name, _size(here), _size(self.total), 100 * here / max(self.total, 1), _size(rate), left,
            )  # fmt: skip

    def end(self) -> None:
        seconds = time.monotonic() - self.began
        logger.info(
            "%s: %s in %.0f s, %s/s",
            self.name,
            _size(self.fresh),
            seconds,
            _size(self.fresh / max(seconds, 1e-6)),
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _length(response: httpx.Response) -> int | None:
    value = response.headers.get("content-length", "")
    return int(value) if value.isdecimal() else None


def _validator(version: dict[str, Any]) -> str | None:
    """What If-Range may compare: a strong ETag, else the time of the last change (RFC 9110, 13.1.5)."""
    etag = version.get("etag")
    if isinstance(etag, str) and not etag.startswith("W/"):
        return etag
    changed = version.get("last_modified")
    return changed if isinstance(changed, str) else None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to be left alone; it may say a number or a date."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    if value.isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, when.timestamp() - time.time())


def _reason(error: httpx.TransportError | httpx.StreamError) -> str:
    """One clause for a person; httpx leaves some messages empty."""
    said = next(iter(str(error).splitlines()), "")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"no connection ({said or type(error).__name__})"
    if isinstance(error, httpx.TimeoutException):
        return "the server fell silent"
    return f"the connection broke off ({said or type(error).__name__})"


def download_from_hub(
    repository: str,
    revision: str,
    patterns: Sequence[str],
    folder: Path,
    key: str,
    endpoint: str | None = None,
) -> None:
    """Fetch the files of a dataset on the Hugging Face hub that match ``patterns``, to the same paths below ``folder``.

    ``huggingface_hub`` does the work: it resumes, checks sizes, and takes HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
    from the environment.

    Raises:
        FetchError: no network, no such dataset or revision, or not one file that matches.
    """
    # Here, since it takes a second to import and nothing else of the stage needs it.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    folder.mkdir(parents=True, exist_ok=True)
    logger.info("%s at %s: %s -> %s", repository, revision, ", ".join(patterns), folder)
    with exclusive(folder / ".lock"):
        try:
            # Asked first: snapshot_download() itself is silent about a hub out of reach where the folder exists.
            commit = HfApi(endpoint=endpoint).dataset_info(repository, revision=revision).sha
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=commit,
                allow_patterns=list(patterns),
                local_dir=folder,
                endpoint=endpoint,
            )
        except (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            httpx.HTTPError,
        ) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise FetchError(
                f"{key}={repository}: cannot be fetched from the hub ({said}). Check {key} and the network."
            ) from error
        files = {pattern: sorted(folder.glob(pattern)) for pattern in patterns}
        if absent := [pattern for pattern, found in files.items() if not found]:
            raise FetchError(
                f"{key}={repository}: has no file {', '.join(absent)} at {revision}. Check {key}."
            )
        for path in sorted({path for found in files.values() for path in found}):
            _note(folder, path, f"hub dataset {repository}", {"commit": commit})
