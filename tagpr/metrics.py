"""Metrics equal to LaMP's official ones, and the interval of a difference of two systems (S23, S32, S33).

ROUGE is computed on rouge-score's tokens (no stemmer) with a ``Counter`` and RapidFuzz's bit-parallel
longest common subsequence: the same floats as rouge-score, many times faster (the tests hold rouge-score
against it). Means are plain means over rows; rouge-score's bootstrap aggregate would change from run to
run.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from rapidfuzz.distance import LCSseq

from tagpr.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

RougeKind = Literal["rouge1", "rougeL", "mean"]

_TOKEN = re.compile(r"[a-z0-9]+")
_LOWEST_RATING, _HIGHEST_RATING = 1.0, 5.0
_RATING_LIMIT = 1e100  # beyond it a squared error may overflow


class ScoredTask(Protocol):
    """What metrics need to know of a task; ``tagpr.benchmarks.lamp.TASKS`` holds such."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def kind(self) -> Literal["classification", "rating", "generation"]:
        """Which metrics are meant."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The closed list of answers; empty for generation."""


def rouge(gold: str, prediction: str) -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L F-measures in [0, 1], as rouge-score without stemmer gives them.

    Tokens are runs of ``a-z0-9`` after lower-casing, so text without any (emoji, Chinese) scores 0, even
    against itself.
    """
    gold_tokens = _TOKEN.findall(gold.lower())
    predicted_tokens = _TOKEN.findall(prediction.lower())
    if not gold_tokens or not predicted_tokens:
        return 0.0, 0.0
    shared = (Counter(gold_tokens) & Counter(predicted_tokens)).total()
    if not shared:
        return 0.0, 0.0
    # RapidFuzz compares hashes of list elements; small integers are their own hash, so nothing can collide.
    number: dict[str, int] = {}
    common = LCSseq.similarity(
        [number.setdefault(token, len(number)) for token in gold_tokens],
        [number.setdefault(token, len(number)) for token in predicted_tokens],
    )
    return (
        _f_measure(shared, len(predicted_tokens), len(gold_tokens)),
        _f_measure(common, len(predicted_tokens), len(gold_tokens)),
    )


def _f_measure(hits: int, predicted: int, gold: int) -> float:
    # In the order in which rouge-score rounds; 2 * hits / (predicted + gold) differs in the last bit.
    precision, recall = hits / predicted, hits / gold
    return 2 * precision * recall / (precision + recall)


def rouge_score(gold: str, prediction: str, rouge_kind: RougeKind = "mean") -> float:
    """One ROUGE figure in [0, 1]; ``mean`` is the mean of ROUGE-1 and ROUGE-L (S23).

    Raises:
        ConfigError: ``rouge_kind`` is none of ``rouge1``, ``rougeL``, ``mean``.
    """
    rouge_1, rouge_l = rouge(gold, prediction)
    if rouge_kind == "mean":
        return (rouge_1 + rouge_l) / 2
    if rouge_kind == "rouge1":
        return rouge_1
    if rouge_kind == "rougeL":
        return rouge_l
    raise ConfigError(f"rouge={rouge_kind}: no such ROUGE. Use rouge1, rougeL or mean.")


def task_score(task: ScoredTask, gold: str, prediction: str, rouge_kind: RougeKind = "mean") -> float:
    """How right one answer is, in [0, 1], higher is better: Accuracy or ROUGE of eq. 6 (S23).

    Exact match for classification and rating, ROUGE for generation. White space around both is ignored;
    nothing else is: a benchmark's ``parse_answer`` comes first.

    Raises:
        ConfigError: ``rouge_kind`` is unknown.
    """
    if task.kind == "generation":
        return rouge_score(gold, prediction, rouge_kind)
    return float(prediction.strip() == gold.strip())


def lamp_metrics(
    task: ScoredTask, golds: Mapping[str, str], predictions: Mapping[str, str]
) -> dict[str, float]:
    """Official metrics of one task over rows ``id -> text``; texts are stripped and nothing else.

    Every task: ``rows`` and ``unparsable``, the share of predictions that say nothing the metric can use
    (no label of the list, no number below 1e100, no ROUGE token). Classification: ``accuracy``, ``f1_macro``
    over the whole label list (a label that never occurs counts as 0); of two labels also ``f1_positive``,
    the F1 of the second, which is index 1 in the official code. Rating: ``mae``, ``mse``, ``rmse``; an
    unparsable prediction counts as the farther of 1 and 5. Generation: ``rouge1``, ``rougeL``, plain means.

    Raises:
        DataError: no rows, the ids of golds and predictions differ, or a gold is not an answer to this task.
    """
    if not golds:
        raise DataError(f"{task.name}: no gold answers. Check the outputs file.")
    for missing in sorted(golds.keys() - predictions.keys())[:1]:
        raise DataError(f"{task.name}: no prediction for id {missing}. Every gold needs exactly one.")
    for extra in sorted(predictions.keys() - golds.keys())[:1]:
        raise DataError(f"{task.name}: id {extra} is predicted but has no gold. Score the right split.")
    ids = list(golds)
    expected = [golds[key].strip() for key in ids]
    predicted = [predictions[key].strip() for key in ids]
    if task.kind == "classification":
        metrics = _classification(task, ids, expected, predicted)
    elif task.kind == "rating":
        metrics = _rating(task, ids, expected, predicted)
    else:
        metrics = _generation(task, expected, predicted)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    return {"rows": float(len(ids)), **metrics}


def _classification(
    task: ScoredTask, ids: Sequence[str], golds: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
    for key, gold in zip(ids, golds, strict=True):
        if gold not in task.labels:
            raise DataError(f"{task.name}: gold {gold!r} of id {key} is no label. Check the outputs file.")
    right = Counter(gold for gold, said in zip(golds, predictions, strict=True) if gold == said)
    of_gold, of_prediction = Counter(golds), Counter(predictions)
    f1 = [2 * right[label] / max(of_gold[label] + of_prediction[label], 1) for label in task.labels]
    metrics = {
        "accuracy": right.total() / len(golds),
        "f1_macro": math.fsum(f1) / len(f1),
        "unparsable": sum(said not in task.labels for said in predictions) / len(golds),
    }
    return {**metrics, "f1_positive": f1[1]} if len(f1) == 2 else metrics


def _rating(
    task: ScoredTask, ids: Sequence[str], golds: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
    errors: list[float] = []
    unparsable = 0
    integers = True
    for key, gold_text, text in zip(ids, golds, predictions, strict=True):
        gold, said = _number(gold_text), _number(text)
        if gold is None:
            raise DataError(f"{task.name}: gold {gold_text!r} of id {key} is no number. Check the outputs.")
        if said is None:
            unparsable += 1
            # At equal distance the official code takes 5; the error is the same.
            said = max(_HIGHEST_RATING, _LOWEST_RATING, key=lambda end: abs(end - gold))
        integers = integers and gold.is_integer() and said.is_integer()
        errors.append(abs(said - gold))
    mae = math.fsum(errors) / len(errors)
    mse = math.fsum(error * error for error in errors) / len(errors)
    rmse = math.sqrt(mse)
    assert not integers or possible_rating_errors(mae, rmse), (mae, rmse)
    return {"mae": mae, "mse": mse, "rmse": rmse, "unparsable": unparsable / len(errors)}


def possible_rating_errors(mae: float, rmse: float, tolerance: float = 1e-9) -> bool:
    """Whether integer ratings can have these errors: an integer is never above its square, so MAE <= MSE.

    ``tolerance`` is in squared rating points; for published figures give what their rounding hides. LaMP-3
    of the paper (0.218, 0.263) is impossible: its RMSE looks like an MSE (S33).
    """
    return rmse * rmse >= mae - tolerance


def _number(text: str) -> float | None:
    # The official code is float(text), which lets "nan", "inf" and "1e300" spoil the mean over all rows.
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < _RATING_LIMIT else None


def _generation(task: ScoredTask, golds: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    beyond_reach = sum(not _TOKEN.search(gold.lower()) for gold in golds)
    if beyond_reach:
        logger.warning(
            "%s: %d of %d golds have no ROUGE token and score 0.", task.name, beyond_reach, len(golds)
        )
    scores = [rouge(gold, said) for gold, said in zip(golds, predictions, strict=True)]
    return {
        "rouge1": math.fsum(score[0] for score in scores) / len(scores),
        "rougeL": math.fsum(score[1] for score in scores) / len(scores),
        "unparsable": sum(not _TOKEN.search(said.lower()) for said in predictions) / len(scores),
    }


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of ``a - b`` over rows, with a 95 % percentile interval over resampled users."""

    mean: float
    low: float
    high: float
    rows: int
    users: int
    samples: int


