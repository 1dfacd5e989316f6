"""Exploratory tagging: some chains are tagged freely, and the proposed tags are clustered into a vocabulary (S9, S10).

The tagger gets no list of tags. It names segments in its own words, by numbers of pieces as in span mode, and says what each
name means. What comes of it is a report and a mapping file for a person to edit; restricted tagging goes by the vocabulary
that is configured (``tags.vocabulary``), not by what this stage found.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.endpoint import Unit, for_each
from data_pipeline.json_reply import read_object
from data_pipeline.pieces import Span, cut, numbered, place_spans
from data_pipeline.prompts import PromptTemplate
from data_pipeline.selection import Candidate, interleave, shuffled
from data_pipeline.settings import ChainSettings
from data_pipeline.tagging import Ask
from tagpr.chat.structured import Structured, structured_request
from tagpr.errors import StageError
from tagpr.runs import write_text_atomically
from tagpr.schema import Chain, Record

if TYPE_CHECKING:
    from data_pipeline.clustering import Clustering

logger = logging.getLogger(__name__)

PROMPT_FIELDS = frozenset({"question", "numbered_chain"})
PROPOSALS = "proposals.jsonl"

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
class Exploration:
    """What came of exploratory tagging. ``rejected``: replies that could not be taken, by problem.

    ``mapping`` is the file that a person may edit; ``mapping_kept`` says that an edited one was left alone, and the new one
    lies beside it.
    """

    chains: int
    untagged: int
    rejected: Counter[str]
    proposals: tuple[Proposal, ...]
    clustering: "Clustering"
    report: Path
    mapping: Path
    mapping_kept: bool


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


async def explore(
    chains: Sequence[Chain], ask: Ask, settings: ChainSettings, folder: Path, seed: int
) -> Exploration:
    """Tag ``chains.exploratory.chains`` of the chains freely, cluster the tags, write report and mapping into ``folder``.

    Doing it again with the same replies gives the same files; a mapping that a person has edited is kept.

    Raises:
        ConfigError: the prompt file or the embedder cannot be used.
        StageError: too few distinct tags came back to be clustered.
    """
    from data_pipeline.clustering import cluster
    from data_pipeline.clustering_report import render
    from data_pipeline.mapping import proposed_mapping, write_mapping

    tagging = ExploratoryTagging.load(settings.prompts.exploratory_tagging, settings.tagger.structured)
    request = tagging.request()
    drawn = draw_chains(chains, settings.exploratory.chains, seed)
    rejected: Counter[str] = Counter()

    async def one(chain: Chain) -> list[Proposal]:
        prompt = tagging.prompt(chain.prompt, chain.reasoning)
        for attempt in range(settings.malformed_attempts):
            reply = await ask(Unit("exploratory_tagger", prompt, attempt=attempt, request=request))
            proposals, problem = tagging.accept(chain, reply.text)
            if not problem:
                return proposals
            rejected[problem] += 1
        return []

    answers = await for_each("exploratory tagger", drawn, one, settings.tagger.concurrency)
    proposals = tuple(proposal for answer in answers for proposal in answer)
    write_text_atomically(
        folder / PROPOSALS, "".join(f"{proposal.model_dump_json()}\n" for proposal in proposals)
    )
    if not proposals:
        named = ", ".join(f"{problem} {count}" for problem, count in rejected.most_common()) or "no chains"
        raise StageError(
            f"chains.exploratory: none of {len(drawn)} chains was tagged ({named}). "
            "Look at the tagger's replies, or set chains.exploratory.chains=0."
        )
    clustering = cluster(proposals, settings.exploratory, seed)
    report = folder / "clusters.html"
    write_text_atomically(report, render(clustering, len(drawn), synthetic=settings.endpoint == "simulated"))
    mapping, kept = write_mapping(folder, proposed_mapping(clustering))
    logger.info(
        "exploratory tags: %d chains, %d segments, %d distinct tags in %d clusters (silhouette %.2f, embedder: %s); see %s",
        len(drawn),
        len(proposals),
        len(clustering.tags),
        len(clustering.clusters),
        clustering.silhouette,
        clustering.embedder,
        report,
    )
    if kept:
        logger.warning("%s has been edited and stays as it is; the new proposal is beside it", mapping)
    return Exploration(
        chains=len(drawn),
        untagged=sum(not answer for answer in answers),
        rejected=rejected,
        proposals=proposals,
        clustering=clustering,
        report=report,
        mapping=mapping,
        mapping_kept=kept,
    )


def draw_chains(chains: Sequence[Candidate], wanted: float, seed: int) -> list[Candidate]:
    """A random subset, the tasks in turn: a share of all chains for ``wanted`` up to 1, else that many."""
    number = round(wanted * len(chains)) if wanted <= 1 else round(wanted)
    return interleave(shuffled(chains, lambda chain: chain.id, seed), lambda chain: chain.task)[:number]
