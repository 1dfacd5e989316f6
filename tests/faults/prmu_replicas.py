"""Faults of the reward service under the load of 50 concurrent requests of five samples each.

    python tests/faults/prmu_replicas.py [kill hang outage refused engine swap ray]

Each scenario prints one JSON object; the last line is one with all of them. Status 1 where something was not as it must be.

kill     one of two replicas is killed, again and again: no sample fails, every replica is replaced
hang     one of two replicas is stopped: its callers are answered by the other one within the deadline, it is replaced
outage   both replicas are dead for --outage seconds: callers wait and go on, every score is that of the model
refused  a response that is too long: one attempt, an error that names it; the others of its company are scored
engine   the only server is killed with requests in flight: every one ends with an error that says so, none hangs
swap     the checkpoint is exchanged: no request fails, each score is of the version it names, who insists on the old one is told
ray      the replicas are placed by Ray; one is killed and replaced, no sample fails
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prmu_setup import QUICK, Load, Service, last_line, percentile, service, tiny_prmu

from reward_server.engine import TransformersEngine
from tagpr.errors import RewardServerError
from tagpr.prmu.client import ItemRefused, check_server
from tagpr.prmu.model import content_version, load
from tagpr.prmu.wire import ScoreItem, read_address
from tagpr.schema import PrmuScore

CALLERS = 50
TOLERANCE = 1e-4
Figures = dict[str, object]


class Oracle:
    """What a checkpoint gives to an item, computed here."""

    def __init__(self, *folders: Path) -> None:
        torch.set_num_threads(1)
        self._prmus = {content_version(folder): load(folder) for folder in folders}

    def wrong(self, answers: list[tuple[ScoreItem, PrmuScore]], most: int = 600) -> int:
        """How many scores (of at most ``most``, evenly taken) are not those of the version that they name."""
        answers = answers[:: max(1, len(answers) // most)]
        bad = 0
        for version in {score.version for _, score in answers}:
            prmu = self._prmus[version]
            own = [(item, score) for item, score in answers if score.version == version]
            inputs = [prmu.encoder.encode(i.id, i.user_id, i.prompt, i.response) for i, _ in own]
            logits = TransformersEngine(prmu, 16384).score(inputs)
            bad += sum(abs(s.logit - logit) > TOLERANCE for (_, s), logit in zip(own, logits, strict=True))
        return bad


def figures(load: Load, oracle: Oracle, **more: object) -> Figures:
    """What the load saw."""
    for error in load.errors[:3]:
        print(error)
    return {
        "samples": load.samples,
        "failed": 5 * len(load.errors),
        "wrong": oracle.wrong(load.answers),
        "p50_s": round(percentile(load.seconds, 0.5), 3),
        "p99_s": round(percentile(load.seconds, 0.99), 3),
        "max_s": round(max(load.seconds, default=0.0), 3),
        **more,
    }


async def until(condition: Callable[[], bool], seconds: float = 300.0) -> float:
    """Wait for a condition; how long it took.

    Raises:
        TimeoutError: it did not come.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError
        await asyncio.sleep(0.1)
    return time.monotonic() - began


def other_pid(running: Service, place: int, pid: int) -> Callable[[], bool]:
    """Whether another process is ready in a replica's place."""
    path = running.run_dir / f"replica_{place}" / "server.json"
    return lambda: path.exists() and read_address(path).pid != pid


def kill(folder: Path, times: int = 3, *settings: str) -> Figures:
    """One of two replicas is killed, the other one the next time."""
    model = tiny_prmu(folder)

    async def go(running: Service) -> tuple[Load, list[float]]:
        load = Load(running.client(), CALLERS)
        load.start()
        await asyncio.sleep(2)
        replaced = []
        for number in range(times):
            pid = running.replica_pids()[number % 2]
            os.kill(pid, signal.SIGKILL)
            replaced.append(round(await until(other_pid(running, number % 2, pid)), 1))
            await asyncio.sleep(2)
        await load.stop()
        stats = load.client.pop_stats()
        await load.client.aclose()
        return load, [*replaced, stats["failovers"]]

    with service(folder / "kill", model, "replicas=2", *QUICK, *settings) as running:
        load, (*replaced, failovers) = asyncio.run(go(running))
    result = figures(load, Oracle(model), kills=times, replaced_after_s=replaced, failovers=failovers)
    return result | {"ok": not result["failed"] and not result["wrong"] and load.samples > 0}


