"""Data of one's own: what validate_data says of it, and that prompts can be made of it."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tagpr.benchmarks import prepare, validate
from tagpr.benchmarks.own_rows import iterate_split
from tagpr.benchmarks.prompt import build_prompt
from tagpr.benchmarks.storage import read_examples
from tagpr.benchmarks.tasks import parse_answer
from tagpr.configuration import main
from tagpr.errors import DataError
from tagpr.rl.data import write_rows

TASKS = """\
support_reply:
  title: Support reply
  kind: generation
  fields: [question, reply]
  long_field: reply
  item: "Customer: {question}\\nYou: {reply}"
  join: "\\n\\n"
  prompt: "Earlier replies of yours:\\n\\n{items}\\n\\nReply to this customer in your own way.\\n{query}"
  prompt_without_profile: "Reply to this customer.\\n{query}"
wine_score:
  title: Wine score
  kind: rating
  labels: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
  fields: [note, score]
  long_field: note
  item: "{score}/10 for: {note}"
  prompt: "Scores that one person gave:\\n{items}\\n\\nWhat does the same person give? Answer with the number.\\n{query}"
  query_after: "Note:"
  search_fields: [note]
ticket_queue:
  title: Ticket queue
  kind: classification
  labels: [billing, delivery, other]
  fields: [ticket, queue]
  long_field: ticket
  item: "'{ticket}' went to {queue}"
  join: ", and "
  prompt: "{items}. {query}"
