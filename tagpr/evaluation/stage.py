"""Stage ``evaluate``: answer, score, ask PRMU, compare, and write it down."""

import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from tagpr.benchmarks.prompt import QueryTooLongError
from tagpr.benchmarks.storage import examples_file, read_examples, read_users
from tagpr.console import library_output_to
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.evaluation import report
from tagpr.evaluation.generate import (
    Engine,
    EngineSettings,
    PromptRenderer,
    PromptSettings,
    VllmEngine,
    answer,
    in_own_process,
)
from tagpr.evaluation.prmu_scores import Answered, BackgroundServer, prmu_scores
from tagpr.evaluation.rows import Key, Row, RowFile
from tagpr.evaluation.score import Decoding, Rewards, Summary, guided_reward, score_row, summarise
from tagpr.evaluation.tables import markdown
from tagpr.rewards.composite import RewardWeights
from tagpr.runs import (
    check_model_folder,
    file_hash,
    folder_hash,
    manifest,
    write_json_atomically,
    write_text_atomically,
)
from tagpr.schema import Example, PrmuScore
from tagpr.tags import vocabulary

logger = logging.getLogger(__name__)

# Which recipe leaves the folder that a label stands for; a label of the user's own comes from elsewhere.
RECIPES = {
    "base": "base.sh",
    "sft": "sft.sh",
    "guided": "guided_rl.sh",
    "exploratory": "exploratory_rl.sh",
}


@dataclass(frozen=True)
class Job:
    """One model's share of the work; plain data, so that it can go to a process of its own."""

    label: str
    model: str
    path: Path
    settings: dict[str, Any]
    when_changed: Literal["redo", "refuse"]
    prompts: PromptSettings
    engine: EngineSettings
    temperature: float
    seeds: tuple[int | None, ...]
    log: Path


def run(config: DictConfig) -> None:
    """Answer a split's rows with every model; leave ``<label>.jsonl``, summary.json, table.md and report.html.

    Raises:
        ConfigError: no model, no way to decode, or an unknown label.
        StageError: a model's folder, PRMU or the examples are missing, or rows were made under other settings.
        DataError: the examples or the rows' files are damaged.
        RewardServerError: PRMU's score of a response cannot be had.
    """
    settings = config.evaluate
    directory = Path(config.run.dir)
    models = _models(config)
    seeds = _seeds(config)
    weights = _reward_weights(config)
    if weights is not None and weights.gamma != 0:
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
    prompts = PromptSettings(
        profile_size=config.benchmark.profile_size,
        retriever=config.benchmark.retriever,
        max_prompt_tokens=config.benchmark.max_prompt_tokens,
        max_response_tokens=config.benchmark.max_response_tokens,
        seed=config.run.seed,
    )
    engine = EngineSettings(**{str(key): value for key, value in settings.engine.items()})
    logger.info(
        "%s of %s: %d of %d rows, models %s, %s",
        settings.split,
        config.benchmark.name,
        len(selected),
        len(examples),
        ", ".join(models),
        ", ".join("greedy" if seed is None else f"seed {seed}" for seed in seeds),
    )
    write_text_atomically(directory / "config.yaml", OmegaConf.to_yaml(config))
    jobs = [
        Job(
            label=label,
            model=model,
            path=directory / f"{label}.jsonl",
            settings={
                "model": folder_hash(Path(model)) if Path(model).is_dir() else model,
                "data": file_hash(data),
                **asdict(prompts),
                "temperature": settings.temperature,
                "dtype": engine.dtype,
                # Rows from before this key may lack what the reward would have seen.
                "special_tokens": "kept",
                # The prompts are neutralised for these tags, and the rows scored by them.
                "tags": list(vocabulary()),
            },
            when_changed=settings.when_changed,
            prompts=prompts,
            engine=engine,
            temperature=settings.temperature,
            seeds=seeds,
            log=directory / "engine.log",
        )
        for label, model in models.items()
    ]
    rows: dict[str, list[Row]] = {}
    with BackgroundServer(config.paths.prmu, directory) as server:
        asks_prmu = weights is not None and weights.gamma != 0
        for job in jobs:
            if engine.process_per_model if engine.process_per_model is not None else _has_gpu():
                in_own_process(answer_with, job=job, selected=selected, seen=seen)
            else:
                # On a GPU the two would want the same memory; elsewhere the server starts while vLLM does.
                beside = server.start if asks_prmu and not _has_gpu() else None
                answer_with(job=job, selected=selected, seen=seen, beside=beside)
            rows[job.label] = scored_rows(job, examples, seen)
            server.check()
        rewards: dict[str, Rewards] | None = None
        version = None
        if weights is not None:
            prmu: dict[str, dict[Key, PrmuScore]] = {}
            if asks_prmu:
                version, prmu = _ask_prmu(config, jobs, rows, selected, server)
            rewards = _rewards(rows, selected, seeds, weights, prmu)

    summary = _summary(config, rows, selected, seeds, weights, version, rewards)
    text = markdown(summary)
    write_json_atomically(directory / "summary.json", summary.model_dump())
    write_text_atomically(directory / "table.md", text)
    write_text_atomically(
        directory / "report.html",
        _page(config, summary, rows, rewards, selected, prompts, list(models.values())),
    )
    inputs = {"examples": data, **{label: Path(model) for label, model in models.items()}}
    if version is not None:
        inputs["prmu"] = Path(config.paths.prmu)
    record = manifest("evaluate", inputs, config.run.seed, synthetic=config.benchmark.synthetic)
    write_json_atomically(directory / "manifest.json", record.model_dump())
    sys.stdout.write(text)
    sys.stdout.flush()
    logger.info("written: %s/{%s}", directory, "table.md, summary.json, report.html")


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
    """Answer what one model still has to answer; returns the number of rows. ``beside`` is called if there are any."""

    def renderer() -> PromptRenderer:
        if beside is not None:
            beside()
        return PromptRenderer(job.model, job.prompts)

    def engine() -> AbstractContextManager[Engine]:
        return VllmEngine(job.model, job.engine, job.prompts, job.temperature)

    with RowFile(job.path, job.settings, job.when_changed) as file:
        # Everything that vLLM and its libraries write goes to a file; our own lines stay on the terminal.
        with library_output_to(job.log):
            return answer(
                label=job.label,
                examples=selected,
                seeds=job.seeds,
                file=file,
                renderer=renderer,
                engine=engine,
                score=lambda generation, example: score_row(generation, example, _is_seen(example, seen)),
                write_every_s=job.engine.write_every_s,
            )


