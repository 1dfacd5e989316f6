"""The summary as tables that a person reads: the same cells for the terminal, ``table.md`` and the page."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tagpr.benchmarks.tasks import get_task
from tagpr.evaluation.published import TABLES, Published
from tagpr.evaluation.score import Decoding, Difference, Group, Interval, ModelSummary, Summary
from tagpr.metrics import possible_rating_errors
from tagpr.tags import vocabulary

SYNTHETIC = (
    "SYNTHETIC: invented users and a tiny model. These figures show that the code works; they say nothing "
    "about LaMP and belong beside no published number."
)

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
    "meteor": "METEOR ↑",
    "meteor_stem": "METEOR without synonyms ↑",
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
    """A title, what to know before reading it, a head and rows of cells; the first column is text.

    ``detail``: for who looks closer; folded on the page, and not printed on the terminal.
    """

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    detail: bool = False


def tables(summary: Summary) -> list[Table]:
    """All tables of a summary; the paper's own stand apart, and never beside synthetic figures."""
    found: list[Table] = []
    for decoding in summary.decodings:
        found += [
            _main(summary, decoding),
            _differences(summary, decoding),
            _reward(summary, decoding),
            _metrics(summary, decoding),
            _metric_differences(summary, decoding),
            _tags(decoding),
            _failures(decoding),
            _users(decoding),
            _histories(decoding),
        ]
    found += _sweep(summary)
    if not summary.synthetic:
        found += [_published(summary, table) for table in TABLES]
    return [table for table in found if table.rows]


def markdown(summary: Summary, details: bool = True) -> str:
    """All tables, or all but the details, as Markdown, padded so that a terminal shows columns too."""
    parts = [f"# Evaluation: {summary.benchmark}, {summary.split}"]
    if summary.synthetic:
        parts.append(f"**{SYNTHETIC}**")
    for table in tables(summary):
        if table.detail and not details:
            continue
        parts.append(f"## {table.title}\n\n{table.note}\n\n{_grid(table)}")
    return "\n\n".join(parts) + "\n"


def describe(decoding: Decoding) -> str:
    """Rows, users and seeds behind the figures."""
    model = next(iter(decoding.models.values()))
    people = f"{model.rows:,} rows of {model.users:,} users"
    trained = max(each.runs for each in decoding.models.values())
    runs = f", up to {trained} training runs a model" if trained > 1 else ""
    if decoding.name == "greedy":
        return f"{people}, greedy decoding (one answer a row){runs}"
    seeds = max(len(each.replicates) // each.runs for each in decoding.models.values())
    return f"{people}, sampled, {seeds} seeds{runs}"


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
        ("well-formed (R_f = 1, R_tag = 0) ↑", "well_formed", lambda m: _share(m.well_formed)),
        ("· R_f = 1", "", lambda m: _share(m.format)),
        ("· R_tag = 0", "", lambda m: _share(m.tag)),
        ("unparsable answers", "", lambda m: _share(m.unparsable)),
        ("truncated responses", "", lambda m: f"{m.truncated:,}"),
        (f"reasoning tokens (vs {next(iter(models))})", "", reasoning),
        ("response tokens", "", lambda m: f"{m.response_tokens:.1f}"),
        ("repetition R_rep", "", lambda m: f"{m.repetition:z.3f}"),
    ]
    if any(model.reward is not None for model in models.values()):
        lines.insert(1, ("reward (eq. 5) ↑", "reward", lambda m: figure(m.reward, m.reward_deviation)))
    if any(model.over_budget for model in models.values()):
        lines.append(("thinking ended by its budget", "", lambda m: f"{m.over_budget:,}"))
    if any(model.unanswered for model in models.values()):
        lines.append(("refused rows", "", lambda m: f"{m.unanswered:,}"))
    rows = [_line(name, models, text, decoding.best.get(measure)) for name, measure, text in lines]
    note = describe(decoding)
    if decoding.name == "sampled":
        note += f", temperature {summary.temperature:g}"
    if any(model.task_score_deviation is not None for model in models.values()):
        note += "; ± is the standard deviation over seeds and runs"
    note += f"; {summary.profile_size} items a prompt by {summary.retriever}"
    if summary.rows_left_out:
        note += (
            f"; {summary.rows_left_out:,} rows left out for all models: "
            "the query alone exceeds a prompt's budget, or an endpoint refused it"
        )
    if not all(model.thinking for model in models.values()):
        note += "; –: not asked of a method without thinking"
    note += (
        ". Bold: the lead over every other model has a 95 % interval without 0, "
        "corrected for all pairs of models."
    )
    return Table(_title("Main figures", decoding), note, ("", *models), tuple(rows))


