"""Stage ``evaluate``: answer, score, ask PRMU, compare, and write it down."""

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from tagpr.benchmarks.prompt import QueryTooLongError
from tagpr.benchmarks.storage import examples_file, read_examples, read_users
from tagpr.console import library_output_to
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.evaluation import report
from tagpr.evaluation.engines import Engine, EngineSettings, open_engine
from tagpr.evaluation.generate import answer, in_own_process
from tagpr.evaluation.measures import Bootstrap
from tagpr.evaluation.methods import Method, read_methods, settings_of
from tagpr.evaluation.prmu_scores import Answered, BackgroundServer, prmu_scores
from tagpr.evaluation.prompts import PromptRenderer, PromptSettings
from tagpr.evaluation.rows import Key, Row, RowFile
from tagpr.evaluation.score import (
    Decoding,
    Replicate,
    Rewards,
    Summary,
    SweepPoint,
    guided_reward,
    interval,
    measure,
    score_row,
    summarise,
)
from tagpr.evaluation.tables import markdown
from tagpr.retrieval import DENSE, known_retrievers
from tagpr.rewards.composite import RewardWeights
from tagpr.runs import (
    check_model_folder,
    file_hash,
    manifest,
    write_json_atomically,
    write_text_atomically,
)
from tagpr.schema import Example, PrmuScore
from tagpr.tags import vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Condition:
    """What every model is shown (S36)."""

    retriever: str
    profile_size: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.retriever}-{self.profile_size}"


@dataclass(frozen=True)
class Pass:
    """One condition of one model: where its rows go, and what determines them."""

    condition: Condition
    path: Path
    settings: dict[str, Any]
    prompts: PromptSettings


@dataclass(frozen=True)
class Job:
    """One training run of one method with all its passes, the first of them under the benchmark's own condition.

    Plain data, so that it can go to a process of its own.
    """

    method: Method
    run: int
    passes: tuple[Pass, ...]
    when_changed: Literal["redo", "refuse"]
    engine: EngineSettings
    temperature: float
    seeds: tuple[int | None, ...]
    log: Path

    @property
    def name(self) -> str:
        """For messages and files: the method's label, with the number of the run from the second on."""
        return self.method.label if self.run == 0 else f"{self.method.label}-run{self.run + 1}"


def run(config: DictConfig) -> None:
    """Answer a split's rows with every model; leave ``<label>.jsonl``, summary.json, table.md and report.html.

    Raises:
        ConfigError: no model, no way to decode, or an unknown label, retriever or profile size.
        StageError: a model's folder, PRMU or the examples are missing, or rows were made under other settings.
        DataError: the examples or the rows' files are damaged.
        RewardServerError: PRMU's score of a response cannot be had.
    """
    settings = config.evaluate
    directory = Path(config.run.dir)
    methods = read_methods(config)
    seeds = _seeds(config)
    weights = _reward_weights(config)
    rewarded = {label for label, method in methods.items() if weights is not None and method.thinking}
    asks_prmu = weights is not None and weights.gamma != 0 and bool(rewarded)
    if asks_prmu:
        check_model_folder(config.paths.prmu, "paths.prmu", "train_prmu.sh")
    data = examples_file(config.paths.examples, settings.split)
    if not data.is_file():
        raise StageError(f"{data}: no such file. Run `bash recipes/prepare_data.sh`.")
    examples = [example for example in read_examples(data) if example.task in set(config.benchmark.tasks)]
    selected = select_evenly(examples, settings.limit)
    if not selected:
        raise DataError(
            f"{data}: holds no row of benchmark.tasks={list(config.benchmark.tasks)}. Name others."
        )
    seen = seen_users(examples_file(config.paths.examples, "train"))
    conditions = read_conditions(config)
    engine = EngineSettings(**{str(key): value for key, value in settings.engine.items()})
    logger.info(
        "%s of %s: %d of %d rows, models %s, %s, %s",
        settings.split,
        config.benchmark.name,
        len(selected),
        len(examples),
        ", ".join(methods),
        ", ".join("greedy" if seed is None else f"seed {seed}" for seed in seeds),
        ", ".join(condition.name for condition in conditions),
    )
    write_text_atomically(directory / "config.yaml", OmegaConf.to_yaml(config))
    jobs = _jobs(config, methods, conditions, engine, seeds, file_hash(data))
    rows: dict[tuple[str, Condition], list[Row]] = {}
    unanswered: dict[str, int] = {}
    with BackgroundServer(config.paths.prmu, directory) as server:
        for job in jobs:
            offline = job.method.endpoint is None
            own_process = engine.process_per_model if engine.process_per_model is not None else _has_gpu()
            if offline and own_process:
                in_own_process(answer_with, job=job, selected=selected, seen=seen)
            else:
                # On a GPU the two would want the same memory; elsewhere the server starts while vLLM does.
                beside = server.start if asks_prmu and not _has_gpu() else None
                answer_with(job=job, selected=selected, seen=seen, beside=beside)
            for each in job.passes:
                rows[job.name, each.condition], refused = scored_rows(each, examples, seen)
                if each is job.passes[0]:
                    unanswered[job.method.label] = max(refused, unanswered.get(job.method.label, 0))
            server.check()
        main = {job.name: rows[job.name, conditions[0]] for job in jobs}
        rewards: dict[str, Rewards] = {}
        version = None
        if weights is not None and rewarded:
            asked = [job for job in jobs if job.method.label in rewarded]
            prmu: dict[str, dict[Key, PrmuScore]] = {}
            if asks_prmu:
                version, prmu = _ask_prmu(config, asked, main, selected, server)
            rewards = _rewards({job.name: main[job.name] for job in asked}, selected, seeds, weights, prmu)

    summary = _summary(config, jobs, rows, unanswered, selected, seeds, weights, version, rewards)
    text = markdown(summary)
    write_json_atomically(directory / "summary.json", summary.model_dump())
    write_text_atomically(directory / "table.md", text)
    write_text_atomically(directory / "report.html", _page(config, summary, jobs, main, rewards, selected))
    inputs = {
        "examples": data,
        **{job.name: Path(job.method.model) for job in jobs if not job.method.endpoint},
    }
    if version is not None:
        inputs["prmu"] = Path(config.paths.prmu)
    record = manifest("evaluate", inputs, config.run.seed, synthetic=config.benchmark.synthetic)
    write_json_atomically(directory / "manifest.json", record.model_dump())
    sys.stdout.write(markdown(summary, details=False))
    sys.stdout.flush()
    logger.info("written: %s/{%s}", directory, "table.md, summary.json, report.html")


