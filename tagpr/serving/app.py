"""The HTTP front of a served model: OpenAI's chat completions, with who may ask and how much.

Bodies are people's data: they are never logged, and error messages do not quote them. Errors have OpenAI's form.
"""

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from tagpr.listening import Admission, BearerAuth, BodyTooLarge, place_of, read_body, refusal_headers
from tagpr.prmu.wire import HEALTH_PATH
from tagpr.serving.asking import Answer, Asker, ChatRequest, Message, Part, Refused, Sample

logger = logging.getLogger(__name__)

CHAT_PATH = "/v1/chat/completions"
MODELS_PATH = "/v1/models"
USER_HEADER = "x-tagpr-user"
KNOWN_FIELDS = {*ChatRequest.model_fields, *Message.model_fields, *Part.model_fields}


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take. Times in seconds."""

    body_bytes: int
    pending: int
    request_timeout_s: float


def create_app(asker: Asker, *, token: str, limits: Limits) -> FastAPI:
    """The application around an :class:`Asker`, which its caller closes."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    # A place for each sample.
    admission = Admission(
        limits.pending,
        lambda taken: Refused(429, "queue_full", f"{taken} samples are under way, the queue is full"),
    )
    started = int(time.time())
    app.add_middleware(
        BearerAuth,
        token=token,
        refusal=lambda: _answer(Refused(401, "unauthorized", "bearer token missing or wrong")),
    )

    @app.get(HEALTH_PATH)
    async def health() -> JSONResponse:
        if await asker.engine.healthy():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "engine is down"}, 503)

    @app.get(MODELS_PATH)
    async def models() -> JSONResponse:
        one = {"id": asker.served.model, "object": "model", "created": started, "owned_by": "tagpr"}
        return JSONResponse({"object": "list", "data": [one]})

    @app.post(CHAT_PATH)
    async def chat(request: Request) -> Response:
        try:
            async with asyncio.timeout(limits.request_timeout_s):
                asked = _parse(await _read(request, limits.body_bytes))
                with admission.hold(min(asked.best_of or asked.n, asker.served.most)):
                    answer = await asker.ask(asked)
        except TimeoutError:
            return _answer(
                Refused(503, "timeout", f"no answer within {limits.request_timeout_s:g} s; try again")
            )
        except Refused as refused:
            return _answer(refused)
        return JSONResponse(_completion(asker.served.model, answer), headers={USER_HEADER: answer.user})

    @app.exception_handler(HTTPException)
    async def no_such_route(_: Request, error: HTTPException) -> Response:
        return _answer(Refused(error.status_code, "no_such_route", str(error.detail)))

    return app


async def _read(request: Request, limit: int) -> bytes:
    try:
        return await read_body(request, limit)
    except BodyTooLarge:
        raise Refused(413, "body_too_large", f"body is larger than {limit} bytes") from None


def _parse(body: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        # The field's place and the kind of error; pydantic's own message could quote the body.
        place = place_of(first["loc"], KNOWN_FIELDS)
        if first["type"] == "extra_forbidden":
            # A field's name is said if it is one; anything longer is not repeated.
            name = str(first["loc"][-1])
            named = name if name.isidentifier() and len(name) <= 40 else "a field"
            raise Refused(422, "unsupported_field", f"{named}: is not supported here, leave it out") from None
        raise Refused(422, "malformed", f"{place or 'body'}: {first['type']}", place or None) from None


def _completion(model: str, answer: Answer) -> dict[str, Any]:
    """OpenAI's ``chat.completion``; ``reasoning_content`` as vLLM has it, and what is ours below ``tagpr``."""
    shown = answer.samples if answer.chosen is None else (answer.samples[answer.chosen],)
    tokens = sum(sample.tokens for sample in answer.samples)
    ours: dict[str, Any] = {
        "user": answer.user,
        "items_used": answer.items_used,
        "items_shortened": answer.items_shortened,
        "problems": [sample.problem for sample in shown],
    }
    if answer.chosen is not None:
        ours["prmu"] = {
            "version": answer.scores[0].version,
            "unknown_user": answer.scores[0].unknown_user,
            "scores": [score.score for score in answer.scores],
            "chosen": answer.chosen,
        }
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(index, sample) for index, sample in enumerate(shown)],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": answer.prompt_tokens + tokens,
        },
        "tagpr": ours,
    }


def _choice(index: int, sample: Sample) -> dict[str, Any]:
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": sample.answer,
            "reasoning_content": sample.reasoning,
        },
        "finish_reason": sample.finish_reason,
        "logprobs": None,
    }


def _answer(refused: Refused) -> Response:
    kind = "invalid_request_error" if refused.status < 500 and refused.status != 429 else "server_error"
    error = {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}
    return JSONResponse({"error": error}, refused.status, headers=refusal_headers(refused.status))
