"""A served model whose engine is killed under load: every caller gets an answer or an error, health says so, the stage ends.

    python tests/faults/serving_engine.py WORK

kills vLLM's server, then (with a new service) the engine core below it; the last line is one JSON object of figures.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from prmu_tiny import make_base  # noqa: E402

from tagpr.errors import RunFault  # noqa: E402

CALLERS = 24
SAMPLES = 4
# None of these is a figure of merit: a machine that is busy is slow, and a hang is longer.
START_S = 1500
ENDED_S = 180
BEFORE_KILL_S = 4.0
QUERY = "Generate a headline for the following article: boats and rain"


class Service:
    """``serve`` of an untrained tiny model."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path) -> None:
        self.process = process
        self.run_dir = run_dir
        address = json.loads((run_dir / "server.json").read_text())
        self.url = str(address["url"]).removesuffix("/v1")
        self.token = Path(address["token_file"]).read_text().strip()
        self.children = psutil.Process(process.pid).children(recursive=True)

    def engine(self) -> psutil.Process:
        """vLLM's server."""
        (found,) = [one for one in self.children if "vllm.entrypoints" in " ".join(one.cmdline())]
        return found

    def core(self) -> psutil.Process:
        """The process below it that holds the model."""
        found = [
            one for one in self.engine().children(recursive=True) if "EngineCore" in " ".join(one.cmdline())
        ]
        return found[0]


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """Start it, wait until it listens; leaves nothing alive."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "base" / "model"
    if not model.exists():
        make_base(model)
    profile = {"id": "1", "fields": {"title": "boats", "text": "rain"}}
    (folder / "profiles.jsonl").write_text(
        json.dumps({"user_id": "ann", "task": "lamp4", "profile": [profile]}) + "\n"
    )
    run_dir = folder / "serve"
    command = [
        sys.executable, "-m", "tagpr.serving", f"run.dir={run_dir}", f"serve.model={model}",
        f"serve.profiles={folder / 'profiles.jsonl'}", "server.port=0", "benchmark.max_prompt_tokens=300",
        "benchmark.max_response_tokens=180",
    ]  # fmt: skip
    log = folder / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
    started: list[psutil.Process] = []
    try:
        give_up = time.monotonic() + START_S
        while not (run_dir / "server.json").exists():
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"no service: {log.read_text()[-3000:]}")
            time.sleep(0.2)
        running = Service(process, run_dir)
        started = running.children
        yield running
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for one in started:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue


async def ask(http: httpx.AsyncClient, found: Counter[str], stop: asyncio.Event) -> None:
    """One caller, until the service is gone: counts answers, errors by code, and the end of the service."""
    body = {
        "model": "tagpr", "user": "ann", "task": "lamp4", "n": SAMPLES, "temperature": 1.0,
        "messages": [{"role": "user", "content": QUERY}],
    }  # fmt: skip
    while not stop.is_set():
        try:
            answer = await http.post("/v1/chat/completions", json=body)
        except httpx.TransportError as error:
            found[f"gone: {type(error).__name__}"] += 1
            if isinstance(error, httpx.ConnectError):
                return
            continue
        if answer.status_code == 200:
            choices = answer.json()["choices"]
            assert [choice["index"] for choice in choices] == list(range(SAMPLES))
            found["answered"] += 1
        else:
            found[f"{answer.status_code} {answer.json()['error']['code']}"] += 1
            await asyncio.sleep(0.02)


async def watch_health(http: httpx.AsyncClient, found: set[int]) -> None:
    """What ``/health`` says until nobody listens any more."""
    while True:
        try:
            found.add((await http.get("/health")).status_code)
        except httpx.TransportError:
            return
        await asyncio.sleep(0.02)


async def under_load(running: Service, victim: psutil.Process) -> dict[str, Any]:
    """Load, the kill, and what came of everything that was under way."""
    found: Counter[str] = Counter()
    health: set[int] = set()
    stop = asyncio.Event()
    headers = {"authorization": f"Bearer {running.token}"}
    async with httpx.AsyncClient(
        base_url=running.url, headers=headers, trust_env=False, timeout=ENDED_S, limits=httpx.Limits(max_connections=None)
    ) as http:  # fmt: skip
        callers = [asyncio.create_task(ask(http, found, stop)) for _ in range(CALLERS)]
        await asyncio.sleep(BEFORE_KILL_S)
        while not found["answered"]:
            await asyncio.sleep(0.1)
        watching = asyncio.create_task(watch_health(http, health))
        killed = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        _, hanging = await asyncio.wait(callers, timeout=ENDED_S)
        took = time.monotonic() - killed
        stop.set()
        for task in (*hanging, watching):
            task.cancel()
        failed = [repr(task.exception()) for task in callers if task not in hanging and task.exception()]
    return {
        "outcomes": dict(sorted(found.items())),
        "callers_hanging": len(hanging),
        "callers_failed": failed,
        "health": sorted(health),
        "all_callers_ended_after_s": round(took, 2),
    }


def kill(folder: Path, victim: str) -> dict[str, Any]:
    """Kill ``engine`` (vLLM's server) or ``core`` (its child) under load."""
    with service(folder) as running:
        figures = asyncio.run(under_load(running, getattr(running, victim)()))
        began = time.monotonic()
        try:
            status: int | None = running.process.wait(ENDED_S)
        except subprocess.TimeoutExpired:
            status = None
        figures["ended_after_s"] = round(time.monotonic() - began, 2)
        _, alive = psutil.wait_procs(running.children, timeout=30)
        last = (folder / "serve.log").read_text().strip().splitlines()[-1]
    names = set(figures["outcomes"])
    refused = {name for name in names if name != "answered" and not name.startswith("gone")}
    return {
        **figures,
        "status": status,
        "said": last,
        "left_alive": [one.pid for one in alive],
        "address_left": (folder / "serve" / "server.json").exists(),
        "ok": status == RunFault.status
        and not alive
        and not figures["callers_hanging"]
        and not figures["callers_failed"]
        and refused <= {"502 engine_failed", "503 timeout"}
        and 503 in figures["health"]
        and last.startswith("error: serve.model=")
        and not (folder / "serve" / "server.json").exists(),
    }


def main() -> None:
    """Both, for the full count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="?", type=Path)
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="serving-engine-"))
    figures = {victim: kill(work.resolve() / victim, victim) for victim in ("engine", "core")}
    print(json.dumps({"ok": all(each["ok"] for each in figures.values()), **figures}))
    sys.exit(0 if all(each["ok"] for each in figures.values()) else 1)


if __name__ == "__main__":
    main()