def read_conditions(config: DictConfig) -> list[Condition]:
    """The benchmark's own condition first, then those of ``evaluate.sweep`` that differ from it.

    Profile sizes are swept with the benchmark's retriever and retrievers with its size, as in the paper (Figure 4);
    ``evaluate.sweep.product`` takes every pair.

    Raises:
        ConfigError: a size or retriever that cannot be meant.
    """
    own = Condition(str(config.benchmark.retriever), int(config.benchmark.profile_size))
    sweep = config.evaluate.sweep
    sizes, retrievers = list(sweep.profile_sizes), [str(name) for name in sweep.retrievers]
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ConfigError(f"evaluate.sweep.profile_sizes={size}: is no number of items. Use 0 or more.")
    if sweep.product:
        swept = [
            Condition(name, size)
            for name in retrievers or [own.retriever]
            for size in sizes or [own.profile_size]
        ]
    else:
        swept = [Condition(own.retriever, size) for size in sizes]
        swept += [Condition(name, own.profile_size) for name in retrievers]
    known = known_retrievers()
    for condition in swept:
        if condition.retriever not in known:
            raise ConfigError(
                f"evaluate.sweep.retrievers={condition.retriever}: no such retriever. Known: {', '.join(known)}."
            )
    return list(dict.fromkeys([own, *swept]))


def _jobs(
    config: DictConfig,
    methods: Mapping[str, Method],
    conditions: Sequence[Condition],
    engine: EngineSettings,
    seeds: tuple[int | None, ...],
    data: str,
) -> list[Job]:
    settings = config.evaluate
    directory = Path(config.run.dir)
    jobs = []
    for label, method in methods.items():
        for number, model in enumerate(method.runs):
            name = label if number == 0 else f"{label}-run{number + 1}"
            passes = []
            for place, condition in enumerate(conditions):
                if place and method.profile_size is not None:
                    continue  # zero-shot is zero-shot under every condition
                prompts = PromptSettings(
                    profile_size=condition.profile_size
                    if method.profile_size is None
                    else method.profile_size,
                    retriever=condition.retriever,
                    max_prompt_tokens=config.benchmark.max_prompt_tokens,
                    max_response_tokens=config.benchmark.max_response_tokens,
                    seed=config.run.seed,
                    thinking_tokens=settings.thinking_tokens,
                    retriever_model=config.benchmark.retriever_model
                    if condition.retriever == DENSE
                    else None,
                )
                folder = directory / "sweep" / condition.name if place else directory
                determined = {
                    "data": data,
                    **asdict(prompts),
                    "temperature": settings.temperature,
                    "dtype": engine.dtype,
                    # Scores of kept rows depend on it, and a trained model's answers do.
                    "tags": dict(vocabulary()),
                    **settings_of(method, model),
                }
                passes.append(Pass(condition, folder / f"{name}.jsonl", determined, prompts))
            jobs.append(
                Job(
                    method=replace(method, model=model, seeds_of=()),
                    run=number,
                    passes=tuple(passes),
                    when_changed=settings.when_changed,
                    engine=engine,
                    temperature=settings.temperature,
                    seeds=seeds,
                    log=directory / "engine.log",
                )
            )
    return jobs


