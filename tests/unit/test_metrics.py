"""ROUGE against rouge-score, LaMP's metrics against independent counts, the bootstrap (S32, S33)."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
    root_mean_squared_error,
)

from tagpr import metrics as metrics_module
from tagpr.benchmarks.lamp import TASKS
from tagpr.errors import ConfigError, DataError
from tagpr.metrics import (
    TaskScorer,
    meteor,
    meteor_name,
    possible_rating_errors,
    rating_error,
    read_answer,
    rouge,
    rouge_score,
    rouge_tokens,
    row_metrics,
    score_rows,
    task_metrics,
    task_score,
)

ORACLE = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def oracle(gold: str, prediction: str) -> tuple[float, float]:
    scores = ORACLE.score(gold, prediction)
    return float(scores["rouge1"].fmeasure), float(scores["rougeL"].fmeasure)


# Few words, so that subsequences overlap; characters whose lower-casing is odd, that look like letters or digits, that combine;
# whatever else Unicode has but half surrogate pairs, which no UTF-8 file can hold; and the same over and over.
words = st.lists(st.sampled_from(["a", "b", "c", "The", "the", "cat's", "x-y", "42", "é", "ß"]), max_size=40)
texts = st.one_of(
    words.map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.text(st.characters(categories=["Lu", "Ll", "Mn", "Nd", "Nl", "No", "Zs", "Cf"]), max_size=60),
    st.text("aAbB0 .İıſKÅﬁǅΣςẞ́\u200b\u0130\x1c\n²½４ａ", max_size=40),
    st.text("aB0 İK\u0301\u0307٣", min_size=1, max_size=4).flatmap(
        lambda part: st.integers(1, 400).map(lambda times: part * times)
    ),
)


@settings(max_examples=600, deadline=None)
@given(texts, texts)
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


@settings(deadline=None)
@given(st.sampled_from(["lamp1", "lamp2"]), st.data())
def test_classification_by_scikit_learn(name: str, data: st.DataObject) -> None:
    labels = TASKS[name].labels
    said = st.sampled_from((*labels, "Comedy"))
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(labels), said), min_size=1, max_size=40))
    index = {label: number for number, label in enumerate(labels)}
    golds, predictions = [index[gold] for gold, _ in pairs], [index.get(text, -1) for _, text in pairs]
    each = f1_score(golds, predictions, labels=list(range(len(labels))), average=None, zero_division=0)
    metrics = task_metrics(TASKS[name], _rows([a for a, _ in pairs]), _rows([b for _, b in pairs]))
    assert metrics["f1_macro"] == pytest.approx(np.mean(each))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(golds, predictions))
    assert metrics.get("f1_positive") == (pytest.approx(each[1]) if name == "lamp1" else None)


numbers = st.one_of(st.sampled_from(["1", "2", "3", "4", "5"]), st.floats(-1e6, 1e6).map(str))


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40))
def test_rating_by_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    golds, predictions = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    metrics = task_metrics(TASKS["lamp3"], _rows([a for a, _ in pairs]), _rows([b for _, b in pairs]))
    assert metrics["mae"] == pytest.approx(mean_absolute_error(golds, predictions))
    assert metrics["mse"] == pytest.approx(mean_squared_error(golds, predictions))
    assert metrics["rmse"] == pytest.approx(root_mean_squared_error(golds, predictions))
    assert metrics["unparsable"] == 0.0


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


# ---- text without Latin letters


def test_characters_are_the_tokens_where_words_cannot_be_told() -> None:
    text = "这家店的Pizza超好吃！！人均￥１００，カフェ 2层 café ﬁn"
    assert rouge_tokens(text, "characters") == [
        *"这家店的", "pizza", *"超好吃人均", "100", *"カフェ", "2", "层", "café", "fin",
    ]  # fmt: skip
    assert rouge_tokens(text) == ["pizza", "2", "caf", "n"]
    # Two of four characters are shared, in order.
    assert rouge("很好吃的", "很难吃啊", "characters") == (0.5, 0.5)
    assert rouge("吃好", "好吃", "characters") == (1.0, 0.5)
    assert rouge("很好吃的", "很难吃啊") == (0.0, 0.0)


@given(words)
def test_characters_are_words_where_there_is_nothing_else(text: list[str]) -> None:
    plain = " ".join(word for word in text if word.isascii())
    assert rouge_tokens(plain, "characters") == rouge_tokens(plain)


def test_a_task_says_which_tokens_count() -> None:
    task = replace(TASKS["lamp5"], rouge_tokens="characters")
    golds, said = {"1": "很好吃的"}, {"1": "很难吃啊"}
    assert task_metrics(task, golds, said) == {"rows": 1.0, "rouge1": 0.5, "rougeL": 0.5, "unparsable": 0.0}
    assert task_metrics(TASKS["lamp5"], golds, said)["unparsable"] == 1.0
    assert task_score(task, "很好吃的", "很难吃啊") == 0.5


# ---- METEOR


class Lemma:
    def __init__(self, text: str) -> None:
        self.text = text

    def name(self) -> str:
        return self.text


class Synset:
    def lemmas(self) -> list[Lemma]:
        return [Lemma("film"), Lemma("flick"), Lemma("moving_picture")]


class WordNet:
    """Knows one synonym."""

    def synsets(self, word: str) -> list[Synset]:
        return [Synset()] if word in ("film", "flick") else []


class NoWordNet:
    def synsets(self, word: str) -> list[Synset]:
        raise LookupError("twenty\nlines")


@pytest.fixture
def fresh_meteor() -> Iterator[None]:
    """What METEOR finds is decided once for a process; here it is decided anew."""
    metrics_module._meteor.cache_clear()
    yield
    metrics_module._meteor.cache_clear()


def expected_meteor(precision: float, recall: float, chunks: int, matches: int) -> float:
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / matches) ** 3)


def test_meteor_with_wordnet(fresh_meteor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.corpus.wordnet", WordNet())
    assert meteor_name() == "meteor"
    # "film" by its synonym (NLTK looks stems up), "cats" by its stem; "dull" and "very" have no partner.
    assert meteor("the cats film was very good", "The cat flick was good dull") == pytest.approx(
        expected_meteor(5 / 6, 5 / 6, 2, 5)
    )
    task = replace(TASKS["lamp5"], metrics=("rougeL", "meteor"))
    found = task_metrics(task, {"1": "a film"}, {"1": "a flick"})
    assert list(found) == ["rows", "rougeL", "meteor", "unparsable"]
    assert found["meteor"] == pytest.approx(expected_meteor(1, 1, 1, 2))


def test_meteor_without_wordnet_has_another_name(
    fresh_meteor: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nltk.corpus.wordnet", NoWordNet())
    task = replace(TASKS["lamp5"], metrics=("meteor",))
    found = [task_metrics(task, {"1": "the films"}, {"1": said}) for said in ("the film", "the flicks")]
    assert [list(each) for each in found] == [["rows", "meteor_stem", "unparsable"]] * 2
    assert found[0]["meteor_stem"] == pytest.approx(expected_meteor(1, 1, 1, 2))
    assert found[1]["meteor_stem"] == pytest.approx(expected_meteor(0.5, 0.5, 1, 1))
    told = [record.message for record in caplog.records if "WordNet" in record.message]
    assert len(told) == 1
    assert "nltk.downloader wordnet" in told[0]
    assert "\n" not in told[0]


def test_meteor_parts_sentences_and_takes_any_text(
    fresh_meteor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nltk.corpus.wordnet", WordNet())
    assert meteor("It was good. I liked him.", "It was good") == pytest.approx(
        expected_meteor(1, 3 / 8, 1, 3)
    )
    assert meteor("", "") == meteor("a", "") == meteor("", "a") == 0.0
    for odd in ("٣ \u0301\u200b", "😀" * 500, "a" * 100_000, "... ... !!"):
        assert 0.0 <= meteor(odd, odd + " a") <= 1.0


# ---- running sums


def test_metrics_do_not_depend_on_the_order_or_on_how_rows_come() -> None:
    rng = random.Random(3)
    vocabulary = [f"w{number}" for number in range(30)]

    def text() -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randrange(1, 25)))

    rows = [
        (TASKS[name], str(number), text(), text()) for number in range(200) for name in ("lamp4", "lamp7")
    ]
    rows += [
        (TASKS["lamp3"], str(n), str(rng.randint(1, 5)), rng.choice(["1", "4", "x", "2.7"]))
        for n in range(200)
    ]
    rows += [
        (TASKS["lamp1"], str(n), rng.choice(["[1]", "[2]"]), rng.choice(["[1]", "[2]", "?"]))
        for n in range(99)
    ]
    together = score_rows(iter(rows))
    shuffled = rng.sample(rows, len(rows))
    assert score_rows(iter(shuffled)) == together
    assert list(together) == ["lamp1", "lamp3", "lamp4", "lamp7"]
    for name, found in together.items():
        its = [row for row in rows if row[0].name == name]
        golds, said = {row[1]: row[2] for row in its}, {row[1]: row[3] for row in its}
        assert task_metrics(TASKS[name], golds, said) == found
        each = [row_metrics(TASKS[name], row[2], row[3]) for row in its]
        for metric in each[0]:
            mean = math.fsum(row[metric] for row in each) / len(each)
            assert found[metric] == pytest.approx(mean**0.5 if metric == "rmse" else mean, rel=1e-15)
        assert not {"f1_macro", "f1_positive", "rmse"} & each[0].keys()


def test_a_scorer_remembers_no_answers() -> None:
    scorer = TaskScorer(TASKS["lamp2"])
    for number in range(1000):
        scorer.add("comedy", f"my own tag {number}", str(number))
    assert len(scorer._said) == 0
    assert scorer.metrics()["unparsable"] == 1.0


def test_only_metrics_that_the_task_names_and_its_kind_has() -> None:
    assert list(task_metrics(replace(TASKS["lamp3"], metrics=("rmse",)), {"1": "4"}, {"1": "2"})) == [
        "rows", "rmse", "unparsable",
    ]  # fmt: skip
    for name, metric in (("lamp3", "accuracy"), ("lamp4", "bleu"), ("lamp2", "f1_positive")):
        with pytest.raises(ConfigError, match=f"{name}: metric '{metric}'"):
            TaskScorer(replace(TASKS[name], metrics=(metric,)))


def test_a_rating_of_another_scale_errs_to_its_ends() -> None:
    ten = replace(TASKS["lamp3"], labels=tuple(str(number) for number in range(1, 11)))
    assert rating_error(ten, "4", "no idea") == (6.0, False)
    assert rating_error(TASKS["lamp3"], "4", "no idea") == (3.0, False)
    assert rating_error(TASKS["lamp3"], "4", "2.5") == (1.5, True)


def test_both_readings_of_an_answer() -> None:
    task = TASKS["lamp2"]
    assert read_answer(task, " Tag: comedy.\n") == "comedy"
    assert read_answer(task, " Tag: comedy.\n", "official") == "Tag: comedy."
