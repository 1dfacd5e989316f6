"""A SIMULATED teacher, judge and tagger behind a real OpenAI-compatible endpoint on loopback.

They know MiniLaMP's synthetic world and nothing else; every model name, log line and manifest says so. The endpoint is a
process of its own, with a key made for this run, and ends when the process that started it ends. A reply depends on the
prompt and the request's seed only; a share of them is faulty on purpose, so that filters and retries have something to do.
"""

import contextlib
import hashlib
import hmac
import importlib.resources
import json
import logging
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline import judge as judge_module
from data_pipeline.prompts import PromptTemplate
from data_pipeline.settings import ChainSettings, PromptFiles, Settings, SimulatedFaults
from data_pipeline.simulated_tagger import SimulatedTagger
from tagpr.benchmarks.minilamp import reader
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.tags import THINK_CLOSE, split_response

logger = logging.getLogger(__name__)

TEACHER, JUDGE, TAGGER = "simulated-teacher", "simulated-judge", "simulated-tagger"
START_TIMEOUT_S = 60.0
# What real endpoints of this kind ask for is seconds; here it only has to be obeyed.
RETRY_AFTER_MS = 200


class Start(Settings):
    """What the parent tells the endpoint on its standard input: there no process list shows the key."""

    key: str
    prompts: PromptFiles
    faults: SimulatedFaults


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


class Server:
    """The HTTP side: who may ask, transient failures, and the wire format."""

    def __init__(self, key: str, simulation: Simulation) -> None:
        self._authorization = f"Bearer {key}"
        self._simulation = simulation
        self._failed: set[bytes] = set()

    def application(self) -> Any:
        """The FastAPI application, with the bodies read by hand: validation of trusted loopback traffic costs more than
        the answer.
        """
        import asyncio

        from fastapi import FastAPI, Request, Response

        app = FastAPI(title="SIMULATED models for MiniLaMP", docs_url=None, redoc_url=None, openapi_url=None)

        def json_response(status: int, value: object, headers: dict[str, str] | None = None) -> Response:
            return Response(json.dumps(value), status, headers, media_type="application/json")

        def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
            return json_response(status, {"error": {"message": message, "type": code, "code": code}}, headers)

        def allowed(request: Request) -> bool:
            given = request.headers.get("authorization", "")
            return hmac.compare_digest(given.encode(), self._authorization.encode())

        @app.get("/health")
        async def health() -> Response:
            return json_response(200, {"status": "ok", "simulated": True})

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if not allowed(request):
                return error(401, "invalid_api_key", "Wrong key.")
            names = [{"id": name, "object": "model"} for name in (TEACHER, JUDGE, TAGGER)]
            return json_response(200, {"object": "list", "data": names})

        @app.post("/v1/chat/completions")
        async def complete(request: Request) -> Response:
            if not allowed(request):
                return error(401, "invalid_api_key", "Wrong key.")
            raw = await request.body()
            try:
                body = json.loads(raw)
                model, seed = body["model"], int(body.get("seed", 0))
                prompt = body["messages"][-1]["content"]
                changes = dict(body.get("simulated_faults", {}))
            except (ValueError, KeyError, TypeError, IndexError):
                return error(400, "invalid_request", "Not a chat completion request.")
            if model not in (TEACHER, JUDGE, TAGGER):
                return error(404, "model_not_found", "There are only simulated models here.")
            failure = self._transient_failure(raw)
            if failure == 429:
                wait = {"retry-after-ms": str(RETRY_AFTER_MS), "retry-after": "1"}
                return error(429, "rate_limit_exceeded", "Slow down (simulated).", wait)
            if failure:
                return error(500, "server_error", "Simulated failure.")
            if self._simulation.faults.latency_s:
                await asyncio.sleep(self._simulation.faults.latency_s)
            try:
                content = self._simulation.reply(model, prompt, seed, changes)
            except (DataError, ConfigError) as problem:
                return error(400, "unreadable_prompt", str(problem))
            sent, made = len(prompt.split()), len(content.text.split())
            message = {"role": "assistant", "content": content.text}
            return json_response(
                200,
                {
                    "id": f"simulated-{seed}",
                    "object": "chat.completion",
                    "created": int(time.time()),
                    "model": model,
                    "choices": [{"index": 0, "message": message, "finish_reason": content.finish_reason}],
                    "usage": {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made},
                },
            )

        return app

    def _transient_failure(self, body: bytes) -> int:
        """429 or 500 for the first try of a share of the requests, 0 for all others."""
        faults = self._simulation.faults
        if not faults.http_429 and not faults.http_500:
            return 0
        digest = hashlib.sha256(body).digest()
        draw = int.from_bytes(digest[:4], "big") / 2**32
        if draw >= faults.http_429 + faults.http_500 or digest in self._failed:
            return 0
        self._failed.add(digest)
        return 429 if draw < faults.http_429 else 500


def revision(faults: SimulatedFaults) -> str:
    """Hash of everything that decides what the simulated models say: the ledger keeps no replies of another world."""
    digest = hashlib.sha256(faults.model_dump_json(exclude={"http_429", "http_500", "latency_s"}).encode())
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
    start = Start(key=key, prompts=settings.prompts, faults=settings.simulated)
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
        application = Server(start.key, Simulation(start.prompts, start.faults)).application()
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
