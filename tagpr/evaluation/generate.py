"""Answers from vLLM's offline engine, on a CPU or a GPU: token ids in, rows out as soon as they are finished."""

import gc
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Protocol

from tagpr.benchmarks.prompt import QueryTooLongError, build_prompt
from tagpr.errors import ConfigError, StageError
from tagpr.evaluation.rows import Generation, Key, Row, RowFile
from tagpr.rewards.repetition import repetition_reward
from tagpr.schema import Example
from tagpr.tags import THINK_CLOSE

logger = logging.getLogger(__name__)

PROGRESS_S = 5.0


@dataclass(frozen=True)
class PromptSettings:
    """How an example becomes a prompt (``benchmark`` in the configuration); budgets in the policy's tokens."""

    profile_size: int
    retriever: str
    max_prompt_tokens: int
    max_response_tokens: int
    seed: int


@dataclass(frozen=True)
class EngineSettings:
    """``evaluate.engine``: what the speed depends on, never what is asked."""

    dtype: str
    enforce_eager: bool | None
    process_per_model: bool | None
    write_every_s: float
    max_num_seqs: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_gib: int


@dataclass(frozen=True)
class RenderedPrompt:
    """The prompt of one example: its text, and the token ids that the chat template makes of it."""

    text: str
    token_ids: tuple[int, ...]
    items_used: int
    items_shortened: int


@dataclass(frozen=True)
class Request:
    """One answer to get: greedy where ``seed`` is None, else sampled from a stream of (id, seed)'s own."""

    key: Key
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One answer: the ids without the end of turn, and why it ended (``stop`` or ``length``)."""

    key: Key
    token_ids: tuple[int, ...]
    finish_reason: str


class Engine(Protocol):
    """Anything that completes token ids, in any order."""

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Yield every request's completion as soon as it is there."""
        ...


