"""The composite reward inside verl's reward loop (``reward.reward_manager``; paper section 3.4, S23-S28).

Called once per response, concurrently; the client sends the responses that wait together in one request. A response whose
PRMU score cannot be had raises: its group fails and ``FailClosedReplayBuffer`` stops the run. No path returns a reward that
was not computed.
"""

import time
from typing import Any

from omegaconf import DictConfig
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from tagpr.errors import ConfigError
from tagpr.prmu.client import RewardClient
from tagpr.prmu.wire import ScoreItem, read_token
from tagpr.rewards.composite import Mode, score_response
from tagpr.rewards.weights import asks_prmu, read_weights
from tagpr.rl.response_shape import response_shape
from tagpr.schema import PrmuScore


class TagPRRewardManager(RewardManagerBase):
    """Eq. 5 (``objective.mode=guided``) or eq. 11 (``exploratory``) for one response at a time."""

    def __init__(self, config: DictConfig, tokenizer: Any, compute_score: Any = None, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        objective = config.objective
        self.mode: Mode = objective.mode
        self.weights = read_weights(objective)
        self.client: RewardClient | None = None
        if self.needs_prmu(config):
            server = config.prmu_client
            if server.url is None:
                raise ConfigError(
                    "prmu_client.url: has no value. The launcher fills it in; set it to a reward server."
                )
            self.client = RewardClient(
                url=server.url,
                token=read_token(server.token_file),
                expected_version=[server.version, *server.also_versions],
                timeout_s=server.timeout_s,
                deadline_s=server.deadline_s,
                concurrency=server.concurrency,
                gather_s=server.gather_s,
                request_items=server.request_items,
            )

    @staticmethod
    def needs_prmu(config: DictConfig) -> bool:
        """Whether this objective asks the reward server at all (exploratory and gamma = 0 do not)."""
        return asks_prmu(config.objective)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Reward of the last sequence in ``data``.

        Returns:
            ``reward_score`` and ``reward_extra_info`` with one constant set of keys, numbers and strings only (verl puts them
            into arrays). There is no key named "reward": verl's validation would append to it twice.

        Raises:
            RewardServerError: no trustworthy PRMU score within ``prmu_client.deadline_s``.
        """
        item = data[-1]
        response_ids = item.batch["responses"]
        length = int(item.batch["attention_mask"][-response_ids.shape[-1] :].sum())
        ids = response_ids[:length].tolist()
        finished = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        own = ids[:-1] if finished else ids
        # Special tokens stay visible: a forged one in the middle of a response breaks its format.
        text = self.tokenizer.decode(own, skip_special_tokens=False)
        about = item.non_tensor_batch["extra_info"]
        began = time.monotonic()
        prmu = await self._prmu(about, item.non_tensor_batch["raw_prompt"], text)
        waited = time.monotonic() - began
        breakdown = score_response(
            task=about["task"],
            gold=item.non_tensor_batch["reward_model"]["ground_truth"],
            response_text=text,
            token_ids=own,
            finished=finished,
            mode=self.mode,
            weights=self.weights.at(
                int(item.non_tensor_batch["global_steps"]) if self.weights.changes else 0
            ),
            prmu=prmu,
        )
        info: dict[str, Any] = {
            "score": breakdown.reward,
            "total": breakdown.reward,
            "verifiable": breakdown.verifiable,
            "repetition": breakdown.repetition,
            "format": breakdown.format,
            "tag": breakdown.tag,
            "failure": breakdown.failure,
            "finished": float(finished),
            **response_shape(text, own, self.tokenizer),
        }
        if prmu is not None:
            info |= {
                "prmu": prmu.score,
                "prmu_logit": prmu.logit,
                "prmu_unknown_user": float(prmu.unknown_user),
                "prmu_seconds": waited,
            }
        return {"reward_score": breakdown.reward, "reward_extra_info": info}

    async def _prmu(self, about: dict[str, Any], messages: Any, response: str) -> PrmuScore | None:
        if self.client is None:
            return None
        prompt = messages[-1]["content"]
        item = ScoreItem(id=about["example_id"], user_id=about["user_id"], prompt=prompt, response=response)
        return await self.client.score_one(item)
