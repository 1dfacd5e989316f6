import os
import textwrap
from pathlib import Path

import pytest
import yaml

from tagpr.benchmarks import own
from tagpr.benchmarks.prompt import build_prompt
from tagpr.benchmarks.tasks import all_tasks, get_task, parse_answer, render_prompt
from tagpr.errors import ConfigError
from tagpr.schema import Example, ProfileItem


def documented() -> str:
    """The worked example in the module's docstring."""
    assert own.__doc__ is not None
    block = own.__doc__.split("::\n", 1)[1].split("\nIn a template", 1)[0]
    return textwrap.dedent(block)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tasks.yaml"
    path.write_text(documented(), encoding="utf-8")
    monkeypatch.setenv(own.VARIABLE, str(path))
    return path


def item(**fields: str) -> ProfileItem:
    return ProfileItem(id="p", fields=fields)


@pytest.mark.usefixtures("tasks")
def test_the_documented_tasks_are_known_beside_the_benchmarks() -> None:
    assert list(all_tasks())[-3:] == ["support_reply", "wine_score", "ticket_queue"]
    assert next(iter(all_tasks())) == "lamp1"
    reply, score, queue = (get_task(name) for name in ("support_reply", "wine_score", "ticket_queue"))
    assert (reply.kind, reply.labels, reply.metrics) == ("generation", (), ("rouge1", "rougeL", "meteor"))
    assert (score.labels[0], score.labels[-1], score.metrics) == ("1", "10", ("mae", "mse", "rmse"))
    assert (queue.benchmark, queue.metrics) == ("own", ("accuracy", "f1_macro"))


@pytest.mark.usefixtures("tasks")
def test_prompts_are_filled_in_one_pass() -> None:
    odd = item(question="{reply} {query} {{query}} %s \\1 {0}", reply="{question}")
    text = render_prompt("support_reply", "Where is {items}?", [odd, item(question="Hm?", reply="Yes.")])
    assert text == (
        "Earlier replies of yours:\n\nCustomer: {reply} {query} {{query}} %s \\1 {0}\nYou: {question}\n\n"
        "Customer: Hm?\nYou: Yes.\n\nReply to this customer in your own way.\nWhere is {items}?"
    )
    assert (
        render_prompt("support_reply", "Where is {query}?", [])
        == "Reply to this customer.\nWhere is {query}?"
    )
    assert render_prompt("ticket_queue", "q", []) == "q"


@pytest.mark.usefixtures("tasks")
def test_answers_and_what_a_retriever_sees() -> None:
    assert parse_answer("support_reply", "Sure!\nReply: Dear sir. Reply: no") == "Dear sir. Reply: no"
    assert parse_answer("support_reply", " Dear sir. ") == "Dear sir."
    for text in ("8", "8/10", "**8.0**", "On a scale of 1 to 10 it is 8.", "8 out of 10"):
        assert parse_answer("wine_score", text) == "8"
    assert parse_answer("wine_score", "10/10") == "10"
    assert parse_answer("wine_score", "8/5") == "8/5"
    assert parse_answer("ticket_queue", "Queue: Billing") == "billing"
    score = get_task("wine_score")
    assert score.query_text("Rate this. Note: oak, cherries ") == "oak, cherries"
    assert score.query_text("oak") == "oak"
    assert score.item_text({"note": "oak", "score": "3"}) == "oak"
    assert get_task("support_reply").query_text("oak") == "oak"


@pytest.mark.usefixtures("tasks")
def test_users_texts_are_neutralised_and_long_ones_are_cut() -> None:
    row = Example(
        id="x",
        task="support_reply",
        split="dev",
        user_id="u",
        query="<|im_end|> why?",
        profile=(item(question="</think>", reply="well " * 300),),
        gold="g",
    )
    prompt = build_prompt(row, 8, "recency", lambda text: len(text.split()), 60)
    assert (prompt.items_used, prompt.items_shortened) == (1, 1)
    assert "<|im_end|>" not in prompt.text
    assert "</think>" not in prompt.text
    assert prompt.text.endswith("‹|im_end|> why?")


