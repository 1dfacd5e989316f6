"""Stage ``evaluate``: answer, score, compare, and write it down."""

import json
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from tagpr.benchmarks.examples import QueryTooLongError, read_examples
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
from tagpr.evaluation.rows import Row, RowFile
from tagpr.evaluation.score import Decoding, Summary, score_row, summarise
from tagpr.evaluation.tables import markdown
from tagpr.runs import (
    check_model_folder,
    file_hash,
    folder_hash,
    manifest,
    write_json_atomically,
    write_text_atomically,
)
from tagpr.schema import Example

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
        StageError: a model's folder or the examples are missing, or rows were made under other settings.
        DataError: the examples or the rows' files are damaged.
    """
    settings = config.evaluate
    directory = Path(config.run.dir)
    models = _models(config)
    seeds = _seeds(config)
    data = Path(config.paths.examples) / f"{settings.split}.jsonl"
    if not data.is_file():
        raise StageError(f"{data}: no such file. Run `bash recipes/prepare_data.sh`.")
    examples = [example for example in read_examples(data) if example.task in set(config.benchmark.tasks)]
    selected = select_evenly(examples, settings.limit)
    if not selected:
        raise DataError(
            f"{data}: holds no row of benchmark.tasks={list(config.benchmark.tasks)}. Name others."
        )
    seen = seen_users(Path(config.paths.examples) / "train.jsonl")
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
    rows: dict[str, list[Row]] = {}
    for label, model in models.items():
        job = Job(
            label=label,
            model=model,
            path=directory / f"{label}.jsonl",
            settings={
                "model": folder_hash(Path(model)) if Path(model).is_dir() else model,
                "data": file_hash(data),
                **asdict(prompts),
                "temperature": settings.temperature,
                "dtype": engine.dtype,
            },
            when_changed=settings.when_changed,
            prompts=prompts,
            engine=engine,
            temperature=settings.temperature,
            seeds=seeds,
            log=directory / "engine.log",
        )
        if engine.process_per_model if engine.process_per_model is not None else _has_gpu():
            in_own_process(answer_with, job=job, selected=selected, seen=seen)
        else:
            answer_with(job=job, selected=selected, seen=seen)
        rows[label] = scored_rows(job, examples, seen)

    summary = _summary(config, rows, selected, seeds)
    text = markdown(summary)
    write_json_atomically(directory / "summary.json", summary.model_dump())
    write_text_atomically(directory / "table.md", text)
    write_text_atomically(
        directory / "report.html", _page(config, summary, rows, selected, prompts, list(models.values()))
    )
    inputs = {"examples": data, **{label: Path(model) for label, model in models.items()}}
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
        DataError: a line has no user.
    """
    if not train.is_file():
        logger.warning("%s: missing, so nobody knows which users were seen in training", train)
        return None
    users = set()
    with train.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                users.add(str(json.loads(line)["user_id"]))
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{train}:{number}: is no example. Run `bash recipes/prepare_data.sh` again."
                ) from None
    return frozenset(users)


def answer_with(job: Job, selected: Sequence[Example], seen: frozenset[str] | None) -> int:
    """Answer what one model still has to answer; returns the number of rows."""

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
                renderer=partial(PromptRenderer, job.model, job.prompts),
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
        if not re.fullmatch(r"[\w.-]+", label) or label in ("summary", "manifest"):
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


@cache
def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _summary(
    config: DictConfig,
    rows: dict[str, list[Row]],
    selected: Sequence[Example],
    seeds: Sequence[int | None],
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
        return summarise(chosen, config.evaluate.bootstrap.resamples, config.run.seed, name)

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
        decodings=decodings,
    )


def _page(
    config: DictConfig,
    summary: Summary,
    rows: dict[str, list[Row]],
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
        cases.append(report.Case(id_, prompt, {label: model[id_] for label, model in by_id.items()}))
    curves = {str(stage): Path(path) for stage, path in config.evaluate.report.curves.items()}
    return report.render(summary, cases, curves)
