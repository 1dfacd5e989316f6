"""The teacher as vLLM engines in Ray actors: the same requests as over HTTP, answered in the job itself (S6).

An engine keeps its prefix cache, all rollouts of a prompt go to one engine, and each is a request with its own seed, so
that a killed engine, or job, loses only what was under way.
"""

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.settings import TeacherSettings, VllmSettings
from data_pipeline.workers import Body, Courier, Pool
from tagpr.chat.client import Outcome, Reply
from tagpr.errors import ConfigError, StageError

# Fields of a request that are not for the sampler.
_NOT_SAMPLING = frozenset({"model", "messages"})
# As the request calls it -> as vLLM's sampler does, where they differ.
_SAMPLING = {"max_completion_tokens": "max_tokens"}
_EDGE_BYTES = 1 << 20


class VllmWorker(Courier):
    """One engine. ``open`` loads the model."""

    async def open(self, settings: tuple[str, VllmSettings]) -> None:
        """Load the model.

        Raises:
            StageError: vLLM cannot; with what it says.
        """
        model, options = settings
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = AsyncEngineArgs(
                **{
                    "model": model,
                    "tensor_parallel_size": options.tensor_parallel_size,
                    "dtype": options.dtype,
                    "max_model_len": options.max_model_len,
                    "enable_prefix_caching": True,
                    "disable_log_stats": True,
                    **options.engine,
                }
            )
            self._engine = AsyncLLM.from_engine_args(arguments)
            self._tokenizer = self._engine.get_tokenizer()
        except Exception as error:  # whatever vLLM or the model's files raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise StageError(
                f"chains.teacher.model={model}: vLLM cannot serve it ({type(error).__name__}: {reason[:300]}). "
                "See chains.teacher.vllm, and the actor's log in Ray's session folder."
            ) from error
        self._template = dict(options.chat_template)

    async def answer(self, role: str, body: Body) -> Outcome:
        """One chain. A prompt that is too long, or a parameter that vLLM refuses, is a bad request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        fields = {
            _SAMPLING.get(name, name): value for name, value in body.items() if name not in _NOT_SAMPLING
        }
        try:
            ids = self._tokenizer.apply_chat_template(
                body["messages"],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._template,
            )
            sampling = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
            last = None
            async for output in self._engine.generate({"prompt_token_ids": ids}, sampling, uuid.uuid4().hex):
                last = output
        except (ValueError, TypeError) as error:
            return Outcome(
                None, "bad_request", 400, "refused_by_vllm", message=str(error).splitlines()[0][:200]
            )
        assert last is not None, "vLLM always yields a final output"
        made = last.outputs[0]
        return Outcome(
            Reply(
                text=made.text,
                reasoning=None,
                finish_reason=made.finish_reason or "",
                prompt_tokens=len(ids),
                cached_prompt_tokens=last.num_cached_tokens or 0,
                completion_tokens=len(made.token_ids),
            ),
            status=200,
        )


def vllm_pool(teacher: TeacherSettings) -> Pool:
    """The replicas. An engine that dies is started again elsewhere or here; what it had is asked again."""
    import ray

    options = teacher.vllm
    gpus = options.tensor_parallel_size if options.gpus is None else options.gpus
    available = ray.cluster_resources().get("GPU", 0.0)
    if gpus * options.replicas > available:
        raise ConfigError(
            f"chains.teacher.vllm.replicas={options.replicas}: they need {gpus * options.replicas:g} GPUs, this Ray has "
            f"{available:g}. Set fewer replicas or gpus, or chains.ray.address."
        )
    actor = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0)(VllmWorker)
    return Pool("chains.teacher.vllm", actor.remote, options.replicas, (teacher.model, options), sticky=True)


def weights_revision(model: str) -> str:
    """For a folder: a hash of names, sizes and both ends of its files, so that other weights of that name are other units.

    Reading 470 GB to name them would take longer than some runs. Empty for a model of the hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()[:16]


def check_request(teacher: TeacherSettings, more: Mapping[str, Any]) -> None:
    """Refuse parameters that vLLM's sampler does not know, before an engine is loaded.

    Raises:
        ConfigError: naming the key.
    """
    import inspect

    from vllm import SamplingParams

    known = set(inspect.signature(SamplingParams).parameters) | set(_SAMPLING)
    for key, fields in (
        ("chains.teacher.request", teacher.request),
        ("chains.preferences.extra_request", more),
    ):
        for name in fields:
            if name not in known:
                raise ConfigError(
                    f"{key}.{name}: vLLM's sampler does not know this parameter. Remove it (~{key}.{name})."
                )
