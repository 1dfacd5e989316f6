"""A SIMULATED teacher, judge and tagger behind a real OpenAI-compatible endpoint on loopback.

They know MiniLaMP's synthetic world and nothing else; every model name, log line and manifest says so. The endpoint is a
process of its own, with a key made for this run, and ends when the process that started it ends. A reply depends on the
prompt and the request's seed only; a share of them is faulty on purpose, so that filters and retries have something to do.
"""

import contextlib
import hashlib
import importlib.resources
import json
import logging
import random
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import judge as judge_module
from data_pipeline.prompts import PromptTemplate
from data_pipeline.settings import ChainSettings, PromptFiles, Settings, SimulatedFaults
from data_pipeline.simulated_http import Server
from data_pipeline.simulated_tagger import SimulatedTagger
from tagpr.benchmarks.minilamp import reader
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.tags import THINK_CLOSE, split_response

logger = logging.getLogger(__name__)

TEACHER, JUDGE, TAGGER = "simulated-teacher", "simulated-judge", "simulated-tagger"
START_TIMEOUT_S = 60.0
# Faults with these beginnings change when a reply comes, not what it says.
TRANSPORT = ("http_", "batch_", "slow_", "latency_")


class Start(Settings):
    """What the parent tells the endpoint on its standard input: there no process list shows the key."""

    key: str
    prompts: PromptFiles
    faults: SimulatedFaults
    state: str


@dataclass(frozen=True)
class Content:
    """A simulated reply."""

    text: str
    finish_reason: str = "stop"


class Simulation:
    """The three models as pure functions of (prompt, seed).

    Raises:
        ConfigError: ``faults.teacher`` names no fault of the reader.
    """

    def __init__(self, prompts: PromptFiles, faults: SimulatedFaults) -> None:
        self.faults = faults
        self._judge = PromptTemplate.load("chains.prompts.judge", prompts.judge, judge_module.PROMPT_FIELDS)
        self._tagger = SimulatedTagger(prompts, faults)
        self._rates = self._fault_rates({})

    def _fault_rates(self, changes: dict[str, float]) -> reader.FaultRates:
        try:
            return reader.FaultRates(**{**self.faults.teacher, **changes})
        except TypeError as error:
            raise ConfigError(
                f"chains.simulated.teacher={self.faults.teacher | changes}: names a fault that the simulated "
                "teacher does not make. See FaultRates in tagpr/benchmarks/minilamp/reader.py."
            ) from error

    def reply(self, model: str, prompt: str, seed: int, changes: dict[str, float]) -> Content:
        """Answer one request; ``changes`` are fault rates of the teacher for this request only.

        Raises:
            DataError: the prompt is none that this model can read.
        """
        rng = random.Random(f"{model} {seed} {hashlib.sha256(prompt.encode()).hexdigest()}")
        if model == TEACHER:
            return self._teach(prompt, rng, self._fault_rates(changes) if changes else self._rates)
        return self._rate(prompt, rng) if model == JUDGE else Content(self._tagger.reply(prompt, rng))

    def _teach(self, prompt: str, rng: random.Random, rates: reader.FaultRates) -> Content:
        """As a thinking model whose template has opened ``<think>``: the reply starts with the reasoning (S6)."""
        reasoned = reader.reason(prompt, rng, rates)
        text = f"{reader.untagged(reasoned.steps)}\n{THINK_CLOSE}\n\n{reasoned.answer}"
        if rng.random() < self.faults.truncated:
            return Content(text[: len(text) // 3], "length")
        return Content(text)

    def _rate(self, prompt: str, rng: random.Random) -> Content:
        values = self._judge.extract(prompt)
        if values is None:
            raise DataError("prompt: is not the judge's prompt.")
        response = split_response(values["response"])
        scores = reader.quality(values["question"], response.reasoning, response.answer)
        quoted = rng.random() < 0.5
        total = sum(scores) + (1 if rng.random() < self.faults.judge_wrong_total else 0)
        report = {
            "evaluation_report": {
                "detailed_assessment": [
                    {"dimension": name, "reasoning": "simulated", "score": str(score) if quoted else score}
                    for name, score in zip(judge_module.DIMENSIONS, scores, strict=True)
                ],
                "summary": {"total_score": total},
            }
        }
        text = json.dumps(report, indent=2)
        if rng.random() < self.faults.judge_malformed:
            text = rng.choice(
                [text[: len(text) // 2], f"Thought process: {text}", text.replace("score", "points")]
            )
        return Content(f"```json\n{text}\n```" if rng.random() < 0.2 else text)


def revision(faults: SimulatedFaults) -> str:
    """Hash of everything that decides what the simulated models say: the ledger keeps no replies of another world."""
    transport = {name for name in SimulatedFaults.model_fields if name.startswith(TRANSPORT)}
    digest = hashlib.sha256(faults.model_dump_json(exclude=transport).encode())
    for package, names in (
        ("tagpr.benchmarks.minilamp", ("reader.py", "world.py")),
        (__package__, ("simulated.py", "simulated_tagger.py", "pieces.py")),
    ):
        for name in names:
            digest.update(importlib.resources.files(package).joinpath(name).read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def running(settings: ChainSettings) -> Iterator[tuple[str, str]]:
    """Start the endpoint; yields its base URL and key, and stops it.

    Raises:
        StageError: it does not start.
    """
    key = secrets.token_urlsafe(24)
    state = str(Path(settings.ledger).absolute().parent / "simulated-batches")
    start = Start(key=key, prompts=settings.prompts, faults=settings.simulated, state=state)
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.simulated"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    try:
        watchdog.start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(start.model_dump_json() + "\n")
            process.stdin.flush()
        port = process.stdout.readline().strip()
        watchdog.cancel()
        if not port.isdigit():
            raise StageError(
                f"chains.endpoint=simulated: {port or 'the endpoint died at start'}. "
                "See the lines above, or set chains.endpoint=openai."
            )
        logger.info(
            "SIMULATED teacher, judge and tagger on 127.0.0.1:%s: synthetic text, no real model", port
        )
        yield f"http://127.0.0.1:{port}/v1", key
    finally:
        watchdog.cancel()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def serve() -> None:
    """Entry point of the endpoint's process: start message on stdin, port on stdout, end of stdin ends it."""
    import uvicorn

    start = Start.model_validate_json(sys.stdin.readline())
    listener = socket.socket()
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
    except OSError as error:
        sys.stdout.write(f"no free port on loopback ({error.strerror})\n")
        return
    try:
        simulation = Simulation(start.prompts, start.faults)
        server_side = Server(
            start.key, (TEACHER, JUDGE, TAGGER), simulation.reply, start.faults, Path(start.state)
        )
        application = server_side.application()
    except ConfigError as error:
        sys.stdout.write(f"{' '.join(str(error).split())}\n")
        return
    server = uvicorn.Server(
        uvicorn.Config(
            application, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=600
        )
    )

    def end_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    server.run(sockets=[listener])


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
