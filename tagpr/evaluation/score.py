"""From rows to figures: of each model, and of differences with their intervals over users (S32, S38)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

from pydantic import Field

from tagpr.benchmarks.tasks import get_task, parse_answer
from tagpr.errors import ConfigError
from tagpr.evaluation.rows import Generation, Key, Row
from tagpr.metrics import lamp_metrics, paired_bootstrap, rouge
from tagpr.rewards.composite import RewardWeights, guided
from tagpr.rewards.format import format_reward
from tagpr.rewards.tag import tag_reward
from tagpr.rewards.verifiable import verifiable_reward
from tagpr.schema import Example, PrmuScore, Record, RewardBreakdown
from tagpr.tags import parse_segments, split_response

# Higher is better for all but these.
LOWER_IS_BETTER = ("mae", "mse", "rmse")
# Measures whose differences from stage to stage are reported.
COMPARED = ("task_score", "reward", "well_formed", "reasoning_tokens")


class Group(Record):
    """Figures of some users only, e.g. those never seen in training (S40)."""

    rows: int
    users: int
    task_score: float
    well_formed: float
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


class ModelSummary(Record):
    """Figures of one model. With several seeds every figure is the mean over seeds."""

    rows: int
    users: int
    seeds: list[int | None]
    task_score: float = Field(description="mean over tasks of the task's mean R_v (S23)")
    task_score_deviation: float | None = Field(description="sample standard deviation over seeds")
    reward: float | None = Field(
        description="guided reward (eq. 5), mean over tasks of the task's mean; None: left out"
    )
    reward_deviation: float | None = Field(description="sample standard deviation over seeds")
    reward_parts: RewardParts | None
    verifiable: dict[str, float] = Field(description="mean R_v by task")
    lamp: dict[str, dict[str, float]] = Field(description="LaMP's own metrics by task (S32)")
    unparsable: float = Field(description="share of answers that say nothing the metric can use")
    well_formed: float = Field(description="share with R_f = 1 and R_tag = 0")
    format: float = Field(description="share with R_f = 1")
    tag: float = Field(description="share with R_tag = 0")
    failures: dict[str, int] = Field(description="responses by the first check that failed")
    truncated: int = Field(description="responses that ended at the token limit")
    repetition: float
    response_tokens: float
    reasoning_tokens: float
    tag_shares: dict[str, float] = Field(description="share of segments by tag, over responses that parse")
    segments: float = Field(description="segments a response, over responses that parse")
    items_used: float = Field(description="profile items in a prompt")
    prompts_shortened: int = Field(description="prompts with items cut to fit")
    groups: dict[str, Group] = Field(description="by users: seen | unseen in training | unknown")


class Difference(Record):
    """Mean of ``model - against`` on the same rows; 95 % interval over users, None with fewer than two."""

    model: str
    against: str
    measure: str
    mean: float
    low: float | None
    high: float | None
    rows: int
    users: int


class Decoding(Record):
    """All figures of one way to decode; ``best`` names a model only where its lead is real."""

    name: Literal["greedy", "sampled"]
    models: dict[str, ModelSummary]
    differences: list[Difference]
    best: dict[str, str] = Field(
        description="measure -> label whose interval against the runner-up excludes 0"
    )


class Summary(Record):
    """What ``summary.json`` holds."""

    benchmark: str
    synthetic: bool
    split: str
    tasks: list[str]
    rows_selected: int
    rows_left_out: int = Field(
        description="rows whose query alone exceeds the prompt's budget for some model"
    )
    temperature: float
    bootstrap_resamples: int
    reward_weights: dict[str, float] | None = Field(
        description="alpha, beta, gamma of eq. 5; None: no rewards"
    )
    prmu_version: str | None = Field(description="hash of the PRMU behind the rewards; None: not asked")
    decodings: list[Decoding]


def score_row(generation: Generation, example: Example, seen_user: bool | None) -> Row:
    """Score one response as the reward does in training (S23, S24, S26).

    Raises:
        DataError: the gold answer is empty.
    """
    response = split_response(generation.response)
    if generation.finish_reason == "length" and not response.problem:
        response = replace(response, problem="truncated")
    tag, tag_problem = tag_reward(response.reasoning)
    segments = parse_segments(response.reasoning)
    return Row(
        **generation.model_dump(),
        gold=example.gold,
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


def summarise(
    rows: Mapping[str, Sequence[Row]],
    resamples: int,
    seed: int,
    decoding: Literal["greedy", "sampled"],
    rewards: Mapping[str, Rewards] | None = None,
) -> Decoding:
    """Figures of every model (label -> rows, in the order of training) and of the differences that matter.

    The rows must be the same (id, seed) for every model, and ``rewards`` (label -> key -> guided reward), where
    given, must hold all of them. Each model is compared with the one before it and with the first.
    """
    its_rewards = {label: None if rewards is None else rewards[label] for label in rows}
    keys = {label: {row.key for row in model} for label, model in rows.items()}
    assert all(these == next(iter(keys.values())) for these in keys.values()), "rows differ"
    models = {label: summarise_model(model, its_rewards[label]) for label, model in rows.items()}
    values = {label: _measures(model, its_rewards[label]) for label, model in rows.items()}
    users = {row.id: row.user_id for row in next(iter(rows.values()))}

    def difference(model: str, against: str, measure: str) -> Difference:
        ids = sorted(values[model][measure])
        a, b = ([values[label][measure][id_] for id_ in ids] for label in (model, against))
        these = [users[id_] for id_ in ids]
        if len(set(these)) < 2:
            low = high = None
            mean = fmean(a) - fmean(b)
        else:
            found = paired_bootstrap(a, b, these, samples=resamples, seed=seed)
            mean, low, high = found.mean, found.low, found.high
        return Difference(
            model=model,
            against=against,
            measure=measure,
            mean=mean,
            low=low,
            high=high,
            rows=len(ids),
            users=len(set(these)),
        )

    labels = list(rows)
    pairs = [(after, before) for before, after in pairwise(labels)]
    pairs += [(label, labels[0]) for label in labels[2:]]
    differences = [
        difference(model, against, measure)
        for measure in COMPARED
        if all(measure in model for model in values.values())
        for model, against in sorted(pairs, key=lambda pair: labels.index(pair[0]))
    ]
    return Decoding(
        name=decoding, models=models, differences=differences, best=_best(labels, values, difference)
    )


def _best(
    labels: Sequence[str],
    values: Mapping[str, Mapping[str, Mapping[str, float]]],
    difference: Callable[[str, str, str], Difference],
) -> dict[str, str]:
    best: dict[str, str] = {}
    if len(labels) < 2:
        return best
    for measure in values[labels[0]]:
        if measure == "reasoning_tokens":
            continue  # fewer is cheaper, not better
        sign = -1 if measure.endswith(LOWER_IS_BETTER) else 1
        mean = {label: sign * fmean(values[label][measure].values()) for label in labels}
        first, second = sorted(labels, key=lambda label: mean[label], reverse=True)[:2]
        lead = difference(first, second, measure)
        if lead.low is not None and lead.high is not None and (lead.low > 0 or lead.high < 0):
            best[measure] = first
    return best


def summarise_model(rows: Sequence[Row], rewards: Rewards | None = None) -> ModelSummary:
    """Figures of one model on at least one row; with ``rewards``, one for every row, those of eq. 5 too."""
    seeds = sorted({row.seed for row in rows}, key=lambda seed: -1 if seed is None else seed)
    by_seed = [_by_task(row for row in rows if row.seed == seed) for seed in seeds]
    scores = [_over_tasks(tasks, lambda row: row.verifiable) for tasks in by_seed]
    guided_rewards = (
        []
        if rewards is None
        else [_over_tasks(tasks, lambda row: rewards[row.key].reward) for tasks in by_seed]
    )
    lamp = {
        task: _mean_of([_lamp(task, tasks[task]) for tasks in by_seed])
        for task in sorted({row.task for row in rows})
    }
    parsed = [row for row in rows if row.tags]
    segments = sum((Counter(row.tags) for row in parsed), Counter[str]())
    return ModelSummary(
        rows=len({row.id for row in rows}),
        users=len({row.user_id for row in rows}),
        seeds=list(seeds),
        task_score=fmean(scores),
        task_score_deviation=stdev(scores) if len(scores) > 1 else None,
        reward=fmean(guided_rewards) if guided_rewards else None,
        reward_deviation=stdev(guided_rewards) if len(guided_rewards) > 1 else None,
        reward_parts=None if rewards is None else _parts(rows, rewards),
        verifiable={
            task: fmean(row.verifiable for row in these) for task, these in sorted(_by_task(rows).items())
        },
        lamp=lamp,
        unparsable=sum(
            lamp[task]["unparsable"] * len(these) / len(rows) for task, these in _by_task(rows).items()
        ),
        well_formed=fmean(map(_well_formed, rows)),
        format=fmean(row.format for row in rows),
        tag=fmean(row.tag == 0.0 for row in rows),
        failures=dict(Counter(row.failure for row in rows if row.failure).most_common()),
        truncated=sum(row.finish_reason == "length" for row in rows),
        repetition=fmean(row.repetition for row in rows),
        response_tokens=fmean(row.response_tokens for row in rows),
        reasoning_tokens=fmean(row.reasoning_tokens for row in rows),
        tag_shares={tag: count / segments.total() for tag, count in segments.most_common()},
        segments=segments.total() / len(parsed) if parsed else 0.0,
        items_used=fmean(row.items_used for row in rows),
        prompts_shortened=len({row.id for row in rows if row.items_shortened}),
        groups={name: _group(these, rewards) for name, these in _by_seen(rows).items() if these},
    )


def _over_tasks(tasks: Mapping[str, Sequence[Row]], value: Callable[[Row], float]) -> float:
    return fmean(fmean(map(value, rows)) for rows in tasks.values())


def _parts(rows: Sequence[Row], rewards: Rewards) -> RewardParts:
    tasks = _by_task(rows)
    return RewardParts(
        verifiable=_over_tasks(tasks, lambda row: row.verifiable),
        repetition=_over_tasks(tasks, lambda row: row.repetition),
        format=_over_tasks(tasks, lambda row: row.format),
        tag=_over_tasks(tasks, lambda row: row.tag),
        prmu=_mean_where_asked(rows, lambda row: rewards[row.key].prmu),
        unknown_user=_unknown_share(rows, rewards),
    )


def _mean_where_asked(rows: Sequence[Row], value: Callable[[Row], float | None]) -> float | None:
    """Mean over tasks; None where PRMU was not asked, which holds for all rows or for none."""
    tasks = [[value(row) for row in task] for task in _by_task(rows).values()]
    if tasks[0][0] is None:
        return None
    numbers = [[number for number in task if number is not None] for task in tasks]
    assert [len(task) for task in numbers] == [len(task) for task in tasks], "some rows without PRMU's score"
    return fmean(map(fmean, numbers))


def _unknown_share(rows: Sequence[Row], rewards: Rewards) -> float | None:
    """Plain share of rows, unlike the means over tasks: it says how many, not how good."""
    unknown = [rewards[row.key].prmu_unknown_user for row in rows]
    return None if unknown[0] is None else fmean(bool(each) for each in unknown)


def _by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _by_seen(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        "seen": [row for row in rows if row.seen_user is True],
        "unseen": [row for row in rows if row.seen_user is False],
        "unknown": [row for row in rows if row.seen_user is None],
    }


def _group(rows: Sequence[Row], rewards: Rewards | None) -> Group:
    tasks = _by_task(rows)
    return Group(
        rows=len({row.id for row in rows}),
        users=len({row.user_id for row in rows}),
        task_score=_over_tasks(tasks, lambda row: row.verifiable),
        well_formed=fmean(map(_well_formed, rows)),
        reward=None if rewards is None else _over_tasks(tasks, lambda row: rewards[row.key].reward),
        unknown_user=None if rewards is None else _unknown_share(rows, rewards),
    )


def _well_formed(row: Row) -> float:
    return float(row.format == 1.0 and row.tag == 0.0)


def _lamp(task: str, rows: Sequence[Row]) -> dict[str, float]:
    return lamp_metrics(
        get_task(task), {row.id: row.gold for row in rows}, {row.id: row.parsed for row in rows}
    )


def _mean_of(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in metrics) for name in metrics[0]}


def _measures(rows: Sequence[Row], rewards: Rewards | None) -> dict[str, dict[str, float]]:
    """Per-row values, measure -> id -> mean over seeds, of all that is a mean over rows.

    ``task_score`` and ``reward`` are means over tasks, so a row weighs N / (number of tasks * rows of its task).
    F1 is no mean of rows and therefore gets no interval here; RMSE goes with the squared error.
    """
    tasks = _by_task(rows)
    values: dict[str, dict[str, list[float]]] = {}

    def add(measure: str, row: Row, value: float) -> None:
        values.setdefault(measure, {}).setdefault(row.id, []).append(value)

    for row in rows:
        weight = len(rows) / (len(tasks) * len(tasks[row.task]))
        add("task_score", row, row.verifiable * weight)
        if rewards is not None:
            add("reward", row, rewards[row.key].reward * weight)
        add("well_formed", row, _well_formed(row))
        add("reasoning_tokens", row, row.reasoning_tokens)
        for metric, value in _row_metrics(row).items():
            add(f"{row.task}/{metric}", row, value)
    return {measure: {id_: fmean(seeds) for id_, seeds in by_id.items()} for measure, by_id in values.items()}


def _row_metrics(row: Row) -> dict[str, float]:
    task = get_task(row.task)
    if task.kind == "generation":
        return dict(zip(("rouge1", "rougeL"), rouge(row.gold, row.parsed), strict=True))
    metrics = lamp_metrics(task, {row.id: row.gold}, {row.id: row.parsed})
    if task.kind == "classification":
        return {"accuracy": metrics["accuracy"]}
    return {"mae": metrics["mae"], "mse": metrics["mse"], "rmse": metrics["mse"]}
