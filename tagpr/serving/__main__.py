"""Stage ``serve``: a trained model behind an OpenAI-compatible endpoint. ``python -m tagpr.serving``."""

import asyncio
import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch
from omegaconf import DictConfig

from tagpr.configuration import main
from tagpr.errors import ConfigError, RunFault
from tagpr.evaluation.prompts import PromptRenderer, PromptSettings
from tagpr.listening import keep_token, listen, serve, url_of
from tagpr.prmu.client import RewardClient, check_server
from tagpr.prmu.local_server import local_server
from tagpr.prmu.wire import read_token
from tagpr.retrieval import known_retrievers
from tagpr.runs import check_model_folder, check_tags_of, write_json_atomically
from tagpr.serving.app import Limits, create_app
from tagpr.serving.asking import Asker, Engine, Served
from tagpr.serving.engine import EngineProcess, vllm_server
from tagpr.serving.profiles import read_profiles
from tagpr.tags import END_OF_TURN

logger = logging.getLogger("tagpr.serving")

TOKEN_VARIABLE = "TAGPR_SERVE_TOKEN"
ENGINE_POLL_S = 1.0
CONNECT_DEADLINE_S = 30.0
# What a chat template adds does not count against the prompt's budget everywhere; as in the evaluation.
TEMPLATE_TOKENS = 16


def run(config: DictConfig) -> None:
    """Serve until SIGTERM or SIGINT; ``<run.dir>/server.json`` says where.

    Raises:
        ConfigError: the port is taken, the host is open to others without a token, or a limit makes no sense.
        StageError: the model, the profiles or PRMU are missing, or vLLM cannot load the model.
        DataError: a profile cannot be used.
        RewardServerError: PRMU is wanted and does not answer.
        RunFault: vLLM ended while it served.
    """
    settings, server, benchmark = config.serve, config.server, config.benchmark
    signal.signal(signal.SIGTERM, _exit_quietly)
    _check(config)
    run_dir = Path(config.run.dir)
    token, token_file = keep_token(server.token_file, server.host, run_dir, TOKEN_VARIABLE)
    listener = listen(server.host, server.port)
    check_model_folder(settings.model, "serve.model", "exploratory_rl.sh")
    check_tags_of(Path(settings.model).parent, "serve.model")
    tasks = tuple(str(task) for task in benchmark.tasks)
    profiles = read_profiles(settings.profiles, config.paths.examples, list(settings.splits), tasks)
    prompts = PromptSettings(
        profile_size=benchmark.profile_size,
        retriever=benchmark.retriever,
        max_prompt_tokens=benchmark.max_prompt_tokens,
        max_response_tokens=benchmark.max_response_tokens,
        seed=config.run.seed,
        retriever_model=benchmark.retriever_model,
    )
    renderer = PromptRenderer(settings.model, prompts)
    on_gpu = torch.cuda.is_available()
    with ExitStack() as stack:
        prmu = _prmu(config, run_dir, stack, on_gpu)
        engine = stack.enter_context(
            vllm_server(
                settings.model, engine_arguments(config, on_gpu), run_dir, kv_cache_gib=settings.engine.kv_cache_gib,
                on_gpu=on_gpu, start_timeout_s=settings.engine.start_timeout_s,
            )
        )  # fmt: skip
        served = Served(
            model=settings.name,
            tasks=tasks,
            max_tokens=benchmark.max_response_tokens,
            temperature=settings.temperature,
            most=settings.max_samples,
            refuse_unknown=settings.unknown_user == "refuse",
        )
        limits = Limits(server.max_body_bytes, server.max_pending, server.request_timeout_s)
        ends = [renderer.tokenizer.eos_token_id, renderer.tokenizer.convert_tokens_to_ids(END_OF_TURN)]
        address_file = run_dir / "server.json"
        address = {
            "url": f"{url_of(server.host, listener)}/v1",
            "model": settings.name,
            "pid": os.getpid(),
            "token_file": token_file,
        }

        def announce() -> None:
            write_json_atomically(address_file, address)
            logger.info(
                "%s (%s) at %s, %d users, tasks %s, PRMU %s; address in %s",
                settings.name, settings.model, address["url"], len(profiles), ", ".join(tasks),
                prmu.url if prmu else "none", address_file,
            )  # fmt: skip

        async def answer() -> None:
            asking = Engine(engine.url, engine.key, settings.name, server.request_timeout_s, ends)
            asker = Asker(served, profiles, renderer, asking, prmu)
            gone = asyncio.Event()
            watch = asyncio.create_task(_watch(engine, gone))
            app = create_app(asker, token=token, limits=limits)
            try:
                await serve(app, listener, server.max_connections, announce, gone)
            finally:
                watch.cancel()
                await asker.aclose()
            if gone.is_set():
                raise RunFault(
                    f"serve.model={settings.model}: vLLM ended ({engine.ended()}). See {engine.log}; the same command starts it "
                    "again."
                )

        try:
            asyncio.run(answer())
        finally:
            address_file.unlink(missing_ok=True)


