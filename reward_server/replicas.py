"""Several servers of one checkpoint: started, watched, replaced when they die or hang (S21).

Each replica is a whole server (``python -m reward_server``) with its own port, on this machine or, through a Ray actor that
holds CPUs and GPUs for it, on any node of a Ray cluster. Clients talk to the replicas themselves and choose among them by prompt
(tagpr.prmu.client). Ray Serve's proxy is not used: it takes the whole body of a request into an unbounded queue before a
replica can look at the token or the size, answers two paths without a token, and knows nothing of shared prefixes.

A replaced replica keeps its port, so addresses that clients hold stay good (on another node of a cluster they cannot).
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import torch
from omegaconf import DictConfig, OmegaConf

from tagpr.errors import ConfigError, RewardServerError, StageError, TagPRError
from tagpr.prmu.wire import HEALTH_PATH, Address, read_address
from tagpr.runs import write_text_atomically

logger = logging.getLogger(__name__)

POLL_S = 0.1
STOP_S = 15.0
MAX_PAUSE_S = 30.0


class Process(Protocol):
    """Where one replica's process lives."""

    def start(self, command: Sequence[str], folder: str, environment: dict[str, str]) -> None:
        """Start it; its output goes to ``folder/server.log``."""
        ...

    def status(self) -> int | None:
        """Exit status, ``None`` while it runs."""
        ...

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens where it has ended."""
        ...


class LocalProcess:
    """A child of this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], folder: str, environment: dict[str, str]) -> None:
        """Start it; it ends with this process, whatever ends that."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command, f"server.parent_pid={os.getpid()}"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=os.environ | environment,
            )

    def status(self) -> int | None:
        """Exit status, ``None`` while it runs."""
        return 0 if self._process is None else self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens where it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


class RayProcess:
    """A child of a Ray actor, which holds the CPUs and GPUs that the replica may use.

    A lost actor or node counts as an exit; the next ``start`` asks Ray for another one.
    """

    def __init__(self, cpus: float, gpus: float) -> None:
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0}
        self._actor: Any = None

    def start(self, command: Sequence[str], folder: str, environment: dict[str, str]) -> None:
        """Place an actor and let it start the process."""
        import ray

        if self._actor is None or self._ask("status") != 0:
            self._actor = ray.remote(LocalProcess).options(**self._options).remote()
        ray.get(self._actor.start.remote(list(command), folder, environment))

    def status(self) -> int | None:
        """Exit status, ``None`` while it runs; -1 where the actor is gone or does not answer."""
        answer = None if self._actor is None else self._ask("status")
        return -1 if self._actor is None else answer

    def signal(self, number: int) -> None:
        """Send a signal through the actor."""
        if self._actor is not None:
            self._ask("signal", number)

    def _ask(self, method: str, *arguments: Any) -> int | None:
        import ray

        try:
            answer: int | None = ray.get(getattr(self._actor, method).remote(*arguments), timeout=10)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("a replica's actor does not answer (%s)", type(error).__name__)
            self._actor = None
            return -1
        return answer


@dataclass(frozen=True)
class Watch:
    """How a replica's health is judged. Times in seconds; ``failures`` in a row mean that it hangs."""

    every_s: float
    timeout_s: float
    failures: int
    start_timeout_s: float


