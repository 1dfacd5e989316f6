"""The metrics that benchmarks report, equal to their official code where that is defined (S23, S32, S33).

ROUGE is computed on rouge-score's tokens (no stemmer) with RapidFuzz's bit-parallel longest common
subsequence: the same floats as rouge-score, many times faster (the tests hold rouge-score
against it). Means are plain means over rows; rouge-score's bootstrap aggregate would change from run to
run. METEOR is NLTK's. Sums are exact, so that no figure depends on the order in which rows come, and they are
running sums: memory does not grow with the rows (:class:`TaskScorer`).
"""

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, Literal, Protocol

from rapidfuzz.distance import LCSseq

from tagpr.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Kind = Literal["classification", "rating", "generation"]
RougeKind = Literal["rouge1", "rougeL", "mean"]
RougeTokens = Literal["words", "characters"]

METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_macro", "f1_positive"),
    "rating": ("mae", "mse", "rmse"),
    "generation": ("rouge1", "rougeL", "meteor"),
}
"""What a task of each kind may name in its ``metrics``; ``f1_positive`` only with two labels."""

_WORDS = re.compile(r"[a-z0-9]+")
# Scripts written without spaces, where a word cannot be told by its letters: Han with its iteration mark and zero,
# kana, and Hangul, whose spaces part phrases.
_ONE_BY_ONE = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_CHARACTERS = re.compile(rf"[{_ONE_BY_ONE}]|(?:(?![{_ONE_BY_ONE}])[^\W_])+")

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

_LOWEST_RATING, _HIGHEST_RATING = 1.0, 5.0  # of a rating task that lists no labels
_RATING_LIMIT = 1e100  # beyond it a squared error may overflow


class ScoredTask(Protocol):
    """What metrics need to know of a task; ``tagpr.benchmarks.task.Task`` is one."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def kind(self) -> Kind:
        """Which metrics are meant."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The closed list of answers; empty for generation."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What to report, of ``METRICS[kind]``, in this order."""

    @property
    def rouge_tokens(self) -> RougeTokens:
        """What ROUGE counts."""

    @property
    def parse(self) -> Callable[[str], str]:
        """The lenient reading of an answer."""


def rouge_tokens(text: str, tokens: RougeTokens = "words") -> list[str]:
    """Split a text into what ROUGE counts.

    ``words``: rouge-score's, runs of ``a-z0-9`` after lower-casing; text without any (emoji, Chinese) has none and
    scores 0 even against itself. ``characters``: each Han, kana or Hangul character by itself and runs of all other
    letters and digits, after NFKC (full-width forms become plain ones) and lower-casing.
    """
    if tokens == "words":
        return _WORDS.findall(text.lower())
    return _CHARACTERS.findall(unicodedata.normalize("NFKC", text).lower())


def rouge(gold: str, prediction: str, tokens: RougeTokens = "words") -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L F-measures in [0, 1]; with ``words`` as rouge-score without stemmer gives them."""
    return _rouge(rouge_tokens(gold, tokens), rouge_tokens(prediction, tokens))


def _rouge(gold: list[str], predicted: list[str]) -> tuple[float, float]:
    if not gold or not predicted:
        return 0.0, 0.0
    # RapidFuzz compares hashes of list elements; small integers are their own hash, so nothing can collide.
    number: dict[str, int] = {}
    gold_ids = [number.setdefault(token, len(number)) for token in gold]
    predicted_ids = [number.setdefault(token, len(number)) for token in predicted]
    left = [0] * len(number)
    for token in gold_ids:
        left[token] += 1
    shared = 0
    for token in predicted_ids:
        if left[token]:
            left[token] -= 1
            shared += 1
    if not shared:
        return 0.0, 0.0
    common = LCSseq.similarity(gold_ids, predicted_ids)
    return _f_measure(shared, len(predicted), len(gold)), _f_measure(common, len(predicted), len(gold))


def _f_measure(hits: int, predicted: int, gold: int) -> float:
    # In the order in which rouge-score rounds; 2 * hits / (predicted + gold) differs in the last bit.
    precision, recall = hits / predicted, hits / gold
    return 2 * precision * recall / (precision + recall)


