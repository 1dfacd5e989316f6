"""``kill -9`` of the pipeline's driver and of its Ray workers at random points; the last line is one JSON object.

    python tests/faults/pipeline_kills.py [--drivers 50] [--workers 10] [--batches 10] [--seed 0]

Each job is a small MiniLaMP job against the SIMULATED models with their faults (429, 5xx, broken and slow replies), behind a
counting proxy that stays up while drivers come and go. A job is killed again and again until it gets through. What must
hold: its files are byte-identical to those of an undisturbed run; a call that was answered and billed twice was in flight
at a kill; no process is left. With judge and tagger in batch mode, whose driver is killed ``--batches`` times, the files are the
same again, and no request was ever put into two batches.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from aiohttp import web

from data_pipeline import simulated
from data_pipeline.__main__ import WAITING_STATUS
from data_pipeline.outputs import FILES
from data_pipeline.settings import read_settings
from tagpr.benchmarks.lamp import read_split
from tagpr.benchmarks.minilamp.generate import write
from tagpr.benchmarks.storage import write_examples
from tagpr.configuration import compose, resolve

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("lamp1", "lamp2", "lamp3", "lamp4", "lamp5", "lamp7")
SMALL = (
    "chains.instances_per_task=4",
    "chains.rollouts=3",
    "chains.preferences.extra_rollouts=4",
    "chains.workers=2",
)
FAULTS = (
    "chains.simulated.latency_s=0.03",
    "chains.simulated.http_429=0.02",
    "chains.simulated.http_500=0.02",
    "chains.simulated.http_broken_json=0.02",
    "chains.simulated.http_slow=0.02",
    "chains.simulated.slow_s=0.5",
    "chains.simulated.batch_failed=0",
)
BATCH = ("chains.judge.mode=batch", "chains.tagger.mode=batch")
ROLES = ("teacher", "judge", "tagger")
# Requests that a driver may have under way: three models, sixteen each, and as many waiting in the workers.
MOST_IN_FLIGHT = 3 * (16 + 16)
RUN_TIMEOUT_S = 300.0
KEY_VARIABLE = "PIPELINE_KILLS_KEY"


class Proxy:
    """Passes requests on to the simulated models and counts, by request body, the whole replies that were made: the bill."""

    def __init__(self, upstream: str) -> None:
        self.billed: Counter[bytes] = Counter()
        self.in_flight = 0
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.url = ""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._loop.run_forever()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/v1/{path:.*}", self._pass_on)
        # A request whose sender has died is worked on to its end, and paid for, as at a real provider.
        self._runner = web.AppRunner(application, handler_cancellation=False, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        self._ready.set()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.in_flight += 1
        try:
            headers = {
                name: request.headers.get(name, "application/json" if name == "content-type" else "")
                for name in ("authorization", "content-type")
            }
            path = request.match_info["path"]
            url = f"{self._upstream}/{path}"
            async with self._session.request(
                request.method, url, data=body, headers=headers, params=request.query
            ) as response:
                answer = await response.read()
                if path == "chat/completions" and response.status == 200 and _is_json(answer):
                    self.billed[hashlib.sha256(body).digest()] += 1
                kept = {
                    name: value
                    for name, value in response.headers.items()
                    if name.lower().startswith("retry")
                }
                return web.Response(
                    body=answer, status=response.status, headers=kept, content_type="application/json"
                )
        except aiohttp.ClientError:
            assert request.transport is not None
            request.transport.abort()
            raise web.HTTPBadGateway from None
        finally:
            self.in_flight -= 1

    def settle(self) -> None:
        """Wait until nothing is worked on any more."""
        while self.in_flight:
            time.sleep(0.01)

    def close(self) -> None:
        async def end() -> None:
            await self._session.close()
            await self._runner.cleanup()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


@dataclass
class Job:
    """One job of its own: folder, simulated models and bill."""

    examples: Path
    folder: Path
    ray: Path
    proxy: Proxy
    environment: dict[str, str]
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "log"

    @property
    def ledger(self) -> Path:
        return self.folder / "chains" / "ledger.sqlite"

    def arguments(self, *more: str) -> list[str]:
        """The stage's overrides."""
        models = [
            f"chains.{role}.{name}={value}"
            for role in ROLES
            for name, value in (
                ("model", f"simulated-{role}"),
                ("base_url", self.proxy.url),
                ("key_variable", KEY_VARIABLE),
            )
        ]
        return [
            f"paths.examples={self.examples}", f"paths.chains={self.folder / 'chains'}", "chains.endpoint=openai",
            "~chains.preferences.extra_request.simulated_faults", *SMALL, *models, *more,
        ]  # fmt: skip

    def start(self, *more: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Start the stage; ``more`` overrides, ``environment`` on top of the usual one."""
        command = [sys.executable, "-m", "data_pipeline", *self.arguments(*more)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def fail(self, *more: str, **environment: str) -> str:
        """It must end with status 2; returns its one line."""
        before = len(self.log.read_text()) if self.log.exists() else 0
        process = self.start(*more, **environment)
        status = process.wait(RUN_TIMEOUT_S)
        said = self.log.read_text()[before:]
        assert status == 2, said[-3000:]
        assert "Traceback" not in said
        *_, last = said.splitlines()
        assert last.startswith("error: ")
        return last

    def finish(self) -> float:
        """Let it get through; returns the seconds it took."""
        started = time.monotonic()
        process = self.start()
        status = process.wait(RUN_TIMEOUT_S)
        assert status == 0, self.log.read_text()[-3000:]
        return time.monotonic() - started

    def collect(self) -> str:
        """``python -m data_pipeline.batch collect`` for this job, with judge and tagger in batch mode; what it said."""
        command = [sys.executable, "-m", "data_pipeline.batch", "collect", *self.arguments(*BATCH)]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def provider_files(self, begin: str) -> int:
        """Files, or batches, that the provider keeps."""
        return len(list((self.folder / "simulated-batches").glob(f"{begin}*")))

    def submitted(self) -> Counter[str]:
        """How often each request was put into a batch at the provider."""
        state = self.folder / "simulated-batches"
        return Counter(
            json.loads(line)["custom_id"]
            for path in state.glob("batch_*.json")
            for line in (state / f"{json.loads(path.read_text())['input_file_id']}.jsonl")
            .read_text()
            .splitlines()
        )

    def rows(self) -> int:
        """Replies in the ledger."""
        if not self.ledger.exists():
            return 0
        with closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True)) as database:
            try:
                return int(database.execute("SELECT COUNT(*) FROM unit").fetchone()[0])
            except sqlite3.OperationalError:  # no table yet
                return 0

    def files(self) -> dict[str, bytes]:
        return {name: (self.folder / "chains" / name).read_bytes() for name in FILES}

    @property
    def billed(self) -> int:
        return self.proxy.billed.total()

    @property
    def billed_again(self) -> int:
        return self.proxy.billed.total() - len(self.proxy.billed)


class Bench:
    """Makes jobs that have the same examples, and knows what they must come to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.examples = folder / "examples"
        write(
            self.examples / "raw",
            0,
            train_users=2,
            dev_seen_users=1,
            dev_unseen_users=1,
            train_rows_per_task=4,
            dev_rows_per_task=2,
        )
        rows = [row for task in TASKS for row in read_split(self.examples / "raw", task, "train")]
        write_examples(self.examples / "train.parquet", rows)
        self._jobs = 0
        with self.job() as job:
            self.seconds = job.finish()
            job.proxy.settle()
            self.files, self.calls = job.files(), job.billed
            assert job.billed_again == 0, "an undisturbed run pays for nothing twice"
            assert job.rows() == self.calls

    @contextmanager
    def job(self) -> Iterator[Job]:
        self._jobs += 1
        folder = self.folder / f"job-{self._jobs}"
        folder.mkdir()
        settings = read_settings(resolve(compose("build_chains", [f"chains.ledger={folder}/none", *FAULTS])))
        # A short path: Ray puts sockets there.
        ray = Path(tempfile.mkdtemp(prefix="kills-", dir="/tmp"))
        with simulated.running(settings) as (url, key):
            proxy = Proxy(url)
            environment = {
                **os.environ, KEY_VARIABLE: key, "RAY_TMPDIR": str(ray), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            environment.pop("RAY_ADDRESS", None)
            try:
                yield Job(self.examples, folder, ray, proxy, environment)
                assert_nothing_left(ray)
            finally:
                proxy.close()
                shutil.rmtree(ray, ignore_errors=True)

    def check(self, job: Job) -> None:
        """The job has got through: its files are those of the undisturbed run."""
        for name, expected in self.files.items():
            assert job.files()[name] == expected, f"{name} differs from the undisturbed run's"
        assert job.rows() == self.calls


def assert_nothing_left(ray: Path) -> None:
    """Everything that ran in this Ray folder ends soon after its driver."""
    deadline = time.monotonic() + 30
    while left := [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(ray) in " ".join(process.info["cmdline"] or [])
    ]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def wait_for_calls(job: Job, process: "subprocess.Popen[bytes]", calls: int) -> bool:
    """Until so many calls were billed; False if the process ended before."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while job.billed < calls:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, job.log.read_text()[-3000:]
        time.sleep(0.002)
    return True


def kill_drivers(bench: Bench, kills: int, rng: random.Random) -> dict[str, int]:
    """So many driver kills, over as many jobs as it takes."""
    done = jobs = billed_again = in_flight = worst = 0
    while done < kills:
        jobs += 1
        with bench.job() as job:
            lost = 0
            while done < kills:
                process = job.start()
                if rng.random() < 0.3:
                    # Anywhere between its first import and its last file.
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(rng.uniform(0.0, bench.seconds))
                else:
                    wait_for_calls(job, process, job.billed + rng.randrange(1, max(2, bench.calls // 3)))
                    time.sleep(rng.uniform(0.0, 0.05))
                if process.poll() is not None:
                    assert process.returncode == 0, job.log.read_text()[-3000:]
                    break
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                job.proxy.settle()
                # Answered, and not in the ledger: what was in flight, and has to be asked again.
                now = job.billed - job.rows() - lost
                assert 0 <= now <= MOST_IN_FLIGHT, f"{now} calls were in flight"
                lost, worst = lost + now, max(worst, now)
                say(f"driver kill {done}: {job.billed} of {bench.calls} calls billed, {now} in flight")
            else:
                job.finish()
            job.proxy.settle()
            bench.check(job)
            assert job.billed_again <= lost, f"{job.billed_again} calls billed again, {lost} were in flight"
            billed_again, in_flight = billed_again + job.billed_again, in_flight + lost
    return {
        "driver_kills": done, "driver_jobs": jobs, "driver_in_flight": in_flight, "driver_most_in_flight": worst,
        "driver_billed_again": billed_again,
    }  # fmt: skip


def kill_workers(bench: Bench, kills: int, rng: random.Random) -> dict[str, int]:
    """So many kills of Ray workers that carry requests, a few in each job, while its driver goes on."""
    done = jobs = billed_again = in_flight = 0
    while done < kills:
        jobs += 1
        with bench.job() as job:
            process = job.start()
            try:
                wanted = min(kills - done, 3)
                points = sorted(rng.sample(range(1, bench.calls - MOST_IN_FLIGHT), wanted))
                for point in points:
                    assert wait_for_calls(job, process, point), job.log.read_text()[-3000:]
                    worker = rng.choice(carriers(process.pid))
                    worker.send_signal(signal.SIGKILL)
                    done += 1
                    say(f"worker kill {done}: at {job.billed} of {bench.calls} calls")
                assert process.wait(RUN_TIMEOUT_S) == 0, job.log.read_text()[-3000:]
            finally:
                process.kill()
                process.wait()
            job.proxy.settle()
            bench.check(job)
            log = job.log.read_text()
            lost = sum(
                int(line.split("died with ")[1].split()[0])
                for line in log.splitlines()
                if "died with " in line
            )
            assert log.count("died with ") == wanted
            assert job.billed_again <= lost <= wanted * MOST_IN_FLIGHT
            billed_again, in_flight = billed_again + job.billed_again, in_flight + lost
    return {
        "worker_kills": done, "worker_jobs": jobs, "worker_in_flight": in_flight, "worker_billed_again": billed_again,
    }  # fmt: skip


def kill_batches(bench: Bench, kills: int, rng: random.Random) -> dict[str, int]:
    """One job in batch mode: it ends with its batches submitted, another process collects; then kills until it is through."""
    with bench.job() as job:
        assert job.start(*BATCH).wait(RUN_TIMEOUT_S) == WAITING_STATUS, job.log.read_text()[-3000:]
        waiting, rows = job.submitted().total(), job.rows()
        assert waiting > 0
        said = job.collect()
        assert f"collected {waiting} replies (0 refused, 0 without an answer); 0 units wait" in said, said
        assert job.rows() == rows + waiting
        done = 0
        while True:
            # Another batch, or another reply: the moments at which there is something to lose.
            look = rng.choice(
                (lambda: job.provider_files("file-"), lambda: job.provider_files("batch_"), job.rows)
            )
            before = look()
            process = job.start(*BATCH, "chains.batch.poll_s=0.1")
            if done < kills:
                deadline = time.monotonic() + RUN_TIMEOUT_S
                while look() == before and process.poll() is None:
                    assert time.monotonic() < deadline, job.log.read_text()[-3000:]
                    time.sleep(0.002)
                time.sleep(rng.choice((0.0, rng.uniform(0.0, 0.3))))
            if done >= kills or process.poll() is not None:
                assert process.wait(RUN_TIMEOUT_S) == 0, job.log.read_text()[-3000:]
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            job.proxy.settle()
            say(
                f"batch kill {done}: {job.submitted().total()} submitted, {job.rows()} of {bench.calls} replies there"
            )
        bench.check(job)
        submitted = job.submitted()
        assert max(submitted.values()) == 1, f"submitted twice: {submitted.most_common(3)}"
    return {"batch_kills": done, "batch_requests": submitted.total(), "batch_requests_twice": 0}


def carriers(driver: int) -> list[psutil.Process]:
    """The Ray workers below this driver that carry requests."""
    deadline = time.monotonic() + 20
    while True:
        found = []
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error):
                if "HttpWorker" in " ".join(process.cmdline()):
                    found.append(process)
        if found:
            return found
        assert time.monotonic() < deadline, "no worker"
        time.sleep(0.05)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drivers", type=int, default=50)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="pipeline-kills-") as folder:
        bench = Bench(Path(folder))
        say(f"undisturbed: {bench.calls} calls in {bench.seconds:.1f} s")
        figures = {
            "calls_of_a_job": bench.calls,
            **kill_drivers(bench, options.drivers, rng),
            **kill_workers(bench, options.workers, rng),
            **kill_batches(bench, options.batches, rng),
        }
    print(json.dumps({**figures, "byte_identical": True, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
