"""Where answers come from: vLLM in this process, vLLM in Ray actors, or an endpoint; to the caller they are one thing.

An engine takes requests lazily, so that a whole benchmark's prompts are never in memory at once, and gives completions back in
the order in which they are finished.
"""

import zlib
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tagpr.errors import ConfigError
from tagpr.evaluation.methods import Method
from tagpr.evaluation.prompts import PromptSettings
from tagpr.evaluation.rows import Key


@dataclass(frozen=True)
class EngineSettings:
    """``evaluate.engine``: what the speed depends on, never what is asked.

    ``replicas`` engines of ``tensor_parallel_size`` GPUs each share the rows; more than one are Ray actors.
    """

    dtype: str
    enforce_eager: bool | None
    process_per_model: bool | None
    write_every_s: float
    max_num_seqs: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_gib: int
    replicas: int


@dataclass(frozen=True)
class Sampling:
    """Temperatures of answers without a seed (``main``) and with one (``seeded``)."""

    main: float
    seeded: float

    def of(self, key: Key) -> tuple[float, int | None]:
        """Temperature of a row, and the seed of its noise; None where it is greedy.

        Rows with the same seed must not share their noise, and a row's must not depend on what is asked beside it.
        """
        id_, seed = key
        temperature = self.main if seed is None else self.seeded
        return temperature, None if temperature == 0 else zlib.crc32(f"{seed}:{id_}".encode())


@dataclass(frozen=True)
class Request:
    """One answer to get: a prompt as token ids, and as the text that an endpoint's own template wraps."""

    key: Key
    token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Completion:
    """One answer: the ids without the end of turn, and why it ended.

    From an endpoint ``text`` takes the place of the ids, and the counts are the endpoint's own where it reports any.
    ``thinking_cut``: the reasoning was ended at the budget. ``refused`` is why there will be no answer to this row, or empty.
    """

    key: Key
    token_ids: tuple[int, ...]
    finish_reason: str
    text: str | None = None
    response_tokens: int | None = None
    reasoning_tokens: int | None = None
    thinking_cut: bool = False
    refused: str = ""


Completions = Generator[Completion | None, None, None]


class Engine(Protocol):
    """Anything that completes prompts, in any order."""

    def complete(self, requests: Iterable[Request]) -> Completions:
        """Yield every request's completion as soon as it is there; None: time has passed, and nothing is finished."""
        ...


def open_engine(
    method: Method, engine: EngineSettings, prompts: PromptSettings, temperature: float
) -> AbstractContextManager[Engine]:
    """The engine that answers for ``method.model``; ``temperature`` is that of answers with a seed.

    Raises:
        ConfigError: settings that contradict each other, or an endpoint's key that is not there.
        StageError: the model cannot be loaded.
    """
    sampling = (
        Sampling(0.0, temperature)
        if method.temperature is None
        else Sampling(method.temperature, method.temperature)
    )
    if method.endpoint is not None:
        from tagpr.evaluation.engines.endpoint import EndpointEngine

        return EndpointEngine(method, prompts, sampling)
    check_thinking_tokens(prompts)
    if engine.replicas < 1:
        raise ConfigError(f"evaluate.engine.replicas={engine.replicas}: answers nothing. Use 1 or more.")
    # Without thinking there is none to end.
    budget = prompts.thinking_tokens if method.thinking else None
    if engine.replicas > 1:
        from tagpr.evaluation.engines.shards import RayEngine

        return RayEngine(method.model, engine, prompts, sampling, budget)
    from tagpr.evaluation.engines.offline import VllmEngine

    return VllmEngine(method.model, engine, prompts, sampling, budget)


def check_thinking_tokens(prompts: PromptSettings) -> None:
    """Refuse a thinking budget that leaves nothing to think or to answer with.

    Raises:
        ConfigError: it is not between 1 and ``benchmark.max_response_tokens`` - 1.
    """
    budget = prompts.thinking_tokens
    if budget is not None and not 1 <= budget < prompts.max_response_tokens:
        raise ConfigError(
            f"evaluate.thinking_tokens={budget}: leaves nothing of benchmark.max_response_tokens="
            f"{prompts.max_response_tokens} to think or to answer with. Set it between, or null."
        )
