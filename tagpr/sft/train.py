"""Stage ``sft``: verl's SFT trainer on the tagged chains, and a Hugging Face folder at the end."""

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tagpr.checkpoints import export_model
from tagpr.console import library_output_to
from tagpr.errors import StageError
from tagpr.runs import (
    MetricsLog,
    check_model_folder,
    check_tags_of,
    complete_lines,
    manifest,
    write_json_atomically,
    write_text_atomically,
)

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> None:
    """Fine-tune ``model.path`` on ``data.train_files``, going on from the last checkpoint; then export the model.

    Raises:
        StageError: the chains or the base model are missing.
        DataError: the chains are malformed or too long.
    """
    run_dir = Path(config.run.dir).resolve()
    model, finished = run_dir / "model", run_dir / "finished.json"
    if model.is_dir() and finished.is_file():
        logger.info(
            "%s is finished: %s. Delete the folder, or set run.name, to train again.", config.run.name, model
        )
        return
    chains = Path(config.data.train_files).resolve()
    if not chains.is_file():
        raise StageError(f"data.train_files={chains}: no such file. Run `bash recipes/build_chains.sh`.")
    check_tags_of(chains.parent, "data.train_files")
    hub = config.setting != "minilamp"
    check_model_folder(config.model.path, "model.path", "quickstart.sh", may_be_hub_id=hub)
    if Path(config.model.path).exists():
        config.model.path = str(Path(config.model.path).resolve())
    config.run.dir = str(run_dir)
    config.data.train_files = str(chains)
    config.trainer.default_local_dir = str(Path(config.trainer.default_local_dir).resolve())
    if config.data.max_length is None:
        config.data.max_length = config.benchmark.max_prompt_tokens + config.benchmark.max_response_tokens
    logger.info(
        "SFT: %s on %s, %d epochs, batch %d, lr %g, on %d x %s",
        config.model.path, chains, config.trainer.total_epochs, config.data.train_batch_size, config.optim.lr,
        config.trainer.n_gpus_per_node * config.trainer.nnodes, config.trainer.device,
    )  # fmt: skip
    write_text_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(config))
    inputs = {"model": Path(config.model.path), "chains": chains}
    record = manifest(config.run.name, inputs, config.run.seed, synthetic=config.benchmark.synthetic)
    write_json_atomically(run_dir / "manifest.json", record.model_dump())

    began = time.monotonic()
    with (
        metrics_of(run_dir, Path(config.trainer.default_local_dir)),
        library_output_to(run_dir / "driver.log", config.run.verbose),
    ):
        if config.trainer.n_gpus_per_node * config.trainer.nnodes == 1:
            train_in_this_process(config)
        else:
            train_with_torchrun(config, run_dir)
        step = last_step(Path(config.trainer.default_local_dir))
        if step == 0:
            raise StageError(
                f"{config.trainer.default_local_dir}: training left no checkpoint. See {run_dir}/driver.log."
            )
        export_model(Path(config.trainer.default_local_dir) / f"global_step_{step}", model)
    write_json_atomically(finished, {"step": step})
    logger.info("%s done in %.0f s: %s", config.run.name, time.monotonic() - began, model)


def last_step(checkpoints: Path) -> int:
    """Step of verl's last SFT checkpoint (its tracker is written atomically), 0 for none."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def train_in_this_process(config: DictConfig) -> None:
    """World of one: saves torchrun's own start-up."""
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        # Port 0: the store that init_process_group makes picks a free one.
        "MASTER_PORT": "0",
    }  # fmt: skip
    set_environment(config)
    train_worker(config)


def train_with_torchrun(config: DictConfig, run_dir: Path) -> None:
    """One process per GPU of this node; for several nodes, start the recipe on each under your launcher."""
    set_environment(config)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={config.trainer.n_gpus_per_node}", "-m", "tagpr.sft", "--worker", str(run_dir / "config.yaml"),
    ]  # fmt: skip
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise StageError(f"torchrun: exited with status {done.returncode}. See {run_dir}/driver.log.")


def set_environment(config: DictConfig) -> None:
    """What verl's trainer and its loggers read from the environment."""
    os.environ["TENSORBOARD_DIR"] = str(Path(config.run.dir) / "tensorboard")
    os.environ["VERL_FILE_LOGGER_PATH"] = str(Path(config.run.dir) / "metrics.part.jsonl")
    os.environ.setdefault("OMP_NUM_THREADS", "1" if config.trainer.device == "cpu" else "8")
    if config.trainer.device == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"
    # Raises what verl's entry-point loading would swallow.
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "tagpr.cpu_platform.platform"


def train_worker(config: DictConfig) -> None:
    """One rank."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from verl.trainer.sft_trainer import run_sft

    run_sft(config)


@contextmanager
def metrics_of(run_dir: Path, checkpoints: Path) -> Iterator[None]:
    """Collect verl's metrics in ``metrics.jsonl``, which goes on over restarts, and show progress while the body runs.

    verl's file logger starts its file anew each time, so it writes a part, which is appended when the body ends, and before it
    begins, if a crash left one.
    """
    part, whole = run_dir / "metrics.part.jsonl", run_dir / "metrics.jsonl"
    start = last_step(checkpoints)

    def collect(known: int, up_to: float) -> None:
        log = MetricsLog(whole, resumed_step=known)
        for record in read_metrics(part):
            if known < record["step"] <= up_to:
                log.log(record["data"], record["step"])
        log.finish()
        part.unlink(missing_ok=True)

    if part.exists():
        # A crash left it: of its steps, those after the last checkpoint will be done again.
        collect(_last_logged_step(whole), up_to=start)
    stop = threading.Event()
    progress = threading.Thread(target=_show_progress, args=(part, stop), daemon=True)
    progress.start()
    try:
        yield
    finally:
        stop.set()
        progress.join()
        collect(start, up_to=math.inf)


def read_metrics(path: Path) -> list[dict]:
    """Records of a verl metrics file; a torn last line is left out."""
    return [json.loads(line) for line in complete_lines(path)]


def _last_logged_step(path: Path) -> int:
    return max((record["step"] for record in read_metrics(path)), default=0)


def _show_progress(path: Path, stop: threading.Event, every_s: float = 8.0) -> None:
    shown = 0
    while not stop.wait(every_s):
        steps = [record for record in read_metrics(path) if "train/loss" in record["data"]]
        if steps and steps[-1]["step"] > shown:
            shown = steps[-1]["step"]
            recent = [record["data"]["train/loss"] for record in steps[-20:]]
            logger.info("step %d  loss %.4f (mean of %d)", shown, sum(recent) / len(recent), len(recent))
