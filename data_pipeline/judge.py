"""The judge: four scores for a chain (S8), read strictly from a reply that nobody trusts."""

from dataclasses import dataclass

from data_pipeline.endpoint import Endpoint, Unit
from data_pipeline.json_reply import read_object
from data_pipeline.prompts import PromptTemplate
from tagpr.schema import Chain
from tagpr.tags import format_response

DIMENSIONS = ("Logical Coherence", "Step Accuracy", "Reasoning Completeness", "Relevance to the Question")
PROMPT_FIELDS = frozenset({"question", "response"})

Scores = tuple[int, int, int, int]


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


def parse_verdict(text: str) -> Verdict:
    """Read a judge's reply: one JSON object of the asked shape, bare or in one code fence, and nothing else.

    Every dimension must be there exactly once, with an integer from 1 to 5, quoted or not. Text around the object, a
    repeated key, a float or "4/5" is malformed: a reply that quotes the chain must not be read as the verdict. Never raises.
    """
    reply, problem = read_object(text)
    if reply is None:
        return Verdict(None, problem)
    report = reply.get("evaluation_report")
    assessment = report.get("detailed_assessment") if isinstance(report, dict) else None
    if not isinstance(report, dict) or not isinstance(assessment, list):
        return Verdict(None, "wrong_shape")
    found: dict[str, int] = {}
    for entry in assessment:
        name = entry.get("dimension") if isinstance(entry, dict) else None
        name = name.strip().casefold() if isinstance(name, str) else ""
        score = _score(entry.get("score")) if name else None
        if name in found or name not in _KNOWN:
            return Verdict(None, "wrong_dimensions")
        if score is None:
            return Verdict(None, "wrong_score")
        found[name] = score
    if len(found) != len(DIMENSIONS):
        return Verdict(None, "wrong_dimensions")
    first, second, third, fourth = (found[name] for name in _KNOWN)
    scores = (first, second, third, fourth)
    summary = report.get("summary")
    own_total = summary.get("total_score") if isinstance(summary, dict) else None
    return Verdict(scores, "", total_differs=str(own_total).strip() != str(sum(scores)))


_KNOWN = tuple(name.casefold() for name in DIMENSIONS)


def _score(value: object) -> int | None:
    """1-5 as an integer or as its one digit in quotes; True is an int to Python, but no score."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 5:
        return value
    if isinstance(value, str) and value.strip() in ("1", "2", "3", "4", "5"):
        return int(value)
    return None


async def judge_chain(chain: Chain, endpoint: Endpoint, template: PromptTemplate, attempts: int) -> Verdict:
    """Ask for a verdict, again with another seed while the reply is malformed, at most ``attempts`` times.

    Equal chains for equal questions are one unit of work. Malformed replies are counted in ``endpoint.counts``.
    """
    prompt = template.render(question=chain.prompt, response=format_response(chain.reasoning, chain.answer))
    verdict = Verdict(None, "not_asked")
    for attempt in range(attempts):
        reply = await endpoint.ask(Unit("judge", prompt, attempt=attempt))
        verdict = parse_verdict(reply.text)
        if verdict.scores is not None:
            endpoint.counts["total_differs"] += verdict.total_differs
            return verdict
        endpoint.counts[f"malformed_{verdict.problem}"] += 1
    return verdict