def select_evenly(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The first ``limit`` rows, taken in turn from every task, so that a larger limit only adds rows.

    Raises:
        ConfigError: ``limit`` < 1.
    """
    if limit is None:
        return list(examples)
    if limit < 1:
        raise ConfigError(f"evaluate.limit={limit}: no row to evaluate. Use 1 or more, or null for all.")
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    turns = chain.from_iterable(zip_longest(*by_task.values()))
    return [example for example in turns if example is not None][:limit]


def seen_users(train: Path) -> frozenset[str] | None:
    """Users with rows in the training split; None where there is none.

    Raises:
        DataError: the split is damaged.
    """
    if not train.is_file():
        logger.warning("%s: missing, so nobody knows which users were seen in training", train)
        return None
    return read_users(train)


def answer_with(
    job: Job,
    selected: Sequence[Example],
    seen: frozenset[str] | None,
    beside: Callable[[], None] | None = None,
) -> int:
    """Answer what one model still has to answer, under all conditions with one engine; returns the number of rows.

    ``beside`` is called if there are any.
    """
    done = 0
    # Everything that vLLM and its libraries write goes to a file; our own lines stay on the terminal.
    with library_output_to(job.log), ExitStack() as stack:
        opened: list[Engine] = []

        def engine() -> AbstractContextManager[Engine]:
            if not opened:
                if beside is not None:
                    beside()
                opened.append(
                    stack.enter_context(
                        open_engine(job.method, job.engine, job.passes[0].prompts, job.temperature)
                    )
                )
            return nullcontext(opened[0])

        for each in job.passes:
            with RowFile(each.path, each.settings, job.when_changed) as file:
                done += answer(
                    label=job.name if each is job.passes[0] else f"{job.name}, {each.condition.name}",
                    examples=selected,
                    # Sampled answers belong to the main condition: a sweep compares greedy ones.
                    seeds=job.seeds if each is job.passes[0] else job.seeds[:1],
                    file=file,
                    renderer=lambda prompts=each.prompts: PromptRenderer(  # type: ignore[misc]
                        job.method.prompt_tokenizer, prompts, job.method.thinking
                    ),
                    engine=engine,
                    score=lambda generation, example: score_row(generation, example, _is_seen(example, seen)),
                    write_every_s=job.engine.write_every_s,
                )
    return done


def scored_rows(one: Pass, examples: Sequence[Example], seen: frozenset[str] | None) -> tuple[list[Row], int]:
    """Every row of a pass's file, scored by today's code, and how many rows were refused; a file scored by older code follows."""
    by_id = {example.id: example for example in examples}
    with RowFile(one.path, one.settings, "refuse") as file:
        left = [row for row in file.rows.values() if row.id in by_id]
        rows = [score_row(row, by_id[row.id], _is_seen(by_id[row.id], seen)) for row in left]
        if len(left) == len(file.rows):
            file.rescore(rows)
        refused = {entry.id for entry in file.unanswered.values() if entry.reason == "refused"}
    # The file has them in the order in which they were finished, which decides the last bit of a sum.
    rows.sort(key=lambda row: (row.id, -1 if row.seed is None else row.seed))
    return rows, len(refused)


def _ask_prmu(
    config: DictConfig,
    jobs: Sequence[Job],
    rows: Mapping[str, Sequence[Row]],
    selected: Sequence[Example],
    server: BackgroundServer,
) -> tuple[str, dict[str, dict[Key, PrmuScore]]]:
    """PRMU's version, and its score of every row of this evaluation, job -> key -> score."""
    from tagpr.prmu.model import content_version

    examples = {example.id: example for example in selected}

    @cache
    def renderer(tokenizer: str, prompts: PromptSettings) -> PromptRenderer:
        job = next(job for job in jobs if _tokenizer_of(job.method.prompt_tokenizer) == tokenizer)
        # PRMU is asked about methods that think only.
        return PromptRenderer(job.method.prompt_tokenizer, prompts)

    # Rows are asked for in order of their ids, so a few prompts are enough for all models.
    @lru_cache(maxsize=64)
    def prompt(tokenizer: str, prompts: PromptSettings, id_: str) -> tuple[str, int]:
        rendered = renderer(tokenizer, prompts).render(examples[id_])
        return rendered.text, len(rendered.token_ids)

    def prompts_of(job: Job) -> Callable[[Row], str]:
        tokenizer = _tokenizer_of(job.method.prompt_tokenizer)
        main = job.passes[0]

        def prompt_of(row: Row) -> str:
            text, tokens = prompt(tokenizer, main.prompts, row.id)
            if tokens != row.prompt_tokens and job.method.endpoint is None:
                raise StageError(
                    f"{main.path}: row {row.id} answers another prompt than today's code renders. "
                    "Move the file away and run the same command again."
                )
            return text

        return prompt_of

    version = content_version(Path(config.paths.prmu))
    answered = [
        Answered(
            label=job.name,
            path=job.passes[0].path.with_name(f"{job.name}.prmu.jsonl"),
            rows=[row for row in rows[job.name] if row.id in examples and row.seed in job.seeds],
            settings=job.passes[0].settings,
            prompt=prompts_of(job),
        )
        for job in jobs
    ]
    return version, prmu_scores(answered, server, version, config.evaluate.reward_batch_items)


@cache
def _tokenizer_of(model: str) -> str:
    """What tells tokenizers apart without loading them: models of one family render every prompt the same."""
    folder = Path(model)
    vocabulary, template = folder / "tokenizer.json", folder / "chat_template.jinja"
    if not (vocabulary.is_file() and template.is_file()):
        return model
    return file_hash(vocabulary) + file_hash(template)


def _rewards(
    rows: Mapping[str, Sequence[Row]],
    selected: Sequence[Example],
    seeds: Sequence[int | None],
    weights: RewardWeights,
    prmu: Mapping[str, Mapping[Key, PrmuScore]],
) -> dict[str, Rewards]:
    wanted = {example.id for example in selected}
    return {
        label: {
            row.key: guided_reward(row, weights, prmu[label][row.key] if prmu else None)
            for row in model
            if row.id in wanted and row.seed in seeds
        }
        for label, model in rows.items()
    }


def _is_seen(example: Example, seen: frozenset[str] | None) -> bool | None:
    return None if seen is None else example.user_id in seen


def _seeds(config: DictConfig) -> tuple[int | None, ...]:
    settings = config.evaluate
    seeds = [int(seed) for seed in settings.seeds]
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"evaluate.seeds={seeds}: names a seed twice. List each once.")
    if seeds and not settings.temperature > 0:
        raise ConfigError(
            f"evaluate.temperature={settings.temperature}: samples need more than 0. Set 1.0, or no seeds."
        )
    if settings.when_changed not in ("redo", "refuse"):
        raise ConfigError(f"evaluate.when_changed={settings.when_changed}: no such way. Use redo or refuse.")
    if not settings.greedy and not seeds:
        raise ConfigError(
            "evaluate.greedy=false: and evaluate.seeds is empty, so there is nothing to do. Set one."
        )
    return (*([None] if settings.greedy else []), *seeds)


