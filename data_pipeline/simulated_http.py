"""The HTTP side of the SIMULATED models: who may ask, what goes wrong on the way, chat completions, files and batches.

Token counts are honest in that both sides count alike (:func:`tagpr.chat.tokens.approximate_tokens`), and prefixes that were
seen before count as cached as OpenAI's are: from 1,024 tokens on, in steps of 128.
"""

import asyncio
import email.utils
import hashlib
import hmac
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response

from data_pipeline.settings import SimulatedFaults
from tagpr.chat.tokens import BYTES_PER_TOKEN, approximate_tokens
from tagpr.errors import ConfigError, DataError

# What real endpoints of this kind ask for is seconds; here it only has to be obeyed.
RETRY_AFTER_S = 0.05
_FIRST_CACHED, _CACHE_STEP, _CACHED_PREFIXES = 1024, 128, 100_000
# What a batch file may hold, as OpenAI's documentation says.
MOST_REQUESTS, MOST_BYTES = 50_000, 200 * 2**20
_FAULTS = ("http_429", "http_500", "http_502", "http_dropped", "http_broken_json", "http_slow")


class Content(Protocol):
    """A simulated reply."""

    @property
    def text(self) -> str: ...  # noqa: D102

    @property
    def finish_reason(self) -> str: ...  # noqa: D102


Reply = Callable[[str, str, int, dict[str, float]], Content]
"""(model, prompt, seed, changed fault rates) -> reply; raises DataError for a prompt that the model cannot read."""