class PromptRenderer:
    """Example -> chat prompt, as in training: one user message, thinking on; the model itself opens ``<think>``."""

    def __init__(self, model: str, settings: PromptSettings) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise StageError(
                f"{model}: its tokenizer cannot be loaded ({error}). Use a Hugging Face model folder."
            ) from None
        if not self.tokenizer.chat_template:
            raise ConfigError(f"{model}: its tokenizer has no chat template. Use a chat model's folder.")
        self.settings = settings

    def encode(self, prompt: str) -> list[int]:
        """Token ids of the whole conversation up to where the model begins."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=True,
            tokenize=True,
            return_dict=False,
        )
        return ids

    def render(self, example: Example) -> RenderedPrompt:
        """Select, neutralise and fit the profile; the budget counts the chat template's own tokens too.

        Raises:
            QueryTooLongError: the query alone does not fit.
        """
        prompt = build_prompt(
            example,
            self.settings.profile_size,
            self.settings.retriever,
            lambda text: len(self.encode(text)),
            self.settings.max_prompt_tokens,
            seed=self.settings.seed,
        )
        return RenderedPrompt(
            prompt.text, tuple(self.encode(prompt.text)), prompt.items_used, prompt.items_shortened
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response as the reward sees it in training: special tokens inside it stay, and break its format."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def reasoning_tokens(self, response: str, total: int) -> int:
        """Tokens before ``</think>``; ``total`` where it never came: then all of it is reasoning (S38)."""
        before, mark, _ = response.partition(THINK_CLOSE)
        if not mark:
            return total
        thought = before.partition("<think>")[2] or before
        return len(self.tokenizer.encode(thought.strip(), add_special_tokens=False))


class VllmEngine:
    """vLLM in this process, for one model; as a context manager it gives its memory back.

    Raises:
        ConfigError: prompt and response together are longer than the model's positions.
        StageError: vLLM cannot load the model.
    """

    def __init__(
        self, model: str, settings: EngineSettings, prompts: PromptSettings, temperature: float
    ) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        _prepare_environment(on_gpu, settings)
        from safetensors import SafetensorError
        from transformers import AutoConfig
        from vllm import LLM

        length = prompts.max_prompt_tokens + prompts.max_response_tokens
        positions = AutoConfig.from_pretrained(model).max_position_embeddings
        if length > positions:
            raise ConfigError(
                f"benchmark.max_response_tokens={prompts.max_response_tokens}: with the prompt's "
                f"{prompts.max_prompt_tokens} more than the {positions} positions of {model}. Lower one."
            )
        dtype = settings.dtype if settings.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
        eager = settings.enforce_eager if settings.enforce_eager is not None else not on_gpu
        self._temperature = temperature
        self._max_tokens = prompts.max_response_tokens
        try:
            self._llm: Any = LLM(
                model=model,
                dtype=dtype,
                enforce_eager=eager,
                max_model_len=length,
                max_num_seqs=settings.max_num_seqs,
                tensor_parallel_size=settings.tensor_parallel_size,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                enable_prefix_caching=True,
                # A folder's generation_config.json would change top-p and top-k behind our back.
                generation_config="vllm",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise StageError(
                f"{model}: vLLM cannot load it ({reason}). See engine.log in run.dir; is the folder complete?"
            ) from error

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """See :class:`Engine`. vLLM batches continuously: a slow row holds nobody up."""
        from vllm import SamplingParams, TokensPrompt

        engine = self._llm.llm_engine
        end_ids = _end_ids(self._llm)
        waiting = {str(number): request for number, request in enumerate(requests)}
        for name, request in waiting.items():
            example_id, seed = request.key
            params = SamplingParams(
                temperature=0.0 if seed is None else self._temperature,
                # Rows with the same seed must not share their noise.
                seed=None if seed is None else zlib.crc32(f"{seed}:{example_id}".encode()),
                max_tokens=self._max_tokens,
                stop_token_ids=sorted(end_ids),
                detokenize=False,
            )
            engine.add_request(name, TokensPrompt(prompt_token_ids=list(request.token_ids)), params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    best = output.outputs[0]
                    ids = tuple(best.token_ids)
                    if ids and ids[-1] in end_ids:
                        ids = ids[:-1]
                    yield Completion(waiting.pop(output.request_id).key, ids, str(best.finish_reason))
        if waiting:
            key = next(iter(waiting.values())).key
            raise StageError(f"vllm: lost {len(waiting)} rows, first {key}. Run the same command again.")

    def __enter__(self) -> "VllmEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _prepare_environment(on_gpu: bool, settings: EngineSettings) -> None:
    """What vLLM reads from the environment when it is imported; a value that is set already stays."""
    defaults = {
        # The engine's core in this process: no second start-up, and a kill leaves no orphan.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not on_gpu:
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        # Our plugin serves weight reloads in training and would import the trainer here.
        defaults["VLLM_PLUGINS"] = ""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _end_ids(llm: Any) -> set[int]:
    """The tokens that end a turn: the tokenizer's, and those of the model's generation_config.json."""
    ids = {llm.get_tokenizer().eos_token_id}
    configured = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    return ids


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
    neither a tokenizer nor an engine is loaded. A row whose query alone exceeds the prompt's budget is told
    and stays out of the file; the summary counts it.

    Raises:
        StageError: the engine gave a row up.
    """
    by_id = {example.id: example for example in examples}
    missing = [(id_, seed) for seed in seeds for id_ in by_id if (id_, seed) not in file.rows]
    total = len(by_id) * len(seeds)
    if not missing:
        logger.info("%s: all %d rows are there", label, total)
        return 0
    started = time.monotonic()
    rendering = renderer()
    prompts: dict[str, RenderedPrompt] = {}
    for id_ in dict.fromkeys(id_ for id_, _ in missing):
        try:
            prompts[id_] = rendering.render(by_id[id_])
        except QueryTooLongError as error:
            logger.warning("%s", error)
    missing = [key for key in missing if key[0] in prompts]
    logger.info("%s: %d of %d rows to answer", label, len(missing), total)
    if not missing:
        return 0
    batch: list[Row] = []
    done = total - len(missing)
    with engine() as running:
        loaded = written = told = time.monotonic()
        for completion in running.complete([Request(key, prompts[key[0]].token_ids) for key in missing]):
            id_, seed = completion.key
            if completion.finish_reason not in ("stop", "length"):
                raise StageError(
                    f"{label}: vLLM ended row {id_} with {completion.finish_reason!r}. "
                    "Run the same command again."
                )
            response = rendering.decode(completion.token_ids)
            example = by_id[id_]
            generation = Generation(
                id=id_,
                task=example.task,
                user_id=example.user_id,
                seed=seed,
                prompt_tokens=len(prompts[id_].token_ids),
                items_used=prompts[id_].items_used,
                items_shortened=prompts[id_].items_shortened,
                response=response,
                response_tokens=len(completion.token_ids),
                reasoning_tokens=rendering.reasoning_tokens(response, len(completion.token_ids)),
                repetition=repetition_reward(completion.token_ids),
                finish_reason="stop" if completion.finish_reason == "stop" else "length",
                thinking=True,
                thinking_cut=False,
            )
            batch.append(score(generation, example))
            now = time.monotonic()
            if now - written >= write_every_s:
                file.append(batch)
                done, batch, written = done + len(batch), [], now
            if now - told >= PROGRESS_S:
                logger.info("%s: %d of %d rows", label, done + len(batch), total)
                told = now
        file.append(batch)
        finished = time.monotonic()
    logger.info(
        "%s: %d rows (start %.1f s, answers %.1f s, end %.1f s)",
        label,
        len(missing),
        loaded - started,
        finished - loaded,
        time.monotonic() - finished,
    )
    return len(missing)


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
