"""Stage ``review_chains``: ``python -m data_pipeline.review key=value ...`` (SPEC S13).

Writes a sample of the finished chains on sheets for people, records their verdicts, and reports the share that is right.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError

from data_pipeline.finished import iterate_finished, read_manifest, sft_column
from data_pipeline.selection import interleave, shuffled
from data_pipeline.settings import Settings
from data_pipeline.sheets import SIMULATED, Card, csv_sheet, html_sheet, markdown_sheet
from data_pipeline.verdicts import Report, read_verdicts, record, recorded_verdicts, report
from tagpr.benchmarks.storage import examples_file, iterate_examples
from tagpr.configuration import main
from tagpr.errors import ConfigError, DataError
from tagpr.runs import check_tags_of, file_hash, write_json_atomically, write_text_atomically
from tagpr.schema import Example

logger = logging.getLogger("data_pipeline")


class ReviewSettings(Settings):
    """The ``review:`` node."""

    chains: int = Field(gt=0)
    verdicts: str | list[str] | None
    reviewer: str | None
    confidence: float = Field(gt=0.0, lt=1.0)


def run(config: DictConfig) -> None:
    """Write the sheets; where verdicts are given, record them; report on all that are recorded.

    Doing it again writes the same files and records nothing twice. The sheets are on the disk before any verdict is read.

    Raises:
        ConfigError: a setting is wrong.
        StageError: there are no finished chains, or they were made for other tags.
        DataError: a file is damaged, or a verdicts file has rows that cannot be used: then nothing of it is recorded, and
            each such row is a line of its own.
    """
    settings = _settings(config)
    chains, folder = Path(config.paths.chains), Path(config.run.dir)
    manifest = read_manifest(chains)
    check_tags_of(chains, "paths.chains")
    simulated = bool(manifest.notes.get("simulated"))
    drawn = sample(sft_column(chains, "id", "task", "user_id"), settings.chains, config.run.seed)
    cards = _cards(config, chains, drawn)
    title = f"Review of {len(cards)} chains"
    write_text_atomically(folder / "sheet.html", html_sheet(cards, title, simulated))
    write_text_atomically(folder / "sheet.md", markdown_sheet(cards, title, simulated))
    write_text_atomically(folder / "sheet.csv", csv_sheet(cards))
    logger.info(
        "%s: %d of %d chains to judge%s; sheet.md and sheet.csv hold the same. Give back what the page saves with "
        "review.verdicts=FILE",
        folder / "sheet.html", len(cards), len(sft_column(chains, "id")), " (SIMULATED)" if simulated else "",
    )  # fmt: skip

    hashes = {card.chain.id: card.text_hash for card in cards}
    files = [settings.verdicts] if isinstance(settings.verdicts, str) else settings.verdicts or []
    stale = _record_all(files, folder / "verdicts.jsonl", hashes, settings.reviewer)
    verdicts = recorded_verdicts(folder / "verdicts.jsonl")
    if not verdicts and not files:
        return
    made = report(verdicts, hashes, {card.chain.id: card.chain.task for card in cards}, settings.confidence)
    write_json_atomically(
        folder / "report.json",
        {"simulated": simulated, "sft_parquet": file_hash(chains / "sft.parquet"), **made.model_dump()},
    )
    write_text_atomically(folder / "report.md", markdown_report(made, simulated))
    for line in _lines(made):
        logger.info("%s", line)
    if stale or made.stale:
        logger.warning(
            "%d verdicts of these files and %d recorded ones are on older texts or on chains outside this sample: not counted",
            stale,
            made.stale,
        )


def _settings(config: DictConfig) -> ReviewSettings:
    try:
        return ReviewSettings.model_validate(OmegaConf.to_container(config.review, resolve=True))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(["review", *map(str, problem["loc"])])
        raise ConfigError(f"{key}={problem['input']}: {problem['msg']}. Change it.") from error


def sample(rows: list[tuple[str, ...]], number: int, seed: int) -> list[str]:
    """Ids of ``number`` of the (id, task, user) rows: tasks take turns, within a task users do.

    Seeded, whatever the order of the rows; a larger sample begins with the smaller one.
    """
    order = shuffled(rows, lambda row: row[0], seed)
    return [row[0] for row in interleave(order, lambda row: row[1], lambda row: row[2])[:number]]


def _cards(config: DictConfig, chains: Path, drawn: list[str]) -> list[Card]:
    found = {chain.id: chain for chain in iterate_finished(chains, frozenset(drawn))}
    wanted = {chain.example_id for chain in found.values()}
    examples: dict[str, Example] = {}
    source = examples_file(config.paths.examples, "train")
    if source.is_file():
        for example in iterate_examples(source):
            if example.id in wanted:
                examples[example.id] = example
                if len(examples) == len(wanted):
                    break
    if len(examples) < len(wanted):
        logger.warning(
            "%s: has not all examples of these chains, so the sheet shows their whole prompt instead", source
        )
    return [Card(found[name], examples.get(found[name].example_id)) for name in drawn]


def _record_all(files: list[str], store: Path, hashes: dict[str, str], reviewer: str | None) -> int:
    """Record every file or none; returns how many verdicts were on older texts."""
    readings = [(Path(name), read_verdicts(Path(name), hashes, reviewer)) for name in files]
    bad = [line for _, reading in readings for line in reading.bad]
    for line in bad:
        logger.error("%s", line)
    if bad:
        raise DataError(
            f"review.verdicts: {len(bad)} rows cannot be used, see the lines above. Mend them and run again; "
            "nothing was recorded."
        )
    for path, reading in readings:
        new = record(store, reading.verdicts)
        logger.info(
            "%s: %d verdicts recorded, %d known before, %d on older texts, %d rows still open",
            path, new, len(reading.verdicts) - new, reading.stale, reading.open,
        )  # fmt: skip
    return sum(reading.stale for _, reading in readings)


def _lines(made: Report) -> list[str]:
    lines = [f"right: {made.all}, {made.sample - made.all.judged} of the sample still open"]
    lines += [f"  {task}: {rate}" for task, rate in made.by_task.items()]
    if len(made.by_reviewer) > 1:
        lines += [f"  by {name}: {rate}" for name, rate in made.by_reviewer.items()]
    for each in made.agreements:
        kappa = "undefined (only one verdict occurs)" if each.kappa is None else f"{each.kappa:.2f}"
        lines.append(
            f"  {' and '.join(each.reviewers)}: agree on {each.agreed:.1%} of {each.chains} chains, Cohen's kappa {kappa}"
        )
    return lines


def markdown_report(made: Report, simulated: bool) -> str:
    """The figures for people; notes of reviewers are in report.json."""
    lines = ["# Review of finished chains", ""]
    if simulated:
        lines += [f"**{SIMULATED}**", ""]
    lines += [
        f"Share of chains that are right, with its {made.confidence:.0%} Wilson score interval. A chain that several people "
        "judged counts once, by the worst verdict; unsure counts as not right.",
        "",
        "| | chains judged | right | wrong | unsure | share right | interval |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        _row("all", made.all),
        *(_row(task, rate) for task, rate in made.by_task.items()),
        *(_row(f"by {name}", rate) for name, rate in made.by_reviewer.items()),
        "",
        f"Sample: {made.sample} chains, {made.sample - made.all.judged} of them still open. "
        f"Verdicts on older texts or outside the sample, not counted: {made.stale}.",
    ]
    if made.agreements:
        lines += [
            "",
            "| reviewers | chains both judged | agreed | Cohen's kappa |",
            "| --- | --- | --- | --- |",
        ]
        for each in made.agreements:
            kappa: Any = "undefined" if each.kappa is None else f"{each.kappa:.2f}"
            names = " and ".join(map(_cell, each.reviewers))
            lines.append(f"| {names} | {each.chains} | {each.agreed:.1%} | {kappa} |")
    return "\n".join(lines) + "\n"


def _row(name: str, rate: Any) -> str:
    share = "" if rate.rate is None else f"{rate.rate:.1%}"
    interval = "" if rate.rate is None else f"{rate.low:.1%} to {rate.high:.1%}"
    return f"| {_cell(name)} | {rate.judged} | {rate.right} | {rate.wrong} | {rate.unsure} | {share} | {interval} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


if __name__ == "__main__":
    main("review_chains", run)
