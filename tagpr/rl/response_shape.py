"""What one response looks like: lengths and tags, as numbers and strings that verl carries beside its reward."""

from typing import Any

from tagpr.tags import THINK_CLOSE, THINK_OPEN, parse_segments, split_response
from tagpr.vocabulary import vocabulary


def response_shape(text: str, token_ids: list[int], tokenizer: Any) -> dict[str, float | str]:
    """Lengths and tags of a response; one constant set of keys.

    Args:
        text: the response as its reward sees it.
        token_ids: its own tokens, without the end of the turn.
        tokenizer: the policy's.

    Returns:
        ``reasoning_tokens``: tokens between ``<think>`` and ``</think>``; all of them where only ``<think>`` came, none where
        neither did, so that a policy that stops thinking shows as reasoning that gets shorter. ``answer_tokens``: the
        others, marks left out. ``tags``: tags of the segments in order, with spaces between them, read up to the first
        problem (``tags.parse_segments``). ``segments``, ``empty_segments``: how many, and how many that say nothing.
        ``opened_tags``, ``reopened_tags``: opening tags anywhere, in broken chains too, and those that came before already.
    """
    before, closed, _ = text.partition(THINK_CLOSE)
    unopened, opened, thought = before.partition(THINK_OPEN)
    if opened:
        reasoning = thought
    else:
        # A template may have written <think> into the prompt: what comes before </think> was thought all the same.
        reasoning = unopened if closed else ""
    if closed or not opened:
        thought_tokens = len(tokenizer.encode(reasoning.strip(), add_special_tokens=False))
    else:
        thought_tokens = len(token_ids)
    parsed = parse_segments(split_response(text).reasoning)
    opened_tags = [text.count(f"<{tag}>") for tag in vocabulary()]
    return {
        "reasoning_tokens": float(thought_tokens),
        "answer_tokens": float(max(0, len(token_ids) - thought_tokens - bool(opened) - bool(closed))),
        "tags": " ".join(tag for tag, _ in parsed.segments),
        "segments": float(len(parsed.segments)),
        "empty_segments": float(sum(1 for _, said in parsed.segments if not said)),
        "opened_tags": float(sum(opened_tags)),
        "reopened_tags": float(sum(times - 1 for times in opened_tags if times)),
    }
