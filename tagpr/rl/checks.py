"""Settings that verl would take and that cannot be meant. Each is refused before anything slow starts."""

import math

from omegaconf import DictConfig

from tagpr.errors import ConfigError

# GSPO's ratio is a per-sequence geometric mean, two to three orders of magnitude closer to 1 than a token's ratio.
LARGEST_GSPO_CLIP = 0.1


def check(config: DictConfig) -> None:
    """Refuse contradictions in a composed RL configuration.

    Raises:
        ConfigError: naming the key, what is wrong and what to do.
    """
    actor, rollout, data, trainer = (
        config.actor_rollout_ref.actor,
        config.actor_rollout_ref.rollout,
        config.data,
        config.trainer,
    )
    if actor.policy_loss.loss_mode == "gspo":
        for key in ("clip_ratio_low", "clip_ratio_high"):
            if not 0 < actor[key] <= LARGEST_GSPO_CLIP:
                raise ConfigError(
                    f"actor_rollout_ref.actor.{key}={actor[key]}: GSPO clips the ratio of whole sequences, which this never "
                    "touches. Use the paper's 3e-4 (low) and 4e-4 (high)."
                )
        if actor.loss_agg_mode != "seq-mean-token-mean":
            raise ConfigError(
                f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode}: GSPO averages over tokens, then over "
                "sequences. Use seq-mean-token-mean."
            )
    if config.algorithm.adv_estimator != "grpo":
        raise ConfigError(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator}: advantages are standardised within a group (S29). "
            "Use grpo."
        )
    if rollout.n < 2:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n={rollout.n}: a group of one has no advantage. Use 5 (S30)."
        )
    if rollout.top_p != 1 or rollout.top_k not in (-1, 0):
        raise ConfigError(
            f"actor_rollout_ref.rollout.top_p={rollout.top_p}, top_k={rollout.top_k}: sampling from a cut distribution breaks "
            "the importance ratio. Use top_p=1 and top_k=-1."
        )
    if data.train_batch_size % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}: does not divide "
            f"data.train_batch_size={data.train_batch_size}. Use a divisor."
        )
    if data.train_batch_size == actor.ppo_mini_batch_size:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}: with one update per batch the ratio is "
            "always 1 and the clip never acts. Use a smaller divisor of data.train_batch_size."
        )
    if not trainer.use_v1 or trainer.v1.trainer_mode != "sync":
        raise ConfigError(
            f"trainer.v1.trainer_mode={trainer.v1.trainer_mode}, trainer.use_v1={trainer.use_v1}: only verl's V1 trainer in "
            "mode sync is supported."
        )
    if config.reward.reward_manager.name != "TagPRRewardManager":
        raise ConfigError(
            f"reward.reward_manager.name={config.reward.reward_manager.name}: the composite reward lives in "
            "TagPRRewardManager. Leave this key alone and set objective.* instead."
        )
    objective = config.objective
    if objective.mode not in ("guided", "exploratory"):
        raise ConfigError(
            f"objective.mode={objective.mode}: unknown. Use guided (eq. 5) or exploratory (eq. 11)."
        )
    for key in ("alpha", "beta", "gamma"):
        if not (math.isfinite(objective[key]) and objective[key] >= 0):
            raise ConfigError(
                f"objective.{key}={objective[key]}: reward weights are finite and not negative."
            )