async def _watch(engine: EngineProcess, gone: asyncio.Event) -> None:
    """Say when the engine has ended: nobody can be answered any more."""
    while engine.ended() is None:
        await asyncio.sleep(ENGINE_POLL_S)
    gone.set()


def engine_arguments(config: DictConfig, on_gpu: bool) -> list[str]:
    """Command line of vLLM's server, without the model and its address."""
    engine, benchmark = config.serve.engine, config.benchmark
    dtype = engine.dtype if engine.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    eager = engine.enforce_eager if engine.enforce_eager is not None else not on_gpu
    length = benchmark.max_prompt_tokens + benchmark.max_response_tokens + TEMPLATE_TOKENS
    return [
        "--served-model-name", config.serve.name,
        "--dtype", dtype,
        "--max-model-len", str(length),
        "--max-num-seqs", str(engine.max_num_seqs),
        "--tensor-parallel-size", str(engine.tensor_parallel_size),
        "--gpu-memory-utilization", str(engine.gpu_memory_utilization),
        "--enable-prefix-caching",
        # A folder's generation_config.json would change top-p and top-k behind our back.
        "--generation-config", "vllm",
        "--seed", "0",
        "--disable-uvicorn-access-log",
        *(["--enforce-eager"] if eager else []),
        *(str(each) for each in engine.arguments),
    ]  # fmt: skip


def _check(config: DictConfig) -> None:
    settings, server = config.serve, config.server
    if settings.unknown_user not in ("empty", "refuse"):
        raise ConfigError(
            f"serve.unknown_user={settings.unknown_user}: unknown. Use empty (no profile is shown) or refuse."
        )
    if settings.max_samples < 1 or server.max_pending < settings.max_samples:
        raise ConfigError(
            f"server.max_pending={server.max_pending}: less than serve.max_samples={settings.max_samples}, so a full request "
            "could never be taken. Raise it."
        )
    if config.benchmark.retriever not in known_retrievers():
        raise ConfigError(
            f"benchmark.retriever={config.benchmark.retriever}: unknown. Use {', '.join(known_retrievers())}."
        )


def _prmu(config: DictConfig, run_dir: Path, stack: ExitStack, on_gpu: bool) -> RewardClient | None:
    client = config.prmu_client
    url, token_file = client.url, client.token_file
    if not config.serve.prmu and url is None:
        return None
    if url is None:
        check_model_folder(config.paths.prmu, "paths.prmu", "train_prmu.sh")
        address = stack.enter_context(local_server(config.paths.prmu, run_dir, "cuda" if on_gpu else "cpu"))
        url, token_file = address.url, address.token_file
    token = read_token(token_file)
    version = check_server(url, token, None, deadline_s=CONNECT_DEADLINE_S).model_version
    return RewardClient(
        url=url, token=token, expected_version=version, timeout_s=client.timeout_s, deadline_s=client.deadline_s
    )  # fmt: skip


def _exit_quietly(_: int, __: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main("serve", run)