def rouge_score(
    gold: str, prediction: str, rouge_kind: RougeKind = "mean", tokens: RougeTokens = "words"
) -> float:
    """One ROUGE figure in [0, 1]; ``mean`` is the mean of ROUGE-1 and ROUGE-L (S23).

    Raises:
        ConfigError: ``rouge_kind`` is none of ``rouge1``, ``rougeL``, ``mean``.
    """
    rouge_1, rouge_l = rouge(gold, prediction, tokens)
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
        return rouge_score(gold, prediction, rouge_kind, task.rouge_tokens)
    return float(prediction.strip() == gold.strip())


def read_answer(task: ScoredTask, answer: str, reading: Literal["lenient", "official"] = "lenient") -> str:
    """Turn a model's answer into what is scored.

    ``lenient`` is the task's parser, which finds the one label that a sentence gives. ``official`` only strips, as
    LaMP's own code does; figures of the two stand side by side, never mixed.
    """
    return task.parse(answer) if reading == "lenient" else answer.strip()


def task_metrics(
    task: ScoredTask, golds: Mapping[str, str], predictions: Mapping[str, str]
) -> dict[str, float]:
    """Metrics of one task over rows ``id -> text``, see :meth:`TaskScorer.metrics`.

    Raises:
        DataError: no rows, the ids of golds and predictions differ, or a gold is not an answer to this task.
        ConfigError: the task names a metric that its kind does not have.
    """
    for missing in sorted(golds.keys() - predictions.keys())[:1]:
        raise DataError(f"{task.name}: no prediction for id {missing}. Every gold needs exactly one.")
    for extra in sorted(predictions.keys() - golds.keys())[:1]:
        raise DataError(f"{task.name}: id {extra} is predicted but has no gold. Score the right split.")
    scorer = TaskScorer(task)
    for key, gold in golds.items():
        scorer.add(gold, predictions[key], key)
    return scorer.metrics()


def score_rows(rows: Iterable[tuple[ScoredTask, str, str, str]]) -> dict[str, dict[str, float]]:
    """Metrics by task of rows (task, id, gold, prediction) in any order, one row in memory at a time.

    That every row comes once is the caller's to see to: to know it, one has to remember them all.

    Raises:
        DataError: a gold is not an answer to its task.
        ConfigError: a task names a metric that its kind does not have.
    """
    scorers: dict[str, TaskScorer] = {}
    for task, key, gold, prediction in rows:
        scorer = scorers.get(task.name)
        if scorer is None:
            scorer = scorers[task.name] = TaskScorer(task)
        scorer.add(gold, prediction, key)
    return {name: scorer.metrics() for name, scorer in sorted(scorers.items())}


def row_metrics(task: ScoredTask, gold: str, prediction: str) -> dict[str, float]:
    """Those of the task's metrics that are plain means over rows, of one row: all but F1 and RMSE.

    Raises:
        DataError: the gold is not an answer to this task.
    """
    return TaskScorer(task).add(gold, prediction)


class _ExactSum:
    """A sum of floats in an integer: no rounding until it is read, so the order of rows cannot show."""

    __slots__ = ("_total",)
    _BITS = 1074  # the smallest float is 2 ** -1074

    def __init__(self) -> None:
        self._total = 0

    def add(self, value: float) -> None:
        numerator, denominator = value.as_integer_ratio()
        self._total += numerator << (self._BITS + 1 - denominator.bit_length())

    def value(self) -> float:
        return self._total / (1 << self._BITS)


