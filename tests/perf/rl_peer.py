"""The same RL run through TRL's GRPOTrainer: ``<peer's python> rl_peer.py <settings.json> <result.json>``.

Run by rl_step.py in the peer's own environment, with this project's sources on the path for the reward alone. GSPO as eq. 10
has it: importance ratio of the sequence, the paper's clip, advantages standardised in the group, no KL, AdamW at a constant
rate, fp32. One process: generation by transformers (TRL's default), one padded batch of all responses.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train for ``settings["steps"]`` generations; per step: seconds, tokens of all responses, mean reward."""
    import pyarrow.parquet as pq
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tagpr.rewards.composite import RewardWeights, score_response

    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = pq.read_table(settings["rows"]).to_pylist()
    dataset = Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "gold": row["reward_model"]["ground_truth"],
                "task": row["extra_info"]["task"],
            }
            for row in rows
        ]
    )
    group, prompts = settings["group"], settings["prompts"]
    updates = prompts // settings["mini_batch"]
    seen: list[dict[str, float]] = []
    starts: list[float] = []
    ends: list[float] = []

    def reward(completion_ids: list[list[int]], gold: list[str], task: list[str], **_: Any) -> list[float]:
        scores = []
        for ids, answer, name in zip(completion_ids, gold, task, strict=True):
            finished = bool(ids) and ids[-1] == tokenizer.eos_token_id
            own = ids[:-1] if finished else ids
            scores.append(
                score_response(
                    task=name,
                    gold=answer,
                    response_text=tokenizer.decode(own, skip_special_tokens=False),
                    token_ids=own,
                    mode="exploratory",
                    weights=RewardWeights(),
                    prmu=None,
                    finished=finished,
                ).reward
            )
        seen.append({"reward": sum(scores) / len(scores), "tokens": sum(map(len, completion_ids))})
        return scores

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            starts.append(time.time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.time())

    config = GRPOConfig(
        output_dir=settings["folder"],
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        chat_template_kwargs={"enable_thinking": True},
        per_device_train_batch_size=settings["mini_batch"] * group,
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        num_generations=group,
        max_completion_length=settings["response_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        importance_sampling_level="sequence",
        loss_type="grpo",
        scale_rewards="group",
        epsilon=3e-4,
        epsilon_high=4e-4,
        beta=0.0,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        max_steps=settings["steps"] * updates,
        seed=settings["seed"],
        logging_steps=10_000,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=settings["model"], reward_funcs=reward, args=config, train_dataset=dataset, callbacks=[Clock()]
    )
    assert next(trainer.model.parameters()).dtype == torch.float32
    trainer.train()
    # One generation feeds `updates` optimizer steps: a step of ours.
    begins, done = starts[::updates], ends[updates - 1 :: updates]
    return {
        "peer": f"trl {trl.__version__}",
        "startup_s": begins[0] - settings["began"],
        # From the end of one step to the end of the next.
        "steps": [
            {"seconds": end - before, **one}
            for before, end, one in zip([begins[0], *done], done, seen, strict=False)
        ],
    }


if __name__ == "__main__":
    made = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(made))
