"""Exploratory tagging: some chains are tagged freely, and the proposed tags are clustered into a vocabulary (S9, S10).

What comes of it is a report and a mapping file for a person to edit; restricted tagging goes by the vocabulary that is
configured (``tags.vocabulary``), not by what was found here.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.endpoint import Unit, for_each
from data_pipeline.exploratory import ExploratoryTagging, Proposal
from data_pipeline.selection import Candidate, interleave, shuffled
from data_pipeline.settings import ChainSettings
from data_pipeline.tagging import Ask
from tagpr.errors import StageError
from tagpr.runs import write_text_atomically
from tagpr.schema import Chain

if TYPE_CHECKING:
    from data_pipeline.clustering import Clustering

logger = logging.getLogger(__name__)

PROPOSALS = "proposals.jsonl"


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
