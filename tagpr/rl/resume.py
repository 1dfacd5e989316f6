"""Where a run goes on: its newest checkpoint that is whole, written by as many workers, for the same settings and data."""

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tagpr.checkpoints import damaged, half_written, latest_complete, world_size
from tagpr.configuration import flat
from tagpr.errors import ConfigError, RunFault, StageError
from tagpr.rl.supervisor import attempt_number, patience_s
from tagpr.runs import last_step

logger = logging.getLogger(__name__)

# Locks of this process; the operating system frees them with it, also after a kill.
_held: list[IO[str]] = []

# What the optimizer's state, the position in the data and the curves before and after a restart have in common. A trailing dot
# stands for all keys below.
FIXED = (
    "objective.",
    "algorithm.",
    "benchmark.",
    "reward.",
    "tags.",
    "run.seed",
    "data.seed",
    "data.shuffle",
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.apply_chat_template_kwargs.",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.override_config.",
    "actor_rollout_ref.model.lora_rank",
    "actor_rollout_ref.model.lora_alpha",
    "actor_rollout_ref.model.target_modules",
    "actor_rollout_ref.actor.strategy",
    "actor_rollout_ref.actor.optim.",
    "actor_rollout_ref.actor.policy_loss.",
    "actor_rollout_ref.actor.loss_agg_mode",
    "actor_rollout_ref.actor.clip_ratio",
    "actor_rollout_ref.actor.clip_ratio_low",
    "actor_rollout_ref.actor.clip_ratio_high",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_epochs",
    "actor_rollout_ref.actor.use_kl_loss",
    "actor_rollout_ref.actor.kl_loss_coef",
    "actor_rollout_ref.actor.entropy_coeff",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.top_p",
    "actor_rollout_ref.rollout.top_k",
    "trainer.critic_warmup",
)
# Of those below the keys above: where things lie, and what verl fills in by itself.
FREE = (
    "benchmark.dir",
    "benchmark.own_tasks",
    "actor_rollout_ref.actor.optim.total_training_steps",
    "reward.num_workers",
)


