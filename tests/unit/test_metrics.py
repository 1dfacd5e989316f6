"""ROUGE against rouge-score, LaMP's metrics against independent counts, the bootstrap (S32, S33)."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tagpr.benchmarks.lamp import TASKS
from tagpr.errors import ConfigError, DataError
from tagpr.metrics import (
    possible_rating_errors,
    rouge,
    rouge_score,
    task_metrics,
    task_score,
)

PUBLISHED = Path(__file__).parents[3] / "shared/data/pgraphrag/metric_check"
ORACLE = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def oracle(gold: str, prediction: str) -> tuple[float, float]:
    scores = ORACLE.score(gold, prediction)
    return float(scores["rouge1"].fmeasure), float(scores["rougeL"].fmeasure)


# Few words, so that subsequences overlap; and characters whose lower-casing is odd or that look like letters.
words = st.lists(st.sampled_from(["a", "b", "c", "The", "the", "cat's", "x-y", "42", "é", "ß"]), max_size=40)
unicode_texts = st.one_of(
    words.map(" ".join),
    st.text(max_size=60),
    st.text("aAbB0 .İıſKÅﬁǅΣςẞ́\u200b\u0130\x1c\n²½４ａ", max_size=40),
)


@settings(max_examples=400)
@given(unicode_texts, unicode_texts)
def test_rouge_is_rouge_score(gold: str, prediction: str) -> None:
    assert rouge(gold, prediction) == oracle(gold, prediction)
    assert rouge(gold, gold) == oracle(gold, gold)


def test_rouge_is_rouge_score_on_long_texts() -> None:
    rng = random.Random(0)
    for length in (63, 64, 65, 300, 700):
        gold, prediction = (" ".join(str(rng.randrange(40)) for _ in range(n)) for n in (length, length + 7))
        assert rouge(gold, prediction) == oracle(gold, prediction)


def test_rouge_by_hand() -> None:
    # 3 shared words of 3 and 4; the longest common subsequence is "a c".
    assert rouge("a b c", "b a, c! d") == (pytest.approx(6 / 7), pytest.approx(4 / 7))
    assert rouge_score("a b c", "b a c d") == pytest.approx(5 / 7)
    assert rouge_score("a b c", "b a c d", "rouge1") == pytest.approx(6 / 7)
    assert rouge_score("a b c", "b a c d", "rougeL") == pytest.approx(4 / 7)
    with pytest.raises(ConfigError, match="rouge2"):
        rouge_score("a", "a", "rouge2")  # type: ignore[arg-type]


def test_published_scores_are_reproduced() -> None:
    if not PUBLISHED.is_dir():
        pytest.skip(f"no published outputs at {PUBLISHED}")
    golds = json.loads((PUBLISHED / "amazon_title_generation_outputs_dev.json").read_text(encoding="utf-8"))
    published = {
        entry["filename"]: entry["result"]
        for entry in json.loads((PUBLISHED / "dev_evaluation_title.json").read_text(encoding="utf-8"))
    }
    files = sorted(PUBLISHED.glob("results_dev_*.json"))
    assert len(files) == 3
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"))
        by_user = {row["user_id"]: _published_answer(row["output"]) for row in rows}
        assert len(by_user) == len(golds) == len(rows)
        metrics = task_metrics(
            TASKS["lamp4"], {row["id"]: row["output"].replace("\n", "") for row in golds}, by_user
        )
        assert metrics["rouge1"] == pytest.approx(published[file.name]["rouge-1"], abs=0.001), file.name
        assert metrics["rougeL"] == pytest.approx(published[file.name]["rouge-L"], abs=0.001), file.name


def _published_answer(output: str) -> str:
    """As those authors cut the answer out of a raw output."""
    answer = output.partition("The title is: ")[2] if "The title is: " in output else output
    for end in ("The title is:", "The title", "The"):
        if end in answer:
            answer = answer.partition(end)[0]
            break
    return answer.replace("\n", "")


@pytest.mark.parametrize("name", TASKS)
def test_gold_answers_score_the_maximum(name: str) -> None:
    task = TASKS[name]
    answers = task.labels or ("A Headline, with 3 < 4", "another one", 'Title of a "<i>paper</i>"')
    golds = {str(index): answer for index, answer in enumerate(answers)}
    metrics = task_metrics(task, golds, {key: f" {gold}\n" for key, gold in golds.items()})
    errors = {"mae", "mse", "rmse", "unparsable"}
    assert {key: value for key, value in metrics.items() if key != "rows"} == {
        key: 0.0 if key in errors else 1.0 for key in metrics if key != "rows"
    }
    assert metrics["rows"] == len(answers)
    assert all(task_score(task, gold, gold) == 1.0 for gold in answers)


def slow_f1(golds: list[str], predictions: list[str], label: str) -> float:
    hit = sum(gold == said == label for gold, said in zip(golds, predictions, strict=True))
    precision = hit / predictions.count(label) if label in predictions else 0.0
    recall = hit / golds.count(label) if label in golds else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(st.sampled_from(["lamp1", "lamp2"]), st.data())
def test_classification_by_an_independent_count(name: str, data: st.DataObject) -> None:
    task = TASKS[name]
    said = st.sampled_from((*task.labels, "Comedy", "", "1"))
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(task.labels), said), min_size=1, max_size=40))
    golds, predictions = [gold for gold, _ in pairs], [text for _, text in pairs]
    metrics = task_metrics(task, _rows(golds), _rows(predictions))
    per_label = [slow_f1(golds, predictions, label) for label in task.labels]
    assert metrics["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert metrics["f1_macro"] == pytest.approx(sum(per_label) / len(per_label))
    assert metrics["unparsable"] == pytest.approx(sum(b not in task.labels for b in predictions) / len(pairs))
    assert ("f1_positive" in metrics) == (name == "lamp1")
    if name == "lamp1":
        assert metrics["f1_positive"] == pytest.approx(per_label[1])


@given(st.data())
def test_classification_by_scikit_learn(data: st.DataObject) -> None:
    sklearn: Any = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not a dependency")
    labels = TASKS["lamp2"].labels
    said = st.sampled_from((*labels, "Comedy"))
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(labels), said), min_size=1, max_size=40))
    index = {label: number for number, label in enumerate(labels)}
    golds, predictions = [index[gold] for gold, _ in pairs], [index.get(text, -1) for _, text in pairs]
    expected = sklearn.f1_score(
        golds, predictions, labels=list(range(len(labels))), average="macro", zero_division=0
    )
    metrics = task_metrics(TASKS["lamp2"], _rows([a for a, _ in pairs]), _rows([b for _, b in pairs]))
    assert metrics["f1_macro"] == pytest.approx(expected)


ratings = st.sampled_from(["1", "2", "3", "4", "5", " 4\n", "2.0"])
messy = st.one_of(
    ratings, st.sampled_from(["", "five", "nan", "inf", "-inf", "1e300", "4 stars", "2.5", "10"])
)


@given(st.lists(st.tuples(ratings, messy), min_size=1, max_size=40))
def test_rating_by_an_independent_count(pairs: list[tuple[str, str]]) -> None:
    errors = []
    unparsable = 0
    for gold, said in pairs:
        if said.strip() in ("1", "2", "3", "4", "5", "2.0", "2.5", "10"):
            errors.append(float(said) - float(gold))
        else:
            unparsable += 1
            errors.append({1: 4.0, 2: 3.0, 3: 2.0, 4: 3.0, 5: 4.0}[int(float(gold))])
    metrics = task_metrics(TASKS["lamp3"], _rows([a for a, _ in pairs]), _rows([b for _, b in pairs]))
    assert metrics["mae"] == pytest.approx(np.mean(np.abs(errors)))
    assert metrics["mse"] == pytest.approx(np.mean(np.square(errors)))
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert metrics["unparsable"] == pytest.approx(unparsable / len(pairs))
    if not any(said.strip() == "2.5" for _, said in pairs):
        assert possible_rating_errors(metrics["mae"], metrics["rmse"])


def test_the_papers_lamp3_errors_are_impossible() -> None:
    assert not possible_rating_errors(0.218, 0.263, tolerance=0.01)
    assert possible_rating_errors(0.218, math.sqrt(0.263))


@pytest.mark.parametrize(
    ("name", "golds", "predictions", "named"),
    [
        ("lamp2", {}, {}, "no gold"),
        ("lamp2", {"7": "comedy", "8": "action"}, {"7": "comedy"}, "id 8"),
        ("lamp2", {"7": "comedy"}, {"7": "comedy", "9": "action"}, "id 9"),
        ("lamp2", {"7": "Comedy"}, {"7": "comedy"}, "id 7"),
        ("lamp3", {"7": "good"}, {"7": "5"}, "id 7"),
        ("lamp3", {"7": "nan"}, {"7": "5"}, "id 7"),
    ],
)
def test_inconsistent_rows_are_refused(
    name: str, golds: dict[str, str], predictions: dict[str, str], named: str
) -> None:
    with pytest.raises(DataError, match=named) as raised:
        task_metrics(TASKS[name], golds, predictions)
    assert str(raised.value).startswith(name)
    assert "\n" not in str(raised.value)


def test_generation_counts_empty_answers_and_golds_out_of_reach(caplog: pytest.LogCaptureFixture) -> None:
    metrics = task_metrics(TASKS["lamp7"], {"1": "a b", "2": "🎉"}, {"1": " ", "2": "🎉"})
    assert metrics == {"rows": 2.0, "rouge1": 0.0, "rougeL": 0.0, "unparsable": 1.0}
    assert "1 of 2 golds" in caplog.text


def _rows(texts: list[str]) -> dict[str, str]:
    return {str(index): text for index, text in enumerate(texts)}


def test_task_score_by_kind() -> None:
    assert task_score(TASKS["lamp3"], "4", " 4 ") == 1.0
    assert task_score(TASKS["lamp3"], "4", "4.0") == 0.0
    assert task_score(TASKS["lamp2"], "comedy", "Comedy") == 0.0
    assert task_score(TASKS["lamp5"], "a b c", "b a c d", "rougeL") == pytest.approx(4 / 7)