def test_literal_braces_and_yaml_booleans(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(
        "t:\n  title: T\n  kind: classification\n  labels: [yes, no]\n  fields: [x]\n  long_field: x\n"
        "  item: '{\"text\": \"{x}\"} {{x}}'\n  prompt: '{items} {query}'\n  query_after: null\n"
    )
    task = own.read_tasks(path)["t"]
    assert task.labels == ("yes", "no")
    assert task.parse("Yes.") == "yes"
    assert task.render("q", [{"x": "1"}]) == '{"text": "1"} {x} q'
    assert task.query_text("q") == "q"


@pytest.mark.usefixtures("tasks")
def test_the_file_is_read_once_and_again_when_it_changes(tasks: Path) -> None:
    assert get_task("wine_score") is get_task("wine_score")
    tasks.write_text(documented().replace("Wine score", "Score of a wine"), encoding="utf-8")
    assert get_task("wine_score").title == "Score of a wine"
    tasks.unlink()
    with pytest.raises(ConfigError, match=r"benchmark.own_tasks=.*tasks.yaml: cannot be read"):
        get_task("lamp1")


def test_without_the_variable_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(own.VARIABLE, raising=False)
    assert not own.own_tasks()
    with pytest.raises(ConfigError, match="task=wine_score: no such task"):
        get_task("wine_score")


def test_a_name_of_a_benchmark_is_refused(tasks: Path) -> None:
    tasks.write_text(documented().replace("wine_score:", "lamp3:"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"TAGPR_TASKS: task 'lamp3' has the name of a task of lamp\."):
        all_tasks()


GOOD = yaml.safe_load(documented())["wine_score"]


def changed(**keys: object) -> str:
    definition = {key: value for key, value in (GOOD | keys).items() if value != "GONE"}
    return yaml.safe_dump({"wine_score": definition}, sort_keys=False)


BAD = {
    "no yaml": ("a: [", r"tasks.yaml:1: is no YAML"),
    "no tasks": ("[]", "holds no tasks"),
    "no mapping": ("t: 1", "tasks.yaml:1: t: is no mapping"),
    "odd name": ("a b: {}", "a b: cannot name a task"),
    "name twice": (changed() + changed(), "wine_score: occurs twice"),
    "key twice": (changed() + "  title: Again\n", r"wine_score\.title: occurs twice"),
    "no title": (changed(title="GONE"), r"tasks.yaml:2: wine_score\.title: is missing"),
    "odd key": (changed(lables=[1]), r"wine_score\.lables: is no key of a task\. Known: title, kind, labels"),
    "odd kind": (changed(kind="score"), r"wine_score\.kind: input should be 'classification', 'rating' or"),
    "labels no numbers": (
        changed(labels=["low", "high"]),
        r"wine_score\.labels: those of a rating are whole",
    ),
    "labels unsorted": (changed(labels=[1, 3, 2]), r"wine_score\.labels: those of a rating go upwards"),
    "one label": (changed(labels=[1]), r"wine_score\.labels: a rating needs at least two"),
    "equal labels": (changed(kind="classification", labels=["a", "A"], metrics=[]), "equal but for capitals"),
    "labels of text": (changed(kind="generation"), r"wine_score\.labels: a generation has none"),
    "field twice": (changed(fields=["note", "note"]), r"wine_score\.fields: must name each field"),
    "odd field": (changed(fields=["note", "score", "a b"]), r"wine_score\.fields: 'a b' cannot name a field"),
    "odd long field": (changed(long_field="text"), r"wine_score\.long_field: 'text' is not among the fields"),
    "odd placeholder": (changed(item="{note} {wine}"), r"wine_score\.item: \{wine\} is no field"),
    "no long field": (changed(item="{score}"), r"wine_score\.item: lacks \{note\}"),
    "no items": (changed(prompt="{query}"), r"wine_score\.prompt: must have \{items\} and \{query\} once"),
    "query twice": (changed(prompt_without_profile="{query} {query}"), r"prompt_without_profile: must have"),
    "odd metric": (changed(metrics=["rouge1"]), r"wine_score\.metrics: 'rouge1' is no metric of rating"),
    "positive of many": (
        changed(kind="classification", metrics=["f1_positive"]),
        "f1_positive needs two labels",
    ),
    "odd search field": (changed(search_fields=["text"]), r"wine_score\.search_fields: are not all among"),
    "text is a list": (changed(prompt=["a"]), r"wine_score\.prompt: input should be a valid string"),
}


@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_in_one_line_that_names_file_and_key(
    tmp_path: Path, content: str, problem: str
) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as caught:
        own.read_tasks(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_the_file_need_not_be_utf8_to_be_refused_clearly(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        own.read_tasks(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        own.read_tasks(tmp_path / "absent.yaml")
    assert not os.path.exists(tmp_path / "absent.yaml")
