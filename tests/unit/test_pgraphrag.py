import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tagpr.benchmarks.pgraphrag import TASKS, iterate_split
from tagpr.errors import ConfigError, DataError
from tagpr.schema import Example

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "pgraphrag"
needs_amazon = pytest.mark.skipif(not (REAL / "amazon_dev.json").is_file(), reason="no real reviews here")


def review(number: int, **changes: Any) -> dict[str, Any]:
    return {"rating": 4, "title": f"T{number}", "text": f"x{number}", "pid": f"P{number}"} | changes


def user(name: str, *reviews: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "profile": list(reviews)}


def read(
    folder: Path,
    rows: Any,
    task: str = "pgraphrag_title",
    counts: Counter[str] | None = None,
    **settings: Any,
) -> list[Example]:
    text = rows if isinstance(rows, str) else json.dumps(rows)
    (folder / "amazon_dev.json").write_text(text, encoding="utf-8")
    return list(iterate_split(folder, task, "dev", Counter() if counts is None else counts, **settings))


def test_the_first_review_is_to_be_written_and_the_others_are_the_history(tmp_path: Path) -> None:
    rows = [user("A", review(0)), user("B", review(1), review(2, rating=5.0), review(3))]
    counts: Counter[str] = Counter()
    (row,) = read(tmp_path, rows, counts=counts)
    assert (row.id, row.user_id, row.gold) == ("pgraphrag_title:dev:B", "B", "T1")
    assert [item.fields for item in row.profile] == [
        {"title": "T2", "text": "x2", "rating": "5"},
        {"title": "T3", "text": "x3", "rating": "4"},
    ]
    assert (counts["users_in_file"], counts["users_without_history"]) == (2, 1)


@pytest.mark.parametrize(
    ("task", "gold", "searched"),
    [
        ("pgraphrag_title", "T1", "it's\n'x'"),
        ("pgraphrag_text", "it's\n'x'", "T1"),
        ("pgraphrag_rating", "4", "T1 it's\n'x'"),
    ],
)
def test_each_task_asks_for_one_part_and_searches_with_the_rest(
    tmp_path: Path, task: str, gold: str, searched: str
) -> None:
    (row,) = read(tmp_path, [user("B", review(1, text="it's\n'x'"), review(2))], task)
    assert row.gold == gold
    assert TASKS[task].query_text(row.query) == searched
    assert TASKS[task].query_text("something else") == "something else"
    assert TASKS[task].item_text(row.profile[0].fields) == "T2 x2"


def test_reviews_of_the_same_product_can_be_taken_out(tmp_path: Path) -> None:
    rows = [user("A", review(0), review(0)), user("B", review(1), review(1), review(2))]
    counts: Counter[str] = Counter()
    kept, _ = read(tmp_path, rows, counts=counts)
    assert (kept.user_id, counts["users_with_same_product_in_history"]) == ("A", 2)
    (row,) = read(tmp_path, rows, same_product=False)
    assert (row.user_id, [item.fields["title"] for item in row.profile]) == ("B", ["T2"])


def test_missing_texts_read_none_in_the_history_and_leave_a_row_out(tmp_path: Path) -> None:
    rows = [
        user("A", review(0, title=" "), review(1)),
        user("B", review(0, text=None), review(1)),
        user("C", review(0), review(1, title=None), review(2, text="")),
    ]
    counts: Counter[str] = Counter()
    (row,) = read(tmp_path, rows, counts=counts)
    assert [(item.fields["title"], item.fields["text"]) for item in row.profile] == [
        ("None", "x1"),
        ("T2", "None"),
    ]
    assert (counts["rows_without_text"], counts["items_without_fields"]) == (2, 2)


