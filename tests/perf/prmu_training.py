"""How fast a pair goes through PRMU in training, forwards and backwards, in the three layouts, in one run.

    python tests/perf/prmu_training.py --device cpu --threads 1

Groups of pairs share a prompt of about 1,400 tokens; responses have 150 to 600. ``padded_masked`` is what a usual trainer does:
both inputs of all pairs as one right-padded batch with its attention mask, through the model's own forward pass. The last
line is one JSON object; ratios are of the seconds of this run, on the CPU those of the processor (other work on the machine
does not count). ``gradient_error`` is |g - g_oracle| / |g_oracle| over all
parameters, the oracle being padding_free.
"""

import argparse
import json
import math
import random
import statistics
import time

import torch
from torch.nn.functional import logsigmoid
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from tagpr.prmu.packing import EncodedPair, logits, pack, use_packing

VOCABULARY = 8192
SIZES = {
    "15M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64},
    "39M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 11, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
LAYOUTS = ("shared_prefix", "padding_free", "padded", "padded_masked")


def make_pairs(count: int, rng: random.Random) -> list[EncodedPair]:
    """Two pairs of each group, prompts of 1,400 tokens on average (log-normal, a tenth of spread 0.3)."""
    pairs = []
    while len(pairs) < count:
        size = min(2400, max(700, round(1400 * math.exp(rng.gauss(0, 0.3) - 0.045))))
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(size)]
        for _ in range(min(2, count - len(pairs))):
            chosen, rejected = (
                [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(150, 600))] for _ in range(2)
            )
            pairs.append(EncodedPair(prompt + chosen, prompt + rejected))
    return pairs


def one_pass(
    model: Qwen3ForSequenceClassification, pairs: list[EncodedPair], layout: str, bf16: bool
) -> tuple[float, int]:
    """Seconds of a forward and backward pass, and tokens that went through the model."""
    device = model.device
    count = len(pairs)
    use_packing(model, "padded" if layout == "padded_masked" else layout)  # type: ignore[arg-type]
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if layout == "padded_masked":
            rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            values = (
                model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False).logits[:, 0].float()
            )
            tokens = ids.numel()
        else:
            batch = pack(pairs, layout, 0).to(device)  # type: ignore[arg-type]
            values = logits(model, batch, model.get_input_embeddings()(batch.users))
            tokens = batch.token_ids.numel()
    (-logsigmoid(values[:count] - values[count:]).mean()).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="39M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=4, help="of one forward pass")
    parser.add_argument(
        "--repeats", type=int, default=2, help="batches; every layout takes each of them in turn"
    )
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, num_labels=1, pad_token_id=0, max_position_embeddings=8192, **SIZES[given.size]
    )
    model = Qwen3ForSequenceClassification(config).to(given.device).train()
    parameters = sum(each.numel() for each in model.parameters())
    rng = random.Random(0)
    one_pass(model, [EncodedPair([5, 6, 7], [5, 6, 8])], "shared_prefix", given.bf16)

    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    tokens = dict.fromkeys(LAYOUTS, 0)
    errors = dict.fromkeys(LAYOUTS, 0.0)
    for repeat in range(given.repeats):
        pairs = make_pairs(given.pairs, rng)
        gradients = {}
        order = list(LAYOUTS)[repeat % 4 :] + list(LAYOUTS)[: repeat % 4]
        for layout in order:
            took, count = one_pass(model, pairs, layout, given.bf16)
            seconds[layout].append(took)
            tokens[layout] += count
            gradients[layout] = torch.cat([each.grad.flatten().cpu() for each in model.parameters()])
            print(f"{layout:>14}: {took:7.2f} s, {count} tokens", flush=True)
        oracle = gradients["padding_free"]
        for layout in LAYOUTS:
            error = ((gradients[layout] - oracle).norm() / oracle.norm()).item()
            errors[layout] = max(errors[layout], error)
    total = {layout: sum(values) for layout, values in seconds.items()}
    figures = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "threads": given.threads,
        "bf16": given.bf16,
        "parameters": parameters,
        "pairs": given.pairs * given.repeats,
        "seconds_per_pair": {layout: total[layout] / (given.pairs * given.repeats) for layout in LAYOUTS},
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
