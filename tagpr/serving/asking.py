"""One request to the model: a user's profile, the prompt as in training and evaluation, samples, perhaps the best by PRMU."""

import asyncio
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field

from tagpr.benchmarks.prompt import QueryTooLongError
from tagpr.errors import DataError, RewardServerError, TagPRError
from tagpr.evaluation.prompts import PromptRenderer, RenderedPrompt
from tagpr.prmu.client import RewardClient, best_of_n
from tagpr.prmu.wire import ScoreItem
from tagpr.schema import Example, PrmuScore
from tagpr.serving.profiles import Profiles
from tagpr.tags import THINK_CLOSE, THINK_OPEN, split_response

Known = Literal["known", "unknown", "none"]
"""Of the user: a profile was used; nothing is known of this user (in this task); the request named none."""


class EngineError(TagPRError, RuntimeError):
    """The model's engine did not give what was asked for."""


class Refused(Exception):
    """Ends a request with a status, a stable code and a line for people; ``param`` is the field to blame."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a request."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "system", "developer", "assistant", "tool"]
    content: str | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its words, in whatever form they came."""
        return (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )


class ChatRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``: OpenAI's fields that mean something here, and ``task`` and ``best_of``."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    user: str | None = Field(default=None, min_length=1, max_length=512, description="whose profile is used")
    task: str | None = Field(
        default=None, description="of benchmark.tasks; may be left out where one is served"
    )
    n: int = Field(default=1, ge=1)
    best_of: int | None = Field(default=None, ge=1, description="samples of which PRMU's favourite is given")
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool = False


@dataclass(frozen=True)
class Served:
    """What is served and what a request may ask of it."""

    model: str
    tasks: tuple[str, ...]
    max_tokens: int
    temperature: float
    most: int
    """Samples of one request."""
    refuse_unknown: bool


@dataclass(frozen=True)
class Sample:
    """One response taken apart; ``problem`` is the first violated rule of the format (S24), or empty."""

    text: str
    reasoning: str | None
    answer: str | None
    problem: str
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Answer:
    """What a request gets. ``scores`` are PRMU's, of ``samples`` in order, and ``chosen`` is the best; [] and None without."""

    samples: tuple[Sample, ...]
    chosen: int | None
    scores: tuple[PrmuScore, ...]
    user: Known
    items_used: int
    items_shortened: int
    prompt_tokens: int


