"""From rows to figures: of each model, and of differences with their intervals over users (S32, S38)."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from pydantic import Field

from tagpr.benchmarks.tasks import get_task, parse_answer
from tagpr.errors import ConfigError
from tagpr.evaluation.measures import LOWER_IS_BETTER, NEUTRAL, Bootstrap, Measured, Table, tables
from tagpr.evaluation.rows import Generation, Key, Row
from tagpr.metrics import read_answer, task_metrics
from tagpr.rewards.composite import RewardWeights, guided
from tagpr.rewards.format import format_reward
from tagpr.rewards.tag import tag_reward
from tagpr.rewards.verifiable import verifiable_reward
from tagpr.schema import Example, PrmuScore, Record, RewardBreakdown
from tagpr.statistics import Resampled, compare, lead
from tagpr.tags import Response, parse_segments, split_response

# Users by the number of items in their profiles: where each group begins (S40).
HISTORY_FROM = (0, 1, 2, 3, 5, 9, 17, 33)


class Group(Record):
    """Figures of some users only, e.g. those never seen in training, or those with few items (S40)."""

    rows: int
    users: int
    task_score: float
    well_formed: float | None = Field(description="None: the method does not think")
    reward: float | None = Field(description="as in ModelSummary")
    unknown_user: float | None = Field(description="share that PRMU scored with its unknown user's row")


class RewardParts(Record):
    """What the mean guided reward is made of: means over tasks of the tasks' means, like the reward itself."""

    verifiable: float = Field(description="R_v (S23)")
    repetition: float = Field(description="R_rep (S25)")
    format: float = Field(description="R_f (S24)")
    tag: float = Field(description="R_tag (S26)")
    prmu: float | None = Field(description="R_PRMU (eq. 3); None where gamma is 0 and PRMU was not asked")
    unknown_user: float | None = Field(description="share that PRMU scored with its unknown user's row")


class Interval(Record):
    """A figure with its 95 % interval over users (and training runs); None with fewer than two users."""

    mean: float
    low: float | None
    high: float | None


class ModelSummary(Record):
    """Figures of one model. With several replicates (decoding seeds, training runs) every figure is their mean."""

    rows: int
    users: int
    thinking: bool
    replicates: list[str]
    runs: int = Field(description="training runs among the replicates")
    task_score: float = Field(description="mean over tasks of the task's mean R_v (S23)")
    task_score_deviation: float | None = Field(description="sample standard deviation over replicates")
    reward: float | None = Field(
        description="guided reward (eq. 5), mean over tasks of the task's mean; None: left out"
    )
    reward_deviation: float | None = Field(description="sample standard deviation over replicates")
    reward_parts: RewardParts | None
    verifiable: dict[str, float] = Field(description="mean R_v by task")
    metrics: dict[str, dict[str, float]] = Field(description="the benchmark's own metrics by task (S32)")
    strict: dict[str, dict[str, float]] = Field(
        description="the same with answers read as the official code does: white space stripped, nothing else"
    )
    intervals: dict[str, Interval] = Field(description="task_score, reward, <task>/<metric>, ...")
    unparsable: float = Field(description="share of answers that say nothing the metric can use")
    unanswered: int = Field(
        description="rows that the model or its endpoint refused; left out for every model"
    )
    well_formed: float | None = Field(
        description="share with R_f = 1 and R_tag = 0; None: the method does not think"
    )
    format: float | None = Field(description="share with R_f = 1")
    tag: float | None = Field(description="share with R_tag = 0")
    failures: dict[str, int] = Field(description="responses by the first check that failed")
    truncated: int = Field(description="responses that ended at the token limit")
    over_budget: int = Field(description="responses whose thinking was ended at evaluate.thinking_tokens")
    repetition: float
    response_tokens: float
    reasoning_tokens: float
    tag_shares: dict[str, float] = Field(description="share of segments by tag, over responses that parse")
    segments: float = Field(description="segments a response, over responses that parse")
    items_used: float = Field(description="profile items in a prompt")
    prompts_shortened: int = Field(description="prompts with items cut to fit")
    groups: dict[str, Group] = Field(description="by users: seen | unseen in training | unknown")
    histories: dict[str, Group] = Field(description="by the number of items in the user's profile (S40)")


