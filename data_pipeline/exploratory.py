"""How chains are tagged freely (S9): what the tagger is asked, and which of its replies can be taken.

The tagger gets no list of tags. It names segments in its own words, by numbers of pieces as in span mode, and says what each
name means.
"""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.json_reply import read_object
from data_pipeline.pieces import Span, cut, numbered, place_spans
from data_pipeline.prompts import PromptTemplate
from tagpr.chat.structured import Structured, structured_request
from tagpr.schema import Chain, Record

PROMPT_FIELDS = frozenset({"question", "numbered_chain"})

# What the prompt asks of a tag, and room for one that is a little longer.
_TAG = re.compile(r"[\w][\w \-]{0,59}")
_LONGEST_PURPOSE = 300


class Proposal(Record):
    """A tag that was proposed for one segment of a chain."""

    chain_id: str
    task: str
    tag: str
    purpose: str
    segment: str


class FreeSpan(Span):
    """A segment of an exploratory reply."""

    tag: str
    purpose: str


class FreeReply(BaseModel):
    """What an exploratory reply holds."""

    model_config = ConfigDict(extra="forbid")
    segments: list[FreeSpan]


@dataclass(frozen=True)
class ExploratoryTagging:
    """How chains are tagged freely."""

    template: PromptTemplate
    structured: Structured = "json_schema"

    @classmethod
    def load(cls, reference: str, structured: Structured = "json_schema") -> "ExploratoryTagging":
        """Read the prompt file.

        Raises:
            ConfigError: it cannot be used.
        """
        return cls(
            PromptTemplate.load("chains.prompts.exploratory_tagging", reference, PROMPT_FIELDS), structured
        )

    def prompt(self, question: str, source: str) -> str:
        """What the model is asked."""
        return self.template.render(question=question, numbered_chain=numbered(source, cut(source)))

    def request(self) -> dict[str, Any]:
        """Fields of the request body."""
        return structured_request(self.structured, FreeReply, "named_segments")

    def accept(self, chain: Chain, reply: str) -> tuple[list[Proposal], str]:
        """Proposals of a reply, or the problem: as ``accept_spans``, with ``tag_malformed`` and ``purpose_malformed``."""
        content, problem = read_object(reply)
        if content is None:
            return [], problem
        try:
            spans = FreeReply.model_validate(content).segments
        except ValidationError:
            return [], "wrong_shape"
        if not all(_TAG.fullmatch(span.tag.strip()) for span in spans):
            return [], "tag_malformed"
        purposes = [span.purpose.strip() for span in spans]
        if not all(0 < len(text) <= _LONGEST_PURPOSE and text.isprintable() for text in purposes):
            return [], "purpose_malformed"
        places, problem = place_spans(spans, cut(chain.reasoning))
        if problem:
            return [], problem
        return [
            Proposal(
                chain_id=chain.id,
                task=chain.task,
                tag=span.tag.strip(),
                purpose=purpose,
                segment=chain.reasoning[start:end],
            )
            for span, purpose, (start, end) in zip(spans, purposes, places, strict=True)
        ], ""
