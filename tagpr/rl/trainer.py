"""verl's synchronous V1 trainer with what it does not do: reward components, resumable metrics, complete-checkpoint markers.

A subclass, not a fork: every override calls verl's own method, except the rollout dump, which verl writes without the
components. ``tests/contract/test_verl_hooks.py`` checks the signatures.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from tagpr.checkpoints import mark_complete, retain
from tagpr.cpu_platform.prefix_sharing import partitions_of_groups
from tagpr.errors import ConfigError
from tagpr.rewards.weights import NAMES, read_weights
from tagpr.rl.advantage import combine_normalised
from tagpr.rl.gauges import show
from tagpr.rl.losses import losses_named
from tagpr.rl.monitors import Alert, Watch, build
from tagpr.rl.profile_use import profile_use
from tagpr.rl.reward_metrics import reward_metrics
from tagpr.rl.rollouts import RolloutManager, RolloutServers
from tagpr.rl.saving import disk_full_is_named, no_space_is_named
from tagpr.rl.trackers import after_tracking, before_tracking, flush
from tagpr.rl.watchdog import rollouts_say, unanswering, watchdog_of
from tagpr.runs import MetricsLog, write_text_atomically

logger = logging.getLogger(__name__)


class TagPRTrainer(PPOTrainerSync):
    """One step: rollouts, rewards, old log-probabilities, group advantages, four GSPO updates, weight sync."""

    # verl's; a monitor may bring it forward.
    total_training_steps: int

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.run_dir = Path(config.run.dir)
        self._started = time.monotonic()
        self._saved_step = 0
        # Kept here, since verl forgets at a restart what it has saved, and deletes before the new one is declared complete.
        self._keep = config.trainer.max_actor_ckpt_to_keep
        config.trainer.max_actor_ckpt_to_keep = None
        self.watchdog = watchdog_of(config)  # idle; :func:`train` puts the running one in its place
        self._tracked = False

    def _setup(self) -> None:
        with mock.patch.object(trainer_base, "LLMServerManager", RolloutServers):
            super()._setup()

    def on_init_end(self) -> None:
        """Weights are synced and a checkpoint, where there is one, is loaded: open the metrics at its step."""
        super().on_init_end()
        self._resumed_step = int(self.global_steps)
        self._metrics_log = MetricsLog(self.run_dir / "metrics.jsonl", resumed_step=self._resumed_step)
        self.wanted_steps = int(self.total_training_steps)
        self.watch = Watch(build(self.config.monitors), self.run_dir, resumed_step=int(self.global_steps))
        self._end_early()
        logger.info(
            "workers ready after %.0f s; %s", time.monotonic() - self._started,
            f"resuming after step {self.global_steps}" if self.global_steps else "training from the start",
        )  # fmt: skip

    def on_validate_begin(self) -> None:
        """verl creates its loggers just before the first validation."""
        super().on_validate_begin()
        self._join_trackers()

    def on_train_begin(self) -> None:
        """As above, where there is no validation before training."""
        super().on_train_begin()
        self._join_trackers()
        self.watchdog.enter("driver")

    def _join_trackers(self) -> None:
        self.logger.logger["run"] = self
        if not self._tracked:
            self._tracked = True
            after_tracking(self.run_dir, self.logger.logger, self._resumed_step)
            show(self.logger.logger, self.config.run.name)

    def on_sample_begin(self) -> None:
        """Rollouts begin; the rewards are asked for as they end."""
        super().on_sample_begin()
        self.watchdog.enter("rollout", self._waits_for)

    def on_sample_end(self) -> None:
        """All groups are there, with their rewards."""
        self.watchdog.enter("driver")
        super().on_sample_end()

    def on_step_end(self) -> None:
        """The new weights go to the rollout engines."""
        with self.watchdog.phase("weight_sync"):
            super().on_step_end()

    def _balance_batch(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Each training worker gets whole groups, where the engine has a group's prompt only once."""
        if self.config.trainer.device != "cpu":
            return super()._balance_batch(batch, *args, **kwargs)
        whole = partitions_of_groups(
            trainer_base.get_seqlen_balanced_partitions, self.config.actor_rollout_ref.rollout.n
        )
        with mock.patch.object(trainer_base, "get_seqlen_balanced_partitions", whole):
            return super()._balance_batch(batch, *args, **kwargs)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch.fields = tensor_columns(batch)
        with self.watchdog.phase("old_log_prob"):
            return super()._compute_old_log_prob(batch, metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch.fields = tensor_columns(batch)
        with self.watchdog.phase("update"):
            return super()._update_actor(batch, metrics)

    def _waits_for(self) -> str:
        """What a stuck rollout lacks, and whose fault it is: the rollout engine's, or the reward's."""
        buffer = self.replay_buffer
        pending, running, finished = (
            sum(len(keys) for keys in list(each.values()))
            for each in (buffer.pending_keys, buffer.running_keys, buffer.finished_keys)
        )
        rewards = {f"reward worker {n}": actor for n, actor in enumerate(self.get_reward_handles() or [])}
        rollouts = {
            f"rollout worker {n}": a for n, a in enumerate(self.agent_loop_manager.agent_loop_workers)
        }
        lines = [f"waiting for {pending + running} groups of {pending + running + finished}"]
        return "; ".join([*lines, *rollouts_say(rollouts), *unanswering(rewards)])

    def _validate(self) -> dict[str, float]:
        with self.watchdog.phase("validation", self._waits_for):
            metrics = super()._validate()
        shown = {name: value for name, value in metrics.items() if name.startswith("val-core/")}
        logger.info(
            "validation: %s",
            "  ".join(f"{_short(name)} {value:.3f}" for name, value in sorted(shown.items())),
        )
        return metrics

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's own, with the estimator of :mod:`tagpr.rl.advantage`; ``objective.normalise_components`` replaces the result."""
        batch = super()._compute_advantage(batch, metrics)
        objective = self.config.objective
        schedule = read_weights(objective)
        weights = schedule.at(int(self.global_steps))
        if schedule.changes:
            metrics |= {f"objective/{name}": getattr(weights, name) for name in NAMES}
        if objective.normalise_components:
            keys = _own_keys(batch)
            # The rewards alone: texts are fetched and decoded once, for the metrics.
            fields = tq.kv_batch_get(
                keys=keys, partition_id=batch.partition_id, select_fields=["extra_fields"]
            )
            advantages = combine_normalised(
                [each["reward_extra_info"] for each in list(fields["extra_fields"])],
                [_group_of(key) for key in keys],
                objective.mode,
                [weights] * len(keys),
            )
            put_advantages(keys, batch.partition_id, advantages)
        return batch

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        self._rows = self._reward_rows(batch)
        metrics.update(
            reward_metrics(
                [row["reward"] for row in self._rows],
                [row["task"] for row in self._rows],
                [row["group"] for row in self._rows],
            )
            | profile_use(self._rows)
        )
        logger.info(
            "step %d/%d  reward %.3f  verifiable %.3f  format %.2f  tags %.2f%s  tokens %.0f  %.1f s (rollout %.1f, update %.1f)",
            global_steps, self.total_training_steps,
            metrics["reward/total/mean"], metrics["reward/verifiable/mean"], metrics["reward/format/mean"],
            metrics["tags/valid_frac"],
            f"  prmu {metrics['reward/prmu/mean']:.3f}" if "reward/prmu/mean" in metrics else "",
            metrics["response_length/mean"],
            timing_raw["step"], timing_raw["gen"], timing_raw["update_actor"],
        )  # fmt: skip
        self.watch.observe(global_steps, metrics)
        self._end_early()

    def _end_early(self) -> None:
        """Where a monitor wants the run to end, the step after its alert is the last: verl saves and validates then."""
        if self.watch.ending is not None:
            self.total_training_steps = min(self.total_training_steps, self.watch.ending.step + 1)

    def _reward_rows(self, batch: KVBatchMeta) -> list[dict[str, Any]]:
        """Who was asked what, what came back, and what its reward was made of; padding rows left out."""
        own = _own_keys(batch)
        data = tq.kv_batch_get(
            keys=own,
            partition_id=batch.partition_id,
            select_fields=["prompts", "responses", "reward_model", "extra_fields", "extra_info"],
        )
        responses = data["responses"].unbind()
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        # One text for each group: its responses share their prompt.
        prompts: dict[str, str] = {}
        rows = []
        for key, prompt, response, text, reward_model, fields, info in zip(
            own,
            data["prompts"].unbind(),
            responses,
            texts,
            list(data["reward_model"]),
            list(data["extra_fields"]),
            list(data["extra_info"]),
            strict=True,
        ):
            group = _group_of(key)
            if group not in prompts:
                prompts[group] = self.tokenizer.decode(prompt, skip_special_tokens=True)
            rows.append(
                {
                    "key": key,
                    "group": group,
                    "example_id": info["example_id"],
                    "task": info["task"],
                    "user_id": info["user_id"],
                    "reward": fields["reward_extra_info"],
                    "gold": reward_model["ground_truth"],
                    "query": info["query"],
                    "prompt": prompts[group],
                    "response": text,
                    "response_tokens": len(response),
                }
            )
        return rows

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """One JSONL file a step: prompt, response, and every component of its reward."""
        lines = [
            json.dumps({"step": int(self.global_steps), **row}, ensure_ascii=False) for row in self._rows
        ]
        path = Path(rollout_data_dir) / f"{int(self.global_steps):06d}.jsonl"
        write_text_atomically(path, "\n".join(lines) + "\n")

    def _save_checkpoint(self) -> None:
        with self.watchdog.phase("save"), disk_full_is_named(Path(self.config.trainer.default_local_dir)):
            super()._save_checkpoint()
        self._saved_step = int(self.global_steps)

    def log(self, data: dict[str, Any], step: int) -> None:
        """Record the metrics of a step (the interface of a verl logger), then declare its checkpoint complete.

        In this order, because a run goes on after its last complete checkpoint: the metrics of that step must be there.
        """
        self._metrics_log.log(data, step)
        if self._saved_step and step == self._saved_step:
            self._saved_step = 0
            flush(self.logger.logger)
            mark_complete(Path(self.config.trainer.default_local_dir), step)
            retain(Path(self.config.trainer.default_local_dir), self._keep)
            logger.info("checkpoint of step %d saved", step)


def _own_keys(batch: KVBatchMeta) -> list[str]:
    """Keys of the responses, in order; padding rows left out."""
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


def _group_of(key: str) -> str:
    return key.split("_")[0]


def tensor_columns(batch: KVBatchMeta) -> list[str]:
    """What a training worker is to fetch of a batch: the columns of tensors.

    The others (texts, gold answers, what a reward consists of) train nothing, and packing them row by row, and moving each to
    the device, takes longer than the update of a small model.
    """
    schema = tq.get_client().kv_retrieve_meta(batch.keys[:1], batch.partition_id).field_schema
    return [name for name, kind in schema.items() if not kind["is_non_tensor"]]


def put_advantages(keys: list[str], partition: str, advantages: np.ndarray) -> None:
    """Replace the advantages of some rows: one number for all tokens of a response."""
    masks = tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=["response_mask"])[
        "response_mask"
    ].unbind()
    rows = [float(value) * mask.float() for value, mask in zip(advantages, masks, strict=True)]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    fields = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(keys))
    tq.kv_batch_put(keys=keys, partition_id=partition, fields=fields)


