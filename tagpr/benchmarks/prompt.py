"""The prompt of an Example within a token budget."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tagpr.benchmarks.tasks import get_task, render_prompt
from tagpr.errors import DataError
from tagpr.retrieval import select
from tagpr.schema import Example, ProfileItem
from tagpr.tags import neutralise

# Cut below this many words an item says nothing of its user: fewer items are the better use of the budget.
MIN_WORDS = 6

_WORD = re.compile(r"\S+")


class QueryTooLongError(DataError):
    """The query alone exceeds the token budget: nothing may be cut from it, so this row has no prompt."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt and what was done to make it fit.

    ``items_used`` counts the profile items shown, ``items_shortened`` those of them that lost words, and
    ``items_dropped`` those that were selected and left out; ``tokens`` is the length, None without a budget.
    """

    text: str
    items_used: int
    items_shortened: int
    items_dropped: int = 0
    tokens: int | None = None


def build_prompt(
    example: Example,
    profile_size: int,
    retriever: str,
    count_tokens: Callable[[str], int] | None,
    max_tokens: int | None,
    seed: int = 0,
) -> Prompt:
    """Select profile items, make untrusted text harmless, render the official prompt and fit it to a budget.

    Every span that a user wrote (query and profile fields) is neutralised before it is rendered. A prompt
    over ``max_tokens`` is made to fit in the spirit of the official code, which gives each item an equal
    share and passes on what short ones leave: the task's long field is cut to a common number of words, the
    largest that fits; if ``MIN_WORDS`` are still too many, the last items (the oldest, with recency) are
    dropped. The query is never cut.

    Args:
        example: the row; its profile in file order.
        profile_size: number of items to show.
        retriever: a name of ``tagpr.retrieval.RETRIEVERS``.
        count_tokens: length in tokens of a prompt *including* whatever the caller wraps around it (chat
            template); None: no budget. Called once for a prompt that fits, a dozen times for another.
        max_tokens: the budget; None: no budget.
        seed: for the random retriever.

    Raises:
        QueryTooLongError: the query alone exceeds the budget. A caller may skip the row if it counts it.
        DataError: dates that cannot be ordered.
        ConfigError: unknown task or retriever.
    """
    task = get_task(example.task)
    query = neutralise(example.query)
    chosen = select(
        example.profile, example.query, profile_size, retriever, user_id=example.user_id, seed=seed
    )
    items = [_neutral(item) for item in chosen]
    text = render_prompt(task.name, query, items)
    if count_tokens is None or max_tokens is None:
        return Prompt(text, items_used=len(items), items_shortened=0)
    tokens = count_tokens(text)
    if tokens <= max_tokens:
        return Prompt(text, items_used=len(items), items_shortened=0, tokens=tokens)
    alone = tokens if not items else count_tokens(query)
    if alone > max_tokens:
        raise QueryTooLongError(
            f"{example.id}: its query alone has {alone} tokens, the budget is {max_tokens}. "
            "Raise benchmark.max_prompt_tokens or leave the row out."
        )
    return _fit(
        task.name, query, [_Cuttable(item, task.long_field) for item in items], count_tokens, max_tokens
    )


def _neutral(item: ProfileItem) -> ProfileItem:
    return item.model_copy(update={"fields": {name: neutralise(text) for name, text in item.fields.items()}})


class _Cuttable:
    """A profile item whose long field can be cut after any of its words."""

    def __init__(self, item: ProfileItem, field: str) -> None:
        self.item = item
        self.field = field
        self.word_ends = [word.end() for word in _WORD.finditer(item.fields[field])]

    def cut(self, words: int) -> ProfileItem:
        if len(self.word_ends) <= words:
            return self.item
        text = self.item.fields[self.field][: self.word_ends[words - 1]]
        return self.item.model_copy(update={"fields": {**self.item.fields, self.field: text}})


def _fit(
    task: str,
    query: str,
    items: Sequence[_Cuttable],
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> Prompt:
    """Keep as many items as fit at ``MIN_WORDS`` each, then as many words of each; the query alone fits."""

    def attempt(kept: int, words: int) -> Prompt | None:
        text = render_prompt(task, query, [item.cut(words) for item in items[:kept]])
        tokens = count_tokens(text)
        if tokens > max_tokens:
            return None
        shortened = sum(len(item.word_ends) > words for item in items[:kept])
        return Prompt(text, kept, shortened, len(items) - kept, tokens)

    # Newest first: the last is the first to go. Trying all of them first spares most prompts the search.
    best = attempt(len(items), MIN_WORDS)
    if best is None:
        best = _largest(0, len(items), lambda kept: attempt(kept, MIN_WORDS))
    assert best is not None, "the query alone was measured and fits"
    kept = best.items_used
    longest = max((len(item.word_ends) for item in items[:kept]), default=0)
    return _largest(MIN_WORDS + 1, longest + 1, lambda words: attempt(kept, words)) or best


def _largest(low: int, high: int, attempt: Callable[[int], Prompt | None]) -> Prompt | None:
    """Return the prompt of the largest number in [low, high) that fits, by bisection; None if none does.

    Tokens grow with words but for a token or two at a cut; every prompt that is returned was measured.
    """
    best = None
    while low < high:
        middle = (low + high) // 2
        prompt = attempt(middle)
        if prompt is None:
            high = middle
        else:
            best, low = prompt, middle + 1
    return best
