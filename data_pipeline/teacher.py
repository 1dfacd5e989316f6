"""The teacher's rollouts: what to ask, and how to read what comes back (S6)."""

from dataclasses import dataclass

from data_pipeline.endpoint import Unit
from tagpr.chat.client import Reply
from tagpr.tags import THINK_CLOSE, THINK_OPEN, split_response


@dataclass(frozen=True)
class Rollout:
    """A reply taken apart; ``problem`` names why it cannot be used, or is empty."""

    reasoning: str
    answer: str
    problem: str


def rollout_unit(
    prompt: str, sample: str, rollout: int, with_profile: bool, request: dict[str, object] | None = None
) -> Unit:
    """The unit of work for one rollout: 16 rollouts of one prompt are 16 resumable requests, not one."""
    kind = "teacher" if with_profile else "teacher_without_profile"
    return Unit(kind, prompt, sample=sample, rollout=rollout, request=request or {})


def read_rollout(reply: Reply) -> Rollout:
    """Take a teacher's reply apart, with the ``<think>`` put back that its chat template had opened (S6).

    Three forms occur: the whole response; one that lacks the opening mark; the chain in a field beside the answer.
    Problems are ``truncated`` (the token limit cut it), ``stopped_<reason>``, or those of ``split_response`` (S24).
    """
    if reply.finish_reason == "length":
        return Rollout("", "", "truncated")
    if reply.finish_reason not in ("stop", ""):
        return Rollout("", "", f"stopped_{reply.finish_reason}")
    text = reply.text.strip()
    if reply.reasoning is not None:
        text = f"{THINK_OPEN}\n{reply.reasoning.strip()}\n{THINK_CLOSE}\n\n{text}"
    elif THINK_CLOSE in text and not text.startswith(THINK_OPEN):
        text = f"{THINK_OPEN}\n{text}"
    response = split_response(text)
    return Rollout(response.reasoning, response.answer, response.problem)