def ray(folder: Path) -> Figures:
    """As ``kill``, with the replicas on Ray."""
    import ray as library

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Its own 15 lets anything else on the machine starve the replicas.
    os.environ.update(RAY_worker_niceness="0")  # Ray wants it written so
    # One machine, loopback only.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    with tempfile.TemporaryDirectory(prefix="r", dir=os.environ.get("TMPDIR")) as short:
        library.init(
            address="local", num_cpus=2, include_dashboard=False, _temp_dir=short, log_to_driver=False,
            object_store_memory=100 * 2**20, logging_level="ERROR",
        )  # fmt: skip
        try:
            return kill(folder, 1, f"ray={library.get_runtime_context().gcs_address}")
        finally:
            library.shutdown()


def hang(folder: Path) -> Figures:
    """One of two replicas is stopped."""
    model = tiny_prmu(folder)
    deadline = 60.0

    async def go(running: Service) -> tuple[Load, float]:
        load = Load(running.client(deadline_s=deadline), CALLERS)
        load.start()
        await asyncio.sleep(2)
        pid = running.replica_pids()[0]
        os.kill(pid, signal.SIGSTOP)
        replaced = await until(other_pid(running, 0, pid))
        await asyncio.sleep(2)
        await load.stop()
        await load.client.aclose()
        return load, replaced

    with service(folder / "hang", model, "replicas=2", *QUICK) as running:
        load, replaced = asyncio.run(go(running))
    result = figures(load, Oracle(model), deadline_s=deadline, replaced_after_s=round(replaced, 1))
    return result | {"ok": not result["failed"] and not result["wrong"] and max(load.seconds) < deadline}


def outage(folder: Path, seconds: float = 60.0) -> Figures:
    """Nobody answers for a while: the whole service is killed and started again at the same ports."""
    model = tiny_prmu(folder)
    first = folder / "outage"

    async def go() -> tuple[Load, int, float]:
        with service(first, model, "replicas=2", *QUICK) as running:
            load = Load(running.client(), CALLERS)
            load.start()
            await asyncio.sleep(2)
            ports = [int(url.rsplit(":", 1)[1]) for url in running.address.url.split(",")]
            pids = running.replica_pids()
            running.process.kill()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(running.process.wait)
        for path in first.glob("replica_*/server.json"):
            path.unlink()
        (first / "server.json").unlink(missing_ok=True)
        began = time.monotonic()
        await asyncio.sleep(1)
        before = load.samples
        await asyncio.sleep(seconds - 1)
        quiet = load.samples - before
        # One server at each of the two ports, as nobody gave the first service fixed ones.
        token = f"token_file={first / 'token'}"
        with (
            service(folder / "again0", model, f"port={ports[0]}", token),
            service(folder / "again1", model, f"port={ports[1]}", token),
        ):
            down = time.monotonic() - began
            await until(lambda: load.samples > before, 60)
            await asyncio.sleep(3)
            await load.stop()
            await load.client.aclose()
        return load, quiet, down

    load, quiet, down = asyncio.run(go())
    result = figures(load, Oracle(model), down_s=round(down, 1), scores_while_down=quiet)
    return result | {"ok": not result["failed"] and not result["wrong"] and not quiet and down >= seconds}


def refused(folder: Path) -> Figures:
    """A response too long for the model, in a group that is otherwise right."""
    model = tiny_prmu(folder)

    async def go(running: Service) -> tuple[list[object], dict[str, float], list[object]]:
        client = running.client(gather_s=0.05)
        groups = [
            [
                ScoreItem(id=f"g{g}/r{i}", user_id="ann", prompt=f"boats {g}", response="rain")
                for i in range(5)
            ]
            for g in range(50)
        ]
        groups[17][3] = groups[17][3].model_copy(update={"response": "rain " * 3000})
        alone = await asyncio.gather(client.score(groups[17]), return_exceptions=True)
        before = client.pop_stats()
        items = [item for group in groups for item in group]
        results = await asyncio.gather(*(client.score_one(item) for item in items), return_exceptions=True)
        await client.aclose()
        return alone, before, results

    with service(folder / "refused", model) as running:
        (alone,), before, results = asyncio.run(go(running))
    bad = [number for number, result in enumerate(results) if isinstance(result, BaseException)]
    named = isinstance(alone, ItemRefused) and "g17/r3" in str(alone)
    right = (
        bad == [17 * 5 + 3] and "g17/r3" in str(results[bad[0]]) and isinstance(results[bad[0]], ItemRefused)
    )
    return {
        "samples": len(results) - len(bad),
        "refused": len(bad),
        "retries": before["retries"],
        "names_the_sample": named,
        "ok": named and right and before["retries"] == 0 and before["failovers"] == 0,
    }


