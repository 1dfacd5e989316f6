"""The prompt of an Example within a token budget."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice

from tagpr.benchmarks.task import Task
from tagpr.benchmarks.tasks import get_task, render_prompt
from tagpr.errors import DataError
from tagpr.retrieval import select
from tagpr.schema import Example, ProfileItem
from tagpr.tags import neutralise

# Cut below this many words an item says nothing of its user: fewer items are the better use of the budget.
MIN_WORDS = 6

# Characters per token: more than tokenizers reach in any language, and a first guess where a prompt is far too long.
LONG_TOKEN, USUAL_TOKEN = 8.0, 3.0
# After so many measurements of one number of items the search takes what fits, or bisects until something does.
ATTEMPTS = 5

# A text is cut after any of these. Where a script has no spaces every character counts as a word, and an unbroken run of
# characters (an address, a blob) may be cut too: else one such item could not be shortened, and would cost all the others.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,40}}")


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
    largest that fits or nearly so; if ``MIN_WORDS`` are still too many, the last items (the oldest, with recency) are
    dropped. The query is never cut. A benchmark's own limit on words (``Task.shown_words``) does not count as a cut.

    Args:
        example: the row; its profile in file order.
        profile_size: number of items to show.
        retriever: a name of ``tagpr.retrieval.RETRIEVERS``.
        count_tokens: length in tokens of a prompt *including* whatever the caller wraps around it (chat
            template); None: no budget. Called once for a prompt that fits, two to five times for most others.
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
        example.profile,
        task.query_text(example.query),
        profile_size,
        retriever,
        item_text=task.item_text,
        user_id=example.user_id,
        seed=seed,
    )
    items = [_neutral(item) for item in chosen]
    if count_tokens is None or max_tokens is None:
        return Prompt(render_prompt(task.name, query, items), items_used=len(items), items_shortened=0)
    fitted = _Fit(task, query, items, count_tokens, max_tokens).best()
    if fitted is None:
        raise QueryTooLongError(
            f"{example.id}: its query alone has {count_tokens(render_prompt(task.name, query, ()))} tokens, the budget is "
            f"{max_tokens}. Raise benchmark.max_prompt_tokens or leave the row out."
        )
    return fitted


def _neutral(item: ProfileItem) -> ProfileItem:
    return item.model_copy(update={"fields": {name: neutralise(text) for name, text in item.fields.items()}})


class _Cuttable:
    """A profile item whose long field can be cut after any of its words; ``shown``: so many the benchmark shows at most."""

    def __init__(self, item: ProfileItem, field: str, shown: int | None) -> None:
        self.item = item
        self.field = field
        self.word_ends = [word.end() for word in islice(_WORD.finditer(item.fields[field]), shown)]

    def characters(self, words: int) -> int:
        """Length of the field cut to so many words."""
        return self.word_ends[min(words, len(self.word_ends)) - 1] if self.word_ends else 0

    def cut(self, words: int) -> ProfileItem:
        if len(self.word_ends) <= words:
            return self.item
        text = self.item.fields[self.field][: self.characters(words)]
        return self.item.model_copy(update={"fields": {**self.item.fields, self.field: text}})


@dataclass(frozen=True)
class _Measured:
    """A prompt with so many words of each item at most: its length in characters, about, and in tokens."""

    words: int
    characters: int
    prompt: Prompt

    @property
    def tokens(self) -> int:
        assert self.prompt.tokens is not None
        return self.prompt.tokens


class _Fit:
    """The search for the longest prompt within the budget.

    Tokens grow nearly in proportion to characters, and characters cost nothing to count: a few measurements find what a bisection
    finds in a dozen, and a profile far over the budget is never tokenized as a whole. Every prompt that is returned was measured.
    """

    def __init__(
        self,
        task: Task,
        query: str,
        items: Sequence[ProfileItem],
        count_tokens: Callable[[str], int],
        max_tokens: int,
    ) -> None:
        self.task = task
        self.query = query
        self.items = [_Cuttable(item, task.long_field, task.shown_words) for item in items]
        self.count_tokens = count_tokens
        self.max_tokens = max_tokens

    def best(self) -> Prompt | None:
        """The longest prompt of all items, else of as many as have room for ``MIN_WORDS`` each; None: the query is too long."""
        fitted = self._longest(len(self.items))
        if fitted is not None or not self.items:
            return fitted
        # Newest first: the last is the first to go.
        kept, low, high = 0, 0, len(self.items) - 1
        while low <= high:
            middle = (low + high) // 2
            if _Measured(MIN_WORDS, 0, self._measure(middle, MIN_WORDS)).tokens <= self.max_tokens:
                kept, low = middle, middle + 1
            else:
                high = middle - 1
        return self._longest(kept)

    def _longest(self, kept: int) -> Prompt | None:
        """The prompt of so many items with as many words of each as fit; None where ``MIN_WORDS`` do not."""
        items = self.items[:kept]
        whole = max((len(item.word_ends) for item in items), default=0)
        least = min(MIN_WORDS, whole)
        rest = len(render_prompt(self.task.name, self.query, [item.cut(least) for item in items]))
        rest -= sum(item.characters(least) for item in items)

        def characters(words: int) -> int:
            return rest + sum(item.characters(words) for item in items)

        fits: _Measured | None = None
        exceeds: _Measured | None = None
        low, high = least, whole  # still possible
        words = whole
        if characters(whole) > LONG_TOKEN * self.max_tokens:
            words = _most_words(characters, least, whole, USUAL_TOKEN * self.max_tokens)
        for attempt in count(1):
            measured = _Measured(words, characters(words), self._measure(kept, words))
            if measured.tokens <= self.max_tokens:
                fits, low = measured, words + 1
            else:
                exceeds, high = measured, words - 1
            if low > high or (fits and attempt >= ATTEMPTS):
                break
            words = _most_words(characters, least, high, self._target(fits, exceeds))
            if fits and words < low:
                break  # by all that is known, another word of each does not fit
            words = max(words, low) if attempt < ATTEMPTS else (low + high) // 2
        return fits.prompt if fits else None

    def _measure(self, kept: int, words: int) -> Prompt:
        items = self.items[:kept]
        text = render_prompt(self.task.name, self.query, [item.cut(words) for item in items])
        shortened = sum(len(item.word_ends) > words for item in items)
        return Prompt(text, kept, shortened, len(self.items) - kept, self.count_tokens(text))

    def _target(self, fits: _Measured | None, exceeds: _Measured | None) -> float:
        """At how many characters the budget should be used up, by the measurements there are."""
        known = fits or exceeds
        assert known is not None
        if fits and exceeds:
            slope = (exceeds.characters - fits.characters) / (exceeds.tokens - fits.tokens)
        else:
            slope = known.characters / max(known.tokens, 1)
        return known.characters + (self.max_tokens - known.tokens) * slope


def _most_words(characters: Callable[[int], int], low: int, high: int, target: float) -> int:
    """The most words in [low, high] with at most ``target`` characters; ``low`` where all have more."""
    return max(low, low + bisect_right(range(low, high + 1), target, key=characters) - 1)
