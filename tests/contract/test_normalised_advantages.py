"""``objective.normalise_components`` in the trainer: which rows it reads, how much of them, and what it writes back."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from tagpr.configuration import compose, resolve
from tagpr.rl import trainer
from tagpr.rl.advantage import combine_normalised
from tagpr.rl.trainer import TagPRTrainer

KEYS = ["a_0", "a_1", "b_0", "b_1"]


def info(verifiable: float, prmu: float) -> dict[str, Any]:
    return {"verifiable": verifiable, "repetition": 0.0, "format": 1.0, "tag": 0.0, "prmu": prmu}


def test_it_reads_the_rewards_alone_and_leaves_padding_out(monkeypatch: pytest.MonkeyPatch) -> None:
    infos = dict(zip(KEYS, [info(1, 0.5), info(0, 0.6), info(0.2, 0.1), info(0.4, 0.9)], strict=True))
    asked: list[list[str]] = []
    written: dict[str, float] = {}

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        asked.append(select_fields)
        return {"extra_fields": [{"reward_extra_info": infos[key]} for key in keys]}

    def put(keys: list[str], partition: str, advantages: np.ndarray) -> None:
        written.update(zip(keys, advantages, strict=True))

    monkeypatch.setattr(trainer.PPOTrainerSync, "_compute_advantage", lambda self, batch, metrics: batch)
    monkeypatch.setattr(trainer.tq, "kv_batch_get", get)
    monkeypatch.setattr(trainer, "put_advantages", put)
    one = object.__new__(TagPRTrainer)
    one.config = resolve(compose("guided_rl", ["objective.normalise_components=true"]))
    one.global_steps = 1
    batch = SimpleNamespace(
        keys=[*KEYS, "padding"], tags=[*[{}] * 4, {"is_padding": True}], partition_id="train"
    )
    one._compute_advantage(batch, {})
    assert asked == [["extra_fields"]]
    weights = [trainer.read_weights(one.config.objective).at(1)] * 4
    expected = combine_normalised(list(infos.values()), ["a", "a", "b", "b"], "guided", weights)
    assert list(written) == KEYS
    np.testing.assert_array_equal(list(written.values()), expected)
    assert np.ptp(expected) > 0.5


def test_without_it_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.PPOTrainerSync, "_compute_advantage", lambda self, batch, metrics: batch)
    monkeypatch.setattr(trainer.tq, "kv_batch_get", lambda **_: pytest.fail("read"))
    one = object.__new__(TagPRTrainer)
    one.config = resolve(compose("guided_rl"))
    assert not OmegaConf.select(one.config, "objective.normalise_components")
    one.global_steps = 1
    one._compute_advantage(SimpleNamespace(keys=[], tags=[], partition_id="train"), {})
