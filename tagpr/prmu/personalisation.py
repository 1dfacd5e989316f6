"""Does PRMU personalise? What becomes of held-out pairs when the user's id or profile is another's, or is taken away (S19, S20).

    python -m tagpr.prmu.personalisation

Conditions, each on the same held-out pairs of users with rows:

``own``            as trained
``swapped id``     another user's row, the prompt as it was
``unknown id``     the unknown row
``others' profile``  the user's row; the query with the profile of another user's example of the same task
``no profile``     the user's row; the query alone

The first line of the report says whether swapping ids changes anything. With what ``prmu_variants`` left, and the cold-start
curve on pairs of users without rows, it is one page: report.md, report.html with charts, and report.json.
"""

import json
import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from tagpr import runs
from tagpr.benchmarks.prompt import build_prompt
from tagpr.benchmarks.storage import examples_file, iterate_examples
from tagpr.configuration import main
from tagpr.dense_retrieval import install
from tagpr.errors import DataError, StageError
from tagpr.prmu import cold_start, report_page
from tagpr.prmu.encoding import Encoder
from tagpr.prmu.figures import places_by_group
from tagpr.prmu.model import Prmu, load
from tagpr.prmu.packing import EncodedPair
from tagpr.prmu.train import encode_pairs, fingerprint, pair_margins
from tagpr.prmu.variants import accuracies, interval, split_of
from tagpr.schema import Example, PreferencePair

logger = logging.getLogger("tagpr.prmu.personalisation")

# Below it, a margin has not changed: rounding, not the id.
SAME = 1e-6
Condition = Sequence[tuple[PreferencePair, int]]
"""Pairs, and the vocabulary id of the user row that each is scored with."""


def run(config: DictConfig) -> None:
    """Write ``report.md``, ``report.html`` and ``report.json``.

    Raises:
        StageError: no PRMU, or one that was made from other pairs or settings than these.
        DataError: nothing is held out, or examples of the pairs are missing.
    """
    settings = config.prmu_report
    torch.set_num_threads(config.cold_start.threads)
    _check_origin(config)
    split = split_of(config)
    if len({pair.user_id for pair in split.seen_users}) < 2:
        raise DataError(
            "train_prmu.heldout_prompts: pairs of fewer than two users are held out. Raise it, and train PRMU again."
        )
    prmu = load(config.paths.prmu, max_tokens=config.train_prmu.max_tokens, device=config.cold_start.device)
    pairs = split.seen_users
    logger.info("%d held-out pairs, ids swapped and profiles shuffled %d times", len(pairs), settings.repeats)
    found = {
        name: [_margins(prmu, condition, config.cold_start.micro_batch_size) for condition in repeats]
        for name, repeats in conditions(config, prmu.encoder, pairs).items()
    }
    made = effects(pairs, found, settings.resamples, config.run.seed)
    made["version"] = prmu.version
    lines = [made["verdict"], "", *_table(made["rows"])]
    variants = Path(settings.variants)
    if variants.is_file():
        made["variants"] = json.loads(variants.read_text("utf-8"))
        lines += ["", variants.with_name("table.md").read_text("utf-8").rstrip()]
    else:
        lines += [
            "",
            f"No variants to set it against: run bash recipes/prmu_variants.sh ({variants} is not there).",
        ]
    if len({pair.user_id for pair in split.unseen_users}) >= 2 and settings.cold_start.sizes:
        made["cold_start"] = cold_start_figures(config, prmu, split.unseen_users)
        lines += ["", "# Users without a row: after a row was fitted to some of their pairs", ""]
        lines += cold_start.table(made["cold_start"])
    folder = Path(config.run.dir)
    runs.write_text_atomically(folder / "report.md", "\n".join(lines) + "\n")
    runs.write_json_atomically(folder / "report.json", made)
    page = report_page.render(made, lines, bool(config.benchmark.synthetic))
    runs.write_text_atomically(folder / "report.html", page)
    for line in lines:
        logger.info(line)
    logger.info("%s", folder / "report.html")


