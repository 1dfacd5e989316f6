"""The dataset card: what is in the folder, how it came to be, who may use it for what (S14)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import DatasetCardData

from data_pipeline.sheets import SIMULATED
from tagpr.errors import ConfigError
from tagpr.schema import Manifest

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Source:
    """Where a benchmark's texts come from, and what is known of their licence (an id of the hub, or ``unknown``)."""

    title: str
    license: str
    language: str | None
    note: str
    share_alike: bool = False


SOURCES = {
    "lamp": Source(
        "LaMP", "cc-by-nc-sa-4.0", "en",
        "LaMP is published under CC BY-NC-SA 4.0. Prompts and profiles in this dataset are its texts, and the chains quote and "
        "rework them, so treat the whole as adapted material: name LaMP and its authors (BY), no commercial use (NC), and pass "
        "it on under the same licence only (SA). The texts underneath LaMP (papers, films, product reviews, news, tweets) have "
        "terms of their own; those are unknown here.",
        share_alike=True,
    ),
    "longlamp": Source("LongLaMP", UNKNOWN, "en", "Its licence is unknown here: ask its authors before you pass anything on."),
    "pgraphrag": Source(
        "PGraphRAG", UNKNOWN, "en",
        "Its licence is unknown here, and so are the terms of the product reviews that it is made of: ask before you pass "
        "anything on.",
    ),
    "dianping": Source(
        "Dianping", UNKNOWN, "zh", "The licence of these posts is unknown here: ask before you pass anything on."
    ),
    "own": Source(
        "the publisher's own data", UNKNOWN, None,
        "No licence is known to the tool that wrote this card. Whoever publishes the dataset has to state one.",
    ),
}  # fmt: skip
SYNTHETIC = Source(
    "MiniLaMP (SYNTHETIC)", UNKNOWN, "en",
    "Users and texts are made up by a program (tagpr.benchmarks.minilamp): there is no third party's text in them. The licence is "
    "unknown because the program states none.",
)  # fmt: skip

# What a card shows of the settings. A list of what may be shown, so that no address, path or name of a key ever is.
SHOWN = (
    "instances_per_task", "rollouts", "accuracy", "judge_minimum", "judge_longest", "malformed_attempts", "tagging.mode",
    "exploratory.chains", "minimum_segments", "size", "max_per_instance", "preferences.prp_minimum_gain", "preferences.pqp_margin",
    "preferences.pqp_last_word_share",
)  # fmt: skip
SHOWN_OF_A_MODEL = ("revision", "temperature", "top_p", "max_tokens")

CONFIGS = {
    "sft": "finished chains, for supervised fine-tuning",
    "prp": "preference pairs: an answer made with the profile over one made without it (PRP)",
    "pqp": "preference pairs: the better answer over the worse one (PQP)",
}


@dataclass(frozen=True)
class Facts:
    """Everything that the card says; rows, files and columns are by configuration, ``tasks`` are name -> title."""

    manifest: Manifest
    funnel: Mapping[str, Any]
    rows: Mapping[str, int]
    files: Mapping[str, str]
    columns: Mapping[str, Sequence[str]]
    tasks: Mapping[str, str]
    tags: Mapping[str, str]
    review: Mapping[str, Any] | None

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the pipeline wrote down of its run."""
        return self.manifest.notes

    @property
    def simulated(self) -> bool:
        """Whether any text is the simulated models'."""
        return bool(self.notes["simulated"])


def sources(benchmark: Mapping[str, Any]) -> list[Source]:
    """The sources of a benchmark, as ``notes.benchmark`` of the pipeline's manifest describes it."""
    if benchmark["synthetic"]:
        return [SYNTHETIC]
    return [SOURCES.get(str(benchmark["name"]), SOURCES["own"])]


def license_id(given: str | None, found: Sequence[Source]) -> str:
    """The licence for the card's head: the given one, else that of the sources.

    Raises:
        ConfigError: the given licence is not that of a source which allows no other.
    """
    for source in found:
        if given is not None and source.share_alike and given != source.license:
            raise ConfigError(
                f"publish.license={given}: {source.title} may be passed on under {source.license} only. Leave the key null."
            )
    if given is not None:
        return given
    licenses = {source.license for source in found}
    return licenses.pop() if len(licenses) == 1 else UNKNOWN


