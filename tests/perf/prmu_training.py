"""How fast pairs go through PRMU in training, forwards and backwards, in its layouts and in a usual trainer's, in one run.

    python tests/perf/prmu_training.py --device cpu --threads 1

A batch is what one update takes: prompts with groups of five responses of 150 to 600 tokens, of which two pairs each are drawn
(our pipeline's chains give 1.9 pairs a prompt). Lengths of prompts are those of LaMP-3's real profiles at eight items where they
lie in ../shared/data (a log-normal spread of 0.65), cut at 3,200, 1,350 on average; elsewhere log-normal ones of about that mean
and a spread of 0.6. Each batch has one prompt of each quantile, so that few batches stand for all.

``shared_prefix``  ours: pairs of a prompt together, the prompt and each response once
``pair_by_pair``   ours with train_prmu.by_prompt=false: what the two inputs of one pair have in common, once
``padding_free``   all inputs in full, none padded (OpenRLHF's reward trainer with --packing_samples); the oracle of the gradients
``padded``         ours: pairs sorted by length, no mask, since a causal model never looks at padding on the right
``padded_masked``  the usual trainer (TRL's RewardTrainer, OpenRLHF's without packing): pairs in random order, chosen and rejected
                   of --micro-batch pairs right-padded to the longest, with an attention mask, through the model's own forward
                   pass. TRL's default is 8 pairs; 4 pad less, and 8 such pairs do not fit in 16 GB beside everything else.

The last line is one JSON object; ratios are of the seconds of this run, on the CPU those of the processor (other work on the
machine does not count). ``gradient_error`` is |g - g_oracle| / |g_oracle| over all parameters and the whole batch.
"""

import argparse
import json
import math
import random
import re
import statistics
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from tagpr.prmu.batches import micro_batches
from tagpr.prmu.packing import EncodedPair, logits, pack, use_packing

REAL = Path(__file__).resolve().parents[3] / "shared/data/lamp3_real/dev_questions.json"
# A tokenizer of Qwen's kind makes somewhat more tokens than there are words and signs.
PROFILE_ITEMS, LONGEST_PROMPT, TOKENS_PER_WORD = 8, 3200, 1.15
GROUP, PAIRS_OF_A_PROMPT = 5, 2
VOCABULARY = 8192
SIZES = {
    "15M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64},
    "39M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 11, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
LAYOUTS = ("shared_prefix", "pair_by_pair", "padding_free", "padded", "padded_masked")


def prompt_lengths(rng: random.Random) -> tuple[str, list[int]]:
    """Where they come from, and the lengths in order."""
    if not REAL.exists():
        lengths = sorted(round(1400 * math.exp(rng.gauss(0, 0.6) - 0.18)) for _ in range(1000))
        return "log-normal", [min(LONGEST_PROMPT, max(250, each)) for each in lengths]
    found = []
    for question in json.loads(REAL.read_text("utf-8")):
        texts = [question["input"], *(item["text"] for item in question["profile"][-PROFILE_ITEMS:])]
        found.append(round(TOKENS_PER_WORD * sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts)))
    return "LaMP-3 dev, 8 items", sorted(min(LONGEST_PROMPT, each) for each in found)


def make_batch(prompts: int, lengths: Sequence[int], rng: random.Random) -> list[EncodedPair]:
    """Pairs of that many prompts, pairs of a prompt next to each other."""
    pairs = []
    for number in range(prompts):
        size = rng.choice(lengths[len(lengths) * number // prompts : len(lengths) * (number + 1) // prompts])
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(size)]
        group = [
            prompt + [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(150, 600))]
            for _ in range(GROUP)
        ]
        for chosen, rejected in rng.sample(list(combinations(group, 2)), PAIRS_OF_A_PROMPT):
            pairs.append(EncodedPair(chosen, rejected, size))
    return pairs