class Difference(Record):
    """``model - against`` on the same rows and users.

    ``low`` and ``high`` are the 95 % interval of this difference alone; the ``corrected`` ones hold for all differences of the
    measure at once, and so does the p-value. None with fewer than two users.
    """

    model: str
    against: str
    measure: str
    mean: float
    low: float | None
    high: float | None
    corrected_low: float | None
    corrected_high: float | None
    p_value: float | None
    rows: int
    users: int


class Decoding(Record):
    """All figures of one way to decode; ``best`` names a model only where its lead is real."""

    name: Literal["greedy", "sampled"]
    models: dict[str, ModelSummary]
    differences: list[Difference]
    best: dict[str, str] = Field(
        description="measure -> label whose corrected interval against every other model excludes 0"
    )


class SweepPoint(Record):
    """One model under one condition (S36)."""

    retriever: str
    profile_size: int
    model: str
    rows: int
    items_used: float
    prompts_shortened: int
    intervals: dict[str, Interval] = Field(description="task_score, <task>/<metric>")


class Summary(Record):
    """What ``summary.json`` holds."""

    benchmark: str
    synthetic: bool
    split: str
    tasks: list[str]
    retriever: str
    profile_size: int
    rows_selected: int
    rows_left_out: int = Field(
        description="rows that some model could not answer: the query alone exceeds its budget, or it was refused"
    )
    temperature: float
    bootstrap_resamples: int
    reward_weights: dict[str, float] | None = Field(
        description="alpha, beta, gamma of eq. 5; None: no rewards"
    )
    prmu_version: str | None = Field(description="hash of the PRMU behind the rewards; None: not asked")
    decodings: list[Decoding]
    sweep: list[SweepPoint]


def score_row(generation: Generation, example: Example, seen_user: bool | None) -> Row:
    """Score one response as the reward does in training (S23, S24, S26).

    Without thinking the whole response is the answer, and format and tags are not asked for (0 both).

    Raises:
        DataError: the gold answer is empty.
    """
    if generation.thinking:
        response = split_response(generation.response)
    else:
        answer = generation.response.strip()
        response = Response("", answer, "" if answer else "empty_answer")
    if generation.finish_reason == "length" and not response.problem:
        response = replace(response, problem="truncated")
    tag, tag_problem = tag_reward(response.reasoning) if generation.thinking else (0.0, "")
    segments = parse_segments(response.reasoning)
    return Row(
        **generation.model_dump(),
        gold=example.gold,
        history=len(example.profile),
        seen_user=seen_user,
        reasoning=response.reasoning,
        answer=response.answer,
        parsed=parse_answer(example.task, response.answer),
        verifiable=verifiable_reward(example.task, example.gold, response),
        format=format_reward(response),
        tag=tag,
        failure=response.problem or tag_problem,
        tags={} if segments.problem else dict(Counter(name for name, _ in segments.segments)),
    )


def guided_reward(row: Row, weights: RewardWeights, prmu: PrmuScore | None) -> RewardBreakdown:
    """Eq. 5 of a scored row: what ``composite.score_response`` gives, without the token ids, which no row keeps.

    Raises:
        ConfigError: gamma is not 0, and there is no score of PRMU.
    """
    if prmu is None and weights.gamma != 0.0:
        raise ConfigError(
            f"evaluate.reward_weights.gamma={weights.gamma}: needs PRMU's score of row {row.id}. "
            "Run the same command again, or set it to 0."
        )
    personal = prmu.score if prmu is not None else 0.0  # gamma is 0 then
    return RewardBreakdown(
        reward=guided(row.verifiable, row.repetition, row.format, row.tag, personal, weights),
        verifiable=row.verifiable,
        repetition=row.repetition,
        format=row.format,
        tag=row.tag,
        prmu=None if prmu is None else prmu.score,
        prmu_logit=None if prmu is None else prmu.logit,
        prmu_unknown_user=None if prmu is None else prmu.unknown_user,
        prmu_version=None if prmu is None else prmu.version,
        failure=row.failure,
    )


