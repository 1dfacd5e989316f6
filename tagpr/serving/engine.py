"""vLLM's own server as a process of ours: on loopback, with a key made for it, ended with us whatever ends us."""

import ctypes
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tagpr.errors import StageError

logger = logging.getLogger(__name__)

READY_POLL_S = 0.5
STOP_S = 15.0
ERROR = re.compile(r"[\w.]*(?:Error|Exception): .+")


@dataclass(frozen=True)
class EngineProcess:
    """A vLLM server that is ready."""

    url: str
    key: str
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> str | None:
        """None while it runs, else what it said last."""
        status = self.process.poll()
        return None if status is None else f"status {status}: {last_words(self.log)}"


@contextmanager
def vllm_server(
    model: str,
    arguments: Sequence[str],
    run_dir: Path,
    *,
    kv_cache_gib: int,
    on_gpu: bool,
    start_timeout_s: float,
) -> Iterator[EngineProcess]:
    """Serve a model folder on a free loopback port while the body runs.

    Raises:
        StageError: it did not come up; its log is named.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, key = f"http://127.0.0.1:{port}", secrets.token_urlsafe(32)
    log = run_dir / "engine.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # The `vllm` command does not work with the CPU build; this does with both.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
        "--port", str(port), *arguments,
    ]  # fmt: skip
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            env=_environment(key, kv_cache_gib, on_gpu), preexec_fn=_die_with_parent,
        )  # fmt: skip
    try:
        engine = EngineProcess(url, key, process, log)
        _wait(engine, start_timeout_s)
        logger.info("engine ready after %.0f s", time.monotonic() - started)
        yield engine
    finally:
        _stop(process)


def _environment(key: str, kv_cache_gib: int, on_gpu: bool) -> dict[str, str]:
    environment = {
        **os.environ,
        # Not on the command line, where every user of this machine could read it.
        "VLLM_API_KEY": key,
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not on_gpu:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib))
        # Our plugin serves weight reloads in training and would import the trainer here.
        environment.setdefault("VLLM_PLUGINS", "")
    return environment


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(engine: EngineProcess, start_timeout_s: float) -> None:
    started = time.monotonic()
    with httpx.Client(trust_env=False, timeout=5.0) as http:
        while time.monotonic() - started < start_timeout_s:
            ended = engine.ended()
            if ended is not None:
                raise StageError(f"serve.model: vLLM cannot serve it ({ended}). See {engine.log}.")
            try:
                if http.get(f"{engine.url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # not listening yet
            time.sleep(READY_POLL_S)
    raise StageError(f"serve.model: vLLM is not ready after {start_timeout_s:.0f} s. See {engine.log}.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the engine core that it started, which are one process group."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            continue


def last_words(log: Path) -> str:
    """The last error that a log names, else the last line that says something."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    # What libraries print while a process ends comes after its error.
    named = (ERROR.search(line) for line in reversed(lines))
    found = next((match[0] for match in named if match), lines[-1] if lines else "it printed nothing")
    return found[-300:]