def _reward_weights(config: DictConfig) -> RewardWeights | None:
    """Weights of eq. 5; None where no rewards are wanted."""
    if not config.evaluate.reward:
        return None
    batch_items = config.evaluate.reward_batch_items
    if not isinstance(batch_items, int) or batch_items < 1:
        raise ConfigError(f"evaluate.reward_batch_items={batch_items}: asks nothing. Use 1 or more.")
    weights = config.evaluate.reward_weights
    for name in ("alpha", "beta", "gamma"):
        if not isinstance(weights[name], int | float) or not math.isfinite(weights[name]):
            raise ConfigError(f"evaluate.reward_weights.{name}={weights[name]}: no weight. Set a number.")
    return RewardWeights(alpha=weights.alpha, beta=weights.beta, gamma=weights.gamma)


@cache
def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _summary(
    config: DictConfig,
    jobs: Sequence[Job],
    rows: Mapping[tuple[str, Condition], Sequence[Row]],
    unanswered: Mapping[str, int],
    selected: Sequence[Example],
    seeds: Sequence[int | None],
    weights: RewardWeights | None,
    prmu_version: str | None,
    rewards: Mapping[str, Rewards],
) -> Summary:
    wanted = {example.id for example in selected}
    own = jobs[0].passes[0].condition
    everywhere = wanted.intersection(*({row.id for row in rows[job.name, own]} for job in jobs))
    if not everywhere:
        raise DataError(
            f"benchmark.max_prompt_tokens={config.benchmark.max_prompt_tokens}: "
            "not one row's query fits. Raise it."
        )
    resamples = config.evaluate.bootstrap.resamples

    def decoding(name: Literal["greedy", "sampled"], its: Sequence[int | None]) -> Decoding:
        models: dict[str, list[Replicate]] = {}
        for job in jobs:
            for seed in its:
                chosen = [row for row in rows[job.name, own] if row.id in everywhere and row.seed == seed]
                if chosen:
                    models.setdefault(job.method.label, []).append(
                        Replicate(chosen, rewards.get(job.name), job.run)
                    )
        return summarise(models, resamples, config.run.seed, name, unanswered)

    sampled = [seed for seed in seeds if seed is not None]
    decodings = ([decoding("greedy", [None])] if None in seeds else []) + (
        [decoding("sampled", sampled)] if sampled else []
    )
    return Summary(
        benchmark=config.benchmark.name,
        synthetic=config.benchmark.synthetic,
        split=config.evaluate.split,
        tasks=list(config.benchmark.tasks),
        retriever=own.retriever,
        profile_size=own.profile_size,
        rows_selected=len(selected),
        rows_left_out=len(wanted) - len(everywhere),
        temperature=config.evaluate.temperature,
        bootstrap_resamples=resamples,
        reward_weights=None
        if weights is None
        else {"alpha": weights.alpha, "beta": weights.beta, "gamma": weights.gamma},
        prmu_version=prmu_version,
        decodings=decodings,
        sweep=_sweep(jobs, rows, wanted, seeds[0], Bootstrap(resamples, config.run.seed)),
    )