def scored_rows(job: Job, examples: Sequence[Example], seen: frozenset[str] | None) -> list[Row]:
    """Every row of a model's file, scored by today's code; a file scored by older code follows."""
    by_id = {example.id: example for example in examples}
    with RowFile(job.path, job.settings, "refuse") as file:
        left = [row for row in file.rows.values() if row.id in by_id]
        rows = [score_row(row, by_id[row.id], _is_seen(by_id[row.id], seen)) for row in left]
        if len(left) == len(file.rows):
            file.rescore(rows)
    return rows


def _ask_prmu(
    config: DictConfig,
    jobs: Sequence[Job],
    rows: Mapping[str, Sequence[Row]],
    selected: Sequence[Example],
    server: BackgroundServer,
) -> tuple[str, dict[str, dict[Key, PrmuScore]]]:
    """PRMU's version, and its score of every row of this evaluation, label -> key -> score."""
    from tagpr.prmu.model import content_version

    examples = {example.id: example for example in selected}

    @cache
    def renderer(tokenizer: str) -> PromptRenderer:
        job = next(job for job in jobs if _tokenizer_of(job.model) == tokenizer)
        return PromptRenderer(job.model, job.prompts)

    # Rows are asked for in order of their ids, so a few prompts are enough for all models.
    @lru_cache(maxsize=64)
    def prompt(tokenizer: str, id_: str) -> tuple[str, int]:
        rendered = renderer(tokenizer).render(examples[id_])
        return rendered.text, len(rendered.token_ids)

    def prompts_of(job: Job) -> Callable[[Row], str]:
        tokenizer = _tokenizer_of(job.model)

        def prompt_of(row: Row) -> str:
            text, tokens = prompt(tokenizer, row.id)
            if tokens != row.prompt_tokens:
                raise StageError(
                    f"{job.path}: row {row.id} answers another prompt than today's code renders. "
                    "Move the file away and run the same command again."
                )
            return text

        return prompt_of

    version = content_version(Path(config.paths.prmu))
    answered = [
        Answered(
            label=job.label,
            path=job.path.with_name(f"{job.label}.prmu.jsonl"),
            rows=[row for row in rows[job.label] if row.id in examples and row.seed in job.seeds],
            settings=job.settings,
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


def _models(config: DictConfig) -> dict[str, str]:
    models = {str(label): str(path) for label, path in config.evaluate.models.items()}
    only = config.evaluate.only
    chosen = list(models) if only is None else [str(label) for label in only]
    for label in chosen:
        if label not in models:
            raise ConfigError(f"evaluate.only={label}: no such model. Known: {', '.join(models)}.")
    if not chosen:
        raise ConfigError("evaluate.models: names no model. Name one, label: folder.")
    for label in models:
        if not re.fullmatch(r"[\w.-]+", label) or label in ("summary", "manifest") or label.endswith(".prmu"):
            raise ConfigError(f"evaluate.models.{label}: cannot name a file. Use letters, digits, . _ and -.")
        if label in chosen:
            if label in RECIPES:
                check_model_folder(
                    models[label], f"paths.{label}", RECIPES[label], may_be_hub_id=label == "base"
                )
            else:
                check_own_folder(models[label], label)
    return {label: path for label, path in models.items() if label in chosen}


def check_own_folder(folder: str, label: str) -> None:
    """Refuse a folder of the user's own that is none.

    Raises:
        StageError: no Hugging Face folder is there.
    """
    if not (Path(folder) / "config.json").is_file() and not re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
        raise StageError(
            f"evaluate.models.{label}={folder}: no Hugging Face folder. "
            "Point it at one with config.json, a tokenizer and *.safetensors."
        )


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
    rows: dict[str, list[Row]],
    selected: Sequence[Example],
    seeds: Sequence[int | None],
    weights: RewardWeights | None,
    prmu_version: str | None,
    rewards: Mapping[str, Rewards] | None,
) -> Summary:
    wanted = {example.id for example in selected}
    everywhere = wanted.intersection(*({row.id for row in model} for model in rows.values()))
    if not everywhere:
        raise DataError(
            f"benchmark.max_prompt_tokens={config.benchmark.max_prompt_tokens}: "
            "not one row's query fits. Raise it."
        )

    def decoding(name: Literal["greedy", "sampled"], its: Sequence[int | None]) -> Decoding:
        chosen = {
            label: [row for row in model if row.id in everywhere and row.seed in its]
            for label, model in rows.items()
        }
        return summarise(chosen, config.evaluate.bootstrap.resamples, config.run.seed, name, rewards)

    sampled = [seed for seed in seeds if seed is not None]
    decodings = ([decoding("greedy", [None])] if None in seeds else []) + (
        [decoding("sampled", sampled)] if sampled else []
    )
    return Summary(
        benchmark=config.benchmark.name,
        synthetic=config.benchmark.synthetic,
        split=config.evaluate.split,
        tasks=list(config.benchmark.tasks),
        rows_selected=len(selected),
        rows_left_out=len(wanted) - len(everywhere),
        temperature=config.evaluate.temperature,
        bootstrap_resamples=config.evaluate.bootstrap.resamples,
        reward_weights=None
        if weights is None
        else {"alpha": weights.alpha, "beta": weights.beta, "gamma": weights.gamma},
        prmu_version=prmu_version,
        decodings=decodings,
    )


def _page(
    config: DictConfig,
    summary: Summary,
    rows: dict[str, list[Row]],
    rewards: Mapping[str, Rewards] | None,
    selected: Sequence[Example],
    prompts: PromptSettings,
    models: Sequence[str],
) -> str:
    seed = None if config.evaluate.greedy else min(config.evaluate.seeds)
    by_id = {label: {row.id: row for row in model if row.seed == seed} for label, model in rows.items()}
    shared = [example for example in selected if all(example.id in model for model in by_id.values())]
    ordered = {label: [model[example.id] for example in shared] for label, model in by_id.items()}
    examples = {example.id: example for example in shared}
    renderer = PromptRenderer(models[0], prompts)
    cases = []
    for id_ in report.choose_cases(ordered, config.evaluate.report.chains):
        try:
            prompt = renderer.render(examples[id_]).text
        except QueryTooLongError:  # another model's tokenizer had room for it
            continue
        answers = {label: model[id_] for label, model in by_id.items()}
        worth = {label: its[id_, seed] for label, its in (rewards or {}).items()}
        cases.append(report.Case(id_, prompt, answers, worth))
    curves = {str(stage): Path(path) for stage, path in config.evaluate.report.curves.items()}
    return report.render(summary, cases, curves)
