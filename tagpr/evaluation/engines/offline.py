"""vLLM's offline engine in this process, on a CPU or a GPU: token ids in, token ids out, batched continuously."""

import gc
import itertools
import os
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from tagpr.errors import ConfigError, StageError
from tagpr.evaluation.engines import Completion, Completions, EngineSettings, Request, Sampling
from tagpr.evaluation.prompts import PromptSettings
from tagpr.tags import THINK_CLOSE

# Requests that wait in the engine, as a share of those it decodes at once: a finished one is replaced in the same step.
WAITING_SHARE = 0.25
# Taken from the source between two steps: rendering prompts must not hold up those that run.
ADDED_PER_STEP = 16
# What a chat template adds where there is no thinking does not count against the prompt's budget.
TEMPLATE_TOKENS = 16


@dataclass(frozen=True)
class _Flight:
    """A request in the engine; ``head`` is what the model said before its thinking was checked against the budget."""

    request: Request
    head: tuple[int, ...] = ()
    checked: bool = False
    cut: bool = False


class VllmEngine:
    """vLLM in this process, for one model; as a context manager it gives its memory back.

    With ``thinking_tokens`` a response whose reasoning is still going on after so many tokens gets ``</think>`` put behind them
    and is completed from there; forced tokens count as the response's own.

    Raises:
        ConfigError: prompt and response together are longer than the model's positions.
        StageError: vLLM cannot load the model.
    """

    def __init__(
        self,
        model: str,
        settings: EngineSettings,
        prompts: PromptSettings,
        sampling: Sampling,
        thinking_tokens: int | None = None,
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
        self._sampling = sampling
        self._max_tokens = prompts.max_response_tokens
        self._thinking_tokens = thinking_tokens
        self._most = settings.max_num_seqs + max(ADDED_PER_STEP, int(WAITING_SHARE * settings.max_num_seqs))
        self._waiting: deque[_Flight] = deque()
        self._flights: dict[str, _Flight] = {}
        self._names = map(str, itertools.count())
        try:
            self._llm: Any = LLM(
                model=model,
                dtype=dtype,
                enforce_eager=eager,
                max_model_len=min(positions, length + TEMPLATE_TOKENS),
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
        self._engine = self._llm.llm_engine
        self._tokenizer = self._llm.get_tokenizer()
        self._end_ids = _end_ids(self._llm)
        self._forced = tuple(self._tokenizer.encode(f"\n{THINK_CLOSE}\n\n", add_special_tokens=False))
        if thinking_tokens is not None and thinking_tokens + len(self._forced) >= self._max_tokens:
            raise ConfigError(
                f"evaluate.thinking_tokens={thinking_tokens}: with the {len(self._forced)} tokens that end the thinking "
                f"nothing of benchmark.max_response_tokens={self._max_tokens} is left for the answer. Lower it."
            )

    @property
    def room(self) -> int:
        """How many more requests keep the engine busy."""
        return max(0, self._most - self.in_flight)

    @property
    def in_flight(self) -> int:
        """Requests that were added and are not finished."""
        return len(self._waiting) + len(self._flights)

    def complete(self, requests: Iterable[Request]) -> Completions:
        """See :class:`tagpr.evaluation.engines.Engine`. A slow row holds nobody up."""
        source = iter(requests)
        try:
            while True:
                for request in itertools.islice(source, min(self.room, ADDED_PER_STEP)):
                    self.add(request)
                if not self.in_flight:
                    return
                finished = self.step()
                yield from finished
                if not finished:
                    yield None
        finally:
            self.abandon()

    def add(self, request: Request) -> None:
        """Queue one request."""
        self._waiting.append(_Flight(request, checked=self._thinking_tokens is None))

    def step(self) -> list[Completion]:
        """Decode one token of every running request; those that are finished now.

        Raises:
            StageError: the engine gave a row up, or lost some.
        """
        self._admit()
        finished = []
        for output in self._engine.step():
            if not output.finished:
                continue
            flight = self._flights.pop(output.request_id)
            best = output.outputs[0]
            ids, reason = tuple(best.token_ids), str(best.finish_reason)
            if reason not in ("stop", "length"):
                raise StageError(
                    f"vllm: ended row {flight.request.key[0]} with {reason!r}. Run the same command again."
                )
            if not flight.checked and reason == "length":
                self._start(self._checked(flight, ids))
                continue
            if ids and ids[-1] in self._end_ids:
                ids = ids[:-1]
            finished.append(
                Completion(flight.request.key, flight.head + ids, reason, thinking_cut=flight.cut)
            )
        if self._flights and not self._engine.has_unfinished_requests():
            key = next(iter(self._flights.values())).request.key
            raise StageError(
                f"vllm: lost {len(self._flights)} rows, first {key}. Run the same command again."
            )
        return finished

    def abandon(self) -> None:
        """Drop what is unfinished: nobody waits for it any more."""
        self._waiting.clear()
        if self._flights:
            self._engine.abort_request(list(self._flights))
            self._flights.clear()

    def _admit(self) -> None:
        """Start what waits, greedy requests and sampled ones never together.

        vLLM on a CPU ignores the seeds of a whole batch in which one request has none (``TopKTopPSampler.forward_cpu``).
        """
        while self._waiting:
            running = next(iter(self._flights.values()), self._waiting[0])
            if self._is_greedy(running) != self._is_greedy(self._waiting[0]):
                return
            self._start(self._waiting.popleft())

    def _is_greedy(self, flight: _Flight) -> bool:
        return self._sampling.of(flight.request.key)[1] is None

    def _checked(self, flight: _Flight, ids: tuple[int, ...]) -> _Flight:
        """The budget's tokens are used up: go on with the answer, where need be behind a forced end of thinking."""
        cut = THINK_CLOSE not in self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return replace(flight, head=ids + (self._forced if cut else ()), checked=True, cut=cut)

    def _start(self, flight: _Flight) -> None:
        from vllm import SamplingParams, TokensPrompt

        temperature, seed = self._sampling.of(flight.request.key)
        if seed is not None and flight.head:
            # Going on with the same seed would repeat the noise of the thinking.
            seed = zlib.crc32(f"{seed}:answer".encode())
        left = self._max_tokens - len(flight.head)
        params = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=left if flight.checked else self._thinking_tokens,
            stop_token_ids=sorted(self._end_ids),
            detokenize=False,
        )
        name = next(self._names)
        prompt = TokensPrompt(prompt_token_ids=[*flight.request.token_ids, *flight.head])
        self._engine.add_request(name, prompt, params)
        self._flights[name] = flight

    def __enter__(self) -> "VllmEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        del self._engine, self._llm
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
        if settings.replicas > 1:
            # Each engine would bind its threads to the same cores.
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _end_ids(llm: Any) -> set[int]:
    """The tokens that end a turn: the tokenizer's, and those of the model's generation_config.json."""
    ids = {llm.get_tokenizer().eos_token_id}
    configured = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    return ids
