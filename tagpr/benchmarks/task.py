"""What a benchmark says of one of its tasks: how rows look, how they are shown, what counts as an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["classification", "rating", "generation"]

Fields = Mapping[str, str]
"""A profile item's texts by the field names of its benchmark."""


@dataclass(frozen=True)
class Task:
    """One task of one benchmark.

    ``labels`` is the closed list of answers (empty for generation); ``fields`` are the fields of a profile item,
    ``long_field`` the one of them that is shown in the prompt and may be shortened to fit it. ``metrics`` names what the
    benchmark reports, in its order. ``rouge_tokens`` are rouge-score's ``words`` (runs of ``a-z0-9``) or, for text that
    has none, ``characters``. ``shown_words`` is how many words of the long field the benchmark's own prompt shows at most
    (None: all); ``render`` sees to it.
    """

    name: str
    title: str
    benchmark: str
    kind: Kind
    labels: tuple[str, ...]
    fields: tuple[str, ...]
    long_field: str
    metrics: tuple[str, ...]
    render: Callable[[str, Sequence[Fields]], str]
    """(query, fields of the items shown, newest first) -> the prompt that the benchmark's own code would make."""
    parse: Callable[[str], str]
    """A model's answer -> the answer it gives, or the stripped text where it gives none or several."""
    query_text: Callable[[str], str]
    """The query -> what a retriever searches with."""
    item_text: Callable[[Fields], str]
    """Fields of an item -> what a retriever searches in."""
    rouge_tokens: Literal["words", "characters"] = "words"
    shown_words: int | None = None