class Replica:
    """Keeps one server alive from a thread of its own.

    Args:
        number: from 0.
        process: where it runs.
        command: arguments of Python that start it.
        folder: of this replica, shared with the machine it runs on.
        environment: added to that of the process.
        watch: when it counts as hung.
        expected: version that it has to serve.
    """

    def __init__(
        self,
        number: int,
        process: Process,
        command: Sequence[str],
        folder: Path,
        environment: dict[str, str],
        watch: Watch,
        expected: str,
    ) -> None:
        self.expected = expected
        self.restarts = 0
        self.first: Future[Address] = Future()
        self._number = number
        self._process = process
        self._command = command
        self._folder = folder
        self._environment = environment
        self._watch = watch
        self._address: Address | None = None
        self._port: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"replica-{number}", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address | None:
        """Where it is, or was before it has to be replaced; ``None`` before it was ever ready."""
        return self._address

    def reload(self, version: str) -> None:
        """Have the running server load the checkpoint that is now in ``paths.prmu``, which is ``version``."""
        self.expected = version
        self._process.signal(signal.SIGHUP)

    def stop(self) -> None:
        """End it; returns when it has ended."""
        self._stop.set()
        self._thread.join(STOP_S + 10)

    def _run(self) -> None:
        pause = 0.5
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    self._start()
                    self._keep()
                except TagPRError as error:
                    logger.warning("replica %d: %s", self._number, error)
                    if not self.first.done():
                        self.first.set_exception(error)
                        return
                finally:
                    self._end()
                if self._stop.is_set():
                    return
                self.restarts += 1
                pause = 0.5 if time.monotonic() - began > 60 else min(pause * 2, MAX_PAUSE_S)
                self._stop.wait(pause)
        except Exception as error:
            logger.exception("replica %d is given up", self._number)
            if not self.first.done():
                self.first.set_exception(error)

    def _start(self) -> None:
        address_file = self._folder / "server.json"
        address_file.unlink(missing_ok=True)
        command = [*self._command, f"server.expect_version={self.expected}"]
        if self._port is not None:
            command.append(f"server.port={self._port}")
        self._process.start(command, str(self._folder), self._environment)
        deadline = time.monotonic() + self._watch.start_timeout_s
        while not address_file.exists():
            status = self._process.status()
            if status is not None:
                raise RewardServerError(
                    f"replica {self._number}: exited with status {status}: {self._last_line()} "
                    f"Log: {self._folder / 'server.log'}"
                )
            if time.monotonic() > deadline:
                raise RewardServerError(
                    f"replica {self._number}: not ready after {self._watch.start_timeout_s:g} s. "
                    f"Log: {self._folder / 'server.log'}"
                )
            if self._stop.wait(POLL_S):
                return
        self._address = read_address(address_file)
        self._port = urlsplit(self._address.url).port
        logger.info("replica %d: ready at %s", self._number, self._address.url)
        if not self.first.done():
            self.first.set_result(self._address)

    def _keep(self) -> None:
        """Return when it has ended or hangs."""
        failures = 0
        while not self._stop.wait(self._watch.every_s):
            status = self._process.status()
            if status is not None:
                logger.warning("replica %d: exited with status %s, replacing it", self._number, status)
                return
            failures = 0 if self._healthy() else failures + 1
            if failures >= self._watch.failures:
                logger.warning(
                    "replica %d: unhealthy %d times in a row, replacing it", self._number, failures
                )
                return

    def _healthy(self) -> bool:
        assert self._address is not None
        try:
            answer = httpx.get(
                self._address.url + HEALTH_PATH, timeout=self._watch.timeout_s, trust_env=False
            )
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    def _end(self) -> None:
        if self._process.status() is not None:
            return
        self._process.signal(signal.SIGTERM if self._stop.is_set() else signal.SIGKILL)
        deadline = time.monotonic() + STOP_S
        while self._process.status() is None:
            if time.monotonic() > deadline:
                self._process.signal(signal.SIGKILL)
                deadline = float("inf")
            time.sleep(POLL_S)

    def _last_line(self) -> str:
        try:
            text = (self._folder / "server.log").read_text("utf-8", errors="replace")
        except OSError:
            return "it left no log."
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing."


