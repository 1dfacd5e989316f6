"""The summary as tables that a person reads: the same cells for the terminal, ``table.md`` and the page."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tagpr.benchmarks.tasks import get_task
from tagpr.evaluation.score import Decoding, Difference, ModelSummary, Summary
from tagpr.metrics import possible_rating_errors
from tagpr.tags import vocabulary

SYNTHETIC = (
    "SYNTHETIC: invented users and a tiny model. These figures show that the code works; they say nothing "
    "about LaMP and belong beside no published number."
)

# Table 1 of the paper (LaMP, Qwen3-8B, 8 profile items): task/metric -> RAG-R (Base), SFT-R, TagPR.
PAPER_METHODS = ("RAG-R (Base)", "SFT-R", "TagPR")
PAPER: dict[str, tuple[float, float, float]] = {
    "lamp1/accuracy": (0.717, 0.722, 0.803),
    "lamp1/f1": (0.722, 0.724, 0.803),
    "lamp2/accuracy": (0.453, 0.456, 0.598),
    "lamp2/f1_macro": (0.413, 0.416, 0.557),
    "lamp3/mae": (0.291, 0.339, 0.218),
    "lamp3/rmse": (0.645, 0.878, 0.263),
    "lamp4/rouge1": (0.152, 0.159, 0.234),
    "lamp4/rougeL": (0.137, 0.145, 0.213),
    "lamp5/rouge1": (0.434, 0.440, 0.542),
    "lamp5/rougeL": (0.365, 0.378, 0.471),
    "lamp7/rouge1": (0.439, 0.437, 0.565),
    "lamp7/rougeL": (0.391, 0.386, 0.507),
}

METRIC_NAMES = {
    "accuracy": "accuracy ↑",
    "f1_positive": "F1 of [2] ↑",
    "f1_macro": "F1 macro ↑",
    "f1": "F1 ↑",
    "mae": "MAE ↓",
    "rmse": "RMSE ↓",
    "mse": "MSE ↓",
    "rouge1": "ROUGE-1 ↑",
    "rougeL": "ROUGE-L ↑",
}
MEASURE_NAMES = {
    "task_score": "mean task score",
    "reward": "reward (eq. 5)",
    "well_formed": "well-formed (points)",
    "reasoning_tokens": "reasoning tokens",
}


@dataclass(frozen=True)
class Cell:
    """Text of one cell; bold only where it is a best outside its interval."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A title, what to know before reading it, a head and rows of cells; the first column is text."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def tables(summary: Summary) -> list[Table]:
    """All tables of a summary; the paper's own stand apart, and never beside synthetic figures."""
    found: list[Table] = []
    for decoding in summary.decodings:
        found += [
            _main(summary, decoding),
            _differences(summary, decoding),
            _reward(summary, decoding),
            _lamp(summary, decoding),
            _tags(decoding),
            _failures(decoding),
            _users(decoding),
        ]
    if not summary.synthetic:
        found.append(_paper(summary))
    return [table for table in found if table.rows]


def markdown(summary: Summary) -> str:
    """All tables as Markdown, padded so that a terminal shows columns too."""
    parts = [f"# Evaluation: {summary.benchmark}, {summary.split}"]
    if summary.synthetic:
        parts.append(f"**{SYNTHETIC}**")
    for table in tables(summary):
        parts.append(f"## {table.title}\n\n{table.note}\n\n{_grid(table)}")
    return "\n\n".join(parts) + "\n"


def describe(decoding: Decoding) -> str:
    """Rows, users and seeds behind the figures."""
    model = next(iter(decoding.models.values()))
    people = f"{model.rows:,} rows of {model.users:,} users"
    if decoding.name == "greedy":
        return f"{people}, greedy decoding (one answer a row)"
    return f"{people}, sampled, {len(model.seeds)} seeds ({', '.join(map(str, model.seeds))})"


def _title(what: str, decoding: Decoding) -> str:
    return what if decoding.name == "greedy" else f"{what} (sampled)"


