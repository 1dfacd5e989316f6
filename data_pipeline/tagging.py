"""Restricted tagging in paper mode: the model rewrites the chain with tags in it, and must change nothing else (S12)."""

from dataclasses import dataclass

from data_pipeline.endpoint import Endpoint, Unit
from data_pipeline.prompts import PromptTemplate
from tagpr.schema import Chain
from tagpr.tags import check_tags, parse_segments, strip_tags, vocabulary

PROMPT_FIELDS = frozenset({"definitions", "question", "chain_of_thought"})


@dataclass(frozen=True)
class Tagged:
    """``text``: the chain as ``<tag> segment </tag>``, one a line; empty where ``problem`` says why not."""

    text: str
    problem: str


def accept_tagged(source: str, reply: str, minimum: int) -> Tagged:
    """Accept a tagger's reply only if it is the source chain, up to white space, with tags of the set put in.

    ``minimum`` is the smallest number of segments. Problems: ``rewritten``, or those of ``check_tags`` (S26). An empty
    segment is dropped. The accepted text is in one canonical form, so that style cannot tell two taggers' chains apart.
    """
    text = reply.strip()
    problem = check_tags(text, minimum)
    if problem:
        return Tagged("", problem)
    segments = [(tag, part) for tag, part in parse_segments(text).segments if part]
    tagged = "\n".join(f"<{tag}> {part} </{tag}>" for tag, part in segments)
    if _letters(strip_tags(tagged)) != _letters(source):
        return Tagged("", "rewritten")
    return Tagged(tagged, "")


def _letters(text: str) -> str:
    return "".join(text.split())


def definitions_text() -> str:
    """The tags in use with their meaning, one a line, as the prompt lists them (S11, S41)."""
    return "\n".join(f"- {tag}: {definition}" for tag, definition in vocabulary().items())


async def tag_chain(
    chain: Chain, endpoint: Endpoint, template: PromptTemplate, minimum: int, attempts: int
) -> Tagged:
    """Ask for a tagged chain, again with another seed while the reply is not acceptable, at most ``attempts`` times.

    Rejected replies are counted in ``endpoint.counts`` by their problem.
    """
    prompt = template.render(
        definitions=definitions_text(), question=chain.prompt, chain_of_thought=chain.reasoning
    )
    tagged = Tagged("", "not_asked")
    for attempt in range(attempts):
        reply = await endpoint.ask(Unit("tagger", prompt, attempt=attempt))
        tagged = accept_tagged(chain.reasoning, reply.text, minimum)
        if not tagged.problem:
            return tagged
        endpoint.counts[f"rejected_{tagged.problem}"] += 1
    return tagged
