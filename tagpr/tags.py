"""The tags of a reasoning chain and the shape of a response: one linear parser, the checks (S11, S24, S26).

Grammar. A *tag* is ``<name>`` or ``</name>`` with a name of ``[A-Za-z_][\\w-]*`` and nothing else between
the brackets, so that ``3 < 4``, ``<3`` and ``<br/>`` are plain text. A *segment* is ``<name> text
</name>``. Reasoning is a sequence of segments; between them only white space may stand. A *response* is
``<think>`` reasoning ``</think>`` answer.

Where a function takes a ``vocabulary`` and gets none, it goes by the one in use (:mod:`tagpr.vocabulary`).
Every function runs in time linear in the text: a back-reference regex such as ``<(\\w+)>.*?</\\1>`` takes
seconds on a few hundred adversarial characters, and the policy writes what it likes.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from tagpr.errors import ConfigError, DataError
from tagpr.vocabulary import CHAT_MARKUP, VARIABLE, name_problem
from tagpr.vocabulary import vocabulary as vocabulary
from tagpr.vocabulary import vocabulary_hash as vocabulary_hash

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
END_OF_TURN = "<|im_end|>"

# Possessive quantifiers (*+, ?+) never give back what they took, so no input makes a match attempt backtrack.
_TAG = re.compile(r"<(/?+)([A-Za-z_][\w-]*+)>")
_CONTROL_START = re.compile(r"<(?=[|\uFF5C])")
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]++\|>")


@dataclass(frozen=True, slots=True)
class Segments:
    """Tagged reasoning, read up to the first problem; ``problem`` is its name, or empty."""

    segments: list[tuple[str, str]]
    """(tag, text without the white space around it), in order; empty texts included."""
    problem: str


@dataclass(frozen=True, slots=True)
class Response:
    """A response taken apart; ``problem`` names the first violated rule of S24, or is empty.

    ``reasoning`` and ``answer`` have no white space around them. Both are empty where the ``<think>`` pair
    itself is broken, since then nobody can say which is which.
    """

    reasoning: str
    answer: str
    problem: str


@dataclass(frozen=True, slots=True)
class _Known:
    """A vocabulary as the functions below use it."""

    names: frozenset[str]
    reserved: re.Pattern[str]
    """What harmless text does not contain: chat markup and the vocabulary's tags, in any case and spacing."""


def _known(tags: Iterable[str] | None) -> _Known:
    """``None`` is the vocabulary in use, which an environment variable can change: no default argument holds it."""
    return _in_use(os.environ.get(VARIABLE)) if tags is None else _compiled(tuple(tags))


@lru_cache(maxsize=8)
def _in_use(path: str | None) -> _Known:
    """Of the file that the variable names. Looked up by its path: the reward asks several times a response."""
    return _compiled(tuple(vocabulary()))


@lru_cache(maxsize=64)
def _compiled(tags: tuple[str, ...]) -> _Known:
    if not tags:
        raise ConfigError("tags: the vocabulary is empty. Name at least one tag.")
    for number, name in enumerate(tags):
        problem = name_problem(name, tags[:number])
        if problem:
            raise ConfigError(f"tags: {name!r} {problem}")
    names = "|".join(re.escape(name) for name in (*CHAT_MARKUP, *tags))
    reserved = re.compile(rf"<(\s*+(?:/\s*+)?+(?:{names})\s*+/?+\s*+)>", re.IGNORECASE)
    return _Known(frozenset(tags), reserved)


def has_tags(text: str) -> bool:
    """Whether anything in ``text`` reads as a tag, of whatever vocabulary: such text fits into no segment."""
    return _TAG.search(text) is not None


def strip_tags(text: str, vocabulary: Iterable[str] | None = None) -> str:
    """Text without the vocabulary's tags: the source chain up to white space (S12).

    Neighbouring pieces are joined by one space, or by a blank line where the text had one; white space
    inside a piece stays. Other tags are left alone.

    Raises:
        ConfigError: the vocabulary is not a list of distinct tag names.
    """
    names = _known(vocabulary).names
    pieces: list[str] = []
    blank_line = False

    def add(piece: str) -> None:
        nonlocal blank_line
        kept = piece.strip()
        before = piece[: len(piece) - len(piece.lstrip())]
        blank_line = blank_line or before.count("\n") > 1
        if kept:
            if pieces:
                pieces.append("\n\n" if blank_line else " ")
            pieces.append(kept)
            blank_line = piece[len(piece.rstrip()) :].count("\n") > 1

    end = 0
    for match in _TAG.finditer(text):
        if match[2] in names:
            add(text[end : match.start()])
            end = match.end()
    add(text[end:])
    return "".join(pieces)


