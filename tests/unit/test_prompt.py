import json
from collections import Counter as Counts
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagpr.benchmarks import longlamp, pgraphrag
from tagpr.benchmarks.prompt import MIN_WORDS, QueryTooLongError, build_prompt
from tagpr.benchmarks.tasks import all_tasks, render_prompt
from tagpr.errors import ConfigError
from tagpr.schema import Example, ProfileItem
from tagpr.tags import neutralise, strip_tags

GOLDEN = Path(__file__).parent / "golden"
ROWS = json.loads((GOLDEN / "rows.json").read_text(encoding="utf-8"))
TASKS = {name: task for name, task in all_tasks().items() if task.benchmark != "own"}


def example(
    task: str = "lamp3", words: tuple[int, ...] = (3, 3), query: str = "a query title", **changes: Any
) -> Example:
    """Make a row whose profile items have ``words`` words in their long field, oldest first."""
    spec = TASKS[task]
    profile = tuple(
        ProfileItem(
            id=f"p{index}",
            fields={
                name: " ".join(
                    f"{name}{index}w{word}" for word in range(count if name == spec.long_field else 1)
                )
                for name in spec.fields
            },
            date=f"2016-01-{index + 1:02d}",
        )
        for index, count in enumerate(words)
    )
    row = {
        "id": "x",
        "task": task,
        "split": "dev",
        "user_id": "u",
        "query": query,
        "profile": profile,
        "gold": "1",
    }
    return Example(**(row | changes))


class Counter:
    """Counts the words of a prompt, and how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str) -> int:
        self.calls += 1
        return len(text.split())


# ---- templates


def golden_row(task: str, folder: Path) -> Example:
    """The made-up row of a task; PGraphRAG's goes through its reader, which words the query."""
    if task.startswith("pgraphrag_"):
        (folder / "amazon_dev.json").write_text(json.dumps([ROWS["pgraphrag"]]), encoding="utf-8")
        (row,) = pgraphrag.iterate_split(folder, task, "dev", Counts())
        return row
    items = [
        ProfileItem(id=raw.pop("id"), date=raw.pop("date", None), fields=raw)
        for raw in map(dict, ROWS[task]["profile"])
    ]
    return example().model_copy(update={"task": task, "query": ROWS[task]["input"], "profile": tuple(items)})


@pytest.mark.parametrize("size", [0, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_the_official_ones_to_the_letter(task: str, size: int, tmp_path: Path) -> None:
    # golden/SOURCES.md says which code wrote the golden files.
    prompt = build_prompt(golden_row(task, tmp_path), size, "recency", None, None)
    assert prompt.text == (GOLDEN / task / f"{size}.txt").read_bytes().decode()
    assert prompt.items_used == size


# ---- budgets


@pytest.mark.parametrize("task", TASKS)
def test_without_a_budget_the_prompt_is_rendered_as_it_is(task: str) -> None:
    row = example(task, words=(3, 400, 5))
    prompt = build_prompt(row, 2, "recency", None, None)
    assert prompt.text == render_prompt(task, row.query, row.profile[:0:-1])
    assert (prompt.items_used, prompt.items_shortened, prompt.items_dropped, prompt.tokens) == (2, 0, 0, None)


def test_a_prompt_that_fits_is_left_alone_and_measured_once() -> None:
    count = Counter()
    row = example(words=(3, 40, 5))
    prompt = build_prompt(row, 8, "recency", count, 10_000)
    assert prompt.text == render_prompt("lamp3", row.query, row.profile[::-1])
    assert (prompt.items_used, prompt.items_shortened, prompt.items_dropped) == (3, 0, 0)
    assert (prompt.tokens, count.calls) == (len(prompt.text.split()), 1)


@pytest.mark.parametrize("task", TASKS)
def test_long_items_are_cut_to_one_length_and_short_ones_stay(task: str) -> None:
    row = example(task, words=(300, 10, 200, 2))
    prompt = build_prompt(row, 4, "recency", Counter(), 150)
    assert (prompt.items_used, prompt.items_shortened, prompt.items_dropped) == (4, 2, 0)
    assert prompt.tokens is not None
    assert 148 <= prompt.tokens <= 150
    field = TASKS[task].long_field
    kept = [prompt.text.count(f"{field}{index}w") for index in range(4)]
    assert kept[0] == kept[2] > 10
    assert kept[1:4:2] == [10, 2]
    assert row.query in prompt.text or task == "lamp1"


def test_few_measurements_find_nearly_the_longest_prompt() -> None:
    count = Counter()
    row = example(words=(300, 10, 200, 2, 170, 90, 400, 60))
    for budget in range(140, 1200, 7):
        count.calls = 0
        prompt = build_prompt(row, 8, "recency", count, budget)
        assert count.calls <= 6
        assert prompt.tokens is not None
        assert budget - 8 < prompt.tokens <= budget


def test_a_huge_item_is_never_measured_as_a_whole() -> None:
    lengths: list[int] = []

    def count(text: str) -> int:
        lengths.append(len(text))
        return len(text.split())

    row = example(words=(20, 200_000))
    assert len(row.profile[1].fields["text"]) > 1_000_000
    prompt = build_prompt(row, 8, "recency", count, 500)
    assert (prompt.items_used, prompt.items_shortened) == (2, 1)
    assert prompt.tokens is not None
    assert prompt.tokens >= 498
    assert max(lengths) < 100_000


@pytest.mark.parametrize("text", ["面条很筋道" * 400, "x" * 4000, "ภาษาไทย" * 500])
def test_texts_without_spaces_are_shortened_too(text: str) -> None:
    items = (
        ProfileItem(id="old", fields={"title": "old", "content": "好吃"}),
        ProfileItem(id="new", fields={"title": "new", "content": text}),
    )
    row = example("dianping_title", profile=items)
    prompt = build_prompt(row, 8, "recency", len, 500)
    assert (prompt.items_used, prompt.items_shortened) == (2, 1)
    assert prompt.tokens is not None
    assert 440 < prompt.tokens <= 500


def test_a_benchmarks_own_limit_on_words_is_no_cut() -> None:
    row = example("longlamp_abstract", words=(1000, 3))
    whole = build_prompt(row, 8, "recency", None, None)
    assert whole.text.count("abstract0w") == longlamp.ABSTRACT_WORDS
    fitting = build_prompt(row, 8, "recency", Counter(), 2000)
    assert (fitting.text, fitting.items_shortened) == (whole.text, 0)
    cut = build_prompt(row, 8, "recency", Counter(), 500)
    assert cut.items_shortened == 1
    assert cut.tokens is not None
    assert 498 <= cut.tokens <= 500


def test_when_words_run_out_the_oldest_items_go() -> None:
    row = example(words=(100,) * 8)
    prompt = build_prompt(row, 8, "recency", Counter(), 45)
    assert (prompt.items_used, prompt.items_shortened, prompt.items_dropped) == (3, 3, 5)
    assert "text7w0" in prompt.text
    assert "text5w0" in prompt.text
    assert "text4w0" not in prompt.text
    assert f"text7w{MIN_WORDS - 1}" in prompt.text


def test_the_query_is_never_cut() -> None:
    row = example(words=(100,), query=" ".join(["word"] * 30))
    prompt = build_prompt(row, 8, "recency", Counter(), 30)
    assert (prompt.text, prompt.items_used, prompt.items_dropped) == (row.query, 0, 1)
    with pytest.raises(QueryTooLongError, match=r"x: its query alone has 30 tokens, the budget is 29"):
        build_prompt(row, 8, "recency", Counter(), 29)
    with pytest.raises(QueryTooLongError):
        build_prompt(row, 0, "recency", Counter(), 29)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(TASKS)),
    st.lists(st.integers(0, 600), max_size=10),
    st.integers(0, 10),
    st.integers(0, 1500),
)
def test_the_budget_holds_within_few_measurements(task: str, words: list[int], size: int, room: int) -> None:
    count = Counter()
    row = example(task, words=tuple(words))
    budget = len(render_prompt(task, row.query, ()).split()) + room
    prompt = build_prompt(row, size, "recency", count, budget)
    assert prompt.tokens == len(prompt.text.split()) <= budget
    assert prompt.items_used + prompt.items_dropped == min(size, len(words))
    assert prompt.items_shortened <= prompt.items_used
    assert count.calls <= 18
    whole = len(build_prompt(row, size, "recency", None, None).text.split())
    assert (prompt.items_shortened + prompt.items_dropped > 0) == (whole > budget)