def _short(metric: str) -> str:
    """``val-core/lamp1/reward/mean@1`` -> ``lamp1``."""
    parts = metric.split("/")
    return parts[1] if len(parts) > 2 else metric


def trainer_class(mode: str) -> type[TagPRTrainer]:
    """The trainer of ``trainer.v1.trainer_mode``."""
    if mode == "sync":
        return TagPRTrainer
    from tagpr.rl.asynchronous import TagPRAsyncTrainer

    return TagPRAsyncTrainer


def train(config: DictConfig) -> Alert | None:
    """Run verl's trainer in this process, with Ray already up; returns when the last step is done.

    Returns:
        The alert of the monitor that ended the run before its last step, if one did.

    Raises:
        ConfigError: verl's own validation refuses the configuration.
    """
    from verl.utils.config import validate_config
    from verl.utils.logging_utils import configure_verl_logging

    try:
        validate_config(config, use_reference_policy=False, use_critic=False)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"verl refuses this configuration: {error}") from error
    configure_verl_logging()
    config.transfer_queue.enable = True
    trainer = None
    succeeded = False
    with (
        no_space_is_named(Path(config.run.dir)),
        watchdog_of(config).running() as watchdog,
        losses_named(config.watchdog.losses_s),
    ):
        try:
            tq.init(config.transfer_queue)
            trainer = trainer_class(config.trainer.v1.trainer_mode)(config)
            trainer.watchdog = watchdog
            trainer.init()
            agent_loops = RolloutManager.create(
                config=config,
                llm_client=trainer.get_llm_client(),
                teacher_client=trainer.get_teacher_client(),
                reward_loop_worker_handles=trainer.get_reward_handles(),
            )
            before_tracking(Path(config.run.dir), list(config.trainer.logger))
            trainer.fit(agent_loops)
            succeeded = True
        finally:
            if trainer is not None and getattr(trainer, "logger", None) is not None:
                trainer.logger.finish(exit_code=0 if succeeded else 1)
            tq.close()
    ending = trainer.watch.ending
    return ending if ending is not None and ending.step < trainer.wanted_steps else None