def paired_bootstrap(
    per_row_a: Sequence[float],
    per_row_b: Sequence[float],
    users: Sequence[Hashable],
    samples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems on the same rows by a bootstrap over *users*: one user's rows are not independent.

    Each sample draws as many users as there are, with replacement, with all their rows; its value is the
    mean of ``a - b`` over the drawn rows. Same seed, same interval.

    Raises:
        DataError: the lengths differ, a value is not finite, or there are fewer than two users.
        ConfigError: ``samples`` < 1.
    """
    if samples < 1:
        raise ConfigError(f"samples={samples}: no samples to draw. Use 1,000 or more.")
    if not len(per_row_a) == len(per_row_b) == len(users):
        raise DataError(
            f"paired bootstrap: {len(per_row_a)} and {len(per_row_b)} scores, {len(users)} rows. Align by id."
        )
    difference = np.asarray(per_row_a, dtype=np.float64) - np.asarray(per_row_b, dtype=np.float64)
    if not np.isfinite(difference).all():
        raise DataError("paired bootstrap: a score is not finite. Score the rows again.")
    order: dict[Hashable, int] = {}
    user_of_row = np.array([order.setdefault(user, len(order)) for user in users], dtype=np.intp)
    count = len(order)
    if count < 2:
        raise DataError(f"paired bootstrap: {count} user(s) give no interval. Evaluate rows of more users.")
    sums = np.bincount(user_of_row, weights=difference, minlength=count)
    rows = np.bincount(user_of_row, minlength=count).astype(np.float64)

    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    chunk = max(1, 1_000_000 // count)  # about 8 MB of drawn indices at a time
    for start in range(0, samples, chunk):
        drawn = generator.integers(count, size=(min(chunk, samples - start), count))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / rows[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedDifference(
        float(difference.mean()), float(low), float(high), len(difference), count, samples
    )
