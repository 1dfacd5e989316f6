"""The records that rooms hand to each other. Plain data: no torch, no ray, no network."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["train", "dev", "test"]


class Record(BaseModel):
    """Immutable, and closed: an unknown field is an error, not a silent extra."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ProfileItem(Record):
    """One past interaction of a user, with the field names of its benchmark (SPEC S3)."""

    id: str
    fields: dict[str, str]
    date: str | None = None


class Example(Record):
    """One row of any benchmark: what a user asks, what is known of the user, what the user would answer.

    ``profile`` is in file order as read; a retriever orders and cuts it (newest first after recency).
    """

    id: str
    task: str
    split: Split
    user_id: str
    query: str
    profile: tuple[ProfileItem, ...]
    gold: str


class Chain(Record):
    """One rollout of the teacher for one example, with what each stage of the pipeline made of it (S5-S14)."""

    id: str
    example_id: str
    task: str
    user_id: str
    prompt: str
    gold: str
    rollout: int
    reasoning: str
    answer: str
    verifiable: float = Field(description="R_v of the answer, in [0, 1]")
    judge_scores: tuple[int, int, int, int] | None = None
    tagged: str | None = None


class PreferencePair(Record):
    """Two responses to the same prompt of the same user, the first preferred (S15, S16)."""

    id: str
    kind: Literal["prp", "pqp"]
    task: str
    user_id: str
    prompt: str
    chosen: str
    rejected: str
    margin: float | None = Field(
        default=None, description="R_v of the chosen response minus that of the rejected one"
    )
    rule: str = Field(
        default="", description="why the first is preferred: made with the profile, better by R_v, ..."
    )
    chains: tuple[str, str] | None = Field(
        default=None, description="ids of the chains that the two were made from"
    )
    example_id: str = Field(default="", description="the Example that both answer")


class PrmuScore(Record):
    """What the reward server says of one response (S18, S21)."""

    logit: float
    score: float = Field(ge=0.0, le=1.0, description="sigmoid(logit), eq. 3")
    unknown_user: bool
    version: str


class RewardBreakdown(Record):
    """A reward with everything it was made of (S23-S28); ``failure`` names the first check that failed, or is empty."""

    reward: float
    verifiable: float
    repetition: float
    format: float
    tag: float
    prmu: float | None
    prmu_logit: float | None
    prmu_unknown_user: bool | None
    prmu_version: str | None
    failure: str


class Manifest(Record):
    """How a run came to be; written beside its outputs."""

    stage: str
    created: str
    versions: dict[str, str]
    git_revision: str | None
    inputs: dict[str, str] = Field(description="what was read -> SHA-256, or the folder's content hash")
    seed: int
    notes: dict[str, Any] = Field(default_factory=dict)
