"""The stage prepare_data killed again and again while a server on loopback misbehaves: nothing torn, nothing lost.

    python tests/faults/downloading.py [kills=12] [seed=0]

A LaMP-3 of about 20 MB is served slowly, with dropped connections, status 500, ignored ranges and new
versions under other ETags. The stage is killed with ``kill -9`` at random moments, then run to its end: the files must be
those of the server, byte for byte, and the prepared rows those of an undisturbed run. The last line is one JSON object of
figures.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tagpr.benchmarks.storage import read_examples
from tagpr.schema import Manifest

PIECE = 1 << 16


def lamp3(megabytes: float) -> dict[str, bytes]:
    """The four files by their path on the server."""
    files = {}
    for split, size in (("train", megabytes), ("dev", 0.05)):
        rows = []
        for number in range(max(2, int(size * 1e6 / 2150))):
            items = [{"id": str(n), "text": f"review {number} {n} " * 10, "score": "4"} for n in range(10)]
            rows.append({"id": str(number), "input": f"review: {number}", "user_id": "u", "profile": items})
        golds = {"task": "LaMP_3", "golds": [{"id": row["id"], "output": "4"} for row in rows]}
        files[f"/time/LaMP_3/{split}/{split}_questions.json"] = json.dumps(rows).encode()
        files[f"/time/LaMP_3/{split}/{split}_outputs.json"] = json.dumps(golds).encode()
    return files


class Server:
    """Serves ``files``; ``faults`` of every kind that it injected are counted. ``calm`` ends them."""

    def __init__(self, files: dict[str, bytes], seed: int) -> None:
        self.files = files
        self.draw = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.bytes = 0
        self.calm = False
        self.version = 1

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = self.files[handler.path]
        fault = (
            "none" if self.calm else self.draw.choice(["none", "drop", "drop", "500", "no range", "version"])
        )
        if fault != "none":
            self.faults[fault] += 1
        if fault == "500":
            handler.send_error(500)
            return
        if fault == "version":
            self.version += 1
        etag, begin = f'"{self.version}"', 0
        asked = handler.headers.get("range")
        if asked and fault != "no range" and handler.headers.get("if-range") == etag:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if begin else 200)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(body) - begin))
        handler.send_header("etag", etag)
        if begin:
            handler.send_header("content-range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        stop = len(body) if fault != "drop" else self.draw.randrange(begin, len(body))
        for place in range(begin, stop, PIECE):
            piece = body[place : min(stop, place + PIECE)]
            handler.wfile.write(piece)
            self.bytes += len(piece)
            if not self.calm:
                time.sleep(0.1)


@contextmanager
def serving(state: Server) -> Iterator[str]:
    """The server's address, while it listens."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
                state.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


def run(folder: Path, kills: int, seed: int, megabytes: float) -> dict[str, object]:
    """Kill the stage so many times, then let it end; returns figures.

    Raises:
        AssertionError: a file or a row is not as it should be.
    """
    draw, state = random.Random(seed), Server(lamp3(megabytes), seed)
    with serving(state) as address:

        def command(outputs: str) -> list[str]:
            overrides = [
                "benchmark=lamp",
                "benchmark.tasks=[lamp3]",
                "prepare_data.download.check_counts=never",
            ]
            overrides += [f"prepare_data.download.lamp_address={address}", f"run.outputs={folder / outputs}"]
            overrides += ["prepare_data.download.backoff_s=0.05", "prepare_data.download.attempts=20"]
            return [sys.executable, "-m", "tagpr.benchmarks.prepare", *overrides]

        killed = 0
        for _ in range(kills):
            process = subprocess.Popen(
                command("disturbed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(timeout=draw.uniform(1.5, 5.0))
                break  # it got to its end
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
        for outputs in ("disturbed", "calm"):
            state.calm = outputs == "calm"
            done = subprocess.run(command(outputs), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
    raw = folder / "disturbed" / "raw" / "lamp-time"
    for path, body in state.files.items():
        assert (raw / path.removeprefix("/time/")).read_bytes() == body
    assert not list(raw.rglob("*.part*"))
    made = Manifest.model_validate_json(
        (folder / "disturbed" / "data" / "lamp" / "manifest.json").read_bytes()
    )
    for path, body in state.files.items():
        assert (
            made.notes["downloads"][path.removeprefix("/time/")]["sha256"] == hashlib.sha256(body).hexdigest()
        )
    for split in ("train", "dev"):
        disturbed, calm = (
            read_examples(folder / outputs / "data" / "lamp" / f"{split}.parquet")
            for outputs in ("disturbed", "calm")
        )
        assert disturbed == calm
    size = sum(map(len, state.files.values()))
    return {
        "killed": killed,
        "faults": dict(state.faults),
        "megabytes": round(size / 1e6, 1),
        "sent_for_each_byte": round(state.bytes / size / 2, 2),
        "rows": made.notes["counts"]["lamp3"]["train"]["rows"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        chosen = [int(argument) for argument in sys.argv[1:]]
        figures = run(Path(scratch), *(chosen + [12, 0][len(chosen) :]), megabytes=20)
        print(json.dumps(figures))