def conditions(
    config: DictConfig, encoder: Encoder, pairs: Sequence[PreferencePair]
) -> dict[str, list[Condition]]:
    """Each condition as one or, where chance has a part in it, several repetitions of all pairs."""
    users = sorted({pair.user_id for pair in pairs})
    unknown = encoder.users.unknown_row
    rows = {user: encoder.users.rows.get(user, unknown) for user in users}
    repeats = range(config.prmu_report.repeats)
    found: dict[str, list[Condition]] = {"own": [[(pair, rows[pair.user_id]) for pair in pairs]]}
    found["swapped id"] = []
    for repeat in repeats:
        rng = random.Random(f"swapped ids {repeat} {config.run.seed}")
        other = {user: rng.choice([each for each in users if each != user]) for user in users}
        found["swapped id"].append([(pair, rows[other[pair.user_id]]) for pair in pairs])
    found["unknown id"] = [[(pair, unknown) for pair in pairs]]
    if not all(pair.example_id for pair in pairs):
        logger.info("pairs do not name their examples: profiles are left as they are")
        return found
    examples = _examples(config, {pair.example_id for pair in pairs})
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples.values():
        by_task[example.task].append(example)
    found["others' profile"] = []
    for repeat in repeats:
        rng = random.Random(f"shuffled profiles {repeat} {config.run.seed}")
        moved: dict[str, str] = {}
        for example in examples.values():
            others = [each for each in by_task[example.task] if each.user_id != example.user_id]
            profile = rng.choice(others).profile if others else example.profile
            moved[example.id] = _prompt(config, example.model_copy(update={"profile": profile}), True)
        found["others' profile"].append(_with_prompts(pairs, rows, moved))
    alone = {example.id: _prompt(config, example, False) for example in examples.values()}
    found["no profile"] = [_with_prompts(pairs, rows, alone)]
    return found


def effects(
    pairs: Sequence[PreferencePair], found: Mapping[str, Sequence[Sequence[float]]], samples: int, seed: int
) -> dict[str, Any]:
    """Accuracy in each condition, what it loses against ``own``, and how far margins move; and a verdict.

    Args:
        pairs: held out.
        found: condition -> repetitions -> margins of the pairs; ``own`` first.
        samples: resamples of users.
        seed: of the resamples.
    """
    own = np.array(found["own"][0])
    rows = []
    for group, places in places_by_group(pairs).items():
        chosen = [pairs[place] for place in places]
        if len({pair.user_id for pair in chosen}) < 2:
            continue
        values, differences = accuracies(
            chosen,
            {name: [[one[p] for p in places] for one in each] for name, each in found.items()},
            samples,
            seed,
        )
        against = {each.b: each for each in differences}
        for name, repeats in found.items():
            moved = np.array([[one[p] for p in places] for one in repeats]) - own[places]
            flips = (np.array([[one[p] for p in places] for one in repeats]) > 0) != (own[places] > 0)
            low, high = interval(values[name])
            row: dict[str, Any] = {
                "group": group, "condition": name, "pairs": len(chosen), "accuracy": values[name].value, "low": low,
                "high": high, "margin_moves": float(np.abs(moved).mean()), "flipped": float(flips.mean()),
            }  # fmt: skip
            if name in against:
                each = against[name]
                row |= {
                    "loss": each.mean, "loss_low": each.corrected_low, "loss_high": each.corrected_high,
                    "p": each.corrected_p,
                }  # fmt: skip
            rows.append(row)
    return {"verdict": verdict(rows), "rows": rows}


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """The report's first line, by what swapping ids does to all pairs."""
    row = next(row for row in rows if row["group"] == "all" and row["condition"] == "swapped id")
    loss = f"{row['loss']:+.3f} [{row['loss_low']:+.3f}, {row['loss_high']:+.3f}]"
    if row["margin_moves"] < SAME:
        return "Swapping user ids changes nothing: this PRMU does not know its users."
    if row["loss_low"] > 0:
        return f"Swapping user ids costs accuracy: own id minus another's {loss}; {row['flipped']:.1%} of preferences flip."
    return (
        f"Swapping user ids changes nothing that is certain: own id minus another's {loss}, although {row['flipped']:.1%} of "
        "preferences flip."
    )


