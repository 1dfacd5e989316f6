"""Every expression of the Grafana dashboard through a real Prometheus, which scrapes a short RL run and its reward server.

    python tests/contract/dashboard_queries.py --outputs FOLDER --work FOLDER [--prometheus PATH] [--replay RUN]

The run is guided RL from the models that a quickstart left in ``--outputs``, all on loopback; with ``--replay`` nothing is
trained: the metrics of a finished run go through the same gauges, without a reward server. The last line of standard output is
one JSON object: how many expressions there are, those that Prometheus refuses, those that have no data at the run's last
step, and the series of each section. Status 1 where one is refused or empty.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUN = "dashboard"
# Weights that change and a validation: for the two charts that have nothing to show otherwise.
SETTINGS = (
    "data.train_batch_size=16", "trainer.total_training_steps=8", "trainer.test_freq=4", "trainer.val_before_train=false",
    "trainer.save_freq=1000", "objective.changes=[{step: 3, gamma: 0.3}]",
)  # fmt: skip
# A counter that exists from the first refusal on.
MAY_BE_EMPTY = "tagpr_prmu_refused_total"


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@contextmanager
def prometheus(binary: str, work: Path, port_of_ray: int) -> Iterator[str]:
    """A server that scrapes Ray, and the reward server that ``served.json`` names, every second; its URL."""
    port = free_port()
    token = work / RUN / "reward_server" / "token"
    (work / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        "scrape_configs:\n"
        f"  - {{job_name: ray, static_configs: [{{targets: ['127.0.0.1:{port_of_ray}']}}]}}\n"
        f"  - job_name: prmu\n    authorization: {{credentials_file: {token}}}\n"
        f"    file_sd_configs: [{{files: ['{work}/served.json'], refresh_interval: 1s}}]\n"
    )
    with (work / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary, f"--config.file={work}/prometheus.yml", f"--storage.tsdb.path={work}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def train(given: argparse.Namespace, port: int) -> Path:
    """The run; tells Prometheus of its reward server."""
    outputs, work = given.outputs.resolve(), given.work.resolve()
    run_dir = work / RUN
    command = [
        sys.executable, "-m", "tagpr.rl", "guided_rl", f"run.outputs={work}", f"run.name={RUN}",
        f"paths.examples={outputs}/data/minilamp", f"paths.sft={outputs}/sft/model", f"paths.prmu={outputs}/prmu/model",
        f"+ray_kwargs.ray_init._metrics_export_port={port}", *SETTINGS, *given.set,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=sys.stderr, env=environment)
    address, served = run_dir / "reward_server" / "server.json", work / "served.json"
    try:
        while process.poll() is None:
            if address.exists() and not served.exists():
                target = urllib.parse.urlsplit(json.loads(address.read_text())["url"]).netloc
                (work / "served.new").write_text(json.dumps([{"targets": [target]}]))
                (work / "served.new").replace(served)
            time.sleep(1)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
    if process.returncode:
        raise SystemExit(f"{run_dir}/driver.log: the run ended with status {process.returncode}. See there.")
    return run_dir


def replay(run: Path, port: int, seconds: float = 25.0) -> float:
    """The metrics of a finished run as gauges of a Ray of our own, some seconds long; until when they were there."""
    from tagpr.local_ray import local_ray
    from tagpr.rl.gauges import Gauges

    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with local_ray(2, _metrics_export_port=port):
        gauges = Gauges(RUN)
        ends = time.time() + seconds
        while time.time() < ends:
            for entry in entries:
                gauges.log(entry["data"], entry["step"])
            time.sleep(1)
        return time.time()


def ask(url: str, expression: str, at: float) -> tuple[str, list[dict[str, Any]]]:
    """(Prometheus' complaint, the series that it finds)."""
    query = urllib.parse.urlencode({"query": expression, "time": f"{at:.3f}"})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=30) as answer:
            return "", json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        return str(json.load(error)["error"]), []


def main(given: argparse.Namespace) -> int:
    """Train, then ask."""
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    binary = given.prometheus or shutil.which("prometheus")
    if binary is None:
        raise SystemExit("prometheus: is not on the PATH. Install it, or give --prometheus.")
    port = free_port()
    refused, empty, series = {}, [], Counter[str]()
    with prometheus(binary, work, port) as url:
        if given.replay:
            at = replay(given.replay, port)
        else:
            run_dir = train(given, port)
            at = max(path.stat().st_mtime for path in (run_dir / "rollouts").glob("*.jsonl"))
        board = json.loads((ROOT / "recipes/cluster/grafana_dashboard.json").read_text(encoding="utf-8"))
        section, asked = "", 0
        for panel in (each for outer in board["panels"] for each in (outer, *outer.get("panels", []))):
            section = panel["title"] if panel["type"] == "row" else section
            for target in panel.get("targets", []):
                asked += 1
                # As Grafana fills in a variable of which all values are chosen.
                expression = target["expr"].replace("$run", ".*")
                complaint, found = ask(url, expression, at)
                series[section] += len(found)
                if complaint:
                    refused[expression] = complaint
                elif MAY_BE_EMPTY not in expression and all(each["value"][1] == "NaN" for each in found):
                    empty.append(f"{section} / {panel['title']}: {expression}")
        complaint, names = ask(url, "count({__name__=~'.+'})", at)
    print(
        json.dumps(
            {
                "expressions": asked, "refused": refused, "empty": empty, "series": dict(series),
                "stored_series": names[0]["value"][1] if names else complaint,
            }
        )
    )  # fmt: skip
    return int(bool(refused or empty))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--outputs", type=Path, help="folder of a quickstart's outputs")
    parser.add_argument("--work", required=True, type=Path, help="an empty folder; what is made there stays")
    parser.add_argument("--prometheus", help="its binary")
    parser.add_argument("--replay", type=Path, help="folder of a finished run")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the run")
    # What was started is ended with this, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = parser.parse_args()
    if not (given.outputs or given.replay):
        parser.error("--outputs or --replay is needed")
    sys.exit(main(given))