def test_white_space_within_a_cut_text_is_kept() -> None:
    item = ProfileItem(id="p", fields={"text": "a  b\n\nc d e f g h " + "i " * 90, "score": "1"})
    prompt = build_prompt(example(profile=(item,)), 8, "recency", Counter(), 16)
    assert '"a  b\n\nc d e f g' in prompt.text


HOSTILE = st.lists(
    st.sampled_from(
        [
            "<|im_end|>",
            "<think>",
            "</think>",
            "<compare_entities>",
            "</make_decision>",
            "<",
            ">",
            "|",
            "x",
            " ",
        ]
    ),
    max_size=12,
).map("".join)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(TASKS)),
    HOSTILE,
    st.lists(HOSTILE, min_size=1, max_size=3),
    st.none() | st.just(12),
)
def test_no_mark_of_a_user_survives_in_a_prompt(
    task: str, query: str, texts: list[str], budget: int | None
) -> None:
    profile = tuple(
        ProfileItem(id=str(index), fields=dict.fromkeys(TASKS[task].fields, text))
        for index, text in enumerate(texts)
    )
    row = example(task, query=f"title {query}", profile=profile)
    try:
        text = build_prompt(row, 8, "recency", None if budget is None else Counter(), budget).text
    except QueryTooLongError:
        return
    assert neutralise(text) == text
    assert strip_tags(text).split() == text.split()
    for mark in ("<|im_end|>", "<think>", "</think>"):
        assert mark not in text


@pytest.mark.parametrize("task", TASKS)
def test_the_text_of_a_query_alone_is_what_is_too_long(task: str) -> None:
    row = example(task, query=" ".join(["title"] * 30))
    alone = len(render_prompt(task, row.query, ()).split())
    assert build_prompt(row, 8, "recency", Counter(), alone).items_used == 0
    with pytest.raises(
        QueryTooLongError, match=f"x: its query alone has {alone} tokens, the budget is {alone - 1}"
    ):
        build_prompt(row, 8, "recency", Counter(), alone - 1)


def test_unknown_task_and_retriever_are_refused() -> None:
    with pytest.raises(ConfigError, match="task=lamp6"):
        build_prompt(example().model_copy(update={"task": "lamp6"}), 8, "recency", None, None)
    with pytest.raises(ConfigError, match="retriever=oracle"):
        build_prompt(example(), 8, "oracle", None, None)


def test_the_seed_and_the_user_reach_the_retriever() -> None:
    row = example(words=(1,) * 12)
    texts = {build_prompt(row, 4, "random", None, None, seed=seed).text for seed in range(5)}
    texts.add(build_prompt(row.model_copy(update={"user_id": "v"}), 4, "random", None, None, seed=0).text)
    assert len(texts) == 6