def dataset_card(facts: Facts, title: str, license: str, found: Sequence[Source]) -> str:
    """The whole ``README.md``: the head that ``datasets`` reads, then text for people. Equal facts give equal text."""
    sections = [
        f"---\n{_head(facts, title, license, found)}\n---",
        f"# {title}",
        *([f"> **{SIMULATED}**"] if facts.simulated else []),
        _contents(facts),
        _making(facts),
        _counts(facts),
        _settings(facts),
        _review(facts),
        _licences(facts, license, found),
        _people(facts),
        _limits(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _head(facts: Facts, title: str, license: str, found: Sequence[Source]) -> str:
    total = sum(facts.rows.values())
    languages = sorted({source.language for source in found if source.language})
    tags = ["personalization", "reasoning", "tagpr"]
    tags += ["synthetic"] if facts.notes["benchmark"]["synthetic"] else []
    tags += ["simulated"] if facts.simulated else []
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": "train", "path": facts.files[name]}],
            **({"default": True} if name == "sft" else {}),
        }
        for name in facts.rows
    ]
    return DatasetCardData(
        license=license,
        pretty_name=title,
        language=languages or None,
        tags=tags,
        task_categories=["text-generation"],
        annotations_creators=["machine-generated"],
        size_categories=[_size(total)],
        configs=configs,
    ).to_yaml()


def _size(rows: int) -> str:
    """The hub's category for a number of rows."""
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for bound, name in bounds if rows < bound), "1M<n<10M")


def _contents(facts: Facts) -> str:
    rows = [
        [
            f"`{name}`",
            f"{number:,}",
            CONFIGS[name],
            ", ".join(f"`{column}`" for column in facts.columns[name]),
        ]
        for name, number in facts.rows.items()
    ]
    return (
        "Chains of thought that reason about one user, in explicit tagged steps, made and filtered by TagPR's data pipeline.\n\n"
        f"{_table(['configuration', 'rows', 'what', 'columns'], rows)}\n\n"
        '```python\nfrom datasets import load_dataset\n\nchains = load_dataset("FOLDER_OR_NAME", split="train")\n'
        'pairs = load_dataset("FOLDER_OR_NAME", "pqp", split="train")\n```\n\n'
        "`response` is `<think>`, tagged segments, `</think>`, the answer; `gold` is what the user really wrote or chose; "
        "`judge_scores` are logical coherence, step accuracy, completeness and relevance, 1 to 5 each."
    )


def _making(facts: Facts) -> str:
    notes = facts.notes
    settings = notes["settings"]
    models = [
        [role, f"`{_name(model)}`", _parameters(settings.get(role, {}))]
        for role, model in notes["models"].items()
    ]
    prompts = [[name.replace("_", " "), f"`{version}`"] for name, version in notes["prompts"].items()]
    tags = [[f"`{tag}`", definition] for tag, definition in facts.tags.items()]
    made = facts.manifest
    return "\n\n".join(
        [
            "## How it was made",
            "Training instances are drawn; the teacher answers each several times; chains with a wrong answer are dropped, then "
            "those that the judge rates low; the tagger marks the segments without changing a word (checked); chains are chosen "
            "with a cap on each instance and the tasks in turn. Preference pairs come from the same chains.",
            _table(["model", "name", "parameters"], models),
            _table(["prompt", "version (hash of its text)"], prompts),
            _table(["tag", "what its segments do"], tags),
            f"Made {made.created} by tagpr {made.versions.get('tagpr', UNKNOWN)} (source revision "
            f"`{made.git_revision or UNKNOWN}`), seed {made.seed}, fingerprint `{str(notes['fingerprint'])[:16]}`.",
        ]
    )


def _name(model: str) -> str:
    """A model's name; of a folder on somebody's machine only its last part."""
    return PurePath(model).name if model.startswith(("/", "~", ".")) else model