class Replicas:
    """All replicas of one service; ``announce`` writes their addresses to ``<run.dir>/server.json``.

    Raises:
        ConfigError: Ray cannot be reached.
    """

    def __init__(self, config: DictConfig, token_file: str | None, version: str) -> None:
        server = config.server
        self._run_dir = Path(config.run.dir).resolve()
        self._token_file = token_file
        self._version = version
        self._announced = ""
        watch = Watch(
            server.health_every_s, server.health_timeout_s, server.health_failures, server.start_timeout_s
        )
        if server.ray is not None:
            _connect(server.ray)
        self._replicas = [
            Replica(
                number,
                LocalProcess()
                if server.ray is None
                else RayProcess(server.replica_cpus, server.replica_gpus),
                self._command(config, number),
                self._run_dir / f"replica_{number}",
                _environment(server, number),
                watch,
                version,
            )
            for number in range(server.replicas)
        ]

    def wait(self) -> None:
        """Return when all are ready.

        Raises:
            RewardServerError: one could not be started; names its log.
        """
        for replica in self._replicas:
            replica.first.result()

    @property
    def restarts(self) -> int:
        """Replicas that were replaced so far."""
        return sum(replica.restarts for replica in self._replicas)

    def announce(self) -> None:
        """Write the address file, where it says something new."""
        addresses = [replica.address for replica in self._replicas]
        urls = [address.url for address in addresses if address is not None]
        address = Address(
            url=",".join(urls), model_version=self._version, pid=os.getpid(), token_file=self._token_file
        )
        text = address.model_dump_json() + "\n"
        if text != self._announced:
            write_text_atomically(self._run_dir / "server.json", text)
            self._announced = text
            logger.info("PRMU %s at %s", self._version, address.url)

    def reload(self, version: str) -> None:
        """Have every replica exchange its checkpoint for what is now in ``paths.prmu``."""
        self._version = version
        for replica in self._replicas:
            replica.reload(version)

    def stop(self) -> None:
        """End all of them and withdraw the address file."""
        (self._run_dir / "server.json").unlink(missing_ok=True)
        with ThreadPoolExecutor(max(1, len(self._replicas))) as pool:
            list(pool.map(Replica.stop, self._replicas))

    def _command(self, config: DictConfig, number: int) -> list[str]:
        server: Any = OmegaConf.to_container(config.server, resolve=True)
        own = {
            "replicas": 1,
            "ray": None,
            "parent_pid": None,
            "expect_version": None,
            "token_file": self._token_file,
        }
        if server["port"]:
            own["port"] = server["port"] + number
        settings = {f"server.{key}": value for key, value in (server | own).items()}
        settings["run.dir"] = str(self._run_dir / f"replica_{number}")
        settings["paths.prmu"] = str(Path(config.paths.prmu).resolve())
        # Given again with the process: what a replica learns at its start.
        for key in ("server.parent_pid", "server.expect_version"):
            del settings[key]
        return ["-m", "reward_server", *(f"{key}={json.dumps(value)}" for key, value in settings.items())]


def _environment(server: DictConfig, number: int) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(server.threads)}
    devices = torch.cuda.device_count() if server.ray is None and server.device != "cpu" else 0
    if devices:  # on a cluster Ray gives each actor its own
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        own = given if given != [""] else [str(device) for device in range(devices)]
        environment["CUDA_VISIBLE_DEVICES"] = own[number % len(own)]
    return environment


def _connect(address: str) -> None:
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"server.ray={address}: no Ray there ({str(error).splitlines()[0][:120]}). "
            "Set auto or a cluster's address; null runs the replicas on this machine."
        ) from None


def check_settings(server: DictConfig) -> None:
    """Refuse settings of replicas that make no sense.

    Raises:
        ConfigError: names the key.
    """
    if server.replicas < 1:
        raise ConfigError(f"server.replicas={server.replicas}: is no number of servers. Set 1 or more.")
    for key in ("health_every_s", "health_timeout_s", "health_failures", "start_timeout_s"):
        if server[key] <= 0:
            raise ConfigError(f"server.{key}={server[key]}: must be more than 0.")


def check_version(expected: str | None, version: str) -> None:
    """Refuse to serve another checkpoint than the other replicas.

    Raises:
        StageError: names both versions.
    """
    if expected is not None and version != expected:
        raise StageError(
            f"paths.prmu: is PRMU {version}, the other replicas serve {expected}. "
            "Send SIGHUP to the service, so that all of them take the new one."
        )