def one_update(
    model: Qwen3ForSequenceClassification,
    pairs: list[EncodedPair],
    layout: str,
    micro_batch: int,
    rng: random.Random,
    bf16: bool,
) -> tuple[float, int]:
    """Seconds of the forward and backward passes over all pairs, and tokens that went through the model."""
    device, tokens = model.device, 0
    if layout == "padded":
        pairs = sorted(pairs, key=lambda pair: pair.length)
    elif layout == "padded_masked":
        pairs = rng.sample(pairs, len(pairs))
    elif layout != "shared_prefix":
        pairs = [pair._replace(prompt_tokens=0) for pair in pairs]
    packing = {"pair_by_pair": "shared_prefix", "padded_masked": "padded"}.get(layout, layout)
    use_packing(model, packing)  # type: ignore[arg-type]
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    for part in micro_batches(pairs, micro_batch, layout == "shared_prefix"):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if layout == "padded_masked":
                rows = [pair.chosen for pair in part] + [pair.rejected for pair in part]
                longest = max(map(len, rows))
                ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
                mask = (ids != 0).long()
                values = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
                tokens += ids.numel()
            else:
                batch = pack(part, packing, 0).to(device)  # type: ignore[arg-type]
                values = logits(model, batch, model.get_input_embeddings()(batch.users))
                tokens += batch.token_ids.numel()
        (-logsigmoid(values[: len(part)] - values[len(part) :]).sum() / len(pairs)).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="15M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4, help="of a batch; each has two pairs")
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs of one forward pass")
    parser.add_argument(
        "--repeats", type=int, default=2, help="batches; every layout takes each of them in turn"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, num_labels=1, pad_token_id=0, max_position_embeddings=8192, **SIZES[given.size]
    )
    model = Qwen3ForSequenceClassification(config).to(given.device).train()
    parameters = sum(each.numel() for each in model.parameters())
    rng = random.Random(given.seed)
    source, lengths = prompt_lengths(rng)
    one_update(model, [EncodedPair([5, 6, 7], [5, 6, 8])], "shared_prefix", 1, rng, given.bf16)

    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    tokens = dict.fromkeys(LAYOUTS, 0)
    errors = dict.fromkeys(LAYOUTS, 0.0)
    for _ in range(given.repeats):
        pairs = make_batch(given.prompts, lengths, rng)
        gradients = {}
        for layout in rng.sample(LAYOUTS, len(LAYOUTS)):
            took, count = one_update(model, pairs, layout, given.micro_batch, rng, given.bf16)
            seconds[layout].append(took)
            tokens[layout] += count
            gradients[layout] = torch.cat([each.grad.flatten().cpu() for each in model.parameters()])
            print(f"{layout:>14}: {took:7.2f} s, {count} tokens", flush=True)
        oracle = gradients["padding_free"]
        for layout in LAYOUTS:
            error = ((gradients[layout] - oracle).norm() / oracle.norm()).item()
            errors[layout] = max(errors[layout], error)
    count_of_pairs = given.prompts * PAIRS_OF_A_PROMPT * given.repeats
    total = {layout: sum(values) for layout, values in seconds.items()}
    figures = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "threads": given.threads,
        "bf16": given.bf16,
        "parameters": parameters,
        "prompts": source,
        "mean_prompt_tokens": round(statistics.mean(lengths)),
        "pairs": count_of_pairs,
        "micro_batch": given.micro_batch,
        "seconds_per_pair": {layout: total[layout] / count_of_pairs for layout in LAYOUTS},
        "tokens": tokens,
        "shared_prefix_over": {
            layout: {
                "ratio": total[layout] / total["shared_prefix"],
                "of_each_batch": [
                    round(a / b, 3) for a, b in zip(seconds[layout], seconds["shared_prefix"], strict=True)
                ],
                "median": statistics.median(
                    a / b for a, b in zip(seconds[layout], seconds["shared_prefix"], strict=True)
                ),
            }
            for layout in LAYOUTS[1:]
        },
        "gradient_error": errors,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
