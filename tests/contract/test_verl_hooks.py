"""What we override or call in verl has the shape that we rely on, and each trap that we step around is still one."""

import inspect
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
from transfer_queue import KVBatchMeta, TransferQueueClient
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, replay_buffer, trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tracking, transferqueue_utils

from tagpr.rl.replay_buffer import (
    LONGEST_POLL_S,
    SHORTEST_POLL_S,
    FailClosedReplayBuffer,
    FailClosedReplayBufferAsync,
    RolloutFailure,
)
from tagpr.rl.reward_manager import TagPRRewardManager
from tagpr.rl.trainer import TagPRTrainer, tensor_columns


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "name",
    [
        "on_init_end", "on_validate_begin", "on_train_begin", "on_sample_begin", "on_sample_end", "on_step_end",
        "_compute_old_log_prob", "_update_actor",
        "_validate", "_compute_advantage", "_compute_metrics", "_log_rollout_data", "_save_checkpoint",
    ],
)  # fmt: skip
def test_trainer_overrides_match(name: str) -> None:
    assert parameters(getattr(TagPRTrainer, name)) == parameters(getattr(PPOTrainerSync, name))


def test_reward_manager_override_matches() -> None:
    assert parameters(TagPRRewardManager.run_single) == parameters(RewardManagerBase.run_single)


def test_agent_loop_manager_takes_what_we_pass() -> None:
    taken = parameters(AgentLoopManagerTQ.__init__) + parameters(AgentLoopManagerTQ.__mro__[1].__init__)
    for name in ("config", "llm_client", "teacher_client", "reward_loop_worker_handles"):
        assert name in taken


def test_trap_file_logger_truncates() -> None:
    assert '"wb"' in inspect.getsource(tracking.FileLogger), (
        "verl's file logger appends now: use it instead of MetricsLog"
    )


def test_trap_failed_groups_are_padded() -> None:
    source = inspect.getsource(replay_buffer.ReplayBuffer._sampleable_terminal_keys)
    assert "failure_keys" in source, "verl no longer trains on failed groups: FailClosedReplayBuffer may go"


def test_trap_components_are_not_logged() -> None:
    for method in (trainer_base.PPOTrainer._compute_metrics, trainer_base.PPOTrainer._log_rollout_data):
        assert "reward_extra_info[" not in inspect.getsource(method), "verl logs reward components now"


def buffer_of(kind: type[FailClosedReplayBuffer | FailClosedReplayBufferAsync], mode: str) -> Any:
    return kind(
        trainer_mode=mode,
        trainer_config={},
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs={},
    )


def test_replay_buffer_stops_on_a_failed_group(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = buffer_of(FailClosedReplayBuffer, "sync")
    rows = {"a": {"is_prompt": True, "status": "finished", "global_steps": 1}}
    monkeypatch.setattr(replay_buffer.tq, "kv_list", lambda *_: {"train": rows})
    buffer._sync_metadata_from_transfer_queue()
    rows["b"] = {"is_prompt": True, "status": "failure", "global_steps": 1}
    with pytest.raises(RolloutFailure, match="train"):
        buffer._sync_metadata_from_transfer_queue()


def test_replay_buffer_polls_the_less_often_the_longer_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = buffer_of(FailClosedReplayBuffer, "sync")
    now, slept = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    while now < 400.0:
        buffer._wait_for_next_poll("train", time.time())
    assert slept[0] == SHORTEST_POLL_S
    assert slept == sorted(slept)
    assert slept[-1] == LONGEST_POLL_S
    assert len(slept) < 1000


@pytest.mark.parametrize(
    ("kind", "mode"), [(FailClosedReplayBuffer, "sync"), (FailClosedReplayBufferAsync, "colocate_async")]
)
def test_replay_buffer_hands_out_whole_groups_in_the_order_of_their_prompts(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[FailClosedReplayBuffer | FailClosedReplayBufferAsync],
    mode: str,
) -> None:
    """Whatever was finished first; with ten responses and more, 10 comes after 9."""
    prompts = [f"prompt-{letter}" for letter in "cab"]
    responses = [f"{prompt}_{n}_0" for prompt in prompts for n in range(11)]
    listed = {key: {"is_prompt": True, "status": "finished", "global_steps": 1} for key in prompts}
    for key in random.Random(0).sample(responses, len(responses)):
        listed[key] = {"seq_len": len(listed)}
    monkeypatch.setattr(replay_buffer.tq, "kv_list", lambda *_: {"train": listed})
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda **_: None)
    batch, _ = buffer_of(kind, mode).sample(global_steps=1, partition_id="train", batch_size=3)
    assert batch.keys == responses
    assert [tag["seq_len"] for tag in batch.tags] == [listed[key]["seq_len"] for key in responses]


def test_trap_rows_come_as_they_were_finished() -> None:
    source = inspect.getsource(replay_buffer.ReplayBuffer._materialize_batch)
    assert "for key, tag in partition_snapshot.items():" in source, "verl sorts rows now: ours may go"
    for name in ("_materialize_batch", "_wait_for_next_poll"):
        assert parameters(getattr(FailClosedReplayBuffer, name)) == parameters(
            getattr(replay_buffer.ReplayBuffer, name)
        )


def test_balancing_and_fetching_go_through_what_we_replace() -> None:
    """``_balance_batch`` asks its module's ``get_seqlen_balanced_partitions``; of a batch, its ``fields`` are fetched."""
    balance = inspect.getsource(PPOTrainerSync._balance_batch)
    assert "get_seqlen_balanced_partitions(workload_lst, k_partitions=dp_size, equal_size=True)" in balance
    bridge = inspect.getsource(transferqueue_utils.async_kv_batch_meta2batch_meta)
    assert "select_fields(fields)" in bridge


def test_training_workers_fetch_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"prompts": {"is_non_tensor": False}, "extra_info": {"is_non_tensor": True}}
    asked = []

    def kv_retrieve_meta(keys: list[str], partition_id: str) -> SimpleNamespace:
        asked.append((keys, partition_id))
        return SimpleNamespace(field_schema=schema)

    client = SimpleNamespace(kv_retrieve_meta=kv_retrieve_meta)
    monkeypatch.setattr("tagpr.rl.trainer.tq.get_client", lambda: client)
    batch = KVBatchMeta(keys=["a", "b"], tags=[{}, {}], partition_id="train")
    assert tensor_columns(batch) == ["prompts"]
    assert asked == [(["a"], "train")]
    found = inspect.signature(TransferQueueClient.kv_retrieve_meta).parameters
    assert list(found)[1:3] == ["keys", "partition_id"]