def _main(summary: Summary, decoding: Decoding) -> Table:
    models = decoding.models
    base = next(iter(models.values()))

    def reasoning(model: ModelSummary) -> str:
        if model is base or not base.reasoning_tokens:
            return f"{model.reasoning_tokens:.1f}"
        return f"{model.reasoning_tokens:.1f} ({model.reasoning_tokens / base.reasoning_tokens - 1:+.0%})"

    def figure(value: float | None, deviation: float | None) -> str:
        shown = f"{value:z.3f}" if value is not None else "–"
        return shown if deviation is None else f"{shown} ± {deviation:.3f}"

    lines: list[tuple[str, str, Callable[[ModelSummary], str]]] = [
        ("mean task score (R_v) ↑", "task_score", lambda m: figure(m.task_score, m.task_score_deviation)),
        ("well-formed (R_f = 1, R_tag = 0) ↑", "well_formed", lambda m: f"{m.well_formed:.1%}"),
        ("· R_f = 1", "", lambda m: f"{m.format:.1%}"),
        ("· R_tag = 0", "", lambda m: f"{m.tag:.1%}"),
        ("unparsable answers", "", lambda m: f"{m.unparsable:.1%}"),
        ("truncated responses", "", lambda m: f"{m.truncated:,}"),
        (f"reasoning tokens (vs {next(iter(models))})", "", reasoning),
        ("response tokens", "", lambda m: f"{m.response_tokens:.1f}"),
        ("repetition R_rep", "", lambda m: f"{m.repetition:z.3f}"),
    ]
    if base.reward is not None:
        lines.insert(1, ("reward (eq. 5) ↑", "reward", lambda m: figure(m.reward, m.reward_deviation)))
    rows = [_line(name, models, text, decoding.best.get(measure)) for name, measure, text in lines]
    note = describe(decoding)
    if decoding.name == "sampled":
        note += f", temperature {summary.temperature:g}; ± is the standard deviation over seeds"
    if summary.rows_left_out:
        note += f"; {summary.rows_left_out:,} rows left out, their query alone exceeds the prompt's budget"
    note += ". Bold: the lead over the runner-up has a 95 % interval without 0."
    return Table(_title("Main figures", decoding), note, ("", *models), tuple(rows))


def _line(
    name: str, models: Mapping[str, ModelSummary], text: Callable[[ModelSummary], str], best: str | None
) -> tuple[Cell, ...]:
    return (Cell(name), *(Cell(text(model), bold=label == best) for label, model in models.items()))


def _differences(summary: Summary, decoding: Decoding) -> Table:
    def cell(difference: Difference) -> Cell:
        form = "+z.3f" if difference.measure in ("task_score", "reward") else "+z.1f"
        scale = 100 if difference.measure == "well_formed" else 1
        text = format(scale * difference.mean, form)
        if difference.low is None or difference.high is None:
            return Cell(f"{text} [no interval: one user]")
        return Cell(f"{text} [{scale * difference.low:{form}}, {scale * difference.high:{form}}]")

    pairs = list(dict.fromkeys((each.model, each.against) for each in decoding.differences))
    found = {(each.model, each.against, each.measure): each for each in decoding.differences}
    measures = [measure for measure in MEASURE_NAMES if any(measure == key[2] for key in found)]
    rows = tuple(
        (Cell(f"{model} − {against}"), *(cell(found[model, against, measure]) for measure in measures))
        for model, against in pairs
    )
    note = (
        f"{describe(decoding)}. In brackets 95 % intervals: paired bootstrap over users, "
        f"{summary.bootstrap_resamples:,} resamples, not corrected for several comparisons."
    )
    head = ("", *(MEASURE_NAMES[measure] for measure in measures))
    return Table(_title("Differences", decoding), note, head, rows)


def _reward(summary: Summary, decoding: Decoding) -> Table:
    models = decoding.models
    weights = summary.reward_weights
    if weights is None:
        return Table("Reward", "", (), ())

    def part(name: str, form: str) -> Callable[[ModelSummary], str]:
        def text(model: ModelSummary) -> str:
            value = getattr(model.reward_parts, name)
            return "–" if value is None else format(value, form)

        return text

    rows = [
        _line("reward (eq. 5)", models, lambda m: f"{m.reward:z.3f}", decoding.best.get("reward")),
        _line("· R_v: task score", models, part("verifiable", ".3f"), None),
        _line("· R_rep: repetition", models, part("repetition", "z.3f"), None),
        _line("· R_f: format", models, part("format", ".3f"), None),
        _line("· R_tag: tags", models, part("tag", "z.3f"), None),
        _line("· R_PRMU", models, part("prmu", ".3f"), None),
        _line("scored with PRMU's unknown user", models, part("unknown_user", ".1%"), None),
    ]
    note = (
        f"{describe(decoding)}. Eq. 5: {weights['alpha']:g}·(R_v + R_rep)·R_f + {weights['beta']:g}·R_tag + "
        f"{weights['gamma']:g}·R_PRMU, means over tasks; "
        + (f"PRMU {summary.prmu_version}." if summary.prmu_version else "PRMU was not asked.")
    )
    return Table(_title("Reward", decoding), note, ("", *models), tuple(rows))


def _lamp(summary: Summary, decoding: Decoding) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for task in summary.tasks:
        by_model = {label: model.lamp[task] for label, model in decoding.models.items() if task in model.lamp}
        if not by_model:
            continue
        name = get_task(task).title
        count = int(next(iter(by_model.values()))["rows"])
        for metric, shown in METRIC_NAMES.items():
            if metric in next(iter(by_model.values())):
                best = decoding.best.get(f"{task}/{metric}")
                rows.append(
                    (
                        Cell(f"{name} {shown}"),
                        Cell(f"{count:,}"),
                        *(Cell(f"{by_model[label][metric]:.3f}", bold=label == best) for label in by_model),
                    )
                )
        if any(metrics["unparsable"] for metrics in by_model.values()):
            shares = (Cell(f"{metrics['unparsable']:.1%}") for metrics in by_model.values())
            rows.append((Cell(f"{name} unparsable"), Cell(f"{count:,}"), *shares))
    note = (
        f"{describe(decoding)}. Unparsable ratings count as the farther of 1 and 5; "
        "F1 is no mean over rows, has no interval here and is never bold."
    )
    return Table(_title("LaMP metrics", decoding), note, ("", "rows", *decoding.models), tuple(rows))


