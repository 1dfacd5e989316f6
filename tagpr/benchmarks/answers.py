"""From a model's text to its answer: shared by every task with a closed list of answers (S32)."""

import re
from functools import lru_cache

from tagpr.benchmarks.task import Kind

_DECORATION = " \t\r\n\"'`*_.,;:!()[]{}“”‘’。，、；：！（）【】《》「」『』"
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|without|rather than|instead of)\b|n['’]t\b", re.I
)
_NUMBER = re.compile(r"(?<![\w.,/-])[0-9]+(?:\.[0-9]+)?(?![\w/%-]|[.,][0-9])")


def parse_label(text: str, labels: tuple[str, ...], kind: Kind) -> str:
    """Return the label that a text gives, or the stripped text where it gives none or several.

    The label comes back in its official spelling if the text is one (``**Comedy**``) or names exactly one as whole words
    (``The answer is [2].``, ``Tag: comedy``, ``4 out of 5``). Text that names several, or negates (``not comedy``), is
    ambiguous and comes back as it is: it then scores as a wrong answer, never as a lucky guess. The labels of a rating are
    whole numbers. LaMP's official code only strips; ``text.strip()`` is that stricter reading.
    """
    text = text.strip()
    if text in labels:
        return text
    bare = text.strip(_DECORATION).casefold()
    for label in labels:
        if bare == label.strip("[]").casefold():
            return label
    if _NEGATION.search(text):
        return text
    named = _named_ratings(labels, text) if kind == "rating" else _named_labels(labels, text)
    return named.pop() if len(named) == 1 and named <= set(labels) else text


def _named_ratings(labels: tuple[str, ...], text: str) -> set[str]:
    """Return the numbers in ``text`` other than the scale's; ``4.0`` counts as ``4``, ``4.5`` stays."""
    return {re.sub(r"\.0+$", "", number) for number in _NUMBER.findall(_scale(labels).sub(" ", text))}


@lru_cache(maxsize=64)
def _scale(labels: tuple[str, ...]) -> re.Pattern[str]:
    """How text names the scale itself: ``1 to 5``, ``1-5``, ``/5``, ``out of 5``."""
    low, high = min(map(int, labels)), max(map(int, labels))
    return re.compile(rf"\b{low}\s?(?:to|and|-|–)\s?{high}\b|(?:\bout\sof|/)\s?{high}\b", re.I)


def _named_labels(labels: tuple[str, ...], text: str) -> set[str]:
    # Longest first, and the search goes from left to right: "dark comedy" is not also "comedy".
    official = {label.casefold(): label for label in labels}
    pattern = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    found = re.findall(rf"(?<![\w-])(?:{pattern})(?![\w-])", text, re.I)
    return {official[name.casefold()] for name in found}
