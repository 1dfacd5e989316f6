"""Stage ``base``: make a tiny Qwen3 that reasons a little, untagged, so that "Base" means something offline.

It practises on fresh prompts of MiniLaMP's SYNTHETIC training users with the simulated teacher's chains,
faults included: what is left to mend is for SFT and RL. The loss is on the response only. Muon on the matrices and a
wide embedding init make it learn within two minutes on one core; AdamW alone does not.
"""

import json
import logging
import math
import random
import re
import shutil
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from tagpr.benchmarks.minilamp.generate import draw
from tagpr.benchmarks.minilamp.reader import FaultRates, reason, untagged
from tagpr.benchmarks.minilamp.world import TASK_NAMES, User, population, visible
from tagpr.configuration import main
from tagpr.errors import StageError
from tagpr.runs import check_model_folder, check_tags_of, manifest, write_json_atomically
from tagpr.tags import format_response, split_response
from tagpr.tiny_model.tokenizer import MAX_POSITIONS, build_tokenizer

logger = logging.getLogger("tagpr.tiny_model.pretrain")  # run as __main__, too

WARMUP_STEPS = 20
LOG_EVERY_S = 10.0
METRICS_EVERY = 10
MAX_NEW_TOKENS = 80
IGNORED = -100

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response, the end of turn included."""


def run(config: DictConfig) -> None:
    """Make ``paths.base`` unless it is there; ``manifest.json`` and ``metrics.jsonl`` go to ``run.dir``.

    Raises:
        StageError: ``paths.base`` exists and is no model folder, or the training diverged.
    """
    base = str(config.paths.base)
    target = Path(base)
    if not config.base.make:
        logger.info("base model: %s as it is; nothing to make with setting=%s", base, config.setting)
        return
    if target.exists():
        check_model_folder(base, "paths.base", "base.sh")
        check_tags_of(target.parent, "paths.base")
        logger.info("base model: %s is there already; remove it to make another", base)
        return
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not target.parent.exists():
        logger.info("base model: %s of the Hugging Face hub; nothing to make", base)
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(config.base.threads)
    tokenizer, model = build(config)
    metrics = Path(config.run.dir) / "metrics.jsonl"
    seconds = train(config, tokenizer, model, metrics)
    strangers = population(config.base.world_seed, 100, first=1_000_000)
    quality = evaluate(model, tokenizer, strangers, config.base.evaluation_rows, config.run.seed)
    logger.info(
        "base model: exact match %.3f at temperature 1 on %d rows of unseen SYNTHETIC users, %.0f s",
        quality["exact_match"],
        config.base.evaluation_rows,
        seconds,
    )
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    record = manifest("base", {}, config.run.seed, synthetic=True, train_s=round(seconds, 1), **quality)
    write_json_atomically(Path(config.run.dir) / "manifest.json", record.model_dump())
    partial.rename(target)


def build(config: DictConfig) -> tuple[PreTrainedTokenizerFast, Qwen3ForCausalLM]:
    """Make the tokenizer and an untrained model of just its vocabulary (verl and vLLM must agree on it)."""
    tokenizer = build_tokenizer(config.base.world_seed, config.base.users)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(config.run.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **config.base.architecture,
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=padding,
        )
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=config.base.embedding_init_std)
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=padding, do_sample=True, temperature=1.0, top_k=0
    )
    return tokenizer, model


def train(
    config: DictConfig, tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM, metrics: Path
) -> float:
    """Train in place on chains made on the fly; the mean loss of every ten steps is a JSON line in ``metrics``.

    Returns the seconds it took.

    Raises:
        StageError: the loss is not finite.
    """
    base = config.base
    users = population(base.world_seed, base.users)
    rng = random.Random(f"practice of run {config.run.seed}")
    tasks = cycle(TASK_NAMES)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=base.matrix_learning_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=base.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, base.steps))
        for optimizer in optimizers
    ]
    metrics.parent.mkdir(parents=True, exist_ok=True)
    started = logged = time.monotonic()
    losses: list[float] = []
    model.train()
    with metrics.open("w", encoding="utf-8") as file:
        for step in range(1, base.steps + 1):
            rows = [_practice(tokenizer, task, users, rng) for task in islice(tasks, base.batch_size)]
            loss = response_loss(model, rows, tokenizer.pad_token_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise StageError(
                    f"base: the loss is {losses[-1]} at step {step}. Lower base.matrix_learning_rate."
                )
            now = time.monotonic()
            if step % METRICS_EVERY == 0 or step == base.steps:
                mean = sum(losses) / len(losses)
                losses = []
                line = {"step": step, "base/loss": mean, "base/seconds": round(now - started, 1)}
                file.write(json.dumps(line) + "\n")
                if now - logged >= LOG_EVERY_S or step == base.steps:
                    logged = now
                    file.flush()
                    logger.info("base model: step %d of %d, loss %.3f", step, base.steps, mean)
    return time.monotonic() - started


def response_loss(model: Qwen3ForCausalLM, rows: Sequence[Row], padding: int) -> torch.Tensor:
    """Mean cross-entropy per response token, in nats; prompts and padding (on the right) do not count."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((len(rows), width), padding)  # [batch, time]
    labels = torch.full((len(rows), width), IGNORED)
    for place, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[place, :end] = torch.tensor(prompt + response)
        labels[place, len(prompt) : end] = torch.tensor(response)
    # Padding stands on the right and attention is causal, so no mask is needed. Logits only where they count.
    hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
    counts = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counts]), labels[:, 1:][counts])


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, users: Sequence[User], rows: int, seed: int
) -> dict[str, float]:
    """Answer fresh prompts at temperature 1; shares of well-formed responses and of exactly right answers.

    Closing words are left out of the comparison on both sides: nobody can know them from the prompt.
    """
    rng = random.Random(f"evaluation of run {seed}")
    drawn = [(task, *draw(task, rng.choice(users), rng)) for task in islice(cycle(TASK_NAMES), rows)]
    model.eval()
    torch.manual_seed(seed)
    well_formed = dict.fromkeys(TASK_NAMES, 0)
    right = dict.fromkeys(TASK_NAMES, 0)
    for start in range(0, rows, 120):
        batch = drawn[start : start + 120]
        prompts = [_prompt_ids(tokenizer, prompt) for _, prompt, _ in batch]
        width = max(map(len, prompts))
        tokens = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for place, prompt in enumerate(prompts):
            tokens[place, width - len(prompt) :] = torch.tensor(prompt)
            mask[place, width - len(prompt) :] = 1
        output = model.generate(tokens, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS)[:, width:]
        for (task, _, gold), response in zip(batch, output.tolist(), strict=True):
            if tokenizer.eos_token_id not in response:
                continue
            text = tokenizer.decode(response[: response.index(tokenizer.eos_token_id)])
            parts = split_response(text)
            well_formed[task] += not parts.problem
            right[task] += not parts.problem and visible(task, parts.answer) == visible(task, gold)
    counts = {task: sum(row[0] == task for row in drawn) for task in TASK_NAMES}
    return {
        "rows": rows,
        "well_formed": sum(well_formed.values()) / rows,
        "exact_match": sum(right.values()) / rows,
        **{f"{task}/exact_match": right[task] / counts[task] for task in TASK_NAMES if counts[task]},
    }


def _learning_rate(step: int, steps: int) -> float:
    """Factor on the learning rates: linear warm-up, flat to 60 % of the steps, linear down to 5 %."""
    done = step / steps
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1.0 if done < 0.6 else max(0.05, (1.0 - done) / 0.4))


def _practice(
    tokenizer: PreTrainedTokenizerFast, task: str, users: Sequence[User], rng: random.Random
) -> Row:
    prompt, _ = draw(task, rng.choice(users), rng)
    reasoned = reason(prompt, rng, FaultRates())
    response = format_response(untagged(reasoned.steps), reasoned.answer)
    ids = tokenizer.encode(response, add_special_tokens=False)
    return _prompt_ids(tokenizer, prompt), [*ids, tokenizer.eos_token_id]


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


if __name__ == "__main__":
    main("base", run)
