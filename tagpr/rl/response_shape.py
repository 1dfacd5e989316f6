"""What one response looks like: lengths and tags, as numbers and strings that verl carries beside its reward."""

from functools import lru_cache
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
    if closed:
        thought_tokens = _tokens_before_close(reasoning, bool(opened), text, token_ids, tokenizer)
    else:
        thought_tokens = len(token_ids) if opened else 0
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


def _tokens_before_close(
    reasoning: str, opened: bool, text: str, token_ids: list[int], tokenizer: Any
) -> int:
    """Tokens of the reasoning without blanks around it: counted where each mark is one token, else encoded again."""
    marks = {mark: _single(tokenizer, mark) for mark in (THINK_OPEN, THINK_CLOSE)}
    # As many in the tokens as in the text: none was spelled out of smaller pieces.
    if any(one is None or token_ids.count(one) != text.count(mark) for mark, one in marks.items()):
        return len(tokenizer.encode(reasoning.strip(), add_special_tokens=False))
    start = token_ids.index(marks[THINK_OPEN]) + 1 if opened else 0  # type: ignore[arg-type]
    end = token_ids.index(marks[THINK_CLOSE])  # type: ignore[arg-type]
    while start < end and _blank(tokenizer, token_ids[start]):
        start += 1
    while end > start and _blank(tokenizer, token_ids[end - 1]):
        end -= 1
    return end - start


@lru_cache(maxsize=16)
def _single(tokenizer: Any, mark: str) -> int | None:
    ids = tokenizer.encode(mark, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


@lru_cache(maxsize=4096)
def _blank(tokenizer: Any, token: int) -> bool:
    return not tokenizer.decode([token]).strip()