class TaskScorer:
    """Running metrics of one task: feed it rows, ask it at the end; memory does not grow with the rows.

    Raises:
        ConfigError: the task names a metric that its kind does not have.
    """

    def __init__(self, task: ScoredTask) -> None:
        for metric in task.metrics:
            if metric not in METRICS[task.kind] or (metric == "f1_positive" and len(task.labels) != 2):
                raise ConfigError(
                    f"{task.name}: metric {metric!r} means nothing for its kind, {task.kind}. "
                    f"Known: {', '.join(METRICS[task.kind])}; f1_positive with two labels."
                )
        self.task = task
        self.rows = 0
        self._unparsable = 0
        self._beyond_reach = 0
        self._integers = True
        self._sums: dict[str, _ExactSum] = {}
        # By label; answers off the list are counted nowhere, or a model's fancies would fill the memory.
        self._right, self._gold, self._said = Counter[str](), Counter[str](), Counter[str]()
        self._meteor = _meteor() if "meteor" in task.metrics else None

    def add(self, gold: str, prediction: str, key: str = "") -> dict[str, float]:
        """Count one row and return those of its metrics that are plain means over rows.

        White space around both texts is ignored, nothing else is: :func:`read_answer` comes first. ``key`` is the row's id,
        for messages.

        Raises:
            DataError: the gold is not an answer to this task.
        """
        gold, said = gold.strip(), prediction.strip()
        if self.task.kind == "classification":
            values = self._classification(gold, said, key)
        elif self.task.kind == "rating":
            values = self._rating(gold, said, key)
        else:
            values = self._generation(gold, said)
        self.rows += 1
        for name, value in values.items():
            self._sums.setdefault(name, _ExactSum()).add(value)
        return {name: value for name, value in values.items() if name in self._reported()}

    def metrics(self) -> dict[str, float]:
        """The task's metrics over the rows so far.

        Every task: ``rows``; and ``unparsable``, the share of predictions that say nothing the metric can use (no label
        of the list, no number below 1e100, no ROUGE token). Besides, those that the task names. Classification:
        ``accuracy``, ``f1_macro`` over the whole label list (a label that never occurs counts as 0), ``f1_positive``, the
        F1 of the second of two labels, which is index 1 in LaMP's code. Rating: ``mae``, ``mse``, ``rmse``; an unparsable
        prediction counts as the farther end of the scale. Generation: ``rouge1``, ``rougeL``, ``meteor`` (or
        ``meteor_stem``, see :func:`meteor_name`), plain means.

        Raises:
            DataError: no rows.
        """
        if not self.rows:
            raise DataError(f"{self.task.name}: no gold answers. Check the outputs file.")
        if self._beyond_reach:
            logger.warning(
                "%s: %d of %d golds have no ROUGE token and score 0.",
                self.task.name,
                self._beyond_reach,
                self.rows,
            )
        found = {name: total.value() / self.rows for name, total in self._sums.items()}
        if self.task.kind == "classification":
            f1 = [
                2 * self._right[label] / max(self._gold[label] + self._said[label], 1)
                for label in self.task.labels
            ]
            found["f1_macro"] = math.fsum(f1) / len(f1)
            found["f1_positive"] = f1[1] if len(f1) == 2 else math.nan
        elif self.task.kind == "rating":
            found["rmse"] = math.sqrt(found["mse"])
            assert not self._integers or possible_rating_errors(found["mae"], found["rmse"]), found
        metrics = {name: found[name] for name in self._reported()}
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        return {"rows": float(self.rows), **metrics, "unparsable": self._unparsable / self.rows}

    def _reported(self) -> Sequence[str]:
        if self._meteor is None:
            return self.task.metrics
        return [meteor_name() if metric == "meteor" else metric for metric in self.task.metrics]

    def _classification(self, gold: str, said: str, key: str) -> dict[str, float]:
        labels = self.task.labels
        if gold not in labels:
            raise DataError(
                f"{self.task.name}: gold {gold!r} of id {key} is no label. Check the outputs file."
            )
        self._gold[gold] += 1
        if said in labels:
            self._said[said] += 1
        else:
            self._unparsable += 1
        if gold == said:
            self._right[gold] += 1
        return {"accuracy": float(gold == said)}

    def _rating(self, gold: str, said: str, key: str) -> dict[str, float]:
        error, parsable = rating_error(self.task, gold, said, key)
        self._unparsable += not parsable
        self._integers = self._integers and error.is_integer()
        return {"mae": error, "mse": error * error}

    def _generation(self, gold: str, said: str) -> dict[str, float]:
        gold_tokens = rouge_tokens(gold, self.task.rouge_tokens)
        said_tokens = rouge_tokens(said, self.task.rouge_tokens)
        self._beyond_reach += not gold_tokens
        self._unparsable += not said_tokens
        rouge_1, rouge_l = _rouge(gold_tokens, said_tokens)
        values = {"rouge1": rouge_1, "rougeL": rouge_l}
        if self._meteor is not None:
            values[meteor_name()] = (
                self._meteor.of_tokens(gold_tokens, said_tokens)
                if self.task.rouge_tokens == "characters"
                else self._meteor.of_texts(gold, said)
            )
        return values


