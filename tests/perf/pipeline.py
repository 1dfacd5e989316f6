"""Requests per second of the pipeline's asking side, as a share of what the endpoint's limit allows; memory; a peer's ratio.

    python tests/perf/pipeline.py [--units 1000,10000,96000] [--peer-python /path/of/a/venv/bin/python | --install-peer FOLDER]

The endpoint (slow_endpoint.py, a process of its own) answers after 200 ms and refuses more than 256 requests at once: 1,280 a
second is the most there is. Each number of units goes through what the job uses: Ray workers with the chat client,
retries and adaptive limit in the driver, every reply committed to the ledger before its unit counts as done; in a driver
process of its own, whose peak memory is told. The peer is bespokelabs-curator, in an environment of its own, at the same
endpoint, right after. The last line is one JSON object; ``load`` is the machine's load before the run, which says
whether others were at work on it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LATENCY_S, CONCURRENCY = 0.2, 256
PEER = "bespokelabs-curator"
PEER_REQUESTS = 2000
PROMPT = "The user has rated two similar products before, and praised the sound of both of them. " * 46


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "slow_endpoint.py"), str(LATENCY_S), str(CONCURRENCY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


def stats(url: str) -> dict[str, float]:
    """What the endpoint has seen since it was last asked."""
    with urllib.request.urlopen(f"{url}/stats") as answer:
        found: dict[str, float] = json.loads(answer.read())
    return found


async def drive(url: str, units: int, folder: Path, workers: int) -> dict[str, float]:
    """So many units through workers, asker and ledger."""
    from data_pipeline.endpoint import Endpoint, Unit, stream
    from data_pipeline.ledger import Ledger
    from data_pipeline.settings import ModelSettings
    from data_pipeline.workers import Address, http_pool
    from tagpr.chat.asking import Asker
    from tagpr.chat.limits import AdaptiveLimit

    model = ModelSettings(
        model="slow", base_url=f"{url}/v1", key_variable=None, key_file=None, revision="", temperature=0.6, top_p=0.95,
        max_tokens=512, request={}, concurrency=CONCURRENCY, timeout_s=60.0, structured="none", mode="sync",
    )  # fmt: skip
    address = Address(f"{url}/v1", "unused", model.timeout_s, CONCURRENCY)
    async with http_pool("perf", workers, {"teacher": address}) as pool:
        asker = Asker(
            "perf",
            pool.attempt("teacher"),
            base_url=f"{url}/v1",
            key_variable=None,
            retries=6,
            # As the job does it: the worker always has a request for a connection that becomes free.
            limit=AdaptiveLimit(CONCURRENCY, ahead=CONCURRENCY),
        )
        with Ledger(folder / "ledger.sqlite") as ledger:
            asked = Endpoint("teacher", model, ledger, 0, asker)

            async def one(number: int) -> None:
                await asked.ask(Unit("teacher", f"{number // 16} {PROMPT}", sample="s", rollout=number))

            await one(-1)  # the worker is there, and connected
            started, cpu = time.monotonic(), time.process_time()
            await stream(iter(range(units)), one, 3 * CONCURRENCY)
            took, cpu = time.monotonic() - started, time.process_time() - cpu
            assert len(ledger) == units + 1
        return {"seconds": took, "driver_cpu_ms": cpu / units * 1e3, "retried": asker.counts["retried_429"]}


def driver(url: str, units: int, workers: int, result: Path) -> None:
    """A driver process: one measurement, as JSON in a file (Ray's processes would keep a pipe open)."""
    import uvloop

    from data_pipeline.cluster import ray_running
    from data_pipeline.settings import RaySettings

    with tempfile.TemporaryDirectory() as folder:
        with ray_running(RaySettings(address=None, cpus=1, dashboard=False)):
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                made = runner.run(drive(url, units, Path(folder), workers))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result.write_text(json.dumps({**made, "rss_mb": peak}))


def measured(url: str, units: int, workers: int) -> dict[str, float]:
    """Run a driver; its figures with the endpoint's view of the same."""
    stats(url)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            sys.executable, __file__, "--drive", url, "--units", str(units), "--workers", str(workers), "--result", str(result),
        ]  # fmt: skip
        subprocess.run(command, check=True, env=environment)
        made: dict[str, float] = json.loads(result.read_text())
    seen = stats(url)
    rate = units / made["seconds"]
    return {
        "units": units,
        "requests_per_s": round(rate, 1),
        "share_of_limit": round(rate / (CONCURRENCY / LATENCY_S), 4),
        "driver_rss_mb": round(made["rss_mb"], 1),
        "driver_cpu_ms_per_request": round(made["driver_cpu_ms"], 3),
        "refused_429": int(seen["refused"]),
        "peak_at_endpoint": int(seen["peak"]),
    }


def install_peer(folder: Path) -> Path:
    """The peer in a virtual environment of its own."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PEER], check=True)
    return python


def peer(url: str, python: Path) -> dict[str, Any] | None:
    """The peer's figures, or None where it cannot run."""
    command = [
        str(python),
        str(HERE / "peers.py"),
        "curator",
        f"{url}/v1",
        str(PEER_REQUESTS),
        str(CONCURRENCY),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        print(f"the peer cannot run: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
        return None
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**made, "requests_per_s": round(made["requests"] / made["seconds"], 1)}


def run(arguments: argparse.Namespace) -> None:
    """All measurements, then the JSON object."""
    load = os.getloadavg()[0]
    figures = []
    with endpoint() as url:
        for units in map(int, arguments.units.split(",")):
            figures.append(measured(url, units, arguments.workers))
            print(figures[-1], flush=True)
        python = (
            install_peer(Path(arguments.install_peer)) if arguments.install_peer else arguments.peer_python
        )
        other = own = None
        if python is None:
            print(f"no peer: give --peer-python or --install-peer to compare with {PEER}")
        else:
            other = peer(url, Path(python))
            own = measured(url, PEER_REQUESTS, arguments.workers)
            print(other, own, flush=True)
    best = max(figures, key=lambda figure: figure["units"])
    print(
        json.dumps(
            {
                "limit_requests_per_s": CONCURRENCY / LATENCY_S,
                "requests_per_s": best["requests_per_s"],
                "share_of_limit": best["share_of_limit"],
                "driver_rss_mb": {str(figure["units"]): figure["driver_rss_mb"] for figure in figures},
                "rss_growth": round(
                    best["driver_rss_mb"] / min(figures, key=lambda figure: figure["units"])["driver_rss_mb"],
                    3,
                ),
                "runs": figures,
                "peer": other,
                "ratio_to_peer": round(own["requests_per_s"] / other["requests_per_s"], 2)
                if own and other
                else None,
                "load": load,
                "cpus": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--units", default="1000,10000,96000")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--peer-python")
    parser.add_argument("--install-peer")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        driver(given.drive, int(given.units), given.workers, Path(given.result))
    else:
        run(given)
