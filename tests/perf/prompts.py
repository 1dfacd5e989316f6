"""What fitting prompts to a budget costs: measurements and CPU seconds, beside a plain bisection over the words of an item.

    python tests/perf/prompts.py [--rows 300] [--items 8] [--budget 2048]

Rows are made up: 32 reviews of 5 to 600 words each, as long as real ones. Both sides use one tokenizer and its chat template,
and the bisection too measures the whole prompt first. ``fill`` is the share of the budget that prompts use. The last
line of standard output is one JSON object.
"""

import argparse
import json
import random
import time
from collections.abc import Callable

from tagpr.benchmarks.prompt import MIN_WORDS, build_prompt
from tagpr.benchmarks.tasks import render_prompt
from tagpr.schema import Example, ProfileItem
from tagpr.tiny_model.tokenizer import build_tokenizer

TEXT = "the battery lasts but a strap broke within weeks and nobody answered so I would not buy it again honestly"


def rows(count: int) -> list[Example]:
    """Users with reviews, oldest first."""
    rng, words = random.Random(0), TEXT.split()

    def review() -> str:
        return " ".join(rng.choices(words, k=min(600, 5 + int(rng.expovariate(1 / 120)))))

    return [
        Example(
            id=str(number), task="lamp3", split="dev", user_id="u", query=f"review: {review()}", gold="4",
            profile=tuple(
                ProfileItem(id=str(item), fields={"text": review(), "score": "4"}) for item in range(32)
            ),
        )
        for number in range(count)
    ]  # fmt: skip


def bisection(row: Example, items: int, count_tokens: Callable[[str], int], budget: int) -> int:
    """Tokens of the longest prompt of all items with a common number of words; the items have room for MIN_WORDS."""
    shown = row.profile[::-1][:items]
    words = [item.fields["text"].split(" ") for item in shown]

    def tokens(most: int) -> int:
        cut = [
            item.model_copy(update={"fields": {**item.fields, "text": " ".join(text[:most])}})
            for item, text in zip(shown, words, strict=True)
        ]
        return count_tokens(render_prompt(row.task, row.query, cut))

    low, high = MIN_WORDS, max(map(len, words))
    best = tokens(high)
    if best <= budget:
        return best
    while low < high:
        middle = (low + high) // 2
        found = tokens(middle)
        if found <= budget:
            best, low = found, middle + 1
        else:
            high = middle
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--budget", type=int, default=2048)
    arguments = parser.parse_args()
    tokenizer, calls = build_tokenizer(0), 0

    def count_tokens(text: str) -> int:
        nonlocal calls
        calls += 1
        conversation = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False))

    def ours(row: Example) -> int:
        prompt = build_prompt(row, arguments.items, "recency", count_tokens, arguments.budget)
        assert prompt.items_dropped == 0, "the bisection drops none: choose a larger budget"
        return prompt.tokens or 0

    def theirs(row: Example) -> int:
        return bisection(row, arguments.items, count_tokens, arguments.budget)

    examples = rows(arguments.rows)
    figures: dict[str, float] = {"rows": len(examples), "items": arguments.items, "budget": arguments.budget}
    for name, fit in (("ours", ours), ("bisection", theirs)):
        calls, begin = 0, time.process_time()
        lengths = [fit(row) for row in examples]
        figures[f"{name}_cpu_s"] = round(time.process_time() - begin, 2)
        figures[f"{name}_measurements_a_row"] = round(calls / len(examples), 2)
        figures[f"{name}_fill"] = round(sum(lengths) / len(lengths) / arguments.budget, 4)
        assert max(lengths) <= arguments.budget
    figures["times_faster"] = round(figures["bisection_cpu_s"] / figures["ours_cpu_s"], 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