def _tags(decoding: Decoding) -> Table:
    models = decoding.models
    if not any(model.tag_shares for model in models.values()):
        return Table("Tags", "", (), ())
    rows = [_line(tag, models, lambda m, tag=tag: _share(m, tag), None) for tag in vocabulary()]  # type: ignore[misc]
    rows.append(
        _line("segments a response", models, lambda m: f"{m.segments:.2f}" if m.segments else "–", None)
    )
    note = f"{describe(decoding)}. Share of segments by tag, over the responses whose tags parse."
    return Table(_title("Tags", decoding), note, ("", *models), tuple(rows))


def _share(model: ModelSummary, tag: str) -> str:
    return f"{model.tag_shares.get(tag, 0.0):.1%}" if model.tag_shares else "–"


def _failures(decoding: Decoding) -> Table:
    names = sorted({name for model in decoding.models.values() for name in model.failures})
    rows = [
        _line(name, decoding.models, lambda m, name=name: f"{m.failures.get(name, 0):,}", None)  # type: ignore[misc]
        for name in names
    ]
    note = (
        f"{describe(decoding)}. Responses by the first check that failed; "
        "a model that was never taught the tags fails theirs."
    )
    return Table(_title("Failed checks", decoding), note, ("", *decoding.models), tuple(rows))


def _users(decoding: Decoding) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name in ("seen", "unseen", "unknown"):
        groups = {label: model.groups.get(name) for label, model in decoding.models.items()}
        some = next(iter(groups.values()))
        if some is None:
            continue
        size = Cell(f"{some.rows:,} rows, {some.users:,} users")
        rows.append(
            (
                Cell(f"{name}: mean task score"),
                size,
                *(Cell(f"{group.task_score:.3f}" if group else "–") for group in groups.values()),
            )
        )
        rows.append(
            (
                Cell(f"{name}: well-formed"),
                size,
                *(Cell(f"{group.well_formed:.1%}" if group else "–") for group in groups.values()),
            )
        )
        if some.reward is not None:
            rewards = [group.reward if group else None for group in groups.values()]
            rows.append(
                (
                    Cell(f"{name}: reward (eq. 5)"),
                    size,
                    *(Cell("–" if reward is None else f"{reward:z.3f}") for reward in rewards),
                )
            )
        if some.unknown_user is not None:
            shares = [group.unknown_user if group else None for group in groups.values()]
            rows.append(
                (
                    Cell(f"{name}: PRMU's unknown user"),
                    size,
                    *(Cell("–" if share is None else f"{share:.1%}") for share in shares),
                )
            )
    note = (
        f"{describe(decoding)}. Seen: the user has rows in the training split; "
        "unknown: there was no training split to look in. PRMU may know fewer users than training saw."
    )
    return Table(_title("Users", decoding), note, ("", "of", *decoding.models), tuple(rows))


def _paper(summary: Summary) -> Table:
    rows = []
    doubtful: list[str] = []
    for key, values in PAPER.items():
        task, metric = key.split("/")
        if task not in summary.tasks:
            continue
        cells = [Cell(f"{value:.3f}") for value in values]
        if metric == "rmse":
            for place, (mae, rmse) in enumerate(zip(PAPER[f"{task}/mae"], values, strict=True)):
                if not possible_rating_errors(mae, rmse, tolerance=2e-3):
                    cells[place] = Cell(f"{rmse:.3f} (?)")
                    doubtful.append(PAPER_METHODS[place])
        rows.append((Cell(f"{get_task(task).title} {METRIC_NAMES[metric]}"), *cells))
    note = (
        "As published in Table 1 of the paper: Qwen3-8B, 8 profile items, all of LaMP's validation rows. "
        "Not measured here."
    )
    if doubtful:
        note += f" (?): impossible for integer ratings beside that MAE, probably an MSE ({', '.join(doubtful)}; S33)."
    return Table("paper (LaMP, Qwen3-8B)", note, ("", *PAPER_METHODS), tuple(rows))


def _grid(table: Table) -> str:
    texts = [[*table.head]] + [
        [f"**{cell.text}**" if cell.bold else cell.text for cell in row] for row in table.rows
    ]
    texts = [[text.replace("|", "\\|") for text in row] for row in texts]
    widths = [max(_width(row[column]) for row in texts) for column in range(len(table.head))]
    lines = [_padded(row, widths) for row in texts]
    rule = "|".join(
        "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":" for column, width in enumerate(widths)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = []
    for column, (text, width) in enumerate(zip(row, widths, strict=True)):
        gap = " " * (width - _width(text))
        cells.append(f" {text}{gap} " if column == 0 else f" {gap}{text} ")
    return f"|{'|'.join(cells)}|"


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