def parse_segments(reasoning: str, vocabulary: Iterable[str] | None = None) -> Segments:
    """Read tagged reasoning; the first problem in reading order ends the reading and is named.

    ``tag_unknown``: a tag outside the vocabulary (names are case-sensitive), wherever it stands.
    ``tag_nested``: a tag opens inside a segment. ``tag_mismatch``: a segment is closed by another tag's name.
    ``tag_unopened``: a tag closes where none is open. ``tag_unclosed``: the text ends inside a segment.
    ``text_outside_tags``: something other than white space stands outside the segments.

    Raises:
        ConfigError: the vocabulary is not a list of distinct tag names.
    """
    names = _known(vocabulary).names
    segments: list[tuple[str, str]] = []
    opened = ""
    end = 0
    for match in _TAG.finditer(reasoning):
        closing, name = match.groups()
        text = reasoning[end : match.start()].strip()
        end = match.end()
        if not opened and text:
            return Segments(segments, "text_outside_tags")
        if name not in names:
            return Segments(segments, "tag_unknown")
        if not closing:
            if opened:
                return Segments(segments, "tag_nested")
            opened = name
        elif not opened:
            return Segments(segments, "tag_unopened")
        elif name != opened:
            return Segments(segments, "tag_mismatch")
        else:
            segments.append((name, text))
            opened = ""
    if opened:
        return Segments(segments, "tag_unclosed")
    if reasoning[end:].strip():
        return Segments(segments, "text_outside_tags")
    return Segments(segments, "")


def check_tags(reasoning: str, minimum: int = 3, vocabulary: Iterable[str] | None = None) -> str:
    """The logical checks behind R_tag (eq. 9, S26): the first problem's name, or an empty string.

    All of: every problem of :func:`parse_segments`, then ``too_few_segments``, when fewer than ``minimum``
    segments say anything (an empty segment is allowed but does not count). The same tag may occur any
    number of times.
    """
    parsed = parse_segments(reasoning, vocabulary)
    if parsed.problem:
        return parsed.problem
    if sum(1 for _, text in parsed.segments if text) < minimum:
        return "too_few_segments"
    return ""


def split_response(text: str, vocabulary: Iterable[str] | None = None) -> Response:
    """Take a response apart (S24): one ``<think>…</think>`` first, then a non-empty answer without tags.

    White space around the parts is dropped, and so is one ``<|im_end|>`` at the end. Problems, in the order
    of the checks: ``empty_response``; ``no_think``: neither mark; ``several_thinks``: one of the marks
    twice; ``think_unopened`` and ``think_unclosed``: one mark only; ``think_not_first``: text before
    ``<think>``, or the marks in the wrong order; ``control_token``: ``<|name|>`` anywhere, such as a second
    end of turn; ``empty_reasoning``; ``empty_answer``; ``tag_in_answer``: one of the vocabulary's tags or
    of the chat format's, in any case or spacing (HTML such as ``<i>``, which real titles contain, is no tag
    here).

    Raises:
        ConfigError: the vocabulary is not a list of distinct tag names.
    """
    reserved = _known(vocabulary).reserved
    text = text.strip().removesuffix(END_OF_TURN).strip()
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    problem = ""
    if not text:
        problem = "empty_response"
    elif not opened and not closed:
        problem = "no_think"
    elif opened > 1 or closed > 1:
        problem = "several_thinks"
    elif not opened:
        problem = "think_unopened"
    elif not closed:
        problem = "think_unclosed"
    elif not text.startswith(THINK_OPEN):
        problem = "think_not_first"
    if problem:
        return Response("", "", problem)
    reasoning, answer = (part.strip() for part in text[len(THINK_OPEN) :].split(THINK_CLOSE))
    if _CONTROL_TOKEN.search(text):
        problem = "control_token"
    elif not reasoning:
        problem = "empty_reasoning"
    elif not answer:
        problem = "empty_answer"
    elif reserved.search(answer):
        problem = "tag_in_answer"
    return Response(reasoning, answer, problem)


def format_response(reasoning: str, answer: str, vocabulary: Iterable[str] | None = None) -> str:
    """The one text form of a response, without its end of turn; white space around both parts is dropped.

    Raises:
        DataError: :func:`split_response` would not give the same two parts back.
    """
    text = f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{answer.strip()}"
    read = split_response(text, vocabulary)
    problem = read.problem
    if not problem and read.answer != answer.strip():  # it ended with an end of turn
        problem = "control_token"
    if problem:
        raise DataError(f"response: {problem}, so it cannot be read back. Drop it, or neutralise its parts.")
    return text


def neutralise(text: str, vocabulary: Iterable[str] | None = None) -> str:
    """Make untrusted text unable to act as a control token, chat mark or reasoning tag; change nothing else.

    The angle brackets of ``<|``, of ``<think>`` and its like, and of the vocabulary's tags (opening or
    closing, any case, any white space within) become single guillemets (``‹``, ``›``). Idempotent. Texts
    that were made harmless one by one stay so when joined, unless the joint itself makes a mark: put a
    separator between them.

    Raises:
        ConfigError: the vocabulary is not a list of distinct tag names.
    """
    return _CONTROL_START.sub("‹", _known(vocabulary).reserved.sub(r"‹\1›", text))