Rewards = Mapping[Key, RewardBreakdown]


@dataclass(frozen=True)
class Replicate:
    """One pass of a model over the rows: one decoding seed of one training run. Each row occurs once."""

    rows: Sequence[Row]
    rewards: Rewards | None = None
    run: int = 0

    @property
    def seed(self) -> int | None:
        """Of the decoding; None: greedy."""
        return self.rows[0].seed

    def scored(self) -> "list[Scored]":
        """Its rows with their rewards."""
        return [Scored(row, None if self.rewards is None else self.rewards[row.key]) for row in self.rows]

    def reward_values(self) -> dict[str, float] | None:
        """Guided reward by row id."""
        if self.rewards is None:
            return None
        return {row.id: self.rewards[row.key].reward for row in self.rows}


@dataclass(frozen=True)
class Scored:
    """A row and its reward, where rewards are wanted."""

    row: Row
    reward: RewardBreakdown | None


def summarise(
    models: Mapping[str, Sequence[Replicate]],
    resamples: int,
    seed: int,
    decoding: Literal["greedy", "sampled"],
    unanswered: Mapping[str, int] | None = None,
) -> Decoding:
    """Figures of every model (label -> replicates, in the order of training) and of the differences that matter.

    The rows must be the same for every replicate of every model. Each model is compared with the one before it and with the
    first; ``best`` compares all with all. ``unanswered``: rows by label that the model refused.
    """
    ids = [{row.id for row in replicate.rows} for replicates in models.values() for replicate in replicates]
    assert all(these == ids[0] for these in ids), "rows differ"
    bootstrap = Bootstrap(resamples, seed)
    measured = {
        label: measure(replicates, bootstrap, number)
        for number, (label, replicates) in enumerate(models.items())
    }
    shared = [name for name in next(iter(measured.values())) if all(name in its for its in measured.values())]
    labels = list(models)
    pairs = [(after, before) for before, after in pairwise(labels)]
    pairs += [(label, labels[0]) for label in labels[2:]]
    pairs.sort(key=lambda pair: labels.index(pair[0]))
    by_measure = {name: {label: its[name] for label, its in measured.items()} for name in shared}
    best = {name: _leader(name, its) for name, its in by_measure.items() if name not in NEUTRAL}
    return Decoding(
        name=decoding,
        models={
            label: summarise_model(replicates, measured[label], (unanswered or {}).get(label, 0))
            for label, replicates in models.items()
        },
        differences=[
            difference for name, its in by_measure.items() for difference in _differences(name, pairs, its)
        ],
        best={name: leader for name, leader in best.items() if leader is not None},
    )


def measure(replicates: Sequence[Replicate], bootstrap: Bootstrap, model: int) -> dict[str, Measured]:
    """Every measure of one model, resampled over users and training runs."""
    runs: dict[int, list[dict[str, Table]]] = {}
    for replicate in replicates:
        runs.setdefault(replicate.run, []).append(tables(replicate.rows, replicate.reward_values()))
    names = next(iter(runs.values()))[0]
    return {
        name: bootstrap.measure([[each[name] for each in its] for its in runs.values()], model)
        for name in names
    }


def _differences(
    name: str, pairs: Sequence[tuple[str, str]], models: Mapping[str, Measured]
) -> list[Difference]:
    resampled = {label: its.resampled for label, its in models.items() if its.resampled is not None}
    made = compare(resampled, pairs) if len(resampled) == len(models) else [None] * len(pairs)
    return [
        Difference(
            model=model,
            against=against,
            measure=name,
            mean=models[model].value - models[against].value,
            low=None if found is None else found.low,
            high=None if found is None else found.high,
            corrected_low=None if found is None else found.corrected_low,
            corrected_high=None if found is None else found.corrected_high,
            p_value=None if found is None else found.corrected_p,
            rows=models[model].rows,
            users=models[model].users,
        )
        for (model, against), found in zip(pairs, made, strict=True)
    ]


