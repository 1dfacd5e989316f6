"""What we override or call in verl has the shape that we rely on, and each trap that we step around is still one."""

import inspect

import pytest
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, replay_buffer, trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tracking

from tagpr.rl.replay_buffer import FailClosedReplayBuffer, RolloutFailure
from tagpr.rl.reward_manager import TagPRRewardManager
from tagpr.rl.trainer import TagPRTrainer


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


def test_replay_buffer_polls_quickly_and_stops_on_a_failed_group(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = FailClosedReplayBuffer(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs={},
    )
    assert buffer.poll_interval == 0.02
    rows = {"a": {"is_prompt": True, "status": "finished", "global_steps": 1}}
    monkeypatch.setattr(replay_buffer.tq, "kv_list", lambda *_: {"train": rows})
    buffer._sync_metadata_from_transfer_queue()
    rows["b"] = {"is_prompt": True, "status": "failure", "global_steps": 1}
    with pytest.raises(RolloutFailure, match="train"):
        buffer._sync_metadata_from_transfer_queue()