def _parameters(model: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {model[key]}" for key in SHOWN_OF_A_MODEL if model.get(key) not in (None, ""))


# Ids of this project's own list of requirements say nothing to others.
_IDS = re.compile(r" \(S\d+(?:, S\d+)*\)")


def _counts(facts: Facts) -> str:
    tasks = list(facts.tasks)
    rows = [
        [
            _plain(_IDS.sub("", stage["what"])),
            f"{stage['all']:,}",
            *(f"{stage.get(task, 0):,}" for task in tasks),
        ]
        for stage in facts.funnel["stages"].values()
    ]
    dropped = [
        f"- {name.replace('_', ' ')}: "
        + ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        for name, reasons in facts.funnel["dropped"].items()
    ]
    return "\n\n".join(
        [
            "## Counts of every stage",
            _table(["stage", "all", *facts.tasks.values()], rows),
            *(["Left out, by the stage that did it:\n\n" + "\n".join(dropped)] if dropped else []),
        ]
    )


def _settings(facts: Facts) -> str:
    settings, benchmark = facts.notes["settings"], facts.notes["benchmark"]
    shown = {key: found for key in SHOWN if (found := _get(settings, key)) is not None}
    shown |= {
        f"benchmark.{key}": benchmark[key]
        for key in ("profile_size", "retriever", "max_prompt_tokens")
        if benchmark.get(key) is not None
    }
    rows = [[f"`{key}`", _value(value)] for key, value in shown.items()]
    return (
        "## Settings and thresholds\n\n"
        f"{_table(['setting', 'value'], rows)}\n\n"
        "`accuracy.above` is the ROUGE that an answer of a generation task had to exceed; classifications and ratings had to match "
        "exactly. The sum of the judge's four scores had to exceed `judge_minimum`; it was recomputed, not taken from the judge."
    )


def _get(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    return _plain(str(value))


def _review(facts: Facts) -> str:
    if facts.review is None or facts.review["all"]["rate"] is None:
        return "## Review by people\n\nNo verdicts of people on these chains were at hand when this card was written."
    whole = facts.review["all"]
    rows = [
        [_plain(name), str(rate["judged"]), f"{rate['rate']:.1%}", f"{rate['low']:.1%} to {rate['high']:.1%}"]
        for name, rate in (
            ("all", whole),
            *((task, facts.review["by_task"][task]) for task in facts.review["by_task"]),
        )
        if rate["rate"] is not None
    ]
    kappas = [
        f"Two reviewers agree on {each['agreed']:.1%} of {each['chains']} chains"
        + ("." if each["kappa"] is None else f" (Cohen's kappa {each['kappa']:.2f}).")
        for each in facts.review["agreements"]
    ]
    return "\n\n".join(
        [
            "## Review by people",
            f"A seeded sample of {facts.review['sample']} chains, as many of each task; right means right in every step and every "
            "tag. A chain that several people judged counts by the worst verdict, and unsure counts as not right.",
            _table(
                [
                    "",
                    "chains judged",
                    "share right",
                    f"{facts.review['confidence']:.0%} Wilson score interval",
                ],
                rows,
            ),
            *kappas,
        ]
    )


def _licences(facts: Facts, license: str, found: Sequence[Source]) -> str:
    sources = [[source.title, source.license, source.note] for source in found]
    models = (
        "The simulated models are part of TagPR's program."
        if facts.simulated
        else "The chains and tags are output of the models named above. Their providers' terms bind too, and some restrict what "
        "output may be used for, such as training other models: read them before you use or pass this on. They are unknown here."
    )
    return (
        f"## Sources and licences\n\nLicence of this dataset: **{license}**."
        + (" *Unknown* means just that: nobody has granted anything by it." if license == UNKNOWN else "")
        + f"\n\n{_table(['source', 'licence', 'what follows'], sources)}\n\n{models}"
    )


def _people(facts: Facts) -> str:
    if facts.notes["benchmark"]["synthetic"]:
        return "## People in the data\n\nNone: every user is made up."
    return (
        "## People in the data\n\n"
        "`prompt` holds what real people wrote, item by item, under `user_id`, and the chains draw conclusions about their "
        "taste and habits, which may be wrong. Even where ids are numbers, texts can lead back to a person. Before you publish or "
        "use it: have a legal ground for it, keep it private where you can, don't try to find out who a user is or to link users "
        "to other data, and take out the rows of anyone who asks (all rows of their `user_id`, in every configuration)."
    )


def _limits(facts: Facts) -> str:
    limits = [
        "The chains are a model's account of how one could get to the answer, not how the user got there.",
        "Only chains with a right (or, by ROUGE, a similar) answer are kept, so easy instances and users with plain habits are "
        "over-represented.",
        "The quality filter is a model; its taste, its mistakes and its language are in what it let through.",
        "Tags were set by a model. Their text is checked to be unchanged, their fitness only by the review above.",
        "ROUGE compares words: a good answer in other words may have been dropped, a poor one with the right words kept.",
        "Only the profile items that the prompt shows were known to the teacher; long ones may be shortened.",
        "Everything comes from the training split; nothing was checked against other benchmarks.",
    ]
    if facts.simulated:
        limits.insert(0, "No real model was asked: this is for testing the pipeline, and for nothing else.")
    return "## Known limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text in a cell that is no markup."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