def json_response(status: int, value: object, headers: dict[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(json.dumps(value), status, headers, media_type="application/json")


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in the shape that OpenAI gives it."""
    return json_response(status, {"error": {"message": message, "type": code, "code": code}}, headers)


class Server:
    """``state`` is a folder for files and batches: like a provider's they outlive this process."""

    def __init__(
        self, key: str, models: tuple[str, ...], reply: Reply, faults: SimulatedFaults, state: Path
    ) -> None:
        self._authorization = f"Bearer {key}".encode()
        self._models = models
        self._reply = reply
        self._faults = faults
        self._batches = Batches(state, self._answer, faults)
        self._failed: set[bytes] = set()
        self._prefixes: OrderedDict[bytes, None] = OrderedDict()

    def application(self) -> Any:
        """The ASGI application. Bodies are read by hand: validation of trusted loopback traffic costs more than the answer."""
        app = FastAPI(title="SIMULATED models for MiniLaMP", docs_url=None, redoc_url=None, openapi_url=None)

        @app.get("/health")
        async def health() -> Response:
            return json_response(200, {"status": "ok", "simulated": True})

        @app.get("/v1/models")
        async def models() -> Response:
            return json_response(
                200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self._models]}
            )

        app.add_api_route("/v1/chat/completions", self._complete, methods=["POST"])
        self._batches.add_routes(app)
        return _Gate(app, self._authorization)

    async def _complete(self, request: Request) -> Response:
        raw = await request.body()
        fault = self._transient_fault(raw)
        if fault == "http_429":
            return error(429, "rate_limit_exceeded", "Slow down (simulated).", self._retry_after(raw))
        if fault == "http_500":
            return error(500, "server_error", "Simulated failure.")
        if fault == "http_502":
            return Response("<html><h1>502 Bad Gateway</h1></html>", 502, media_type="text/html")
        if fault == "http_dropped":
            request.scope["drop"]()
            return Response()
        if fault == "http_slow":
            await asyncio.sleep(self._faults.slow_s)
        if self._faults.latency_s:
            await asyncio.sleep(self._faults.latency_s)
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        status, answer = self._answer(body)
        text = json.dumps(answer)
        if fault == "http_broken_json":
            text = text[: len(text) // 2]
        return Response(text, status, media_type="application/json")

    def _answer(self, body: object) -> tuple[int, dict[str, Any]]:
        """Status and body for one request, by whichever way it came."""

        def refusal(status: int, code: str, message: str) -> tuple[int, dict[str, Any]]:
            return status, {"error": {"message": message, "type": code, "code": code}}

        try:
            assert isinstance(body, dict)
            model, seed = body["model"], int(body.get("seed", 0))
            prompt = body["messages"][-1]["content"]
            changes = dict(body.get("simulated_faults", {}))
        except (AssertionError, ValueError, KeyError, TypeError, IndexError):
            return refusal(400, "invalid_request", "Not a chat completion request.")
        if model not in self._models:
            return refusal(404, "model_not_found", "There are only simulated models here.")
        try:
            content = self._reply(model, prompt, seed, changes)
        except (DataError, ConfigError) as problem:
            return refusal(400, "unreadable_prompt", str(problem))
        sent, made = approximate_tokens(prompt), approximate_tokens(content.text)
        message = {"role": "assistant", "content": content.text, "refusal": None}
        usage = {
            "prompt_tokens": sent,
            "completion_tokens": made,
            "total_tokens": sent + made,
            "prompt_tokens_details": {"cached_tokens": self._cached(model, prompt)},
        }
        return 200, {
            "id": f"simulated-{seed}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [{"index": 0, "message": message, "finish_reason": content.finish_reason}],
            "usage": usage,
        }

    def _cached(self, model: str, prompt: str) -> int:
        """Tokens of the prompt's longest prefix that an earlier prompt began with."""
        data = prompt.encode()
        step = int(_CACHE_STEP * BYTES_PER_TOKEN)
        first = int(_FIRST_CACHED * BYTES_PER_TOKEN)
        digest = hashlib.blake2b(model.encode(), digest_size=16)
        cached, done, hit = 0, 0, True
        for end in range(first, len(data) + 1, step):
            digest.update(data[done:end])
            done, prefix = end, digest.copy().digest()
            if hit and prefix in self._prefixes:
                cached = int(end / BYTES_PER_TOKEN)
                self._prefixes.move_to_end(prefix)
            else:
                hit = False
                self._prefixes[prefix] = None
        while len(self._prefixes) > _CACHED_PREFIXES:
            self._prefixes.popitem(last=False)
        return cached

    def _transient_fault(self, body: bytes) -> str:
        """What goes wrong at the first try of a share of the requests; nothing at all others."""
        digest = hashlib.sha256(body).digest()
        draw = int.from_bytes(digest[:4], "big") / 2**32
        for name in _FAULTS:
            share = getattr(self._faults, name)
            if 0.0 <= draw < share:
                if digest in self._failed:
                    return ""
                self._failed.add(digest)
                return name
            draw -= share
        return ""

    def _retry_after(self, body: bytes) -> dict[str, str]:
        """The three forms of Retry-After; seldom the date, which cannot say less than a second."""
        form = hashlib.sha256(body).digest()[4] % 16
        if form == 0:
            return {"retry-after": email.utils.formatdate(time.time() + 1, usegmt=True)}
        if form < 8:
            return {"retry-after": str(RETRY_AFTER_S)}
        return {"retry-after-ms": str(int(RETRY_AFTER_S * 1000)), "retry-after": "1"}


class _Gate:
    """Lets in who has the key, and gives every request ``scope["drop"]``, which cuts its connection without a word."""

    def __init__(self, app: Any, authorization: bytes) -> None:
        self._app = app
        self._authorization = authorization

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if scope["path"] != "/health" and not hmac.compare_digest(given, self._authorization):
            await error(401, "invalid_api_key", "Wrong key.")(scope, receive, send)
            return
        transport = getattr(getattr(send, "__self__", None), "transport", None)
        scope["drop"] = transport.abort if transport is not None else lambda: None
        await self._app(scope, receive, send)


class Batches:
    """``/v1/files`` and ``/v1/batches`` as OpenAI has them, one JSON file each in the state folder.

    A batch is worked on when somebody looks at it ``batch_s`` seconds after it was made. A share of its lines fails with
    status 500; another share stays without an answer, and the batch then ends as expired.
    """

    def __init__(
        self,
        state: Path,
        answer: Callable[[object], tuple[int, dict[str, Any]]],
        faults: SimulatedFaults,
    ) -> None:
        self._state = state
        self._answer = answer
        self._faults = faults

    def add_routes(self, app: FastAPI) -> None:
        """Add the endpoints."""
        app.add_api_route("/v1/files", self._upload, methods=["POST"])
        app.add_api_route("/v1/files/{file_id}/content", self._content, methods=["GET"])
        app.add_api_route("/v1/batches", self._create, methods=["POST"])
        app.add_api_route("/v1/batches", self._list, methods=["GET"])
        app.add_api_route("/v1/batches/{batch_id}", self._retrieve, methods=["GET"])

    async def _upload(self, request: Request) -> Response:
        async with request.form(max_part_size=MOST_BYTES + 1) as form:
            upload = form.get("file")
            if form.get("purpose") != "batch" or upload is None or isinstance(upload, str):
                return error(400, "invalid_request", "A file with purpose=batch is needed.")
            data = await upload.read()
            name = upload.filename
        if len(data) > MOST_BYTES:
            return error(400, "file_too_large", "The file is larger than 200 MB.")
        return json_response(200, self._keep_file(data, name or "file", "batch"))

    async def _content(self, file_id: str) -> Response:
        path = self._path(file_id, ".jsonl")
        if path is None or not path.is_file():
            return error(404, "not_found", "No such file.")
        return Response(path.read_bytes(), media_type="application/octet-stream")

    async def _create(self, request: Request) -> Response:
        body = await request.json()
        path = self._path(str(body.get("input_file_id")), ".jsonl")
        if path is None or not path.is_file() or body.get("endpoint") != "/v1/chat/completions":
            return error(400, "invalid_request", "input_file_id or endpoint is wrong.")
        batch_id = f"batch_{len(list(self._state.glob('batch_*.json'))):08d}"
        batch = {
            "id": batch_id,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": body.get("completion_window", "24h"),
            "status": "in_progress",
            "created_at": int(time.time()),
            "metadata": body.get("metadata"),
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "due": time.time() + self._faults.batch_s,
        }
        self._keep_batch(batch)
        return json_response(200, batch)

    async def _list(self, request: Request) -> Response:
        """Newest first, in pages, as the real one does."""
        limit, after = int(request.query_params.get("limit", 20)), request.query_params.get("after")
        names = sorted((path.stem for path in self._state.glob("batch_*.json")), reverse=True)
        names = [name for name in names if after is None or name < after]
        page = [self._advance(name) for name in names[:limit]]
        return json_response(
            200,
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(names) > limit,
            },
        )

    async def _retrieve(self, batch_id: str) -> Response:
        path = self._path(batch_id, ".json")
        if path is None or not path.is_file():
            return error(404, "not_found", "No such batch.")
        return json_response(200, self._advance(batch_id))

    def _advance(self, batch_id: str) -> dict[str, Any]:
        batch: dict[str, Any] = json.loads((self._state / f"{batch_id}.json").read_bytes())
        if batch["status"] == "in_progress" and time.time() >= batch["due"]:
            self._work(batch)
            self._keep_batch(batch)
        return batch

    def _work(self, batch: dict[str, Any]) -> None:
        lines = (self._state / f"{batch['input_file_id']}.jsonl").read_text("utf-8").splitlines()
        problem = _check(lines)
        if problem:
            batch["status"] = "failed"
            batch["errors"] = {
                "object": "list",
                "data": [{"code": problem, "message": "See the input file.", "line": None}],
            }
            return
        outputs: list[dict[str, Any]] = []
        failures: list[dict[str, Any]] = []
        unanswered = 0
        for line in lines:
            request = json.loads(line)
            # What went wrong in one batch need not go wrong in the next.
            draw = random.Random(f"{batch['id']} {request['custom_id']}").random()
            entry = {"id": f"{batch['id']}-{request['custom_id']}", "custom_id": request["custom_id"]}
            if draw < self._faults.batch_expired:
                unanswered += 1
                problem_of_it = {
                    "code": "batch_expired",
                    "message": "This request could not be executed in time.",
                }
                failures.append({**entry, "response": None, "error": problem_of_it})
                continue
            if draw < self._faults.batch_expired + self._faults.batch_failed:
                status, answer = 500, {"error": {"code": "server_error", "message": "Simulated failure."}}
            else:
                status, answer = self._answer(request["body"])
            response = {
                "status_code": status,
                "request_id": request["custom_id"][:8],
                "body": answer,
            }
            (outputs if status == 200 else failures).append({**entry, "response": response, "error": None})
        # Outputs come in no particular order.
        random.Random(batch["id"]).shuffle(outputs)
        if outputs:
            batch["output_file_id"] = self._keep_lines(outputs)
        if failures:
            batch["error_file_id"] = self._keep_lines(failures)
        batch["status"] = "expired" if unanswered else "completed"
        batch["request_counts"] = {
            "total": len(lines),
            "completed": len(outputs),
            "failed": len(failures),
        }

    def _keep_lines(self, entries: list[dict[str, Any]]) -> str:
        data = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        return str(self._keep_file(data, "output.jsonl", "batch_output")["id"])

    def _keep_file(self, data: bytes, name: str, purpose: str) -> dict[str, Any]:
        self._state.mkdir(parents=True, exist_ok=True)
        file_id = f"file-{len(list(self._state.glob('file-*.jsonl'))):08d}"
        (self._state / f"{file_id}.jsonl").write_bytes(data)
        return {
            "id": file_id,
            "object": "file",
            "bytes": len(data),
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }

    def _keep_batch(self, batch: Mapping[str, Any]) -> None:
        self._state.mkdir(parents=True, exist_ok=True)
        (self._state / f"{batch['id']}.json").write_text(json.dumps(batch))

    def _path(self, name: str, suffix: str) -> Path | None:
        """The file of this name in the state folder; None for a name that would lead out of it."""
        return self._state / f"{name}{suffix}" if name.replace("-", "").replace("_", "").isalnum() else None


def _check(lines: list[str]) -> str:
    """Code of what is wrong with an input file; empty if nothing is."""
    if not lines:
        return "empty_file"
    if len(lines) > MOST_REQUESTS:
        return "too_many_tasks"
    seen, models = set(), set()
    for line in lines:
        try:
            request = json.loads(line)
            seen.add(request["custom_id"])
            models.add(request["body"]["model"])
            fine = request["method"] == "POST" and request["url"] == "/v1/chat/completions"
        except (ValueError, KeyError, TypeError):
            return "invalid_json_line"
        if not fine:
            return "invalid_url"
    if len(seen) < len(lines):
        return "duplicate_custom_id"
    return "mismatched_model" if len(models) > 1 else ""