def _leader(name: str, models: Mapping[str, Measured]) -> str | None:
    """The best model, if its lead over every other holds when all pairs are looked at: the data chose the leader, too."""
    resampled = {label: its.resampled for label, its in models.items() if its.resampled is not None}
    if len(resampled) < len(models):
        return None
    return lead(resampled, higher_is_better=not name.endswith(LOWER_IS_BETTER))


def interval(name: str, measured: Measured) -> Interval:
    """A figure with its interval over users and training runs, cut off where the measure ends: the interval is symmetric."""
    one = measured.resampled
    if one is None:
        return Interval(mean=measured.value, low=None, high=None)
    nothing = np.zeros(len(one.over_both))
    zero = Resampled(0.0, nothing, nothing, 0.0, 1, one.users)
    (found,) = compare({"it": one, "zero": zero})
    lowest = -math.inf if name == "reward" else 0.0
    highest = math.inf if name in ("reward", *NEUTRAL) or name.endswith(LOWER_IS_BETTER) else 1.0
    return Interval(mean=measured.value, low=max(lowest, found.low), high=min(highest, found.high))


def summarise_model(
    replicates: Sequence[Replicate], measured: Mapping[str, Measured] | None = None, unanswered: int = 0
) -> ModelSummary:
    """Figures of one model on at least one row; of eq. 5 too, where the replicates have rewards."""
    by_replicate = [replicate.scored() for replicate in replicates]
    scored = [each for its in by_replicate for each in its]
    rows = [each.row for each in scored]
    scores = [_over_tasks(its, _task_score) for its in by_replicate]
    rewarded = all(replicate.rewards is not None for replicate in replicates)
    rewards = [_over_tasks(its, _reward) for its in by_replicate] if rewarded else []
    tasks = sorted({row.task for row in rows})
    metrics, strict = (
        {task: _mean_of([_metrics(task, its, reading) for its in by_replicate]) for task in tasks}
        for reading in ("lenient", "official")
    )
    thinking = all(row.thinking for row in rows)
    parsed = [row for row in rows if row.tags]
    segments = sum((Counter(row.tags) for row in parsed), Counter[str]())
    return ModelSummary(
        rows=len({row.id for row in rows}),
        users=len({row.user_id for row in rows}),
        thinking=thinking,
        replicates=[_name(replicate, replicates) for replicate in replicates],
        runs=len({replicate.run for replicate in replicates}),
        task_score=fmean(scores),
        task_score_deviation=stdev(scores) if len(scores) > 1 else None,
        reward=fmean(rewards) if rewards else None,
        reward_deviation=stdev(rewards) if len(rewards) > 1 else None,
        reward_parts=_parts(scored) if rewarded else None,
        verifiable={task: fmean(row.verifiable for row in rows if row.task == task) for task in tasks},
        metrics=metrics,
        strict=strict,
        intervals={name: interval(name, each) for name, each in (measured or {}).items()},
        unparsable=sum(
            metrics[task]["unparsable"] * sum(row.task == task for row in rows) / len(rows) for task in tasks
        ),
        unanswered=unanswered,
        well_formed=fmean(map(_well_formed, rows)) if thinking else None,
        format=fmean(row.format for row in rows) if thinking else None,
        tag=fmean(row.tag == 0.0 for row in rows) if thinking else None,
        failures=dict(Counter(row.failure for row in rows if row.failure).most_common()),
        truncated=sum(row.finish_reason == "length" for row in rows),
        over_budget=sum(row.thinking_cut for row in rows),
        repetition=fmean(row.repetition for row in rows),
        response_tokens=fmean(row.response_tokens for row in rows),
        reasoning_tokens=fmean(row.reasoning_tokens for row in rows),
        tag_shares={tag: count / segments.total() for tag, count in segments.most_common()},
        segments=segments.total() / len(parsed) if parsed else 0.0,
        items_used=fmean(row.items_used for row in rows),
        prompts_shortened=len({row.id for row in rows if row.items_shortened}),
        groups={name: _group(these) for name, these in _by_seen(scored).items() if these},
        histories={name: _group(these) for name, these in _by_history(scored).items() if these},
    )