def _line(
    name: str, models: Mapping[str, ModelSummary], text: Callable[[ModelSummary], str], best: str | None
) -> tuple[Cell, ...]:
    return (Cell(name), *(Cell(text(model), bold=label == best) for label, model in models.items()))


def _differences(summary: Summary, decoding: Decoding) -> Table:
    return _compared(
        _title("Differences", decoding),
        summary,
        decoding,
        list(MEASURE_NAMES.items()),
    )


def _metric_differences(summary: Summary, decoding: Decoding) -> Table:
    measures = [
        (f"{task}/{metric}", f"{get_task(task).title} {shown}")
        for task in summary.tasks
        for metric, shown in METRIC_NAMES.items()
    ]
    return _compared(_title("Differences by task", decoding), summary, decoding, measures, detail=True)


def _compared(
    title: str,
    summary: Summary,
    decoding: Decoding,
    measures: Sequence[tuple[str, str]],
    detail: bool = False,
) -> Table:
    """Measures down, pairs of models across."""

    def cell(difference: Difference | None) -> Cell:
        if difference is None:
            return Cell("–")
        scale = 100 if difference.measure == "well_formed" else 1
        form = "+z.1f" if difference.measure in ("well_formed", "reasoning_tokens") else "+z.3f"
        text = format(scale * difference.mean, form)
        if difference.low is None or difference.high is None or difference.p_value is None:
            return Cell(f"{text} [no interval: one user]")
        bounds = f"[{scale * difference.low:{form}}, {scale * difference.high:{form}}]"
        p_value = "p<0.001" if difference.p_value < 0.001 else f"p={difference.p_value:.3f}"
        return Cell(f"{text} {bounds} {p_value}")

    pairs = list(dict.fromkeys((each.model, each.against) for each in decoding.differences))
    found = {(each.model, each.against, each.measure): each for each in decoding.differences}
    rows = tuple(
        (Cell(name), *(cell(found.get((model, against, measure))) for model, against in pairs))
        for measure, name in measures
        if any(measure == key[2] for key in found)
    )
    note = (
        f"{describe(decoding)}. In brackets the 95 % interval of that one difference: paired bootstrap over users, "
        f"{summary.bootstrap_resamples:,} resamples; p is corrected for the {len(pairs)} comparison(s) of its line (max-|t|)."
    )
    return Table(title, note, ("", *(f"{model} − {against}" for model, against in pairs)), rows, detail)


