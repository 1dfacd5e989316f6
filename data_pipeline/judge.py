"""The judge: four scores for a chain (S8), read strictly from a reply that nobody trusts."""

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from data_pipeline.endpoint import Endpoint, Unit
from data_pipeline.json_reply import read_object
from data_pipeline.prompts import PromptTemplate
from data_pipeline.settings import JudgeLimits
from tagpr.chat.structured import structured_request
from tagpr.schema import Chain
from tagpr.tags import format_response

Dimension = Literal[
    "Logical Coherence", "Step Accuracy", "Reasoning Completeness", "Relevance to the Question"
]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
PROMPT_FIELDS = frozenset({"question", "response"})
REPLY_NAME = "evaluation_report"

Scores = tuple[int, int, int, int]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Assessment(_Part):
    """One dimension: first the reasons, then the score that follows from them."""

    dimension: Dimension
    reasoning: str
    score: Literal[1, 2, 3, 4, 5]


class Summary(_Part):
    """The judge's own sum, which is asked for because the paper's prompt does, and never used."""

    total_score: int


class EvaluationReport(_Part):
    """All four dimensions, each once (no schema can say so; :func:`parse_verdict` does)."""

    detailed_assessment: list[Assessment]
    summary: Summary


class JudgeReply(_Part):
    """The reply's shape for structured outputs. What comes back is read by :func:`parse_verdict`, which trusts no server."""

    evaluation_report: EvaluationReport


@dataclass(frozen=True)
class Verdict:
    """``scores`` in the order of DIMENSIONS, or None and the ``problem``.

    ``total_differs``: the model's own total is not the sum. It is never used.
    """

    scores: Scores | None
    problem: str
    total_differs: bool = False

    @property
    def total(self) -> int:
        """Sum of the four scores, 4-20 (S8: recomputed); 0 without scores."""
        return sum(self.scores) if self.scores else 0


def read_verdict(text: str, finish_reason: str) -> Verdict:
    """:func:`parse_verdict` of a whole reply; ``truncated`` and ``refused`` replies hold no verdict, whatever their text."""
    if finish_reason == "length":
        return Verdict(None, "truncated")
    if finish_reason in ("content_filter", "refusal"):
        return Verdict(None, "refused")
    return parse_verdict(text)


def parse_verdict(text: str) -> Verdict:
    """Read a judge's reply: one JSON object of the asked shape, bare or in one code fence, and nothing else.

    Every dimension must be there exactly once, with an integer from 1 to 5, quoted or not. Text around the object, a
    repeated key, a key that was not asked for, a float or "4/5" is malformed: a reply that quotes the chain must not be read
    as the verdict. Never raises.
    """
    reply, problem = read_object(text)
    if reply is None:
        return Verdict(None, problem)
    report = reply.get("evaluation_report")
    if not isinstance(report, dict) or len(reply) > 1:
        return Verdict(None, "wrong_shape")
    assessment, summary = report.get("detailed_assessment"), report.get("summary")
    if not isinstance(assessment, list) or report.keys() - {"detailed_assessment", "summary"}:
        return Verdict(None, "wrong_shape")
    found: dict[str, int] = {}
    for entry in assessment:
        if not isinstance(entry, dict) or entry.keys() - {"dimension", "reasoning", "score"}:
            return Verdict(None, "wrong_shape")
        name = entry.get("dimension")
        # Not casefold(), which would let other letters stand for these.
        name = name.strip().lower() if isinstance(name, str) else ""
        if name in found or name not in _KNOWN:
            return Verdict(None, "wrong_dimensions")
        score = _score(entry.get("score"))
        if score is None:
            return Verdict(None, "wrong_score")
        found[name] = score
    if len(found) != len(DIMENSIONS):
        return Verdict(None, "wrong_dimensions")
    first, second, third, fourth = (found[name] for name in _KNOWN)
    scores = (first, second, third, fourth)
    own_total = summary.get("total_score") if isinstance(summary, dict) else None
    return Verdict(scores, "", total_differs=str(own_total).strip() != str(sum(scores)))


_KNOWN = tuple(name.lower() for name in DIMENSIONS)


def _score(value: object) -> int | None:
    """1-5 as an integer or as its one digit in quotes; True is an int to Python, but no score."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 5:
        return value
    if isinstance(value, str) and value.strip() in ("1", "2", "3", "4", "5"):
        return int(value)
    return None


def judge_prompt(chain: Chain, template: PromptTemplate, longest: JudgeLimits) -> tuple[str, str]:
    """The prompt for a chain, or an empty one and the problem: ``question_too_long`` or ``response_too_long``.

    A text over its limit is not judged at all: half a chain is another chain, and its cut-off end could not be rated.
    """
    response = format_response(chain.reasoning, chain.answer)
    if len(chain.prompt) > longest.question:
        return "", "question_too_long"
    if len(response) > longest.response:
        return "", "response_too_long"
    return template.render(question=chain.prompt, response=response), ""


async def judge_chain(
    chain: Chain, endpoint: Endpoint, template: PromptTemplate, longest: JudgeLimits, attempts: int
) -> Verdict:
    """Ask for a verdict, again with another seed while the reply is malformed, at most ``attempts`` times.

    Equal chains for equal questions are one unit of work. Malformed replies are counted in ``endpoint.counts``.
    """
    prompt, problem = judge_prompt(chain, template, longest)
    request = structured_request(endpoint.settings.structured, JudgeReply, REPLY_NAME)
    verdict = Verdict(None, problem)
    for attempt in range(0 if problem else attempts):
        reply = await endpoint.ask(Unit("judge", prompt, attempt=attempt, request=request))
        verdict = read_verdict(reply.text, reply.finish_reason)
        if verdict.scores is not None:
            endpoint.counts["total_differs"] += verdict.total_differs
            return verdict
        endpoint.counts[f"malformed_{verdict.problem}"] += 1
    return verdict
