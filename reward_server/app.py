"""The HTTP front of the reward server: who may ask, how much, and what an answer looks like (S21).

Whatever goes wrong is a status and an ``ErrorBody``; a number is only ever sent when the model gave it.
Bodies are people's data: they are never logged, and error messages do not quote them.
"""

import asyncio
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from reward_server.batching import Batcher
from reward_server.metrics import CONTENT_TYPE, Counting, Metrics
from reward_server.serving import Served, Serving, checkpoint_folder
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.listening import Admission, BearerAuth, BodyTooLarge, place_of, read_body, refusal_headers
from tagpr.prmu.client import sigmoid
from tagpr.prmu.encoding import Encoded, Encoder
from tagpr.prmu.wire import (
    HEALTH_PATH,
    METRICS_PATH,
    NOT_FINITE,
    OTHER_VERSION,
    SCORE_PATH,
    SWAP_PATH,
    VERSION_PATH,
    ErrorBody,
    ItemScore,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    SwapRequest,
    SwapResponse,
    VersionInfo,
)

logger = logging.getLogger(__name__)

KNOWN_FIELDS = {*ScoreRequest.model_fields, *ScoreItem.model_fields, *SwapRequest.model_fields}
SWAP_BODY_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take. Times in seconds."""

    body_bytes: int
    items: int
    pending_items: int
    request_timeout_s: float
    item_characters: int


class _Refused(Exception):
    """Ends a request with a status and an error body."""

    def __init__(self, status: int, code: str, message: str, item: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(code=code, message=message, item=item)


@dataclass(frozen=True)
class Admin:
    """Who may exchange the checkpoint, and for which: folders directly in ``checkpoints``."""

    token: str
    checkpoints: Path


def create_app(serving: Serving, *, token: str, limits: Limits, admin: Admin | None = None) -> FastAPI:
    """The application around a running checkpoint; its caller closes ``serving``. Without ``admin`` nobody can exchange it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    # A place for each item, from before tokenizing until the answer.
    admission = Admission(
        limits.pending_items,
        lambda taken: _Refused(429, "queue_full", f"{taken} items are waiting, the queue is full"),
    )
    metrics = Metrics(serving, lambda: admission.taken)
    app.add_middleware(
        BearerAuth,
        token=token,
        refusal=lambda: _answer(_Refused(401, "unauthorized", "bearer token missing or wrong")),
        admin=None if admin is None else (SWAP_PATH, admin.token),
    )
    app.add_middleware(Counting, metrics=metrics)

    @app.get(HEALTH_PATH)
    async def health() -> JSONResponse:
        batcher = serving.current.batcher
        if batcher.alive and batcher.busy_s() < limits.request_timeout_s:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "engine hangs" if batcher.alive else "engine is down"}, 503)

    @app.get(VERSION_PATH)
    async def version_info() -> Response:
        served = serving.current
        return _json(
            VersionInfo(
                model_version=served.version,
                engine=served.engine,
                users=len(served.encoder.users.rows),
                max_tokens=served.encoder.max_tokens,
            )
        )

    @app.get(METRICS_PATH)
    async def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.post(SCORE_PATH)
    async def score(request: Request) -> Response:
        try:
            async with asyncio.timeout(limits.request_timeout_s):
                asked = _parse(ScoreRequest, await _read(request, limits.body_bytes))
                if len(asked.items) > limits.items:
                    many = f"{len(asked.items)} items, more than the limit of {limits.items}"
                    raise _Refused(413, "too_many_items", many)
                with admission.hold(len(asked.items)), serving.lease() as served:
                    _check_lengths(asked, limits.item_characters)
                    answer = await _scores(served, asked)
        except TimeoutError:
            late = f"no answer within {limits.request_timeout_s:g} s; try again"
            return refuse(_Refused(503, "timeout", late))
        except _Refused as refused:
            return refuse(refused)
        metrics.items.inc(len(answer.scores))
        metrics.unknown.inc(sum(one.unknown_user for one in answer.scores))
        return _json(answer)

    def refuse(refused: _Refused) -> Response:
        metrics.refused.labels(refused.body.code).inc()
        return _answer(refused)

    if admin is not None:

        @app.post(SWAP_PATH)
        async def swap(request: Request) -> Response:
            try:
                asked = _parse(SwapRequest, await _read(request, SWAP_BODY_BYTES))
                old, new = await serving.swap(checkpoint_folder(admin.checkpoints, asked.checkpoint))
            except (StageError, ConfigError) as error:
                return refuse(_Refused(422, "unusable_checkpoint", str(error)))
            except _Refused as refused:
                return refuse(refused)
            return _json(SwapResponse(old_version=old, model_version=new))

    @app.exception_handler(HTTPException)
    async def no_such_route(_: Request, error: HTTPException) -> Response:
        return _answer(_Refused(error.status_code, "no_such_route", str(error.detail)))

    return app


async def _scores(served: Served, asked: ScoreRequest) -> ScoreResponse:
    if asked.versions is not None and served.version not in asked.versions:
        wanted = ", ".join(asked.versions)
        raise _Refused(409, OTHER_VERSION, f"serves PRMU {served.version}, the request insists on {wanted}")
    encoded = await asyncio.to_thread(_encode, served.encoder, asked.items)
    logits = await _logits(served.batcher, encoded)
    scores = []
    for item, one, logit in zip(asked.items, encoded, logits, strict=True):
        if not math.isfinite(logit):
            logger.error("item %s: logit is %s", item.id, logit)
            raise _Refused(500, NOT_FINITE, f"the model's logit is {logit}", item.id)
        scores.append(ItemScore(id=item.id, logit=logit, score=sigmoid(logit), unknown_user=one.unknown_user))
    return ScoreResponse(model_version=served.version, scores=scores)


async def _read(request: Request, limit: int) -> bytes:
    try:
        return await read_body(request, limit)
    except BodyTooLarge:
        raise _Refused(413, "body_too_large", f"body is larger than {limit} bytes") from None


Body = TypeVar("Body", ScoreRequest, SwapRequest)


def _parse(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        # The field's place and the kind of error; pydantic's own message could quote the body.
        place = place_of(first["loc"], KNOWN_FIELDS)
        raise _Refused(422, "malformed", f"{place or 'body'}: {first['type']}") from None


def _check_lengths(asked: ScoreRequest, limit: int) -> None:
    """Before any text is tokenized, which takes a hundred times its memory."""
    for item in asked.items:
        length = len(item.prompt) + len(item.response)
        if length > limit:
            message = f"item {item.id}: {length} characters, more than the limit of {limit}"
            raise _Refused(422, "unusable_item", message, item.id)


def _encode(encoder: Encoder, items: list[ScoreItem]) -> list[Encoded]:
    encoded = []
    for item in items:
        try:
            encoded.append(encoder.encode(item.id, item.user_id, item.prompt, item.response))
        except DataError as error:
            raise _Refused(422, "unusable_item", str(error), item.id) from None
    return encoded


async def _logits(batcher: Batcher, encoded: list[Encoded]) -> list[float]:
    try:
        return await batcher.score(encoded)
    except (RuntimeError, ValueError, MemoryError) as error:  # its traceback is in the log already
        raise _Refused(500, "engine_failed", f"the engine failed ({type(error).__name__})") from error


def _json(record: VersionInfo | ScoreResponse | SwapResponse) -> Response:
    return Response(record.model_dump_json(), media_type="application/json")


def _answer(refused: _Refused) -> Response:
    return Response(
        refused.body.model_dump_json(),
        refused.status,
        headers=refusal_headers(refused.status),
        media_type="application/json",
    )