def _name(replicate: Replicate, among: Sequence[Replicate]) -> str:
    decoding = "greedy" if replicate.seed is None else f"seed {replicate.seed}"
    return f"run {replicate.run + 1}, {decoding}" if any(each.run for each in among) else decoding


def _over_tasks(scored: Iterable[Scored], value: Callable[[Scored], float]) -> float:
    by_task: dict[str, list[float]] = {}
    for each in scored:
        by_task.setdefault(each.row.task, []).append(value(each))
    return fmean(map(fmean, by_task.values()))


def _task_score(scored: Scored) -> float:
    return scored.row.verifiable


def _reward(scored: Scored) -> float:
    assert scored.reward is not None
    return scored.reward.reward


def _prmu(scored: Scored) -> float:
    assert scored.reward is not None
    assert scored.reward.prmu is not None, "some rows without PRMU's score"
    return scored.reward.prmu


def _parts(scored: Sequence[Scored]) -> RewardParts:
    asked = scored[0].reward is not None and scored[0].reward.prmu is not None
    return RewardParts(
        verifiable=_over_tasks(scored, _task_score),
        repetition=_over_tasks(scored, lambda each: each.row.repetition),
        format=_over_tasks(scored, lambda each: each.row.format),
        tag=_over_tasks(scored, lambda each: each.row.tag),
        prmu=_over_tasks(scored, _prmu) if asked else None,
        unknown_user=_unknown_share(scored),
    )


def _unknown_share(scored: Sequence[Scored]) -> float | None:
    """Plain share of rows, unlike the means over tasks: it says how many, not how good."""
    unknown = [None if each.reward is None else each.reward.prmu_unknown_user for each in scored]
    return None if unknown[0] is None else fmean(bool(each) for each in unknown)


def _by_seen(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    return {
        "seen": [each for each in scored if each.row.seen_user is True],
        "unseen": [each for each in scored if each.row.seen_user is False],
        "unknown": [each for each in scored if each.row.seen_user is None],
    }


def _by_history(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    groups: dict[str, list[Scored]] = {}
    for low, high in zip(HISTORY_FROM, (*HISTORY_FROM[1:], None), strict=True):
        name = f"{low}+" if high is None else f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        groups[name] = [
            each for each in scored if each.row.history >= low and (high is None or each.row.history < high)
        ]
    return groups


def _group(scored: Sequence[Scored]) -> Group:
    rewarded = all(each.reward is not None for each in scored)
    thinking = all(each.row.thinking for each in scored)
    return Group(
        rows=len({each.row.id for each in scored}),
        users=len({each.row.user_id for each in scored}),
        task_score=_over_tasks(scored, _task_score),
        well_formed=fmean(_well_formed(each.row) for each in scored) if thinking else None,
        reward=_over_tasks(scored, _reward) if rewarded else None,
        unknown_user=_unknown_share(scored),
    )


def _well_formed(row: Row) -> float:
    return float(row.format == 1.0 and row.tag == 0.0)


def _metrics(task: str, scored: Sequence[Scored], reading: str) -> dict[str, float]:
    rows = [each.row for each in scored if each.row.task == task]
    spec = get_task(task)
    return task_metrics(
        spec,
        {row.id: row.gold for row in rows},
        {
            row.id: row.parsed if reading == "lenient" else read_answer(spec, row.answer, "official")
            for row in rows
        },
    )


def _mean_of(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in metrics) for name in metrics[0]}