def cold_start_figures(
    config: DictConfig, prmu: Prmu, pairs: Sequence[PreferencePair]
) -> list[dict[str, Any]]:
    """Accuracy on pairs of unseen users after fitting rows to 0, 1, 2, ... of theirs, with intervals over users and draws."""
    settings = config.prmu_report
    sizes = list(settings.cold_start.sizes)
    prmu.model.float()
    pairs, found = cold_start.curve(
        prmu, pairs, sizes, settings.cold_start.draws, config.cold_start, config.run.seed
    )
    figures = []
    for group, places in places_by_group(pairs).items():
        # A draw tries half of the pairs: its accuracy is that of those.
        runs_of = {
            str(size): [[draw[p] for p in places] for draw in found[size]] for size in sorted(set(sizes))
        }
        values = _of_tried([pairs[p] for p in places], runs_of, settings.resamples, config.run.seed)
        for size, (value, low, high, users, count) in values.items():
            figures.append(
                {"group": group, "pairs_to_fit": int(size), "accuracy": value, "low": low, "high": high, "users": users,
                 "pairs": count}
            )  # fmt: skip
    return figures


def _of_tried(
    pairs: Sequence[PreferencePair], runs_of: Mapping[str, Sequence[Sequence[float]]], samples: int, seed: int
) -> dict[str, tuple[float, float, float, int, int]]:
    """Accuracy over pairs and draws, a pair once for each draw that tried it; users are the units."""
    first = next(iter(runs_of.values()))
    kept = [
        (draw, place)
        for draw, one in enumerate(first)
        for place, margin in enumerate(one)
        if not np.isnan(margin)
    ]
    chosen = [pairs[place] for _, place in kept]
    users = len({pair.user_id for pair in chosen})
    if users < 2:
        return {}
    values, _ = accuracies(
        chosen,
        {size: [[each[draw][place] for draw, place in kept]] for size, each in runs_of.items()},
        samples,
        seed,
    )
    return {size: (value.value, *interval(value), users, len(set(kept))) for size, value in values.items()}


def _margins(prmu: Prmu, condition: Condition, batch_size: int) -> list[float]:
    encoded = encode_pairs(prmu.encoder, [pair for pair, _ in condition])
    shown: list[EncodedPair] = [each.with_row(row) for each, (_, row) in zip(encoded, condition, strict=True)]
    return pair_margins(prmu, shown, batch_size)


def _with_prompts(
    pairs: Sequence[PreferencePair], rows: Mapping[str, int], prompts: Mapping[str, str]
) -> Condition:
    return [
        (pair.model_copy(update={"prompt": prompts[pair.example_id]}), rows[pair.user_id]) for pair in pairs
    ]


def _examples(config: DictConfig, wanted: set[str]) -> dict[str, Example]:
    path = examples_file(Path(config.paths.examples), "train")
    found = {example.id: example for example in iterate_examples(path) if example.id in wanted}
    if missing := wanted - found.keys():
        raise DataError(
            f"{path}: lacks example {min(missing)} of a preference pair. Point paths.examples at what the chains were made from."
        )
    return found


def _prompt(config: DictConfig, example: Example, with_profile: bool) -> str:
    benchmark = config.benchmark
    install(benchmark.retriever, benchmark.retriever_model)
    size = benchmark.profile_size if with_profile else 0
    return build_prompt(example, size, benchmark.retriever, None, None, seed=config.run.seed).text


def _check_origin(config: DictConfig) -> None:
    path = Path(config.paths.prmu) / "manifest.json"
    try:
        made_from = json.loads(path.read_text("utf-8"))["notes"].get("fingerprint")
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{path}: not there or not readable. Run bash recipes/train_prmu.sh.") from error
    if made_from != fingerprint(config):
        raise StageError(
            f"{path}: this PRMU was trained on other pairs or with other settings, so what was held out is not known. Give the "
            "same train_prmu.* and run.seed, or run bash recipes/train_prmu.sh."
        )


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "# PRMU: what the user's id and profile do on held-out pairs",
        "",
        "| pairs | condition | accuracy | own minus it | mean change of margin | preferences flipped |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss = (
            f"{row['loss']:+.3f} [{row['loss_low']:+.3f}, {row['loss_high']:+.3f}]" if "loss" in row else ""
        )
        accuracy = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        cells = [f"{row['group']} ({row['pairs']})", row["condition"], accuracy, loss]
        lines.append(f"| {' | '.join(cells)} | {row['margin_moves']:.3f} | {row['flipped']:.1%} |")
    return lines


if __name__ == "__main__":
    main("prmu_report", run)
