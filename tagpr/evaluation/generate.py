"""The rows that a file lacks, answered by whatever engine: asked for lazily, scored, on the disk as soon as they are finished."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, closing
from multiprocessing import get_context
from typing import Any, Literal

from tagpr.benchmarks.prompt import QueryTooLongError
from tagpr.errors import StageError
from tagpr.evaluation.engines import Completion, Engine, Request
from tagpr.evaluation.prompts import PromptRenderer, RenderedPrompt
from tagpr.evaluation.rows import Generation, Key, Row, RowFile, Unanswered
from tagpr.rewards.repetition import repetition_reward
from tagpr.schema import Example
from tagpr.tags import THINK_CLOSE, THINK_OPEN

logger = logging.getLogger(__name__)

PROGRESS_S = 5.0
# Prompts that are rendered before the engine wants them.
RENDERED_AHEAD = 256


def answer(
    *,
    label: str,
    examples: Sequence[Example],
    seeds: Sequence[int | None],
    file: RowFile,
    renderer: Callable[[], PromptRenderer],
    engine: Callable[[], AbstractContextManager[Engine]],
    score: Callable[[Generation, Example], Row],
    write_every_s: float = 2.0,
) -> int:
    """Answer every (example, seed) that ``file`` lacks; returns how many were.

    Rows are scored and on the disk at most ``write_every_s`` after they are finished. With nothing to do
    neither a tokenizer nor an engine is loaded. A row whose query alone exceeds the prompt's budget, or that an endpoint
    refuses, is told and goes to ``file.unanswered``; it is not asked again unless somebody removes that file.

    Raises:
        StageError: the engine gave a row up.
    """
    by_id = {example.id: example for example in examples}
    # All greedy answers before the first sampled one; then row by row, so that each prompt is rendered twice at most.
    wanted: list[Key] = [(id_, None) for id_ in by_id if None in seeds]
    wanted += [(id_, seed) for id_ in by_id for seed in seeds if seed is not None]
    missing = [key for key in wanted if key not in file.rows]
    left_out = len(missing)
    missing = [key for key in missing if key not in file.unanswered]
    left_out -= len(missing)
    total = len(wanted)
    told = f", {left_out} have no answer (see {file.unanswered_path.name})" if left_out else ""
    if not missing:
        logger.info("%s: all %d rows are there%s", label, total - left_out, told)
        return 0
    started = time.monotonic()
    rendering = renderer()
    work = _Work([(key, by_id[key[0]]) for key in missing], rendering)
    logger.info("%s: %d of %d rows to answer%s", label, len(missing), total, told)
    answered = refused = 0
    hinted = False
    batch: list[Row] = []
    with closing(work):
        if not work.wait_for_first():
            file.note(work.too_long())
            return 0
        with engine() as running:
            loaded = written = progress = time.monotonic()
            with closing(running.complete(work)) as completions:
                for completion in completions:
                    if completion is not None and completion.refused:
                        work.taken(completion.key)
                        refused += 1
                        logger.warning("%s: %s is refused: %s", label, completion.key[0], completion.refused)
                        file.note([_refusal(completion)])
                    elif completion is not None:
                        prompt = work.taken(completion.key)
                        example = by_id[completion.key[0]]
                        generation = generation_of(completion, example, prompt, rendering)
                        if not hinted and completion.text is not None and _lacks_opening(generation):
                            hinted = True
                            logger.warning(
                                "%s: a response closes <think> without opening it. Where the model's chat template opens it, "
                                "set evaluate.models.%s.tokenizer to the model's own",
                                label,
                                label,
                            )
                        batch.append(score(generation, example))
                    now = time.monotonic()
                    if batch and now - written >= write_every_s:
                        file.append(batch)
                        answered, batch, written = answered + len(batch), [], now
                    if now - progress >= PROGRESS_S:
                        done = answered + len(batch)
                        logger.info("%s: %d of %d rows", label, total - len(missing) - left_out + done, total)
                        progress = now
            file.append(batch)
            answered += len(batch)
            file.note(work.too_long())
            finished = time.monotonic()
    lost = work.unfinished()
    if lost:
        raise StageError(
            f"{label}: {len(lost)} rows got no answer, first {lost[0]}. Run the same command again."
        )
    logger.info(
        "%s: %d rows%s (start %.1f s, answers %.1f s, end %.1f s)",
        label,
        answered,
        f", {refused} refused" if refused else "",
        loaded - started,
        finished - loaded,
        time.monotonic() - finished,
    )
    return answered


def generation_of(
    completion: Completion, example: Example, prompt: RenderedPrompt, rendering: PromptRenderer
) -> Generation:
    """A completion with what its row keeps of it.

    Raises:
        StageError: it ended for a reason that is none of the model's.
    """
    id_, seed = completion.key
    if completion.finish_reason not in ("stop", "length", "content_filter"):
        raise StageError(
            f"evaluate: row {id_} ended with {completion.finish_reason!r}. Run the same command again."
        )
    finish_reason: Literal["stop", "length", "content_filter"] = completion.finish_reason  # type: ignore[assignment]
    if completion.text is None:
        ids: Sequence[int] = completion.token_ids
        response = rendering.response_text(rendering.decode(ids))
    else:
        response = rendering.response_text(completion.text)
        ids = rendering.response_ids(completion.text)
    tokens = len(ids) if completion.response_tokens is None else completion.response_tokens
    # Servers without a reasoning parser report 0 of what stands in the text.
    reasoning_tokens = completion.reasoning_tokens or rendering.reasoning_tokens(response, tokens)
    return Generation(
        id=id_,
        task=example.task,
        user_id=example.user_id,
        seed=seed,
        prompt_tokens=len(prompt.token_ids),
        items_used=prompt.items_used,
        items_shortened=prompt.items_shortened,
        response=response,
        response_tokens=tokens,
        reasoning_tokens=reasoning_tokens,
        repetition=repetition_reward(ids),
        finish_reason=finish_reason,
        thinking=rendering.thinking,
        thinking_cut=completion.thinking_cut,
    )


def _lacks_opening(generation: Generation) -> bool:
    response = generation.response
    return generation.thinking and THINK_CLOSE in response and THINK_OPEN not in response


def _refusal(completion: Completion) -> Unanswered:
    id_, seed = completion.key
    return Unanswered(id=id_, seed=seed, reason="refused", detail=completion.refused)


class _Work(Iterator[Request]):
    """Requests in order, rendered by a thread a little ahead of the engine: neither waits for the other, nor runs away.

    Rows whose query is too long are left out and collected.
    """

    def __init__(self, rows: Sequence[tuple[Key, Example]], rendering: PromptRenderer) -> None:
        self._rows = rows
        self._rendering = rendering
        self._ahead: queue.Queue[Request | Exception | None] = queue.Queue(RENDERED_AHEAD)
        self._first: Request | None = None
        self._ended = False
        self._closed = threading.Event()
        self._prompts: dict[Key, RenderedPrompt] = {}
        self._too_long: list[Unanswered] = []
        self._thread = threading.Thread(target=self._render, name="render prompts", daemon=True)
        self._thread.start()

    def __next__(self) -> Request:
        if self._first is not None:
            request, self._first = self._first, None
            return request
        if self._ended:
            raise StopIteration
        item = self._ahead.get()
        if isinstance(item, Request):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def wait_for_first(self) -> bool:
        """Whether there is anything to ask; an engine is not worth starting before that is known."""
        self._first = next(self, None)
        return self._first is not None

    def taken(self, key: Key) -> RenderedPrompt:
        """The prompt of a row that is finished, and is forgotten here."""
        return self._prompts.pop(key)

    def unfinished(self) -> list[Key]:
        """Rows that were asked for and not finished."""
        return list(self._prompts)

    def too_long(self) -> list[Unanswered]:
        """Rows that have no prompt."""
        return list(self._too_long)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        while self._thread.is_alive():
            # Make room, in case it waits for some.
            try:
                self._ahead.get(timeout=0.05)
            except queue.Empty:
                continue

    def _render(self) -> None:
        end: Exception | None = None
        last: tuple[str, RenderedPrompt | None] = ("", None)
        try:
            for key, example in self._rows:
                if self._closed.is_set():
                    return
                if last[0] != key[0]:
                    last = (key[0], self._prompt(example))
                if last[1] is None:
                    continue
                self._prompts[key] = last[1]
                self._ahead.put(Request(key, last[1].token_ids, last[1].text))
        except Exception as error:  # noqa: BLE001 raised where the requests are taken
            end = error
        finally:
            self._ahead.put(end)

    def _prompt(self, example: Example) -> RenderedPrompt | None:
        try:
            return self._rendering.render(example)
        except QueryTooLongError as error:
            logger.warning("%s", error)
            self._too_long += [
                Unanswered(id=key[0], seed=key[1], reason="query_too_long", detail=str(error))
                for key, its in self._rows
                if its.id == example.id
            ]
            return None


def in_own_process(function: Callable[..., int], **arguments: Any) -> int:
    """Run ``function`` in a fresh process that ends with it: the only sure way to get a GPU's memory back.

    Raises:
        StageError: the process died.
    """
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(1, get_context("spawn"), logging.basicConfig, ()) as pool:
        pool.submit(logging.getLogger().setLevel, logging.getLogger().level)
        try:
            return pool.submit(function, **arguments).result()
        except BrokenProcessPool:
            raise StageError(
                "evaluate: the process of a model died (out of memory?). Lower evaluate.engine.max_num_seqs, "
                "then run the same command again."
            ) from None
