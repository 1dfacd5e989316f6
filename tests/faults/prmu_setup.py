"""A reward service of tiny models, and load on it, for the fault runs of PRMU's server."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from prmu_tiny import USERS, make_base, make_prmu  # noqa: E402

from tagpr.errors import RewardServerError  # noqa: E402
from tagpr.prmu.client import RewardClient  # noqa: E402
from tagpr.prmu.wire import Address, ScoreItem, read_address, read_token  # noqa: E402
from tagpr.schema import PrmuScore  # noqa: E402

WORDS = ["the", "user", "likes", "short", "titles", "about", "boats", "and", "rain", "which", "tag", "movie"]
# What a run of the service here takes to notice a fault, next to what it waits for in production.
QUICK = ("health_every_s=0.5", "health_timeout_s=2", "health_failures=2", "start_timeout_s=300")


def tiny_prmu(folder: Path, seed: int = 0) -> Path:
    """An untrained PRMU in ``folder/model<seed>``."""
    model = folder / f"model{seed}"
    if not model.exists():
        make_prmu(model, make_base(folder / f"base{seed}", seed), seed)
    return model


class Service:
    """A running service."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path) -> None:
        self.process = process
        self.run_dir = run_dir
        self.address: Address = read_address(run_dir / "server.json")
        self.token = read_token(self.address.token_file)

    def replica_pids(self) -> list[int]:
        """Processes that answer requests, in the order of the addresses; the one process where there is no replica."""
        pids = [read_address(path).pid for path in sorted(self.run_dir.glob("replica_*/server.json"))]
        return pids or [self.process.pid]

    def client(self, **settings: object) -> RewardClient:
        """A client of all its replicas."""
        options = {"timeout_s": 20.0, "deadline_s": 200.0, "concurrency": 64, **settings}
        return RewardClient(self.address.url, self.token, self.address.model_version, **options)  # type: ignore[arg-type]


@contextmanager
def service(run_dir: Path, model: Path, *settings: str) -> Iterator[Service]:
    """``python -m reward_server`` with ``server.<setting>`` for each of ``settings``, until the body ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TAGPR_PRMU")}
    with (run_dir / "service.log").open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "reward_server", f"run.dir={run_dir}", f"paths.prmu={model}",
                f"server.parent_pid={os.getpid()}", *(f"server.{setting}" for setting in settings),
            ],
            env=environment | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, cwd=ROOT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 400
        while not (run_dir / "server.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no service: {(run_dir / 'service.log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield Service(process, run_dir)
    finally:
        for pid in _tree(process.pid):  # a stopped process cannot end by itself
            _signal(pid, signal.SIGCONT)
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def group(rng: random.Random, number: int, size: int = 5, words: int = 120) -> list[ScoreItem]:
    """Responses of one user to one prompt."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(words // 2, words)))
    user = rng.choice([*USERS, "nobody"])
    return [
        ScoreItem(
            id=f"g{number}/r{i}", user_id=user, prompt=prompt,
            response=" ".join(rng.choices(WORDS, k=rng.randint(1, words // 2))),
        )
        for i in range(size)
    ]  # fmt: skip


class Load:
    """Callers that ask without a pause until told to stop; every answer is kept or counted."""

    def __init__(self, client: RewardClient, callers: int = 50, seed: int = 0) -> None:
        self.client = client
        self.callers = callers
        self.groups = self.samples = 0
        self.errors: list[str] = []
        self.seconds: list[float] = []
        self.answers: list[tuple[ScoreItem, PrmuScore]] = []
        self.keep = True
        self._rng = random.Random(seed)
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; for a running event loop."""
        self._tasks = [asyncio.create_task(self._call()) for _ in range(self.callers)]

    async def stop(self) -> None:
        """Let every caller finish what it has begun."""
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def _call(self) -> None:
        while not self._stop:
            self.groups += 1
            items = group(self._rng, self.groups)
            began = time.monotonic()
            try:
                scores = await self.client.score(items)
            except RewardServerError as error:
                self.errors.append(str(error))
                await asyncio.sleep(0.1)
                continue
            self.seconds.append(time.monotonic() - began)
            self.samples += len(scores)
            if self.keep:
                self.answers += zip(items, scores, strict=True)


def percentile(values: list[float], share: float) -> float:
    """Of values in any order; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def resident_mib(pids: list[int]) -> float:
    """Memory of processes that are still there."""
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def last_line(figures: dict[str, object]) -> None:
    """Print figures as the last line."""
    print(json.dumps(figures))


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
