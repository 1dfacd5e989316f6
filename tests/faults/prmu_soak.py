"""Load at saturation for a long time: is the memory flat, is there an error, what are the latencies?

    python tests/faults/prmu_soak.py --minutes 30

The cache of prompts is small, so it is full within a minute and every new prompt drives an old one out. The last line is one JSON
object of figures; status 1 where a request failed or memory grew.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from prmu_setup import Load, last_line, percentile, resident_mib, service, tiny_prmu

SAMPLE_S = 5.0
# Of the time, at the start: imports, allocator and cache fill up.
WARM_SHARE = 0.25
GROWTH_MIB_PER_HOUR = 60.0


async def soak(load: Load, pids: list[int], seconds: float) -> list[tuple[float, float]]:
    """Memory (MiB) over time (s) under load."""
    load.keep = False
    load.start()
    began, memory = time.monotonic(), []
    said = began
    while (now := time.monotonic()) - began < seconds:
        memory.append((now - began, resident_mib(pids)))
        if now - said > 60:
            said = now
            print(
                f"{(now - began) / 60:.0f} min: {load.samples} samples, {len(load.errors)} errors, "
                f"{memory[-1][1]:.0f} MiB",
                flush=True,
            )
        await asyncio.sleep(SAMPLE_S)
    await load.stop()
    await load.client.aclose()
    return memory


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--callers", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = (f"replicas={arguments.replicas}", "kv_cache_gib=0.02")
        with service(folder / "run", tiny_prmu(folder), *settings) as running:
            load = Load(running.client(), arguments.callers)
            pids = running.replica_pids()
            memory = asyncio.run(soak(load, pids, arguments.minutes * 60))
            end = resident_mib(pids)
    late = [(when, size) for when, size in memory if when >= WARM_SHARE * arguments.minutes * 60]
    slope = float(np.polyfit(*np.array(late).T, 1)[0]) * 3600 if len(late) > 2 else 0.0
    figures = {
        "minutes": arguments.minutes,
        "callers": arguments.callers,
        "replicas": arguments.replicas,
        "samples": load.samples,
        "requests": len(load.seconds),
        "samples_per_s": round(load.samples / (arguments.minutes * 60), 1),
        "errors": len(load.errors),
        "p50_s": round(percentile(load.seconds, 0.5), 3),
        "p99_s": round(percentile(load.seconds, 0.99), 3),
        "max_s": round(max(load.seconds, default=0.0), 3),
        "memory_after_warm_up_mib": round(late[0][1] if late else end, 1),
        "memory_at_the_end_mib": round(end, 1),
        "memory_slope_mib_per_hour": round(slope, 1),
    }
    for error in load.errors[:5]:
        print(error)
    last_line(figures)
    return int(bool(load.errors) or slope > GROWTH_MIB_PER_HOUR)


if __name__ == "__main__":
    sys.exit(main())