def _sweep(
    jobs: Sequence[Job],
    rows: Mapping[tuple[str, Condition], Sequence[Row]],
    wanted: set[str],
    seed: int | None,
    bootstrap: Bootstrap,
) -> list[SweepPoint]:
    """Every model under every condition, on the rows that all of them answered; [] without a sweep."""
    conditions = list(dict.fromkeys(each.condition for job in jobs for each in job.passes))
    if len(conditions) < 2:
        return []
    shared = wanted.intersection(*({row.id for row in its} for its in rows.values()))
    points = []
    for condition in conditions:
        labels = dict.fromkeys(job.method.label for job in jobs if (job.name, condition) in rows)
        for number, label in enumerate(labels):
            replicates = [
                Replicate(
                    [row for row in rows[job.name, condition] if row.id in shared and row.seed == seed],
                    run=job.run,
                )
                for job in jobs
                if job.method.label == label
            ]
            shown = [row for replicate in replicates for row in replicate.rows]
            found = measure(replicates, bootstrap, number)
            points.append(
                SweepPoint(
                    retriever=condition.retriever,
                    profile_size=condition.profile_size,
                    model=label,
                    rows=len(replicates[0].rows),
                    items_used=fmean(row.items_used for row in shown),
                    prompts_shortened=len({row.id for row in shown if row.items_shortened}),
                    intervals={name: interval(name, each) for name, each in found.items()},
                )
            )
    return points


def _page(
    config: DictConfig,
    summary: Summary,
    jobs: Sequence[Job],
    rows: Mapping[str, Sequence[Row]],
    rewards: Mapping[str, Rewards],
    selected: Sequence[Example],
) -> str:
    seed = None if config.evaluate.greedy else min(config.evaluate.seeds)
    first = [job for job in jobs if job.run == 0]
    by_id = {job.name: {row.id: row for row in rows[job.name] if row.seed == seed} for job in first}
    shared = [example for example in selected if all(example.id in model for model in by_id.values())]
    ordered = {label: [model[example.id] for example in shared] for label, model in by_id.items()}
    examples = {example.id: example for example in shared}
    method = first[0].method
    renderer = PromptRenderer(method.prompt_tokenizer, first[0].passes[0].prompts, method.thinking)
    cases = []
    for id_ in report.choose_cases(ordered, config.evaluate.report.chains):
        try:
            prompt = renderer.render(examples[id_]).text
        except QueryTooLongError:  # another model's tokenizer had room for it
            continue
        answers = {label: model[id_] for label, model in by_id.items()}
        worth = {label: its[id_, seed] for label, its in rewards.items() if label in by_id}
        cases.append(report.Case(id_, prompt, answers, worth))
    curves = {str(stage): Path(path) for stage, path in config.evaluate.report.curves.items()}
    return report.render(summary, cases, curves)
