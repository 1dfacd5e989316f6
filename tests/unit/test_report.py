"""The page: whatever a model or a user wrote stays text; curves from real-looking files; missing files are named."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation_score import answered, compared, model, summary, tagged

from tagpr.errors import DataError
from tagpr.evaluation.report import Case, choose_cases, render
from tagpr.evaluation.score import Summary
from tagpr.page.figures import Series, line_chart, ticks
from tagpr.page.parts import read_metrics

ATTACK = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">&lt;b&gt; \' $title ${x} \ud83d'


class Page(HTMLParser):
    """Elements with their attributes, and all visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(response: str, prompt: str = "p", gold: str = "g", metrics: dict[str, Path] | None = None) -> str:
    row = answered("lamp4:dev:1", response, gold=gold, task="lamp4")
    return render(figures(), [Case(row.id, prompt, {"base": row, "sft": row})], metrics or {})


def figures() -> Summary:
    users = ["a", "b", "c"]
    rows = {"base": model([False] * 3, users), "sft": model([True] * 3, users)}
    return summary(compared(rows, 100), synthetic=True)


@pytest.mark.parametrize(
    "response", [ATTACK, tagged(ATTACK), tagged("x", f"<make_decision> {ATTACK} </make_decision>")]
)
def test_untrusted_text_never_becomes_markup(response: str) -> None:
    text = page(response, prompt=ATTACK, gold=ATTACK)
    text.encode("utf-8")
    found = Page(text)
    names = {name for name, _ in found.elements}
    assert not names & {"script", "img", "b", "iframe", "link", "object"}
    assert not any(
        key.startswith("on") or key in ("src", "href") for _, attrs in found.elements for key in attrs
    )
    assert found.text.count("<script>alert(1)</script>") == 4  # prompt, gold, two models
    assert "$title ${x}" in found.text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*"<>/&\"'$ abi\n", "<make_decision>", "</make_decision>", "<think>"])).map(
        "".join
    )
)
def test_any_response_keeps_the_page_whole(response: str) -> None:
    found = Page(page(response, prompt=response))
    assert {name for name, _ in found.elements} & {"script", "a", "b", "i"} == set()


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = page(tagged("x"))
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)


def test_segments_are_blocks_and_broken_tags_are_shown_as_written() -> None:
    whole = page(tagged("x"))
    assert whole.count('<div class="segment') == 2 * 3
    broken = page(tagged("x", "<make_decision> never closed"))
    assert '<div class="segment' not in broken
    assert "tag_unclosed" in broken
    assert '<span class="pill t6">&lt;make_decision&gt;</span>' in broken


def test_synthetic_is_said_first() -> None:
    text = page(tagged("x"))
    assert text.index('<p class="banner">SYNTHETIC') < text.index("Main figures")


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_metrics_of_a_resumed_run(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        json.dumps({"step": 1, "data": {"reward/total/mean": 0.1, "note": "text", "flag": True}}),
        json.dumps({"step": 2, "data": {"reward/total/mean": 0.2}}),
        json.dumps({"step": 2, "data": {"reward/total/mean": 0.25, "extra": 1}}),
        '{"step": 3, "data": {"reward/total/mean": NaN}}',
        '{"step": 4, "da',
    )
    assert read_metrics(path) == {"reward/total/mean": [(1, 0.1), (2, 0.25)], "extra": [(2, 1.0)]}
    write(path, "not json", '{"step": 1, "data": {}}')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: is not"):
        read_metrics(path)


def test_curves_go_on_from_guided_to_exploratory_and_gaps_are_named(tmp_path: Path) -> None:
    guided = write(
        tmp_path / "guided.jsonl",
        *(json.dumps({"step": step, "data": {"reward/verifiable/mean": step / 10}}) for step in (1, 2, 3)),
    )
    exploratory = write(
        tmp_path / "exploratory.jsonl",
        json.dumps({"step": 1, "data": {"reward/verifiable/mean": 0.5, "val-core/lamp3/acc/mean@1": 0.7}}),
    )
    text = page(
        tagged("x"),
        metrics={"guided": guided, "exploratory": exploratory, "sft": tmp_path / "none" / "metrics.jsonl"},
    )
    assert "<title>guided: step 3, 0.3</title>" in text
    assert "<title>exploratory: step 4, 0.5</title>" in text
    assert "val-core/lamp3/acc/mean@1" in text
    assert "sft: " in text
    assert "none/metrics.jsonl is missing, so there is no curve" in text
    assert "prmu: no metrics file is configured" in text


def test_rows_to_show_are_one_a_task_and_where_models_disagree() -> None:
    def rows(right: bool) -> list:
        return [
            answered("a1", tagged("[1]"), gold="[1]", task="lamp1"),
            answered("a2", tagged("[1]" if right else "[2]"), gold="[1]", task="lamp1"),
            answered("b1", tagged("4"), gold="4", task="lamp3"),
            answered("b2", tagged("4"), gold="4", task="lamp3"),
        ]

    models = {"base": rows(False), "sft": rows(True)}
    assert choose_cases(models, 2) == ["a2", "b1"]
    assert choose_cases(models, 9) == ["a2", "b1", "a1", "b2"]


finite = st.floats(-1e6, 1e6)


@given(finite, finite)
def test_ticks_cover_the_range_with_few_round_numbers(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, 4)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))


@settings(deadline=None)
@given(st.lists(st.tuples(finite, st.floats()), max_size=20))
def test_a_chart_never_draws_outside_itself(points: list[tuple[float, float]]) -> None:
    drawn = [point for point in points if math.isfinite(point[1]) and abs(point[1]) < 1e9]
    svg = line_chart([Series("<x>", sorted(drawn))], 'a "label"')
    if not drawn:
        assert svg == ""
        return
    Page(svg)
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', svg):
        assert 0 <= float(x) <= 340
        assert 0 <= float(y) <= 200
