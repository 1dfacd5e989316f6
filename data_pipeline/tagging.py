"""Restricted tagging: tags of the vocabulary in use, put into a chain that is otherwise left as it is (S12, S41).

Paper mode: the model writes the chain again with tags in it, and must change nothing else. Span mode: the model names the
first and the last piece of each segment and its tag as structured output, and our code puts the tags in. The same segments
give the same text in both.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from data_pipeline.endpoint import Unit
from data_pipeline.json_reply import read_object
from data_pipeline.pieces import Place, Span, cut, numbered, place_spans
from data_pipeline.prompts import PromptTemplate
from data_pipeline.settings import PromptFiles
from tagpr.chat.client import Reply
from tagpr.chat.structured import Structured, structured_request
from tagpr.schema import Chain
from tagpr.tags import check_tags, has_tags, parse_segments, strip_tags, vocabulary

Mode = Literal["paper", "span"]
Ask = Callable[[Unit], Awaitable[Reply]]

PROMPT_FIELDS = frozenset({"definitions", "example", "question", "chain_of_thought"})
SPAN_PROMPT_FIELDS = frozenset({"definitions", "question", "numbered_chain"})

_EXAMPLE = (
    ("analyze_input", "I am to choose one tag for a film from 1958."),
    ("examine_examples", "The user's three old films are all marked classic."),
    ("identify_patterns", "So age seems to be what makes a film classic for this user."),
    ("compare_entities", "A film from 1958 is as old as those."),
    ("make_decision", "I choose classic."),
)


@dataclass(frozen=True)
class Tagged:
    """``text``: the chain as ``<tag> segment </tag>``, one a line; empty where ``problem`` says why not.

    ``rejected``: problems of the replies that could not be taken, in order.
    """

    text: str
    problem: str
    rejected: tuple[str, ...] = ()


class TaggedSpan(Span):
    """A segment of a reply in span mode."""

    tag: str


class SpanReply(BaseModel):
    """What a reply in span mode holds."""

    model_config = ConfigDict(extra="forbid")
    segments: list[TaggedSpan]


@dataclass(frozen=True)
class RestrictedTagging:
    """How chains are tagged: the mode, its prompt, and the smallest number of segments (S26)."""

    mode: Mode
    template: PromptTemplate
    minimum: int
    structured: Structured = "json_schema"
    """What the server can do to keep a span reply in shape; whatever it is, the reply is checked here."""

    @classmethod
    def load(
        cls, mode: Mode, prompts: PromptFiles, minimum: int, structured: Structured = "json_schema"
    ) -> "RestrictedTagging":
        """Read the mode's prompt file.

        Raises:
            ConfigError: the prompt file cannot be used.
        """
        if mode == "span":
            key, reference, fields = "span_tagging", prompts.span_tagging, SPAN_PROMPT_FIELDS
        else:
            key, reference, fields = "restricted_tagging", prompts.restricted_tagging, PROMPT_FIELDS
        template = PromptTemplate.load(f"chains.prompts.{key}", reference, fields)
        return cls(mode, template, minimum, structured)

    def unfit(self, source: str) -> str:
        """Why no reply could make this chain right, or an empty string: nobody needs to be asked about it."""
        if problem := unfit(source):
            return problem
        few = self.mode == "span" and len(cut(source, self.minimum)) < self.minimum
        return "too_few_segments" if few else ""

    def prompt(self, question: str, source: str) -> str:
        """What the model is asked."""
        if self.mode == "span":
            shown = numbered(source, cut(source, self.minimum))
            return self.template.render(
                definitions=definitions_text(), question=question, numbered_chain=shown
            )
        return self.template.render(
            definitions=definitions_text(),
            example=example_text(),
            question=question,
            chain_of_thought=source,
        )

    def request(self) -> dict[str, Any]:
        """Fields of the request body."""
        if self.mode == "paper":
            return {}
        return structured_request(self.structured, span_reply_model(), "tagged_segments")

    def accept(self, source: str, reply: str) -> Tagged:
        """Read a reply: the tagged chain, or why it cannot be taken."""
        accept = accept_spans if self.mode == "span" else accept_tagged
        return accept(source, reply, self.minimum)

    def typical_reply(self, source: str, segments: int) -> str:
        """A reply as it would be for this chain with so many segments, for estimates of what replies cost."""
        pieces = cut(source, self.minimum)
        segments = max(1, min(segments, len(pieces)))
        tags = list(vocabulary())
        spans = [
            (number * len(pieces) // segments, (number + 1) * len(pieces) // segments)
            for number in range(segments)
        ]
        if self.mode == "span":
            reply = SpanReply(
                segments=[
                    TaggedSpan(first=low + 1, last=high, tag=tags[number % len(tags)])
                    for number, (low, high) in enumerate(spans)
                    if high > low
                ]
            )
            return reply.model_dump_json()
        places = [(pieces[low][0], pieces[high - 1][1]) for low, high in spans if high > low]
        return _insert(source, places, [tags[number % len(tags)] for number in range(len(places))])


async def tag_chain(chain: Chain, ask: Ask, tagging: RestrictedTagging, attempts: int) -> Tagged:
    """Ask for a tagged chain, again with another seed while the reply cannot be taken, at most ``attempts`` times.

    A chain that no reply could make right (``source_has_tags``, ``empty_chain``, ``too_few_segments``) is not asked about.
    """
    if problem := tagging.unfit(chain.reasoning):
        return Tagged("", problem)
    prompt, request = tagging.prompt(chain.prompt, chain.reasoning), tagging.request()
    tagged = Tagged("", "not_asked")
    rejected: list[str] = []
    for attempt in range(attempts):
        reply = await ask(Unit("tagger", prompt, attempt=attempt, request=request))
        tagged = tagging.accept(chain.reasoning, reply.text)
        if not tagged.problem:
            break
        rejected.append(tagged.problem)
    return replace(tagged, rejected=tuple(rejected))


def unfit(source: str) -> str:
    """Why a chain cannot be tagged by anybody, or an empty string."""
    if not source.strip():
        return "empty_chain"
    return "source_has_tags" if has_tags(source) else ""


def accept_tagged(source: str, reply: str, minimum: int) -> Tagged:
    """Accept a reply in paper mode only if it is the source chain, up to white space, with tags of the set put in.

    ``minimum`` is the smallest number of segments. Problems: ``rewritten``, or those of ``check_tags`` (S26). An empty
    segment is dropped. The text of the segments is the source's own, white space included: style cannot tell two taggers'
    chains apart.
    """
    text = reply.strip()
    if problem := unfit(source) or check_tags(text, minimum):
        return Tagged("", problem)
    segments = [(tag, _letters(part)) for tag, part in parse_segments(text).segments if part]
    if "".join(letters for _, letters in segments) != _letters(source):
        return Tagged("", "rewritten")
    where = [place for place, letter in enumerate(source) if not letter.isspace()]
    places: list[Place] = []
    done = 0
    for _, letters in segments:
        places.append((where[done], where[done + len(letters) - 1] + 1))
        done += len(letters)
    return _checked(source, _insert(source, places, [tag for tag, _ in segments]), minimum)


def accept_spans(source: str, reply: str, minimum: int) -> Tagged:
    """Accept a reply in span mode only if its segments are all of the chain, in order, with tags of the vocabulary.

    Problems: those of ``read_object``; ``wrong_shape``; ``tag_unknown``; those of ``place_spans``; ``too_few_segments``.
    """
    if problem := unfit(source):
        return Tagged("", problem)
    content, problem = read_object(reply)
    if content is None:
        return Tagged("", problem)
    try:
        spans = SpanReply.model_validate(content).segments
    except ValidationError:
        return Tagged("", "wrong_shape")
    if any(span.tag not in vocabulary() for span in spans):
        return Tagged("", "tag_unknown")
    places, problem = place_spans(spans, cut(source, minimum))
    if problem:
        return Tagged("", problem)
    return _checked(source, _insert(source, places, [span.tag for span in spans]), minimum)


def _insert(source: str, places: Sequence[Place], tags: Sequence[str]) -> str:
    """The one form that tagged chains are written in."""
    return "\n".join(
        f"<{tag}> {source[start:end]} </{tag}>" for tag, (start, end) in zip(tags, places, strict=True)
    )


def _checked(source: str, tagged: str, minimum: int) -> Tagged:
    if problem := check_tags(tagged, minimum):
        return Tagged("", problem)
    assert _letters(strip_tags(tagged)) == _letters(source), "tags were put into another chain"
    return Tagged(tagged, "")


def _letters(text: str) -> str:
    return "".join(text.split())


def span_reply_model() -> type[BaseModel]:
    """Shape of a span reply for the server: as :class:`SpanReply`, with the tags in use as the only ones."""
    tag: Any = (Literal[tuple(vocabulary())], Field(description="what the segment does"))
    span: Any = create_model("Segment", __base__=Span, tag=tag)
    segments: Any = (list[span], ...)
    return create_model("Segments", __config__=ConfigDict(extra="forbid"), segments=segments)


def definitions_text() -> str:
    """The tags in use with their meaning, one a line, as the prompt lists them (S11, S41)."""
    return "\n".join(f"- {tag}: {definition}" for tag, definition in vocabulary().items())


def example_text() -> str:
    """An example of a reply in paper mode: worked out for the paper's tags, only its form for others."""
    tags = list(vocabulary())
    if all(tag in tags for tag, _ in _EXAMPLE):
        chain = " ".join(text for _, text in _EXAMPLE)
        reply = "\n".join(f"<{tag}> {text} </{tag}>" for tag, text in _EXAMPLE)
        return (
            'A user who has called three films from before 1970 "classic" asks for the tag of a film from 1958, and the\n'
            f"chain was: {chain} The reply is:\n\n{reply}"
        )
    shown = [tags[number % len(tags)] for number in range(3)]
    words = ("the first sentences of the chain", "the sentences after them", "the last sentences")
    reply = "\n".join(f"<{tag}> {text} </{tag}>" for tag, text in zip(shown, words, strict=True))
    return f"With three segments, a reply has this form:\n\n{reply}"