def _reward(summary: Summary, decoding: Decoding) -> Table:
    models = decoding.models
    weights = summary.reward_weights
    if weights is None:
        return Table("Reward", "", (), ())

    def part(name: str, form: str) -> Callable[[ModelSummary], str]:
        def text(model: ModelSummary) -> str:
            value = getattr(model.reward_parts, name, None)
            return "–" if value is None else format(value, form)

        return text

    rows = [
        _line(
            "reward (eq. 5)",
            models,
            lambda m: "–" if m.reward is None else f"{m.reward:z.3f}",
            decoding.best.get("reward"),
        ),
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


def _metrics(summary: Summary, decoding: Decoding) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for task in summary.tasks:
        by_model = {
            label: model.metrics[task] for label, model in decoding.models.items() if task in model.metrics
        }
        if not by_model:
            continue
        some = next(iter(by_model.values()))
        name, count = get_task(task).title, Cell(f"{int(some['rows']):,}")
        strict = {label: decoding.models[label].strict[task] for label in by_model}
        for metric, shown in METRIC_NAMES.items():
            if metric not in some:
                continue
            best = decoding.best.get(f"{task}/{metric}")
            cells = (
                Cell(
                    _with_interval(metrics[metric], decoding.models[label].intervals.get(f"{task}/{metric}")),
                    bold=label == best,
                )
                for label, metrics in by_model.items()
            )
            rows.append((Cell(f"{name} {shown}"), count, *cells))
            if any(strict[label][metric] != metrics[metric] for label, metrics in by_model.items()):
                cells = (Cell(f"{strict[label][metric]:.3f}") for label in by_model)
                rows.append((Cell(f"· read strictly: {shown}"), count, *cells))
        if any(metrics["unparsable"] for metrics in by_model.values()):
            shares = (Cell(f"{metrics['unparsable']:.1%}") for metrics in by_model.values())
            rows.append((Cell(f"{name} unparsable"), count, *shares))
    note = (
        f"{describe(decoding)}. In brackets 95 % intervals over users. Unparsable ratings count as the farther end of the scale. "
        "Read strictly: as the official code reads an answer, white space stripped and nothing else; shown where it differs."
    )
    return Table(_title("Metrics by task", decoding), note, ("", "rows", *decoding.models), tuple(rows))


def _with_interval(value: float, interval: Interval | None) -> str:
    if interval is None or interval.low is None or interval.high is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _tags(decoding: Decoding) -> Table:
    models = decoding.models
    if not any(model.tag_shares for model in models.values()):
        return Table("Tags", "", (), ())
    rows = [_line(tag, models, lambda m, tag=tag: _tag_share(m, tag), None) for tag in vocabulary()]  # type: ignore[misc]
    rows.append(
        _line("segments a response", models, lambda m: f"{m.segments:.2f}" if m.segments else "–", None)
    )
    note = f"{describe(decoding)}. Share of segments by tag, over the responses whose tags parse."
    return Table(_title("Tags", decoding), note, ("", *models), tuple(rows), detail=True)


def _tag_share(model: ModelSummary, tag: str) -> str:
    return _share(model.tag_shares.get(tag, 0.0) if model.tag_shares else None)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


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
    return Table(_title("Failed checks", decoding), note, ("", *decoding.models), tuple(rows), detail=True)


def _users(decoding: Decoding) -> Table:
    names = ("seen", "unseen", "unknown")
    rows = _groups(decoding, names, lambda model: model.groups)
    note = (
        f"{describe(decoding)}. Seen: the user has rows in the training split; "
        "unknown: there was no training split to look in. PRMU may know fewer users than training saw."
    )
    return Table(_title("Users", decoding), note, ("", "of", *decoding.models), rows)


def _histories(decoding: Decoding) -> Table:
    names = list(dict.fromkeys(name for model in decoding.models.values() for name in model.histories))
    if len(names) < 2:
        return Table("Users by history", "", (), ())
    rows = _groups(decoding, names, lambda model: model.histories)
    note = f"{describe(decoding)}. By the number of items in the profile, of which a prompt shows some (S40)."
    return Table(
        _title("Users by history", decoding), note, ("items", "of", *decoding.models), rows, detail=True
    )


def _groups(
    decoding: Decoding, names: Iterable[str], of: Callable[[ModelSummary], Mapping[str, Group]]
) -> tuple[tuple[Cell, ...], ...]:
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        groups = [of(model).get(name) for model in decoding.models.values()]
        some = next((group for group in groups if group is not None), None)
        if some is None:
            continue
        size = Cell(f"{some.rows:,} rows, {some.users:,} users")

        def line(
            what: str,
            value: Callable[[Group], float | None],
            form: str,
            name: str = name,
            groups: Sequence[Group | None] = groups,
            size: Cell = size,
        ) -> None:
            values = [None if group is None else value(group) for group in groups]
            if any(each is not None for each in values):
                cells = (Cell("–" if each is None else format(each, form)) for each in values)
                rows.append((Cell(f"{name}: {what}"), size, *cells))

        line("mean task score", lambda group: group.task_score, ".3f")
        line("well-formed", lambda group: group.well_formed, ".1%")
        line("reward (eq. 5)", lambda group: group.reward, "z.3f")
        line("PRMU's unknown user", lambda group: group.unknown_user, ".1%")
    return tuple(rows)


def _sweep(summary: Summary) -> list[Table]:
    """One table a measure: conditions down, models across."""
    if not summary.sweep:
        return []
    models = list(dict.fromkeys(point.model for point in summary.sweep))
    conditions = sorted(
        {(point.retriever, point.profile_size) for point in summary.sweep},
        key=lambda condition: (condition[0] != summary.retriever, *condition),
    )
    found = {(point.retriever, point.profile_size, point.model): point for point in summary.sweep}
    measures = [("task_score", "mean task score (R_v) ↑")] + [
        (f"{task}/{metric}", f"{get_task(task).title} {shown}")
        for task in summary.tasks
        for metric, shown in METRIC_NAMES.items()
    ]
    rows: list[tuple[Cell, ...]] = []
    for measure, name in measures:
        if not any(measure in point.intervals for point in summary.sweep):
            continue
        for retriever, size in conditions:
            points = [found.get((retriever, size, model)) for model in models]
            some = next(point for point in points if point is not None)
            cells = (
                Cell("–")
                if point is None or measure not in point.intervals
                else Cell(_with_interval(point.intervals[measure].mean, point.intervals[measure]))
                for point in points
            )
            shown = f"{some.items_used:.1f}" + (
                f", {some.prompts_shortened:,} cut" if some.prompts_shortened else ""
            )
            rows.append((Cell(f"{name}: {retriever}, {size}"), Cell(shown), *cells))
    note = (
        "Retriever and number of profile items asked for (S36); how many a prompt shows on average, and how many prompts had items "
        "cut to fit. In brackets 95 % intervals over users; greedy decoding, the same rows everywhere."
    )
    return [
        Table(
            "Robustness: profile length and retriever",
            note,
            ("", "items shown", *models),
            tuple(rows),
            detail=True,
        )
    ]


def _published(summary: Summary, table: Published) -> Table:
    columns = [
        (place, task, metric)
        for place, (task, _, metric) in enumerate(column.partition("/") for column in table.columns)
        if task in summary.tasks
    ]
    if not columns:
        return Table("paper", "", (), ())
    rows = []
    doubtful: list[str] = []
    for method, values in table.methods.items():
        cells = [Cell(method), Cell("✓" if method in table.thinks else "")]
        for place, task, metric in columns:
            mae = f"{task}/mae"
            # Both figures are rounded to three digits.
            if metric == "rmse" and not possible_rating_errors(
                values[table.columns.index(mae)], values[place], tolerance=2e-3
            ):
                cells.append(Cell(f"{values[place]:.3f} (?)"))
                doubtful.append(method)
            else:
                cells.append(Cell(f"{values[place]:.3f}"))
        rows.append(tuple(cells))
    note = f"As published, {table.title}. Not measured here."
    if doubtful:
        note += f" (?): impossible for integer ratings beside that MAE, probably an MSE ({', '.join(doubtful)}; S33)."
    head = [f"{get_task(task).title} {METRIC_NAMES[metric]}" for _, task, metric in columns]
    return Table(f"paper: {table.title.split(':')[0]}", note, ("", "R", *head), tuple(rows))


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