@pytest.mark.parametrize(
    ("task", "answer", "parsed"),
    [
        ("pgraphrag_title", "Review title: Loved it\n", "Loved it"),
        ("pgraphrag_title", "Sure! Review title: One Review title: Two", "One"),
        ("pgraphrag_title", '**Review title:** ""Great""', '"Great"'),
        ("pgraphrag_title", '**Review title:** "Great"', '**Review title:** "Great"'),
        ("pgraphrag_title", " Great ", "Great"),
        ("pgraphrag_text", 'Review text: "Fine "soap"." Bye', 'Fine "soap".'),
        ("pgraphrag_text", '**Review text:** "Fine."', "Fine."),
        ("pgraphrag_text", "Review text: Fine.", "Fine."),
        ("pgraphrag_text", 'The review text is: "Fine."', "Fine."),
        ("pgraphrag_text", "The review text is: Fine.", "Fine."),
        ("pgraphrag_text", " Fine. ", "Fine."),
        ("pgraphrag_text", "[[VIDEOID:ab1]] Review text: Fine.", "Fine."),
        ("pgraphrag_rating", "Rating: 4", "4"),
        ("pgraphrag_rating", "Review rating: **5** stars", "5"),
        ("pgraphrag_rating", "4.0", "4"),
        ("pgraphrag_rating", "Rating: 7", "7"),
        ("pgraphrag_rating", "4 or 5", "4 or 5"),
    ],
)
def test_answers_are_read_as_by_the_official_code(task: str, answer: str, parsed: str) -> None:
    # Run against extract_prediction of master_eval.py at 722a71e0; for ratings ours reads more than the bare number.
    assert TASKS[task].parse(answer) == parsed


BAD = {
    "html": ("<html>", "holds an HTML page"),
    "no array": ("{}", "is not a JSON array"),
    "no user": ("[]", "holds no user"),
    "no id": ([{"profile": [review(0)]}], "user 'number 1': has no 'id'"),
    "twice": ([user("A", review(0)), user("A", review(0))], "user 'A': occurs twice"),
    "no review": ([user("A")], "user 'A': its 'profile' is not an array of reviews"),
    "profile no array": ([{"id": "A", "profile": {}}], "user 'A': its 'profile' is not an array of reviews"),
    "review no object": (
        [{"id": "A", "profile": ["x"]}],
        "user 'A': its 'profile' is not an array of reviews",
    ),
    "surrogate": ([user("A", review(0, title="\ud800"), review(1))], "user 'A': has half a surrogate"),
}


@pytest.mark.parametrize(("rows", "problem"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_in_one_line(tmp_path: Path, rows: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "amazon_dev.json"))
    assert "\n" not in str(caught.value)


def test_a_rating_of_seven_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"user 'A': its gold is '7', not one of 1, 2, 3, 4, 5"):
        read(tmp_path, [user("A", review(0, rating=7), review(1))], "pgraphrag_rating")


def test_missing_files_and_unknown_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"amazon_test.json: missing \(looked in .*data_splits too\)"):
        list(iterate_split(tmp_path, "pgraphrag_title", "test", Counter()))
    with pytest.raises(ConfigError, match=r"task=lamp3: no task of PGraphRAG. Known: pgraphrag_title"):
        list(iterate_split(tmp_path, "lamp3", "test", Counter()))


@needs_amazon
def test_real_users_with_a_history() -> None:
    counts: Counter[str] = Counter()
    rows = list(iterate_split(REAL, "pgraphrag_title", "dev", counts))
    assert counts["users_in_file"] == 2500
    assert len(rows) == 126
    assert counts["users_with_same_product_in_history"] == 17
    assert len(list(iterate_split(REAL, "pgraphrag_title", "dev", Counter(), same_product=False))) == 110
    # Somebody else's selection of the same users.
    questions = json.loads((REAL / "title_dev_hist1_questions.json").read_text())
    golds = json.loads((REAL / "title_dev_hist1_outputs.json").read_text())["golds"]
    title = TASKS["pgraphrag_title"]
    for row, question, gold in zip(rows, questions, golds, strict=True):
        assert (row.user_id, row.gold) == (question["id"], gold["output"].strip())
        assert title.query_text(row.query) == question["query_review"]["text"]
        assert [item.fields["text"] for item in row.profile] == [item["text"] for item in question["profile"]]
