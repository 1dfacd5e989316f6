"""The downloader against a server on loopback that does what servers do on bad days."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tagpr.benchmarks.download import Patience, Remote, download, download_from_hub, downloaded
from tagpr.errors import DataError, StageError

BODY = json.dumps(
    [{"id": str(number), "input": f"text {number} é", "profile": []} for number in range(4000)]
).encode()
ETAG = '"one"'


@dataclass
class Server:
    """What the next requests meet. ``turns`` are answers to the first requests; later ones get the file."""

    turns: list[Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=list)
    body: bytes = BODY
    etag: str | None = ETAG
    ranges: bool = True
    requests: list[dict[str, str]] = field(default_factory=list)
    address: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append({name.lower(): value for name, value in handler.headers.items()})
        number = len(self.requests) - 1
        (self.turns[number] if number < len(self.turns) else self.whole)(handler)

    def whole(self, handler: BaseHTTPRequestHandler, stop: int | None = None) -> None:
        """The file or its rest, the connection cut at byte ``stop`` of the file."""
        begin = 0
        asked = handler.headers.get("range")
        if asked and self.ranges and handler.headers.get("if-range") == self.etag:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send(
            handler, 206 if begin else 200, self.body[begin:], begin, None if stop is None else stop - begin
        )

    def send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        begin: int = 0,
        stop: int | None = None,
    ) -> None:
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(content)))
        if status == 206:
            handler.send_header("content-range", f"bytes {begin}-{len(self.body) - 1}/{len(self.body)}")
        if self.etag:
            handler.send_header("etag", self.etag)
        handler.end_headers()
        handler.wfile.write(content[:stop])


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.address = f"http://127.0.0.1:{http.server_port}/data/rows.json"
    yield state
    http.shutdown()
    http.server_close()


def cut(at: int, server: Server) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: server.whole(handler, stop=at)


def status(code: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(b"<html>an error page</html>")

    return answer


def fetch(folder: Path, server: Server, **patience: float) -> Path:
    target = folder / "raw" / "rows.json"
    fast = Patience(**({"attempts": 4, "timeout_s": 5.0, "backoff_s": 0.0} | patience))  # type: ignore[arg-type]
    download([Remote(server.address, target, "the.key")], folder / "raw", fast)
    return target


def left_over(folder: Path) -> set[str]:
    return {path.name for path in (folder / "raw").iterdir()} - {".lock"}


def test_a_file_arrives_whole_and_is_recorded(tmp_path: Path, server: Server) -> None:
    target = fetch(tmp_path, server)
    assert target.read_bytes() == BODY
    assert left_over(tmp_path) == {"rows.json", "downloads.json"}
    entry = downloaded(tmp_path / "raw", [target])["rows.json"]
    assert entry["sha256"] == hashlib.sha256(BODY).hexdigest()
    assert (entry["bytes"], entry["etag"], entry["address"]) == (len(BODY), ETAG, server.address)
    fetch(tmp_path, server)
    assert len(server.requests) == 1
    target.write_bytes(b"[]")
    assert downloaded(tmp_path / "raw", [target]) == {}


def test_a_dropped_connection_is_resumed_where_it_broke(tmp_path: Path, server: Server) -> None:
    server.turns = [cut(1000, server), cut(70_000, server), status(503)]
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert [request.get("range") for request in server.requests] == [
        None, "bytes=1000-", "bytes=70000-", "bytes=70000-",
    ]  # fmt: skip
    assert server.requests[1]["if-range"] == ETAG


def test_a_server_without_ranges_is_asked_from_the_start(tmp_path: Path, server: Server) -> None:
    server.ranges = False
    server.turns = [cut(1000, server), cut(2000, server)]
    assert fetch(tmp_path, server).read_bytes() == BODY


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path: Path, server: Server) -> None:
    def changes(handler: BaseHTTPRequestHandler) -> None:
        server.etag, server.body = '"two"', BODY.replace(b"text", b"TEXT")
        server.whole(handler)

    server.turns = [cut(1000, server), changes]
    assert fetch(tmp_path, server).read_bytes() == BODY.replace(b"text", b"TEXT")


def test_a_server_that_ignores_if_range_mixes_no_two_versions(tmp_path: Path, server: Server) -> None:
    def mixes(handler: BaseHTTPRequestHandler) -> None:
        server.etag, server.body = '"two"', BODY.replace(b"text", b"TEXT")
        server.send(handler, 206, server.body[1000:], 1000)

    server.turns = [cut(1000, server), mixes]
    assert fetch(tmp_path, server).read_bytes() == BODY.replace(b"text", b"TEXT")


def test_a_range_other_than_the_one_asked_for_is_refused(tmp_path: Path, server: Server) -> None:
    server.turns = [cut(1000, server), lambda handler: server.send(handler, 206, BODY[900:], 900)]
    assert fetch(tmp_path, server).read_bytes() == BODY


def test_a_version_without_a_name_is_not_resumed(tmp_path: Path, server: Server) -> None:
    server.etag = None
    server.turns = [cut(1000, server)]
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert "range" not in server.requests[1]


def test_a_weak_etag_does_not_vouch_for_bytes(tmp_path: Path, server: Server) -> None:
    server.etag = 'W/"one"'
    server.turns = [cut(1000, server)]
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert "range" not in server.requests[1]


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_passing_fault_is_tried_again(tmp_path: Path, server: Server, code: int) -> None:
    server.turns = [status(code), status(code)]
    assert fetch(tmp_path, server).read_bytes() == BODY


def test_waits_grow_and_a_server_may_ask_for_more(tmp_path: Path, server: Server) -> None:
    waits: list[float] = []
    server.turns = [status(500), status(429, retry_after="7"), status(500), status(429, retry_after="9999")]
    patience = Patience(attempts=9, timeout_s=5.0, backoff_s=0.5, sleep=waits.append)
    download([Remote(server.address, tmp_path / "rows.json", "the.key")], tmp_path, patience)
    assert waits == [0.5, 7.0, 2.0, 120.0]


def test_a_lasting_fault_ends_in_one_line(tmp_path: Path, server: Server) -> None:
    server.turns = [status(500)] * 9
    with pytest.raises(DataError, match=r"HTTP 500, after 4 attempts.*the\.key") as caught:
        fetch(tmp_path, server)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 4


def test_what_was_fetched_before_a_lasting_fault_stays(tmp_path: Path, server: Server) -> None:
    server.turns = [cut(50_000, server), *[status(500)] * 3]
    with pytest.raises(DataError, match="HTTP 500"):
        fetch(tmp_path, server)
    assert (tmp_path / "raw" / "rows.json.part").stat().st_size == 50_000
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert server.requests[-1]["range"] == "bytes=50000-"


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_wrong_address_is_said_at_once(tmp_path: Path, server: Server, code: int) -> None:
    server.turns = [status(code)]
    with pytest.raises(DataError, match=rf"/data/rows\.json: the server answers HTTP {code}.*the\.key"):
        fetch(tmp_path, server)
    assert len(server.requests) == 1
    assert left_over(tmp_path) == set()


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/json"])
def test_a_web_page_with_status_200_is_recognised(tmp_path: Path, server: Server, kind: str) -> None:
    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", kind)
        handler.end_headers()
        handler.wfile.write(b"\n <!DOCTYPE html><html><body>Not found, sorry</body></html>")

    server.turns = [page]
    with pytest.raises(DataError, match="HTML page"):
        fetch(tmp_path, server)
    assert left_over(tmp_path) == set()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "is empty"),
        (b"id,input\n1,2\n", "is no JSON file, it begins with"),
        (BODY[:-300], "ends in the middle of its JSON"),
    ],
)
def test_what_is_not_json_is_refused(tmp_path: Path, server: Server, body: bytes, problem: str) -> None:
    server.body = body
    with pytest.raises(DataError, match=problem):
        fetch(tmp_path, server)
    assert left_over(tmp_path) == set()


def test_fewer_bytes_than_announced_never_count_as_whole(tmp_path: Path, server: Server) -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", str(len(BODY) + 10))
        handler.end_headers()
        handler.wfile.write(BODY)

    server.turns = [short] * 9
    with pytest.raises(DataError, match=r"broke off .*after 4 attempts"):
        fetch(tmp_path, server)
    assert not (tmp_path / "raw" / "rows.json").exists()


def test_compressed_data_that_nobody_asked_for_is_refused(tmp_path: Path, server: Server) -> None:
    server.turns = [status(200, content_encoding="gzip")]
    with pytest.raises(DataError, match="compressed data unasked"):
        fetch(tmp_path, server)
    assert server.requests[0]["accept-encoding"] == "identity"


def test_no_network_is_said_soon(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9/rows.json"
    remotes = [Remote(nobody, tmp_path / name, "the.key") for name in ("a.json", "b.json")]
    with pytest.raises(DataError, match=r"no connection .*after 3 attempts"):
        download(remotes, tmp_path, Patience(attempts=9, backoff_s=0.0))


@pytest.mark.parametrize("address", ["ftp://host/rows.json", "nonsense", "http://[bad/rows.json"])
def test_an_address_that_is_none_names_its_key(tmp_path: Path, address: str) -> None:
    with pytest.raises(DataError, match=r"the\.key"):
        download([Remote(address, tmp_path / "rows.json", "the.key")], tmp_path, Patience(backoff_s=0.0))


def test_secrets_in_an_address_stay_out_of_messages_and_record(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    secret = server.address.replace("http://", "http://me:geheim@") + "?token=geheim"
    with caplog.at_level(logging.INFO, logger="tagpr"):
        download([Remote(secret, tmp_path / "rows.json", "the.key")], tmp_path, Patience(backoff_s=0.0))
        server.turns = [*[status(200)] * 1, status(404)]
        with pytest.raises(DataError) as caught:
            download([Remote(secret, tmp_path / "other.json", "the.key")], tmp_path, Patience(backoff_s=0.0))
    assert "geheim" not in caplog.text + str(caught.value) + (tmp_path / "downloads.json").read_text()


def test_a_full_disk_is_said_before_the_download(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StageError, match=r"needs .* bytes, 1,000 are free"):
        fetch(tmp_path, server)


def test_progress_is_told(tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fetch(tmp_path, server, progress_every_s=0.0)
    assert " MB/s" in caplog.text or " kB/s" in caplog.text
    assert " %) at " in caplog.text


def test_two_processes_do_not_write_one_part(tmp_path: Path, server: Server) -> None:
    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        server.whole(handler)

    server.turns = [slow]
    threads = [threading.Thread(target=fetch, args=(tmp_path, server)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "raw" / "rows.json").read_bytes() == BODY
    assert len(server.requests) == 1


def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path, server: Server) -> None:
    held = threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        server.send(handler, 200, BODY, stop=100_000)
        # The rest does not come while the client lives.
        held.wait(30)

    server.turns = [hang]
    # send() announces the whole length and writes a piece of it.
    target = tmp_path / "raw" / "rows.json"
    code = (
        "from pathlib import Path; from tagpr.benchmarks.download import *; "
        f"download([Remote({server.address!r}, Path({str(target)!r}), 'the.key')], Path({str(target.parent)!r}), Patience())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONWARNINGS": "ignore"})
    part = target.with_name("rows.json.part")
    give_up = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    held.set()
    assert not target.exists()
    here = part.stat().st_size
    assert 0 < here <= 100_000
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert server.requests[-1]["range"] == f"bytes={here}-"
    assert left_over(tmp_path) == {"rows.json", "downloads.json"}


# ---- the hub


COMMIT = "0123456789012345678901234567890123456789"
HUB = {
    "a_user/train-0.parquet": b"PAR1xxxPAR1",
    "a_user/val-0.parquet": b"PAR1yPAR1",
    "b_user/train-0.parquet": b"no",
}


@pytest.fixture
def hub() -> Iterator[str]:
    """As much of the hub as a dataset's snapshot needs; returns its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, name = self.path.partition("?")[0], self.path.partition(f"/resolve/{COMMIT}/")[2]
            if path == "/api/datasets/some/data/revision/main" or path.endswith(f"/revision/{COMMIT}"):
                self.reply(
                    {"id": "some/data", "sha": COMMIT, "siblings": [{"rfilename": name} for name in HUB]}
                )
            elif path.startswith(f"/api/datasets/some/data/tree/{COMMIT}"):
                files = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in HUB.items()]
                self.reply(files)
            elif name in HUB:
                self.reply(HUB[name])
            else:
                self.send_response(404)
                self.end_headers()

        def reply(self, content: object) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.send_header("etag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("x-repo-commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_the_hubs_files_come_with_their_commit(tmp_path: Path, hub: str) -> None:
    download_from_hub("some/data", "main", ["a_user/*.parquet"], tmp_path, "the.key", hub)
    files = sorted(tmp_path.glob("*_user/*"))
    assert [path.name for path in files] == ["train-0.parquet", "val-0.parquet"]
    record = downloaded(tmp_path, files)
    assert record["a_user/val-0.parquet"]["commit"] == COMMIT
    assert record["a_user/val-0.parquet"]["sha256"] == hashlib.sha256(HUB["a_user/val-0.parquet"]).hexdigest()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("repository", "pattern", "problem"),
    [
        ("some/data", "c_user/*.parquet", r"has no file c_user/\*\.parquet at main"),
        ("other/data", "a_user/*.parquet", "cannot be fetched from the hub"),
        ("no repository", "a_user/*.parquet", "cannot be fetched from the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(
    tmp_path: Path, hub: str, repository: str, pattern: str, problem: str
) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        download_from_hub(repository, "main", [pattern], tmp_path, "the.key", hub)
    assert "\n" not in str(caught.value)
    assert "Check the.key" in str(caught.value)


@pytest.mark.usefixtures("online")
def test_a_hub_out_of_reach_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be fetched from the hub"):
        download_from_hub("some/data", "main", ["*.parquet"], tmp_path, "the.key", "http://127.0.0.1:9")


def test_offline_is_respected(tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot be fetched from the hub.*offline"):
        download_from_hub("some/data", "main", ["*.parquet"], tmp_path, "the.key", hub)
