"""The ``chains:`` node of the configuration, checked: types, ranges, and what goes together."""

from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tagpr.chat.cost import Price
from tagpr.chat.structured import Structured
from tagpr.errors import ConfigError
from tagpr.metrics import RougeKind

Share = float
# The models of a run, each a node of ``chains:``.
ROLES = ("teacher", "judge", "tagger")


class Settings(BaseModel):
    """Closed and immutable; no default lives here, they are all in ``tagpr/config/build_chains.yaml``."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(Settings):
    """One model behind an OpenAI-compatible endpoint."""

    model: str
    base_url: str | None
    key_variable: str | None
    key_file: str | None
    revision: str
    temperature: float = Field(ge=0.0)
    top_p: float = Field(gt=0.0, le=1.0)
    max_tokens: int = Field(gt=0)
    request: dict[str, Any]
    concurrency: int = Field(gt=0)
    timeout_s: float = Field(gt=0.0)
    structured: Structured
    mode: Literal["sync", "batch"]

    @property
    def key_source(self) -> str:
        """Where the key comes from, in words for a message."""
        return self.key_file or self.key_variable or "(no key)"


class BudgetSettings(Settings):
    """Money: the hard limit, and from which estimate on the run asks first."""

    dollars: float | None = Field(ge=0.0)
    ask_above_dollars: float | None = Field(ge=0.0)
    yes: bool


class Expectations(Settings):
    """What an estimate of the cost goes by until the ledger knows better; lengths in tokens."""

    prompt_tokens: float = Field(gt=0.0)
    chain_tokens: float = Field(gt=0.0)
    answer_tokens: float = Field(gt=0.0)
    judge_reply_tokens: float = Field(gt=0.0)
    exploratory_reply_tokens: float = Field(gt=0.0)
    accurate: Share = Field(ge=0.0, le=1.0)
    judged: Share = Field(ge=0.0, le=1.0)
    unsolved: Share = Field(ge=0.0, le=1.0)
    untagged_in_pairs: Share = Field(ge=0.0, le=1.0)
    segments: int = Field(ge=1)
    malformed: Share = Field(ge=0.0, le=1.0)


class BatchSettings(Settings):
    """The Batch API: the provider's limits of a file, and how often to look (None: end, and look in the next run)."""

    requests: int = Field(gt=0, le=50_000)
    megabytes: float = Field(gt=0.0, le=200.0)
    poll_s: float | None = Field(gt=0.0)


class VllmSettings(Settings):
    """A teacher of our own: vLLM engines in Ray actors."""

    replicas: int = Field(gt=0)
    tensor_parallel_size: int = Field(gt=0)
    gpus: float | None = Field(ge=0.0)
    dtype: str
    max_model_len: int | None = Field(gt=0)
    engine: dict[str, Any]
    chat_template: dict[str, Any]


class TeacherSettings(ModelSettings):
    """The teacher, behind an endpoint or in this job."""

    backend: Literal["endpoint", "vllm"]
    vllm: VllmSettings


class RaySettings(Settings):
    """The Ray that the job runs on."""

    address: str | None
    cpus: int | None = Field(gt=0)
    dashboard: bool


class PromptFiles(Settings):
    """Where the wordings of the prompts are."""

    judge: str
    restricted_tagging: str
    span_tagging: str
    exploratory_tagging: str


class SimulatedFaults(Settings):
    """Shares in [0, 1] of the simulated endpoint's replies that go wrong; ``teacher`` overrides its FaultRates."""

    teacher: dict[str, Share]
    truncated: Share = Field(ge=0.0, le=1.0)
    judge_malformed: Share = Field(ge=0.0, le=1.0)
    judge_wrong_total: Share = Field(ge=0.0, le=1.0)
    tag_unknown: Share = Field(ge=0.0, le=1.0)
    tag_rewritten: Share = Field(ge=0.0, le=1.0)
    tag_unclosed: Share = Field(ge=0.0, le=1.0)
    free_tag_wrong: Share = Field(ge=0.0, le=1.0)
    free_tag_vague: Share = Field(ge=0.0, le=1.0)
    http_429: Share = Field(ge=0.0, le=1.0)
    http_500: Share = Field(ge=0.0, le=1.0)
    http_502: Share = Field(ge=0.0, le=1.0)
    http_dropped: Share = Field(ge=0.0, le=1.0)
    http_broken_json: Share = Field(ge=0.0, le=1.0)
    http_slow: Share = Field(ge=0.0, le=1.0)
    slow_s: float = Field(ge=0.0)
    latency_s: float = Field(ge=0.0)
    batch_s: float = Field(ge=0.0)
    batch_failed: Share = Field(ge=0.0, le=1.0)
    batch_expired: Share = Field(ge=0.0, le=1.0)


