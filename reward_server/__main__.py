"""Stage ``serve_prmu``: serve a PRMU checkpoint until told to stop (S21). ``python -m reward_server``."""

import asyncio
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import psutil
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError

from reward_server.app import Admin, Limits, create_app
from reward_server.batching import Batcher
from reward_server.engine import Engine, TransformersEngine, VllmEngine, choose_engine
from reward_server.prefix import PrefixEngine, shares_prefixes
from reward_server.replicas import Replicas, check_settings, check_version
from reward_server.serving import Served, Serving
from tagpr.configuration import main
from tagpr.errors import ConfigError, StageError, TagPRError
from tagpr.listening import SHUTDOWN_S, keep_token, listen, serve, url_of
from tagpr.prmu.encoding import Encoder
from tagpr.prmu.model import content_version, load, load_encoder
from tagpr.prmu.wire import ADMIN_TOKEN_VARIABLE, Address, read_token
from tagpr.runs import check_model_folder, write_text_atomically

logger = logging.getLogger("reward_server")

PARENT_POLL_S = 1.0
ANNOUNCE_EVERY_S = 2.0


def run(config: DictConfig) -> None:
    """Serve until SIGTERM, SIGINT or the death of ``server.parent_pid``; SIGHUP takes the checkpoint that is then in
    ``paths.prmu``, without dropping a request.

    Raises:
        ConfigError: the port is taken, the host is open to others without a token, or a limit makes no sense.
        StageError: ``paths.prmu`` holds no PRMU, or the model gives no number.
        RewardServerError: a replica could not be started.
    """
    server = config.server
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _exit_quietly)
    if server.parent_pid is not None:
        _die_with(server.parent_pid)
    check_settings(server)
    if server.max_pending_items < server.max_items:
        raise ConfigError(
            f"server.max_pending_items={server.max_pending_items}: less than server.max_items="
            f"{server.max_items}, so a full request could never be taken. Raise it."
        )
    run_dir = Path(config.run.dir)
    token, token_file = keep_token(server.token_file, server.host, run_dir)
    if server.replicas > 1 or server.ray is not None:
        check_model_folder(config.paths.prmu, "paths.prmu", "train_prmu.sh")
        _supervise(config, token_file)
    else:
        _serve_here(config, token, token_file)


def _serve_here(config: DictConfig, token: str, token_file: str | None) -> None:
    server, run_dir = config.server, Path(config.run.dir)
    limits = Limits(
        server.max_body_bytes, server.max_items, server.max_pending_items, server.request_timeout_s,
        server.max_item_characters,
    )  # fmt: skip
    admin = _admin(config, token)
    listener = listen(server.host, server.port)
    check_model_folder(config.paths.prmu, "paths.prmu", "train_prmu.sh")

    started = time.monotonic()
    folder = Path(config.paths.prmu)
    first = _load(config, folder)
    if server.expect_version is not None:
        check_version(server.expect_version, first.version)
    address_file = run_dir / "server.json"
    url = url_of(server.host, listener)

    def announce(served: Served) -> None:
        address = Address(url=url, model_version=served.version, pid=os.getpid(), token_file=token_file)
        write_text_atomically(address_file, address.model_dump_json() + "\n")
        logger.info(
            "PRMU %s (%s, %d users) at %s after %.1f s; address in %s",
            served.version, served.engine, len(served.encoder.users.rows), address.url,
            time.monotonic() - started, address_file,
        )  # fmt: skip

    async def run_server() -> None:
        serving = Serving(first, lambda folder: _load(config, folder), announce)
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            task = asyncio.get_running_loop().create_task(_reload(serving, folder))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
        app = create_app(serving, token=token, limits=limits, admin=admin)
        try:
            await serve(app, listener, server.max_connections, lambda: announce(serving.current))
        finally:
            await serving.close()
            logger.info("stopped after %d scores", serving.scored)

    try:
        asyncio.run(run_server())
    finally:
        if address_file.exists() and f'"pid":{os.getpid()}' in address_file.read_text("utf-8"):
            address_file.unlink()


