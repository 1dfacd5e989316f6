"""Settings that verl would take and that cannot be meant. Each is refused before anything slow starts."""

import json
import math
from pathlib import Path

from omegaconf import DictConfig

from tagpr.errors import ConfigError
from tagpr.rewards.weights import asks_prmu, read_weights
from tagpr.rl.monitors import build

# GSPO's ratio is a per-sequence geometric mean, two to three orders of magnitude closer to 1 than a token's ratio.
LARGEST_GSPO_CLIP = 0.1
# tagpr.rl.advantage.NAME, said here too because that file needs torch and verl.
ADVANTAGE = "group_standardised"


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
    if config.algorithm.adv_estimator != ADVANTAGE:
        raise ConfigError(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator}: advantages are standardised within a group (S29). "
            f"Use {ADVANTAGE}; verl's grpo pushes groups whose rewards all agree."
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
    if not trainer.use_v1 or trainer.v1.trainer_mode not in ("sync", "colocate_async"):
        raise ConfigError(
            f"trainer.v1.trainer_mode={trainer.v1.trainer_mode}, trainer.use_v1={trainer.use_v1}: only verl's V1 trainer in "
            "the modes sync and colocate_async is supported."
        )
    if actor.use_prefix_grouper:
        raise ConfigError(
            "actor_rollout_ref.actor.use_prefix_grouper=true: verl 0.9.1 shares a group's prompt in its old trainer only; V1 takes "
            "the key and does nothing. Leave it false."
        )
    if config.reward.reward_manager.name != "TagPRRewardManager":
        raise ConfigError(
            f"reward.reward_manager.name={config.reward.reward_manager.name}: the composite reward lives in "
            "TagPRRewardManager. Leave this key alone and set objective.* instead."
        )
    check_division(config)
    objective = config.objective
    if objective.mode not in ("guided", "exploratory"):
        raise ConfigError(
            f"objective.mode={objective.mode}: unknown. Use guided (eq. 5) or exploratory (eq. 11)."
        )
    read_weights(objective)
    build(config.monitors)
    if trainer.nnodes > 1 and asks_prmu(objective) and config.prmu_client.url is None:
        raise ConfigError(
            f"prmu_client.url=null: trainer.nnodes={trainer.nnodes}, and a reward server of this run's own listens on loopback, "
            "where other nodes cannot reach it. Start one (bash recipes/serve_prmu.sh) and give its URL."
        )
    if config.launch.preflight not in ("auto", True, False):
        raise ConfigError(f"launch.preflight={config.launch.preflight}: unknown. Use auto, true or false.")


def check_division(config: DictConfig) -> None:
    """Refuse batches that do not divide over the GPUs, and budgets of tokens that no response fits into.

    Raises:
        ConfigError: naming the key, the numbers and what to do.
    """
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    nodes, per_node = config.trainer.nnodes, config.trainer.n_gpus_per_node
    if nodes < 1 or per_node < 1:
        raise ConfigError(
            f"trainer.nnodes={nodes}, trainer.n_gpus_per_node={per_node}: nobody to train. Use 1 or more of each."
        )
    world = nodes * per_node
    parallel = rollout.tensor_model_parallel_size
    if per_node % parallel:
        raise ConfigError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel}: does not divide trainer.n_gpus_per_node="
            f"{per_node}. Use a divisor: a rollout engine stays on one node."
        )
    sequence_parallel = actor.ulysses_sequence_parallel_size
    if world % sequence_parallel:
        raise ConfigError(
            f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={sequence_parallel}: does not divide the {world} GPUs. Use "
            "a divisor."
        )
    shards = world // sequence_parallel
    for key, prompts in (
        ("data.train_batch_size", data.train_batch_size),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", actor.ppo_mini_batch_size),
    ):
        if prompts * rollout.n % shards:
            raise ConfigError(
                f"{key}={prompts}: {prompts} x {rollout.n} responses do not divide over {shards} data-parallel workers. Use a "
                f"multiple of {shards // math.gcd(shards, rollout.n)}."
            )
    longest = data.max_prompt_length + data.max_response_length
    budgets = [
        (
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
            actor.ppo_max_token_len_per_gpu,
            actor.use_dynamic_bsz,
        )
    ]
    budgets.append(
        (
            "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
            rollout.log_prob_max_token_len_per_gpu,
            rollout.log_prob_use_dynamic_bsz,
        )
    )
    for key, budget, used in budgets:
        if used and budget * sequence_parallel < longest:
            raise ConfigError(
                f"{key}={budget}: less than the {longest} tokens of the longest prompt and response "
                "(benchmark.max_prompt_tokens + benchmark.max_response_tokens). Raise it."
            )


def check_context(config: DictConfig) -> None:
    """Give the rollout engine the context that prompt and response need, where none is set.

    Raises:
        ConfigError: the model's own context is shorter.
    """
    rollout, benchmark = config.actor_rollout_ref.rollout, config.benchmark
    if rollout.max_model_len is None:
        rollout.max_model_len = config.data.max_prompt_length + config.data.max_response_length
    description = Path(config.actor_rollout_ref.model.path) / "config.json"
    if not description.is_file():
        return
    context = json.loads(description.read_text("utf-8")).get("max_position_embeddings")
    if context is not None and rollout.max_model_len > context:
        raise ConfigError(
            f"benchmark.max_prompt_tokens={benchmark.max_prompt_tokens}, "
            f"benchmark.max_response_tokens={benchmark.max_response_tokens}: more than the {context} tokens of context of "
            f"{config.actor_rollout_ref.model.path}. Lower one of them."
        )


def schedule(config: DictConfig, prompts: int) -> tuple[int, int]:
    """Steps per epoch and in all; the last, incomplete batch of an epoch is left out, as verl does (S30, S31).

    Raises:
        ConfigError: there are fewer prompts than one batch takes.
    """
    per_epoch = prompts // config.data.train_batch_size
    if per_epoch == 0:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size}: larger than the {prompts} prompts. Lower it."
        )
    return per_epoch, config.trainer.total_training_steps or per_epoch * config.trainer.total_epochs