class AccuracySettings(Settings):
    """The accuracy filter (S7), and what a chain must say at least to be one."""

    rouge: RougeKind
    above: dict[str, Annotated[Share, Field(ge=0.0, lt=1.0)]]
    minimum_words: int = Field(ge=1)


class JudgeLimits(Settings):
    """The longest texts that are judged, in characters."""

    question: int = Field(gt=0)
    response: int = Field(gt=0)


class TaggingSettings(Settings):
    """Restricted tagging (S12)."""

    mode: Literal["paper", "span"]


class ContextWeights(Settings):
    """How much each thing that is known about a proposed tag counts when tags are clustered; 0: not at all."""

    name: float = Field(ge=0.0)
    purposes: float = Field(ge=0.0)
    segments: float = Field(ge=0.0)


class ExploratorySettings(Settings):
    """Exploratory tagging and the clustering of its tags (S9, S10)."""

    chains: float = Field(ge=0.0)
    embedder: str
    fewest_clusters: int = Field(ge=2)
    most_clusters: int = Field(ge=2)
    weights: ContextWeights


class PreferenceSettings(Settings):
    """Preference pairs for PRMU (S15, S16)."""

    prp_pairs: int = Field(ge=0)
    prp_instances_per_task: int = Field(ge=0)
    prp_rollouts: int = Field(ge=0)
    prp_minimum_gain: float | None
    pqp_pairs: int = Field(ge=0)
    pqp_margin: float = Field(ge=0.0, lt=1.0)
    pqp_last_word_share: Share | None = Field(ge=0.0, le=1.0)
    extra_rollouts: int = Field(ge=0)
    extra_request: dict[str, Any]


class ChainSettings(Settings):
    """Everything that :mod:`data_pipeline` can be told."""

    endpoint: Literal["simulated", "openai"]
    instances_per_task: int = Field(gt=0)
    rollouts: int = Field(gt=0)
    accuracy: AccuracySettings
    judge_minimum: int = Field(ge=3, le=19)
    judge_longest: JudgeLimits
    malformed_attempts: int = Field(gt=0)
    minimum_segments: int = Field(gt=0)
    size: int = Field(gt=0)
    max_per_instance: int = Field(gt=0)
    retries: int = Field(ge=0)
    tokenizer: str | None
    prices: dict[str, Price]
    budget: BudgetSettings
    expected: Expectations
    batch: BatchSettings
    ledger: str
    extend_ledger: bool
    stop_after: Literal["judge", "exploratory"] | None
    workers: int = Field(gt=0)
    ray: RaySettings
    prompts: PromptFiles
    tagging: TaggingSettings
    exploratory: ExploratorySettings
    teacher: TeacherSettings
    judge: ModelSettings
    tagger: ModelSettings
    preferences: PreferenceSettings
    simulated: SimulatedFaults


def read_settings(config: DictConfig) -> ChainSettings:
    """Check ``config.chains``: keys, types, ranges, and what ``endpoint`` asks for.

    Raises:
        ConfigError: naming the key, its value and what it may be.
    """
    node = OmegaConf.to_container(config.chains, resolve=True)
    try:
        settings = ChainSettings.model_validate(node)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(["chains", *map(str, problem["loc"])])
        if problem["type"] in ("missing", "extra_forbidden"):
            raise ConfigError(f"{key}: {problem['msg']}. See tagpr/config/build_chains.yaml.") from error
        raise ConfigError(f"{key}={problem['input']}: {problem['msg']}. Change it.") from error
    exploratory = settings.exploratory
    if exploratory.most_clusters < exploratory.fewest_clusters:
        raise ConfigError(
            f"chains.exploratory.most_clusters={exploratory.most_clusters}: less than fewest_clusters="
            f"{exploratory.fewest_clusters}. Raise it."
        )
    if not any(exploratory.weights.model_dump().values()):
        raise ConfigError("chains.exploratory.weights: all are 0. Give one of them a weight.")
    for name in ROLES:
        model: ModelSettings = getattr(settings, name)
        if in_this_job(settings, name):
            continue
        if settings.endpoint == "openai" and not (model.base_url and (model.key_variable or model.key_file)):
            raise ConfigError(
                f"chains.{name}: chains.endpoint=openai needs base_url and key_variable (the name of the environment "
                "variable that holds the key) or key_file. Set both."
            )
        if (
            settings.endpoint == "openai"
            and "simulated_faults" in settings.preferences.extra_request | model.request
        ):
            raise ConfigError(
                "chains.preferences.extra_request.simulated_faults: only the simulated endpoint knows this. "
                "Remove it with ~chains.preferences.extra_request.simulated_faults."
            )
    return settings


def in_this_job(settings: ChainSettings, role: str) -> bool:
    """Whether the model of this role runs in the job itself: no URL, no key."""
    return role == "teacher" and settings.teacher.backend == "vllm"