def changes(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Keys that must not differ and do, as (key, before, now); a key that only one of them has came with other sources."""
    old, new = dict(flat(before)), dict(flat(now))
    return [
        (key, old[key], new[key])
        for key in old
        if key in new and key not in FREE and _is_fixed(key) and old[key] != new[key]
    ]


def _is_fixed(key: str) -> bool:
    return any(key.startswith(each) if each.endswith(".") else key == each for each in FIXED)


def check_unchanged(config: DictConfig, inputs: Mapping[str, str], resumed: int) -> None:
    """Refuse to go on after step ``resumed`` with other settings or data than those that the run directory tells of.

    Args:
        inputs: SHA-256 of what the run reads, as its manifest has them.

    Raises:
        ConfigError: one line that names the first difference, while the others are logged; or the record that is missing.
    """
    run_dir = Path(config.run.dir)
    if resumed == 0 or config.run.accept_changes:
        return
    file = run_dir / "config.yaml"
    try:
        before = OmegaConf.load(file)
        if not isinstance(before, DictConfig):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise _no_record(file, error) from error
    now = OmegaConf.create(OmegaConf.to_yaml(config))
    found = changes(*(OmegaConf.to_container(each, resolve=False) for each in (before, now)))
    found += [(f"{name} (content)", old[:12], new[:12]) for name, old, new in _other_inputs(run_dir, inputs)]
    if found:
        for key, old, new in found[1:]:
            logger.error("%s: was %s up to step %d, is %s now", key, old, resumed, new)
        key, old, new = found[0]
        more = f" ({len(found) - 1} more above)" if len(found) > 1 else ""
        raise ConfigError(
            f"{key}={new}: was {old} up to step {resumed}{more}. Set it as it was, run.name for a run of its own, or "
            "run.accept_changes=true to go on regardless."
        )


def _other_inputs(run_dir: Path, inputs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    if not inputs:
        return []
    file = run_dir / "manifest.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["inputs"]
        return [(name, before[name], now) for name, now in inputs.items() if before.get(name, now) != now]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_record(file, error) from error


def _no_record(file: Path, error: Exception) -> ConfigError:
    """Written before the first step and replaced as a whole: where it is not there, somebody took it away."""
    reason = (
        "is gone"
        if isinstance(error, FileNotFoundError)
        else f"cannot be read ({str(error).splitlines()[0]})"
    )
    return ConfigError(
        f"{file}: {reason}. It records what the checkpoints were trained with: restore it, or set run.accept_changes=true "
        "to go on unchecked."
    )


def resume(config: DictConfig) -> int:
    """Point verl at the newest good checkpoint; returns its step, 0 for a run that has none yet.

    verl's own choice reads a tracker file that a crash can leave torn. Folders whose saving was interrupted are removed.

    Raises:
        StageError: there were checkpoints, and none is good any more; or the checkpoint is of another number of GPUs.
    """
    if config.trainer.resume_mode != "auto":
        return 0
    run_dir, checkpoints = Path(config.run.dir), Path(config.trainer.default_local_dir)
    found = latest_complete(checkpoints)
    bad = damaged(checkpoints)
    step, folder = found or (0, None)
    for number, path, wrong in bad:
        if number > step and found is not None:
            logger.warning("%s: is damaged (%s). Going on from the one before it.", path, wrong)
    if found is None:
        if bad:
            raise StageError(
                f"{bad[0][1]}: is damaged ({bad[0][2]}), and there is no other checkpoint. Restore it, or delete "
                f"{checkpoints} to train again from the start."
            )
        reached, every = last_step(run_dir / "metrics.jsonl"), config.trainer.save_freq
        if every > 0 and reached > every:
            raise StageError(
                f"{checkpoints}: holds no complete checkpoint, although {run_dir / 'metrics.jsonl'} tells of step {reached} and "
                f"one is saved every {every}. Restore it, or delete {run_dir} to train again from the start."
            )
        if reached:
            logger.warning("no checkpoint was complete yet: steps 1 to %d are done again", reached)
    for path in half_written(checkpoints):
        logger.warning("%s: its saving was interrupted; removed", path)
        shutil.rmtree(path, ignore_errors=True)
    _say_if_verls_tracker_differs(checkpoints, step)
    if folder is None:
        config.trainer.resume_mode = "disable"
        return 0
    wrote, world = world_size(folder), config.trainer.nnodes * config.trainer.n_gpus_per_node
    if wrote is not None and wrote != world:
        raise StageError(
            f"trainer.nnodes={config.trainer.nnodes}, trainer.n_gpus_per_node={config.trainer.n_gpus_per_node}: {folder} was "
            f"written by {wrote} GPUs, and its shards fit no other number. Use {wrote}, or set run.name for a run of its own."
        )
    config.trainer.resume_mode = "resume_path"
    config.trainer.resume_from_path = str(folder)
    # The validation of this step is in metrics.jsonl already.
    config.trainer.val_before_train = False
    reached = last_step(run_dir / "metrics.jsonl")
    again = f"; steps {step + 1} to {reached} are done again" if reached > step else ""
    logger.info("going on after step %d (%s)%s", step, folder, again)
    return step


def _say_if_verls_tracker_differs(checkpoints: Path, step: int) -> None:
    """verl writes this file in place, before the checkpoint is complete; nothing here reads it but this line."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return
    text = tracker.read_bytes().decode(errors="replace").strip()
    if text != str(step):
        logger.warning(
            "%s: says %r; the newest complete checkpoint is that of step %d", tracker, text[:40], step
        )


def hold(config: DictConfig, pause: Callable[[float], None] = time.sleep) -> None:
    """Hold the run directory until this process ends: two drivers in one would tear each other's checkpoints and metrics.

    Raises:
        StageError: another process trains there, in a first attempt at once, in a later one after ``launch.patience_s``.
    """
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / ".lock").open("a+")
    give_up = time.monotonic() + patience_s(config)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() >= give_up:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                lock.close()
                # A person has started it twice; or what the attempt before has left behind is not gone yet.
                kind = RunFault if attempt_number() > 1 else StageError
                raise kind(
                    f"{run_dir}: another process trains there ({holder}). Wait for it, end it, or set run.name."
                ) from error
        pause(1.0)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
    _held.append(lock)