def rating_error(task: ScoredTask, gold: str, prediction: str, key: str = "") -> tuple[float, bool]:
    """Return ``|prediction - gold|`` and whether the prediction was a number.

    One that is none counts as the farther end of the task's scale, as LaMP's official code has it for 1 to 5.

    Raises:
        DataError: the gold is no number.
    """
    expected, said = _number(gold), _number(prediction)
    if expected is None:
        raise DataError(f"{task.name}: gold {gold!r} of id {key} is no number. Check the outputs.")
    if said is None:
        return max(abs(end - expected) for end in _scale(task.labels)), False
    return abs(said - expected), True


@lru_cache(maxsize=64)
def _scale(labels: tuple[str, ...]) -> tuple[float, float]:
    ends = [float(label) for label in labels]
    return (min(ends), max(ends)) if ends else (_LOWEST_RATING, _HIGHEST_RATING)


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


def meteor_name() -> str:
    """What METEOR is called here: ``meteor``, or ``meteor_stem`` where NLTK finds no WordNet.

    METEOR as benchmarks report it matches words exactly, then by stem, then by WordNet's synonyms. Without WordNet
    matching ends with the stems: another figure, 4 % lower on the published titles of PGraphRAG, and so another name. Decided
    once for a process.
    """
    return _meteor().name


def meteor(gold: str, prediction: str) -> float:
    """METEOR of two texts in [0, 1]: NLTK's, with its alpha 0.9, beta 3, gamma 0.5; :func:`meteor_name` says which kind.

    Tokens are those of NLTK's ``word_tokenize``, as in Hugging Face's ``evaluate``. It first parts sentences with NLTK's
    ``punkt_tab``; where that is not installed, after ``.``, ``!`` or ``?`` and white space, which gives the published
    figures of PGraphRAG to their three decimals (not parting them at all is off by 0.003).
    """
    return _meteor().of_texts(gold, prediction)


@cache
def _meteor() -> "_Meteor":
    return _Meteor()


class _NoSynonyms:
    """WordNet where there is none."""

    def synsets(self, word: str) -> tuple[()]:
        return ()


class _Meteor:
    """NLTK's METEOR with what it finds on this machine."""

    def __init__(self) -> None:
        from nltk import word_tokenize
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score

        self._tokenize_line = word_tokenize
        self.name = "meteor"
        synonyms: Any = wordnet
        # NLTK's LookupError has twenty lines; a corpus with a file missing gives an OSError.
        try:
            wordnet.synsets("word")
        except (LookupError, OSError) as error:
            self.name = "meteor_stem"
            synonyms = _NoSynonyms()
            logger.warning(
                "METEOR: NLTK has no usable WordNet (%s); reported as meteor_stem, exact and stem matches only, not to be "
                "compared with meteor. Get it with `python -m nltk.downloader wordnet`.",
                type(error).__name__,
            )
        self._single = partial(single_meteor_score, wordnet=synonyms)
        self._punkt = True
        try:
            word_tokenize("One. Two.")
        except (LookupError, OSError):
            self._punkt = False
            logger.warning(
                "METEOR: NLTK has no punkt_tab, sentences are parted by a rule and the last decimals may differ. "
                "Get it with `python -m nltk.downloader punkt_tab`."
            )

    def of_texts(self, gold: str, prediction: str) -> float:
        return self.of_tokens(self._tokenize(gold), self._tokenize(prediction))

    def of_tokens(self, gold: Sequence[str], prediction: Sequence[str]) -> float:
        return float(self._single(gold, prediction))

    def _tokenize(self, text: str) -> list[str]:
        sentences = [text] if self._punkt else _SENTENCE_END.split(text)
        return [
            token
            for sentence in sentences
            for token in self._tokenize_line(sentence, preserve_line=not self._punkt)
        ]