def engine(folder: Path) -> Figures:
    """The server dies with everything in flight, and stays dead."""
    model = tiny_prmu(folder)
    deadline = 6.0

    async def go(running: Service) -> tuple[float, list[object]]:
        client = running.client(deadline_s=deadline, concurrency=64)
        items = [
            ScoreItem(id=f"s{i}", user_id="ann", prompt="boats " * 150, response=f"{i} rain " * 60)
            for i in range(300)
        ]
        calls = [asyncio.create_task(client.score([item])) for item in items]
        await asyncio.sleep(0.3)
        os.kill(running.process.pid, signal.SIGKILL)
        began = time.monotonic()
        results = await asyncio.gather(*calls, return_exceptions=True)
        took = time.monotonic() - began
        await client.aclose()
        return took, results

    with service(folder / "engine", model) as running:
        took, results = asyncio.run(go(running))
    scored = [result for result in results if isinstance(result, list)]
    errors = [result for result in results if isinstance(result, RewardServerError)]
    return {
        "requests": len(results),
        "scored_before": len(scored),
        "errors": len(errors),
        "all_ended_after_s": round(took, 2),
        "deadline_s": deadline,
        # Every call ends by its own deadline; the minute is for a machine that is busy.
        "ok": len(scored) + len(errors) == 300 and bool(errors) and took < deadline + 60,
    }


def swap(folder: Path) -> Figures:
    """``paths.prmu`` is replaced and the service told, under load."""
    old, new = tiny_prmu(folder, 0), tiny_prmu(folder, 1)
    model = folder / "served"
    shutil.copytree(old, model)
    versions = [content_version(old), content_version(new)]

    async def go(running: Service) -> tuple[Load, float, str]:
        load = Load(running.client(), CALLERS)
        load.client.versions = (versions[0], versions[1])
        pinned = running.client()
        load.start()
        await asyncio.sleep(2)
        model.rename(folder / "before")
        shutil.copytree(new, model)
        os.kill(running.process.pid, signal.SIGHUP)

        def swapped() -> bool:
            try:
                check_server(running.address.url, running.token, versions[1], deadline_s=5)
            except RewardServerError:
                return False
            return True

        began = time.monotonic()
        while not await asyncio.to_thread(swapped):
            if time.monotonic() - began > 120:
                raise TimeoutError
            await asyncio.sleep(0.2)
        took = time.monotonic() - began
        await asyncio.sleep(3)
        told = ""
        try:
            await pinned.score([ScoreItem(id="late", user_id="ann", prompt="boats", response="rain")])
        except RewardServerError as error:
            told = str(error)
        await load.stop()
        await load.client.aclose()
        await pinned.aclose()
        return load, took, told

    with service(folder / "swap", model, "replicas=2", *QUICK) as running:
        load, took, told = asyncio.run(go(running))
    by_version = {version: sum(s.version == version for _, s in load.answers) for version in versions}
    result = figures(
        load,
        Oracle(old, new),
        swapped_after_s=round(took, 1),
        by_version=list(by_version.values()),
        told=told,
    )
    named = all(version in told for version in versions)
    return result | {
        "ok": not result["failed"] and not result["wrong"] and all(by_version.values()) and named,
    }


SCENARIOS: dict[str, Callable[..., Figures]] = {
    "kill": kill, "hang": hang, "outage": outage, "refused": refused, "engine": engine, "swap": swap, "ray": ray,
}  # fmt: skip


def main() -> int:
    """Run the chosen scenarios, all without a choice."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenarios", nargs="*", metavar="|".join(SCENARIOS))
    parser.add_argument("--outage", type=float, default=60.0)
    arguments = parser.parse_args()
    if unknown := set(arguments.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    found: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        for scenario in arguments.scenarios or SCENARIOS:
            folder = Path(name) / scenario
            folder.mkdir()
            more = {"seconds": arguments.outage} if scenario == "outage" else {}
            found[scenario] = SCENARIOS[scenario](folder, **more)
            print(scenario, found[scenario], flush=True)
    last_line(found)
    return int(not all(result["ok"] for result in found.values()))  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