"""

Row = dict[str, Any]


def reply(split: str, number: int, user: str = "mara", **changes: Any) -> Row:
    items = [
        {
            "id": str(month),
            "date": f"2024-0{month}-15",
            "fields": {
                "question": f"Is number {month} there?",
                "reply": f"Month {month}, {user}: sure, it is.",
            },
        }
        for month in (1, 2, 3)
    ]
    row = {
        "id": f"r{number}",
        "task": "support_reply",
        "user_id": user,
        "query": f"Where is my {split} parcel number {number}, please?",
        "gold": f"On its way, dear customer number {number} of {split}.",
        "profile": items,
    }
    return row | changes


def score(split: str, number: int, **changes: Any) -> Row:
    items = [
        {"id": str(n), "fields": {"note": f"plum and leather, bottle {n}", "score": n + 4}} for n in range(3)
    ]
    row = {
        "id": f"r{number}",
        "task": "wine_score",
        "user_id": "mara",
        "query": f"Rate it. Note: dark cherry, {split}, bottle {number}",
        "gold": "7",
        "profile": items,
    }
    return row | changes


def ticket(split: str, number: int, **changes: Any) -> Row:
    items = [{"id": str(n), "fields": {"ticket": f"earlier ticket {n}", "queue": "other"}} for n in range(3)]
    row = {
        "id": f"r{number}",
        "task": "ticket_queue",
        "user_id": "jo",
        "query": f"Ticket {number} of {split}: the invoice is wrong",
        "gold": "billing",
        "profile": items,
    }
    return row | changes


def rows(split: str) -> list[Row | str]:
    return [make(split, number) for number in range(3) for make in (reply, score, ticket)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid folder of three own tasks; the work directory is elsewhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    # main() exports it; monkeypatch takes it back.
    monkeypatch.setenv("TAGPR_TASKS", "")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "tasks.yaml").write_text(TASKS)
    for split in ("train", "dev"):
        put(mine, split, rows(split))
    return mine


def put(folder: Path, split: str, lines: list[Row | str]) -> None:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / f"{split}.jsonl").write_bytes(text.encode())


def run(stage: Any, name: str, folder: Path, *overrides: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(name, stage.run, ["benchmark=own", f"benchmark.dir={folder}", *overrides])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def validated(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, list[str]]:
    """Exit status and lines on standard output."""
    status = run(validate, "validate_data", folder, *overrides)
    return status, capsys.readouterr().out.splitlines()


def test_three_own_tasks_are_valid_prepared_and_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, lines = validated(folder, capsys)
    assert (status, lines[0]) == (0, "")
    assert "18 rows can be used: 0 errors, 0 warnings" in lines[-1]
    put(folder, "test", [reply("test", 0), ticket("test", 1)])
    assert run(prepare, "prepare_data", folder) == 0
    prepared = Path("outputs/data/own")
    train = read_examples(prepared / "train.parquet")
    assert [row.id for row in train[::3]] == [
        "support_reply:train:r0",
        "wine_score:train:r0",
        "ticket_queue:train:r0",
    ]
    assert len(read_examples(prepared / "test.parquet")) == 2
    notes = json.loads((prepared / "manifest.json").read_text())["notes"]
    assert notes["counts"]["ticket_queue"]["dev"]["users_seen_in_train"] == 1
    assert notes["counts"]["ticket_queue"]["test"]["rows_of_users_seen_in_dev"] == 1
    # One person in all tasks, unless told otherwise.
    assert train[0].user_id == "mara"
    # What evaluation and RL do with a row.
    prompts = {row.task: build_prompt(row, 2, "recency", None, None).text for row in train}
    assert prompts["support_reply"].startswith(
        "Earlier replies of yours:\n\nCustomer: Is number 3 there?\nYou: Month 3"
    )
    assert "6/10 for: plum and leather, bottle 2" in prompts["wine_score"]
    assert prompts["ticket_queue"].startswith("'earlier ticket 2' went to other, and 'earlier ticket 1'")
    assert parse_answer("wine_score", "I would say **7**.") == "7"
    count = write_rows(
        train,
        tmp_path / "rl.parquet",
        profile_size=8,
        retriever="recency",
        count_tokens=len,
        max_prompt_tokens=500,
        seed=0,
    )
    assert count == 9


# What is wrong with line 3 of dev.jsonl -> how its message begins.
FAULTS: dict[str, tuple[Row | str, str]] = {
    "malformed JSON": ('{"id": "r9",', "error: is no JSON"),
    "two keys": ('{"id": "r9", "id": "r9"}', "error: key 'id' occurs twice"),
    "NaN": ('{"id": NaN}', "error: is no JSON"),
    "no object": ("[1]", "error: is no JSON object"),
    "HTML": ("<html>", "error: is HTML"),
    "half a line": ('{"id": "r9", "gold": "a\u2028b', "error: is no JSON"),
    "missing key": ({k: v for k, v in reply("dev", 9).items() if k != "gold"}, "error: has no 'gold'"),
    "unknown key": (reply("dev", 9, golden="x"), "error: 'golden' is no key"),
    "unknown task": (reply("dev", 9, task="suport"), "error: task 'suport' is none of support_reply, wine_score"),
    "gold not a label": (score("dev", 9, gold="11"), "error: gold '11' is not one of 1, 2,"),
    "empty gold": (reply("dev", 9, gold=" "), "error: 'gold' is empty"),
    "empty query": (reply("dev", 9, query=""), "error: 'query' is empty"),
    "null gold": (reply("dev", 9, gold=None), "error: 'gold' is null"),
    "list gold": (reply("dev", 9, gold=["a"]), "error: 'gold' is an array"),
    "id twice": (reply("dev", 0, query="Another one, please?"), "error: id 'r0' is that of line 1 too"),
    "profile": (reply("dev", 9, profile={}), "error: 'profile' is an object"),
    "item": (reply("dev", 9, profile=["x"]), "error: profile item 1 is text"),
    "item without id": (reply("dev", 9, profile=[{"fields": {}}]), "error: profile item 1 has no 'id'"),
    "item without fields": (reply("dev", 9, profile=[{"id": "a"}]), "error: profile item 'a' has no 'fields'"),
    "item with another key": (
        ticket("dev", 9, profile=[{"id": "a", "text": "x", "fields": {"ticket": "x", "queue": "y"}}]),
        "error: profile item 'a': 'text' is no key of an item",
    ),
    "item without field": (
        ticket("dev", 9, profile=[{"id": "a", "fields": {"ticket": "x"}}]),
        "error: profile item 'a' has no field 'queue'",
    ),
    "item with another field": (
        ticket("dev", 9, profile=[{"id": "a", "fields": {"ticket": "x", "queue": "y", "z": "w"}}]),
        "error: profile item 'a': 'z' is no field",
    ),
    "field null": (
        ticket("dev", 9, profile=[{"id": "a", "fields": {"ticket": None, "queue": "y"}}]),
        "error: profile item 'a': field 'ticket' is null",
    ),
    "bad date": (
        ticket("dev", 9, profile=[{"id": "a", "date": "05-07-2013", "fields": {"ticket": "x", "queue": "y"}}]),
        "error: profile item 'a': its date is '05-07-2013'",
    ),
    "no such day": (
        ticket("dev", 9, profile=[{"id": "a", "date": "2013-02-30", "fields": {"ticket": "x", "queue": "y"}}]),
        "error: profile item 'a': its date is '2013-02-30'",
    ),
    "some dates": (
        reply("dev", 9, profile=[*reply("dev", 9)["profile"], {"id": "d", "fields": {"question": "q", "reply": "r"}}]),
        "error: 3 of 4 profile items have a date",
    ),
    "half a surrogate": (json.dumps(reply("dev", 9)).replace("parcel", "\\ud83d"), "error: has half a surrogate pair"),
    "question in profile": (
        reply("dev", 9, query="is number  2 there?  And the others?", profile=[
            {"id": name, "fields": {"question": f"Is number {n} there? And the others?", "reply": "no"}}
            for n, name in enumerate("abcd")
        ]),
        "error: what it asks about is 'question' of profile item 'c'",
    ),
    "gold in profile": (
        reply("dev", 9, gold="Month 2, mara: sure, it is."),
        "error: the gold stands in 'reply' of profile item '2'",
    ),
    "gold in training": (
        reply("dev", 9, user="jo", gold="Month 2, mara: sure, it is."),
        "error: its gold is an item of the profile of train.jsonl:1",
    ),
    "row in two splits": (reply("train", 1, id="r9"), "error: is the same as train.jsonl:4"),
    "question in two splits": (
        reply("dev", 9, query="where is my  TRAIN parcel number 1, please?"), "error: its user has this query at train.jsonl:4"
    ),
    "too new": (reply("dev", 9, date="2024-02"), "error: profile item '3' is of 2024-03-15, the question of 2024-02"),
    "row twice": (reply("dev", 0, id="r9"), "warning: is the same as dev.jsonl:1"),
    "question twice": (reply("dev", 0, id="r9", gold="Another answer to it."), "warning: its user has this query at dev.jsonl:1"),
    "empty profile": (reply("dev", 9, profile=[]), "warning: its profile is empty"),
    "near-empty profile": (reply("dev", 9, profile=reply("dev", 9)["profile"][:2]), "warning: its profile has 2 items"),
    "huge item": (
        ticket("dev", 9, profile=[{"id": str(n), "fields": {"ticket": "x" * n, "queue": "y"}} for n in (1, 1_000_000, 2)]),
        "warning: profile item '1000000' has 1,000,000 characters",
    ),
    "rating off the scale": (
        score("dev", 9, profile=[{"id": str(n), "fields": {"note": "x", "score": n}} for n in (7, 11, 9)]),
        "warning: profile item '11' has a rating that is none of 1, 2,",
    ),
    "order": (
        reply("dev", 9, profile=[reply("dev", 9)["profile"][n] for n in (1, 0, 2)]),
        "warning: its profile is neither oldest nor newest first",
    ),
    "precision": (
        reply("dev", 9, profile=[reply("dev", 9)["profile"][n] | {"date": d} for n, d in enumerate(("2022", "2023-01", "2024"))]),
        "warning: some dates are years and others days",
    ),
    "item ids": (
        score("dev", 9, profile=[{"id": "a", "fields": {"note": str(n), "score": n}} for n in (7, 8, 9)]),
        "warning: profile items share the id 'a'",
    ),
    "item twice": (
        score("dev", 9, profile=[{"id": str(n), "fields": {"note": "x", "score": 5}} for n in (7, 8, 9)]),
        "warning: profile item '7' occurs twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_by_file_and_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    line, message = FAULTS[fault]
    # A blank line counts, too.
    put(folder, "dev", [*rows("dev")[:1], "", line, *rows("dev")[1:]])
    status, lines = validated(folder, capsys)
    found = [text for text in lines if text.startswith(f"{folder / 'dev.jsonl'}:")]
    assert found, lines
    assert found[0].startswith(f"{folder / 'dev.jsonl'}:3: {message}")
    assert status == (2 if message.startswith("error") else 0)
    # The reader has the same view of what is no row at all; leakage is for the validator.
    monkeypatch.setenv("TAGPR_TASKS", str(folder / "tasks.yaml"))
    unusable = "error" in message and not any(
        word in fault for word in ("in profile", "in training", "in two", "too new")
    )
    with pytest.raises(DataError) if unusable else nullcontext() as refused:
        for task in ("support_reply", "wine_score", "ticket_queue"):
            assert list(iterate_split(folder, task, "dev", Counter()))
    if refused is not None:
        assert str(refused.value).startswith(f"{folder / 'dev.jsonl'}:3: {message.removeprefix('error: ')}")


def test_all_faults_of_a_folder_come_at_once_with_counts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(
        folder,
        "train",
        [*rows("train"), *[score("train", 10 + number, gold="12") for number in range(30)], "{", "nothing"],
    )
    put(folder, "dev", [*rows("dev"), reply("dev", 9, gold="", query="", golden="x")])
    status, lines = validated(folder, capsys, "validate_data.show_per_kind=5")
    assert status == 2
    told = [line for line in lines if ": error: gold '12' is not one of" in line]
    assert [line.split(":")[1] for line in told] == ["10", "11", "12", "13", "14"]
    assert sum(line.startswith(f"{folder / 'dev.jsonl'}:10: error: ") for line in lines) == 3
    table = {line.split("  ")[0]: line.split() for line in lines[lines.index("") :]}
    assert table["gold not among labels"][5] == "30"
    assert table["malformed JSON"][3] == "2"
    report = json.loads(Path("outputs/validation/validation.json").read_text())
    assert report["findings"]["gold not among labels"]["count"] == 30
    assert report["findings"]["malformed JSON"]["shown"][1]["line"] == 41
    assert report["counts"]["wine_score"]["train"]["rows"] == 3


def test_leakage_can_be_a_warning_and_warnings_can_count(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder, "dev", [*rows("dev"), reply("train", 1, id="r9")])
    assert validated(folder, capsys)[0] == 2
    status, lines = validated(folder, capsys, "validate_data.leakage=warning")
    assert status == 0
    assert any("dev.jsonl:10: warning: is the same as train.jsonl:4" in line for line in lines)
    assert validated(folder, capsys, "validate_data.leakage=warning", "validate_data.strict=true")[0] == 2


def test_missing_and_empty_files_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "dev.jsonl").unlink()
    put(folder, "train", [])
    status, lines = validated(folder, capsys)
    assert status == 2
    assert any("dev.jsonl: missing" in line for line in lines)
    assert any("train.jsonl: error: holds no row" in line for line in lines)


def test_not_utf8_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "dev.jsonl").open("ab") as stream:
        stream.write('{"id": "é"}\n'.encode("latin-1"))
    status, lines = validated(folder, capsys)
    assert status == 2
    assert lines[0].startswith(f"{folder / 'dev.jsonl'}:10: error: is not UTF-8 text (byte 9 of the line)")


def test_a_task_without_rows_is_an_error_in_both(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "dev"):
        put(
            folder,
            split,
            [row for row in rows(split) if isinstance(row, dict) and row["task"] != "wine_score"],
        )
    assert validated(folder, capsys)[0] == 2
    assert run(prepare, "prepare_data", folder) == 2
    assert "has no row of task wine_score" in capsys.readouterr().err
    assert run(prepare, "prepare_data", folder, "benchmark.tasks=[ticket_queue]") == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("benchmark.own_tasks=/nowhere.yaml", "benchmark.own_tasks=/nowhere.yaml: no such file"),
        ("benchmark.tasks=[wine]", "task=wine: no such task"),
        ("validate_data.show_per_kind=0", "validate_data.show_per_kind=0"),
        ("validate_data.leakage=maybe", "validate_data.leakage=maybe"),
        ("validate_data.strict=1", "validate_data.strict"),
    ],
)
def test_bad_settings_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, says: str
) -> None:
    assert run(validate, "validate_data", folder, override) == 2
    assert says in capsys.readouterr().err


def test_a_fault_in_the_tasks_names_file_and_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tasks.yaml").write_text(TASKS.replace("kind: rating", "kind: raiting"))
    assert run(validate, "validate_data", folder) == 2
    assert f"{folder / 'tasks.yaml'}:12: wine_score.kind" in capsys.readouterr().err


def test_other_benchmarks_are_looked_through_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    item = {"id": "p", "text": "A long enough review of the very thing.", "score": "4"}
    row = {
        "id": "0",
        "input": f"What is the score? review: {item['text']}",
        "profile": [item],
        "user_id": "u",
    }
    golds = {"task": "LaMP_3", "golds": [{"id": "0", "output": "4"}]}
    for split in ("train", "dev"):
        (tmp_path / f"{split}_questions.json").write_text(json.dumps([row]))
        (tmp_path / f"{split}_outputs.json").write_text(json.dumps(golds))
    with pytest.raises(SystemExit) as ended:
        main(
            "validate_data",
            validate.run,
            ["benchmark=lamp", f"benchmark.dir={tmp_path}", "benchmark.tasks=[lamp3]"],
        )
    assert ended.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    assert any("train_questions.json: error: lamp3:train:0: what it asks about is" in line for line in lines)
    assert any("lamp3:dev:0: is the same as lamp3:train:0" in line for line in lines)


def test_lines_end_at_line_feeds_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query = "one\u2028two\x85three"
    put(folder, "dev", [json.dumps(reply("dev", 9, query=query), ensure_ascii=False)])
    monkeypatch.setenv("TAGPR_TASKS", str(folder / "tasks.yaml"))
    assert [row.query for row in iterate_split(folder, "support_reply", "dev", Counter())] == [query]
