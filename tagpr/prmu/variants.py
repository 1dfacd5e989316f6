"""The variants of Table 4, trained on the same pairs and tried on the same held-out ones, with several seeds (S20).

``full``                 as configured: user rows learned with the model
``without_user_rows``    trained with everybody as the unknown user
``frozen_random_rows``   a row per user, random, that stays as it was drawn
``untrained``            the base with a new head and random rows, before its first update
``none``                 no PRMU: nothing tells the two responses of a pair apart, so 0.5

The split is that of ``run.seed``; a training seed decides random rows, head, order of pairs and dropped ids. Every trained
variant is kept as its margins on the held-out pairs, so that a run that was cut off goes on with the next one.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from tagpr import runs
from tagpr.configuration import main
from tagpr.errors import ConfigError
from tagpr.prmu.figures import places_by_group
from tagpr.prmu.pairs import Split, pair_files, read_pairs, split_pairs
from tagpr.prmu.train import encode_pairs, fingerprint, margins_of, prepare, train
from tagpr.schema import PreferencePair
from tagpr.statistics import Comparison, Resampled, UserResamples, by_user, compare, resample

logger = logging.getLogger("tagpr.prmu.variants")

CHANGES: dict[str, dict[str, Any]] = {
    "full": {},
    "without_user_rows": {"user_rows": "none"},
    "frozen_random_rows": {"user_rows": "frozen"},
    "untrained": {"row_init": "random"},
}
VARIANTS = (*CHANGES, "none")
Margins = dict[str, list[float]]
"""Part of the held-out pairs (``seen_users``, ``unseen_users``) -> their margins."""


def run(config: DictConfig) -> None:
    """Train what is missing, write ``table.md`` and ``variants.json``.

    Raises:
        ConfigError: fewer than one seed.
        StageError: pairs or the base model are missing.
    """
    settings = config.prmu_variants
    if not settings.seeds:
        raise ConfigError("prmu_variants.seeds: is empty. Name at least one, five to see the spread.")
    split = split_of(config)
    folder = Path(config.run.dir)
    torch.set_num_threads(config.train_prmu.threads)
    found: dict[str, list[Margins]] = {variant: [] for variant in CHANGES}
    for seed in settings.seeds:
        for variant in CHANGES:
            found[variant].append(margins(config, split, variant, seed, folder))
    report(split, found, list(settings.seeds), settings.resamples, config.run.seed, folder)


def split_of(config: DictConfig) -> Split:
    """The pairs at ``paths.chains``, divided as ``train_prmu`` divides them. Raises StageError and DataError."""
    settings = config.train_prmu
    files = pair_files(Path(config.paths.chains))
    return split_pairs(read_pairs(files), settings.unseen_users, settings.heldout_prompts, config.run.seed)


def margins(config: DictConfig, split: Split, variant: str, seed: int, folder: Path) -> Margins:
    """Margins of the held-out pairs by a variant trained with a seed; from ``folder`` where they are there already."""
    changed = config.copy()
    changed.train_prmu = OmegaConf.merge(config.train_prmu, CHANGES[variant])
    settings = changed.train_prmu
    made_from = hashlib.sha256(f"{fingerprint(changed)} {variant} {seed}".encode()).hexdigest()
    path = folder / "runs" / f"{variant}-{seed}.json"
    if path.exists():
        kept = json.loads(path.read_text("utf-8"))
        if kept["made_from"] == made_from:
            result: Margins = kept["margins"]
            return result
    began = time.monotonic()
    training = prepare(settings, split.train, seed)
    if variant != "untrained":
        train(training, split.train, settings, seed)
    encoder = training.prmu.encoder
    result = {
        name: margins_of(training, encode_pairs(encoder, pairs), settings.micro_batch_size, settings.packing)
        for name, pairs in (("seen_users", split.seen_users), ("unseen_users", split.unseen_users))
        if pairs
    }
    took = time.monotonic() - began
    runs.write_json_atomically(path, {"made_from": made_from, "seconds": took, "margins": result})
    right = sum(margin > 0 for margin in result["seen_users"]) / max(1, len(result["seen_users"]))
    logger.info("%s, seed %d: %.3f on held-out pairs of seen users, %.0f s", variant, seed, right, took)
    return result


def accuracies(
    pairs: Sequence[PreferencePair], runs_of: Mapping[str, Sequence[Sequence[float]]], samples: int, seed: int
) -> tuple[dict[str, Resampled], tuple[Comparison, ...]]:
    """Accuracy of each variant on some pairs over its runs, resampled over users and runs, and the first minus each other."""
    order: dict[Any, int] = {}
    for pair in pairs:
        order.setdefault(pair.user_id, len(order))
    users = [pair.user_id for pair in pairs]
    drawn = UserResamples(len(order), samples, seed)
    found = {
        variant: resample(
            [by_user([float(margin > 0) for margin in one], users, order) for one in each],
            drawn,
            system=number,
        )
        for number, (variant, each) in enumerate(runs_of.items())
    }
    first, *others = found
    return found, compare(found, [(first, other) for other in others])


def interval(value: Resampled) -> tuple[float, float]:
    """95 % interval of an accuracy by itself: its difference from a system that is always wrong."""
    nothing = Resampled(
        0.0, np.zeros_like(value.over_users), np.zeros_like(value.over_both), 0.0, 1, value.users
    )
    (against,) = compare({"value": value, "nothing": nothing})
    return max(0.0, against.low), min(1.0, against.high)


def report(
    split: Split,
    found: Mapping[str, Sequence[Margins]],
    seeds: Sequence[int],
    samples: int,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Write the table and the figures behind it; returns the latter."""
    rows: list[dict[str, Any]] = []
    lines = [
        "# PRMU: variants on held-out preference pairs",
        "",
        f"{len(seeds)} training seed(s) ({', '.join(map(str, seeds))}); accuracy with its 95 % interval over users and seeds; "
        "the difference is full minus the variant, its interval corrected for all variants of the group.",
        "",
        "| pairs | users | variant | accuracy | full minus it |",
        "|---|---|---|---|---|",
    ]
    for name, pairs in (("seen_users", split.seen_users), ("unseen_users", split.unseen_users)):
        for group, places in places_by_group(pairs).items():
            chosen = [pairs[place] for place in places]
            if len({pair.user_id for pair in chosen}) < 2:
                continue
            by_variant = {
                variant: [[one[name][place] for place in places] for one in each]
                for variant, each in found.items()
            }
            values, differences = accuracies(chosen, by_variant, samples, seed)
            against = {each.b: each for each in differences}
            users = len({pair.user_id for pair in chosen})
            for variant in VARIANTS:
                if variant == "none":
                    rows.append({"part": name, "group": group, "variant": "none", "accuracy": 0.5})
                    continue
                low, high = interval(values[variant])
                row: dict[str, Any] = {
                    "part": name, "group": group, "variant": variant, "pairs": len(chosen), "users": users,
                    "accuracy": values[variant].value, "low": low, "high": high,
                    "by_seed": [float(np.mean([m > 0 for m in each])) for each in by_variant[variant]],
                }  # fmt: skip
                cell = ""
                if variant in against:
                    each = against[variant]
                    row |= {
                        "full_minus_it": each.mean, "difference_low": each.corrected_low,
                        "difference_high": each.corrected_high, "p": each.corrected_p,
                    }  # fmt: skip
                    cell = f"{each.mean:+.3f} [{each.corrected_low:+.3f}, {each.corrected_high:+.3f}]"
                rows.append(row)
                lines.append(
                    f"| {name.replace('_', ' ')}: {group} ({len(chosen)}) | {users} | {variant} | "
                    f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {cell} |"
                )
    lines += ["", "none (no PRMU) is 0.5 by definition: nothing tells the two responses apart.", ""]
    made = {"seeds": list(seeds), "resamples": samples, "rows": rows}
    runs.write_text_atomically(folder / "table.md", "\n".join(lines))
    runs.write_json_atomically(folder / "variants.json", made)
    for line in lines:
        logger.info(line)
    return made


if __name__ == "__main__":
    main("prmu_variants", run)