async def _reload(serving: Serving, folder: Path) -> None:
    try:
        await serving.swap(folder)
    except TagPRError as error:
        logger.error("SIGHUP: the checkpoint stays %s: %s", serving.current.version, error)


def _supervise(config: DictConfig, token_file: str | None) -> None:
    """Keep ``server.replicas`` servers alive; this process itself answers nobody."""
    folder = Path(config.paths.prmu)
    hangup = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: hangup.set())
    replicas = Replicas(config, token_file, content_version(folder))
    try:
        replicas.wait()
        while True:
            replicas.announce()
            if hangup.wait(ANNOUNCE_EVERY_S):
                hangup.clear()
                replicas.reload(content_version(folder))
    finally:
        replicas.stop()
        logger.info("stopped; %d replicas were replaced", replicas.restarts)


def _admin(config: DictConfig, token: str) -> Admin | None:
    server = config.server
    admin_token = read_token(server.admin_token_file, ADMIN_TOKEN_VARIABLE)
    if admin_token is None:
        return None
    if admin_token == token:
        raise ConfigError(
            "server.admin_token_file: holds the same token as server.token_file. Give another one."
        )
    return Admin(admin_token, Path(server.checkpoints or Path(config.paths.prmu).resolve().parent))


def _load(config: DictConfig, folder: Path) -> Served:
    server = config.server
    name, device = choose_engine(server.engine, server.device)
    torch.set_num_threads(server.threads)
    engine: Engine
    if name == "transformers":
        try:
            prmu = load(folder, max_tokens=server.max_tokens, device=device, dtype=server.dtype)
        except (SafetensorError, RuntimeError) as error:  # torn weights, or weights of another shape
            raise StageError(
                f"{folder}: its weights cannot be loaded ({str(error).splitlines()[0][:160]}). "
                "Run bash recipes/train_prmu.sh again."
            ) from error
        encoder, version = prmu.encoder, prmu.version
        if server.prefix_cache and shares_prefixes(prmu):
            engine = PrefixEngine(prmu, server.batch_tokens, int(server.kv_cache_gib * 2**30))
        else:
            engine = TransformersEngine(prmu, server.batch_tokens)
    else:
        encoder, _, version = load_encoder(folder, server.max_tokens)
        engine = VllmEngine(
            folder, server.dtype, encoder.max_tokens, server.batch_tokens, server.gpu_memory_utilization,
            server.kv_cache_gib, server.prefix_cache,
        )  # fmt: skip
    _check_engine(engine, encoder)
    return Served(encoder, Batcher(engine, server.batch_items), version, engine.name)


def _check_engine(engine: Engine, encoder: Encoder) -> None:
    """Score one input before anyone can ask: a broken model shows now, and first-use costs are paid."""
    (logit,) = engine.score([encoder.encode("start-up", "", "prompt", "response")])
    if logit != logit or abs(logit) == float("inf"):
        raise StageError(
            f"paths.prmu: the model's logit is {logit}. Train it again: bash recipes/train_prmu.sh"
        )


def _exit_quietly(_: int, __: FrameType | None) -> None:
    raise SystemExit(0)


def _die_with(parent_pid: int) -> None:
    """End this process when another one ends, whatever ended that one (``kill -9`` tells nobody)."""
    try:
        parent = psutil.Process(parent_pid)
    except psutil.NoSuchProcess:
        raise ConfigError(f"server.parent_pid={parent_pid}: no such process. Leave it unset.") from None

    def gone() -> bool:
        try:
            return not parent.is_running() or parent.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def watch() -> None:
        while not gone():
            time.sleep(PARENT_POLL_S)
        logger.warning("process %d is gone, stopping", parent_pid)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SHUTDOWN_S + 5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    main("serve_prmu", run)