class Engine:
    """A vLLM server on loopback, asked with token ids, so that no text of anybody's turns into a special token.

    Args:
        url: of its API, without ``/v1``.
        key: what it was started with.
        model: its name there.
        timeout_s: of one request.
        ends: ids of the tokens that end a turn.
    """

    def __init__(self, url: str, key: str, model: str, timeout_s: float, ends: Sequence[int]) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            timeout=timeout_s,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )
        self._model = model
        self._ends = frozenset(ends)

    async def healthy(self) -> bool:
        """Whether it answers."""
        try:
            return (await self._http.get("/health", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def complete(self, token_ids: Sequence[int], **settings: Any) -> list[tuple[list[int], str]]:
        """Token ids of each sample, without the end of turn, and why it ended.

        Raises:
            EngineError: it is down, refuses, or answers something else.
        """
        body = {
            "model": self._model,
            "prompt": list(token_ids),
            "return_token_ids": True,
            "add_special_tokens": False,
            **settings,
        }
        try:
            answer = await self._http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise EngineError(f"the model's engine does not answer ({type(error).__name__})") from error
        if answer.status_code != 200:
            raise EngineError(f"the model's engine answers with HTTP {answer.status_code}")
        try:
            choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
            found = [
                (
                    self._without_end([int(token) for token in choice["token_ids"]]),
                    str(choice["finish_reason"]),
                )
                for choice in choices
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError("the model's engine answers in a form that is not vLLM's") from error
        if len(found) != settings["n"]:
            raise EngineError(f"the model's engine gave {len(found)} samples instead of {settings['n']}")
        return found

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self._ends else ids

    async def aclose(self) -> None:
        """Close the pooled connections."""
        await self._http.aclose()


class Asker:
    """Answers requests. ``prmu`` None: best-of-n is refused."""

    def __init__(
        self,
        served: Served,
        profiles: Profiles,
        renderer: PromptRenderer,
        engine: Engine,
        prmu: RewardClient | None,
    ) -> None:
        self.served = served
        self._profiles = profiles
        self._renderer = renderer
        self.engine = engine
        self._prmu = prmu
        # Tokenizers keep state while they work: one thread of their own.
        self._rendering = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def ask(self, request: ChatRequest) -> Answer:
        """The samples of a request, or the best of them.

        Raises:
            Refused: the request cannot be meant, or cannot be answered now.
        """
        served = self.served
        task = self._task(request)
        query = self._query(request)
        samples = request.best_of or request.n
        temperature = served.temperature if request.temperature is None else request.temperature
        self._check(request, samples, temperature)
        known, example = self._example(request.user, task, query)
        try:
            prompt = await asyncio.get_running_loop().run_in_executor(
                self._rendering, self._renderer.render, example
            )
        except QueryTooLongError:
            raise Refused(
                422,
                "query_too_long",
                f"the query alone exceeds the {self._renderer.settings.max_prompt_tokens} tokens of a prompt",
                "messages",
            ) from None
        except DataError:
            raise Refused(
                422, "not_of_this_task", f"does not look like a query of {task}", "messages"
            ) from None
        settings = {"n": samples, "temperature": temperature, "top_p": request.top_p, "seed": request.seed}
        limit = request.max_completion_tokens or request.max_tokens or served.max_tokens
        try:
            found = await self.engine.complete(prompt.token_ids, max_tokens=limit, **settings)
        except EngineError as error:
            raise Refused(502, "engine_failed", str(error)) from error
        taken = tuple(self._taken_apart(ids, reason) for ids, reason in found)
        chosen: int | None = None
        scores: tuple[PrmuScore, ...] = ()
        if request.best_of:
            chosen, scores = await self._best(request.user, prompt, taken)
        return Answer(
            taken,
            chosen,
            scores,
            known,
            prompt.items_used,
            prompt.items_shortened,
            len(prompt.token_ids),
        )

    def _task(self, request: ChatRequest) -> str:
        tasks = self.served.tasks
        if request.model != self.served.model:
            raise Refused(404, "no_such_model", f"this server has one model, {self.served.model}", "model")
        if request.task is None and len(tasks) > 1:
            raise Refused(422, "no_task", f"name the task of this query: one of {', '.join(tasks)}", "task")
        task = request.task or tasks[0]
        if task not in tasks:
            raise Refused(422, "no_such_task", f"is none of {', '.join(tasks)}", "task")
        return task

    def _query(self, request: ChatRequest) -> str:
        if len(request.messages) != 1 or request.messages[0].role != "user":
            raise Refused(
                422,
                "one_user_message",
                "this model was trained on one user message: send the query alone",
                "messages",
            )
        query = request.messages[0].text
        if not query.strip():
            raise Refused(422, "empty_query", "the query is empty", "messages")
        try:
            query.encode()
        except UnicodeEncodeError:
            raise Refused(422, "not_utf8", "has half a surrogate pair in its text", "messages") from None
        return query

    def _check(self, request: ChatRequest, samples: int, temperature: float) -> None:
        if request.stream:
            raise Refused(
                422, "no_streaming", "answers are not streamed: leave it out, or set it to false", "stream"
            )
        param = "best_of" if request.best_of else "n"
        if samples > self.served.most:
            raise Refused(422, "too_many_samples", f"at most {self.served.most} samples a request", param)
        if request.best_of and request.n > 1:
            raise Refused(422, "best_of_and_n", "best_of gives one answer: leave n out", "n")
        if request.best_of and self._prmu is None:
            raise Refused(422, "no_prmu", "this server was started without PRMU (serve.prmu)", "best_of")
        if samples > 1 and temperature == 0:
            raise Refused(
                422, "no_noise", "samples at temperature 0 are all the same: set temperature", param
            )
        for name in ("max_tokens", "max_completion_tokens"):
            wanted = getattr(request, name)
            if wanted is not None and wanted > self.served.max_tokens:
                raise Refused(422, "too_many_tokens", f"at most {self.served.max_tokens}", name)

    def _example(self, user: str | None, task: str, query: str) -> tuple[Known, Example]:
        profile = None if user is None else self._profiles.get(user, task)
        known: Known = "none" if user is None else "unknown" if profile is None else "known"
        if known == "unknown" and self.served.refuse_unknown:
            raise Refused(404, "unknown_user", f"nothing is known of this user in {task}", "user")
        return known, Example(
            id=f"asked:{secrets.token_hex(8)}",
            task=task,
            split="test",
            user_id=user or "nobody",
            query=query,
            profile=profile or (),
            gold="",
        )

    def _taken_apart(self, ids: list[int], reason: str) -> Sample:
        text = self._renderer.response_text(self._renderer.decode(ids))
        problem = split_response(text).problem or ("" if reason == "stop" else "truncated")
        before, mark, after = text.partition(THINK_CLOSE)
        reasoning = before.strip().removeprefix(THINK_OPEN).strip()
        if mark:
            return Sample(text, reasoning, after.strip(), problem, reason, len(ids))
        if THINK_OPEN in before:  # it never came to an answer
            return Sample(text, reasoning, None, problem, reason, len(ids))
        return Sample(text, None, text.strip(), problem, reason, len(ids))

    async def _best(
        self, user: str | None, prompt: RenderedPrompt, samples: Sequence[Sample]
    ) -> tuple[int, tuple[PrmuScore, ...]]:
        """Place of the sample that PRMU likes best among those that can be read, or among all where none can."""
        assert self._prmu is not None
        items = [
            ScoreItem(id=str(place), user_id=user or "nobody", prompt=prompt.text, response=sample.text)
            for place, sample in enumerate(samples)
        ]
        try:
            scores = await self._prmu.score(items)
        except RewardServerError as error:
            raise Refused(503, "prmu_failed", f"no score of PRMU, and so no best answer: {error}") from error
        places = [place for place, sample in enumerate(samples) if not sample.problem] or range(len(samples))
        return places[best_of_n([scores[place] for place in places])], tuple(scores)

    async def aclose(self) -> None:
        """Close connections and the rendering thread."""
        await self.engine.aclose()
        if self._prmu is not None:
            await self._prmu.aclose()
        self._rendering.shutdown()
