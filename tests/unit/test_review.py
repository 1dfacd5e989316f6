"""The sheets, the verdicts, and what they amount to (S13)."""

import asyncio
import csv
import html.parser
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.finished import Finished
from data_pipeline.review import run, sample
from data_pipeline.sheets import Card, csv_sheet, html_sheet, markdown_sheet
from data_pipeline.verdicts import (
    JUDGEMENTS,
    ReviewVerdict,
    guarded,
    rate,
    read_verdicts,
    record,
    recorded_verdicts,
    report,
    unguarded,
)
from tagpr.benchmarks.storage import write_examples
from tagpr.configuration import compose, resolve
from tagpr.errors import DataError, StageError
from tagpr.schema import Example, ProfileItem
from tests.unit.finished_chains import TASKS, write_finished

SEGMENTS = "<analyze_input> {0} </analyze_input>\n<make_decision> b </make_decision>\n<verify_conclusion> c </verify_conclusion>"
NASTY = [
    "<script>alert(1)</script>", "</article></main><h1>", '" onclick="alert(1)', "<img src=x onerror=alert(1)>", "&lt;b&gt;",
    "$title ${x} $$",
    "\u202egnp.exe", "zero\u200bwidth", "a\u2028b", "]]>", "<!--", "'; alert(1)//", "```\n# heading\n```", "=HYPERLINK(\"http://x\")",
]  # fmt: skip


def finished(text: str = "x", name: str = "c1", gold: str = "[1]") -> Finished:
    response = f"<think>\n{SEGMENTS.format(text)}\n</think>\n\n[1]"
    return Finished(name, "e1", "lamp1", "u1", f"prompt {text}", response, gold, (5, 4, 5, 4))


def card(text: str = "x", name: str = "c1") -> Card:
    profile = (ProfileItem(id="p", fields={"title": text, "abstract": "never shown"}),)
    example = Example(
        id="e1", task="lamp1", split="train", user_id="u1", query=f"q {text}", profile=profile, gold="[1]"
    )
    return Card(finished(text, name), example)


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


# sheets


@pytest.mark.parametrize("text", NASTY)
def test_untrusted_text_adds_no_element_to_the_page(text: str) -> None:
    plain, nasty = (
        Page(html_sheet([card("plain text")], "t", True)),
        Page(html_sheet([card(text)], "t", True)),
    )
    extra = nasty.tags - plain.tags
    assert set(extra) <= {"span"}  # a mark for a character that nobody would see
    assert nasty.attributes - plain.attributes <= {"title"}
    if not extra:
        assert nasty.text.count(text) >= 3
    assert not any(name.startswith("on") for name in nasty.attributes)


@given(st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text)))
def test_any_text_can_be_shown(text: str) -> None:
    each = card(text)
    page = html_sheet([each], "t", False)
    page.encode()
    assert Page(page).tags["article"] == 1
    markdown_sheet([each], "t", False).encode()
    rows = list(csv.DictReader(io.StringIO(csv_sheet([each]).removeprefix("\ufeff"), newline="")))
    assert len(rows) == 1
    assert unguarded(rows[0]["id"]) == "c1"


def test_the_page_needs_nothing_from_outside_and_runs_no_script_but_its_own() -> None:
    page = html_sheet([card()], "t", False)
    assert "default-src 'none'" in page
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", page)
    assert not re.search(r"(?:src|href)=|https?://|@import|url\(", page)
    assert "SIMULATED" not in page
    assert "SIMULATED" in html_sheet([card()], "t", True)


def test_the_page_shows_question_profile_gold_answer_and_coloured_tags() -> None:
    page = html_sheet([card("surprise")], "t", False)
    text = Page(page).text
    for shown in (
        "q surprise",
        "title",
        "surprise",
        "analyze_input",
        "Answer",
        "Gold",
        "LaMP-1",
        "user u1, c1",
    ):
        assert shown in text
    assert page.count('class="segment t') == 3
    assert "5 + 4" not in text, "the judge's scores would lead the reviewer"


def test_only_what_the_prompt_shows_of_the_profile_is_shown() -> None:
    each = card("surprise")
    item = ProfileItem(id="p2", fields={"title": "another paper", "abstract": "x"})
    assert each.example is not None
    more = Card(each.chain, each.example.model_copy(update={"profile": (*each.example.profile, item)}))
    assert [(shown.id, dict(shown.fields)) for shown in more.items] == [("p", {"title": "surprise"})]
    page = html_sheet([more], "t", False)
    assert "another paper" not in page
    assert "never shown" not in page


@pytest.mark.parametrize(
    "text", ["x\n```\n# heading\n```\ny", "x\n````\n# heading", "x\n`````text\n# heading\n```"]
)
def test_text_in_markdown_cannot_end_its_block(text: str) -> None:
    sheet = markdown_sheet([card(text)], "t", False)
    opened = ""
    for line in sheet.splitlines():
        fence = re.fullmatch(r"(`{3,})(text)?", line)
        if fence and not opened:
            opened = fence[1]
        elif fence and not fence[2] and len(fence[1]) >= len(opened):
            opened = ""
        elif line == "# heading":
            assert opened
    assert opened == ""


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "'quoted", "'=x", "plain", ""])
def test_no_cell_is_a_formula_and_ids_come_back(text: str) -> None:
    assert not guarded(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert unguarded(guarded(text)) == text


def test_another_text_is_another_hash() -> None:
    hashes = {card("a").text_hash, card("b").text_hash, Card(finished("a", gold="[2]"), None).text_hash}
    assert len(hashes) == 3
    assert Card(finished("a"), None).text_hash == card("a").text_hash


# sampling


def test_samples_are_seeded_balanced_and_grow_by_adding() -> None:
    rows: list[tuple[str, ...]] = [
        (f"{task}-{number}", task, f"u{number % 5}")
        for task, size in (("a", 40), ("b", 7), ("c", 100))
        for number in range(size)
    ]
    drawn = sample(rows, 30, 0)
    assert Counter(name[0] for name in drawn) == {"a": 12, "b": 7, "c": 11} or Counter(
        name[0] for name in drawn
    ) == {"a": 11, "b": 7, "c": 12}
    users = Counter(int(name.split("-")[1]) % 5 for name in drawn if name[0] == "c")
    assert max(users.values()) - min(users.values()) <= 1
    assert sample(rows, 60, 0)[:30] == drawn
    assert sample(rows, 30, 1) != drawn
    random.Random(3).shuffle(rows)
    assert sample(rows, 30, 0) == drawn
    assert len(sample(rows, 1000, 0)) == 147


# verdicts


SAMPLE = {"c1": "h1", "c2": "h2", "c3": "h3"}
TASK = {"c1": "lamp1", "c2": "lamp1", "c3": "lamp2"}


def row(name: str, verdict: str, text_hash: str | None = None, **more: object) -> dict[str, object]:
    return {"id": name, "text_hash": text_hash or SAMPLE.get(name, "h"), "verdict": verdict, **more}


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps({"reviewer": "from file", "verdicts": rows}))
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "text_hash", "verdict", "note", "reviewer", "chain"])
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_every_kind_of_file_is_read(tmp_path: Path, suffix: str) -> None:
    rows = [
        row("c1", "right"),
        row("c2", " Wrong ", note="no, it\nis\u2028not"),
        row("c3", ""),
        row("c1", "right", "old"),
    ]
    reading = read_verdicts(write_rows(tmp_path / f"v{suffix}", rows), SAMPLE, "given")
    assert [(each.id, each.verdict) for each in reading.verdicts] == [("c1", "right"), ("c2", "wrong")]
    assert reading.verdicts[1].note == "no, it\nis\u2028not"
    assert reading.verdicts[0].reviewer == ("from file" if suffix == ".json" else "given")
    assert (reading.bad, reading.stale, reading.open) == ([], 1, 1)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_every_bad_row_is_one_line_that_names_it(tmp_path: Path, suffix: str) -> None:
    rows = [
        row("c1", "right"), row("c2", "rigth"), row("c9", "right"), row("c1", "wrong"),
        {"id": "c3", "text_hash": None, "verdict": "right"},
    ]  # fmt: skip
    path = write_rows(tmp_path / f"v{suffix}", rows)
    reading = read_verdicts(path, SAMPLE, None)
    expected = ["'right', 'wrong' or 'unsure'", "c9 is not in the sample", "c1 is judged twice"]
    assert all("\n" not in line and line.startswith(str(path)) for line in reading.bad)
    for line, says in zip(reading.bad, expected, strict=False):
        assert says in line
    # An empty cell of a spreadsheet is an empty text, another JSON value is none.
    assert len(reading.bad) + reading.stale == 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.json", "no json"),
        ("v.json", "[]"),
        ("v.json", '{"verdicts": 1}'),
        ("v.csv", "a,b\n1,2\n"),
        ("v.csv", ""),
        ("none.json", None),
    ],
)
def test_a_file_that_is_none_is_one_error(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"^review\.verdicts="):
        read_verdicts(tmp_path / name, SAMPLE, None)


@pytest.mark.parametrize("line", ["null", "3", "[1]", "{", '"x"'])
def test_a_line_that_is_no_row_is_bad(tmp_path: Path, line: str) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text(f"{json.dumps(row('c1', 'right'))}\n{line}\n")
    reading = read_verdicts(path, SAMPLE, None)
    assert len(reading.verdicts) == 1
    assert [text.startswith(f"{path}:2: ") for text in reading.bad] == [True]


def verdict(
    name: str, said: str, reviewer: str = "", text_hash: str | None = None, note: str = ""
) -> ReviewVerdict:
    return ReviewVerdict.model_validate(row(name, said, text_hash, reviewer=reviewer, note=note))


def test_recording_appends_only_what_is_new_and_survives_a_torn_line(tmp_path: Path) -> None:
    store = tmp_path / "verdicts.jsonl"
    first = [verdict("c1", "right", note="a\u2028b"), verdict("c2", "wrong")]
    assert record(store, first) == 2
    assert record(store, first) == 0
    with store.open("ab") as stream:
        stream.write('{"id": "c3", "note": "ü'.encode()[:-1])  # killed in the middle of a character
    assert record(store, [verdict("c2", "right"), verdict("c3", "unsure")]) == 2
    assert [(each.id, each.verdict) for each in recorded_verdicts(store)] == [
        ("c1", "right"), ("c2", "wrong"), ("c2", "right"), ("c3", "unsure"),
    ]  # fmt: skip
    store.write_text("damaged\n")
    with pytest.raises(DataError, match=r"verdicts.jsonl:1: is no verdict"):
        recorded_verdicts(store)


def test_the_last_verdict_counts_once_a_chain_and_older_texts_do_not() -> None:
    said = [
        verdict("c1", "wrong", "a"), verdict("c1", "right", "a"), verdict("c2", "right", "a"), verdict("c2", "unsure", "b"),
        verdict("c3", "wrong", "a", "older"), verdict("c9", "wrong", "a"),
    ]  # fmt: skip
    made = report(said, SAMPLE, TASK, 0.95)
    assert (made.all.judged, made.all.right, made.all.unsure, made.all.wrong) == (2, 1, 1, 0)
    assert made.stale == 2
    assert made.by_task["lamp2"].rate is None
    assert {name: each.judged for name, each in made.by_reviewer.items()} == {"a": 2, "b": 1}
    assert [(each.id, each.reviewer) for each in made.doubted] == [("c2", "b")]


def test_the_interval_is_wilsons() -> None:
    # 47 of 50, 95 %: worked out by hand from (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    made = rate(["right"] * 47 + ["wrong"] * 2 + ["unsure"], 0.95)
    z, n, p = 1.959963984540054, 50, 0.94
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert made.rate == p
    assert made.low == pytest.approx((centre - half) / (1 + z * z / n))
    assert made.high == pytest.approx((centre + half) / (1 + z * z / n))
    assert (round(made.low or 0, 3), round(made.high or 0, 3)) == (0.838, 0.979)
    everything = rate(["right"] * 50, 0.95)
    assert everything.high == 1.0
    assert 0.92 < (everything.low or 0) < 0.93


@given(st.lists(st.tuples(st.sampled_from(JUDGEMENTS), st.sampled_from(JUDGEMENTS)), min_size=1, max_size=30))
def test_kappa_is_cohens(pairs: list[tuple[str, str]]) -> None:
    from sklearn.metrics import cohen_kappa_score

    names = {f"c{number}": "h" for number in range(len(pairs))}
    said = [verdict(f"c{n}", one, "a", "h") for n, (one, _) in enumerate(pairs)]
    said += [verdict(f"c{n}", other, "b", "h") for n, (_, other) in enumerate(pairs)]
    (made,) = report(said, names, dict.fromkeys(names, "t"), 0.95).agreements
    assert made.agreed == pytest.approx(sum(one == other for one, other in pairs) / len(pairs))
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    if len({*first, *second}) == 1:
        assert made.kappa is None
    else:
        assert made.kappa == pytest.approx(cohen_kappa_score(first, second))


# the stage


def overrides(folder: Path, *more: str) -> list[str]:
    return [f"run.outputs={folder}", "review.chains=12", *more]


def review(folder: Path, *more: str) -> None:
    run(resolve(compose("review_chains", overrides(folder, *more))))


@pytest.fixture
def chains(tmp_path: Path) -> Path:
    examples = write_finished(tmp_path / "chains", per_task=8)
    write_examples(tmp_path / "data" / "minilamp" / "train.parquet", examples)
    return tmp_path


def saved(folder: Path, reviewer: str, wrong: int) -> Path:
    rows = list(csv.DictReader(io.StringIO((folder / "review/sheet.csv").read_text("utf-8-sig"), newline="")))
    given = [
        {
            "id": unguarded(each["id"]),
            "text_hash": each["text_hash"],
            "verdict": "wrong" if number < wrong else "right",
            "note": "",
        }
        for number, each in enumerate(rows)
    ]
    path = folder / f"{reviewer}.json"
    path.write_text(json.dumps({"sample": "s", "reviewer": reviewer, "verdicts": given}))
    return path


def test_the_stage_from_sheet_to_report(chains: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    review(chains)
    assert not (chains / "review/report.json").exists()
    page = (chains / "review/sheet.html").read_text()
    assert page.count("<article") == 12
    assert "SIMULATED" in page
    assert "prompt as the teacher saw it" in page
    rows = list(csv.DictReader(io.StringIO((chains / "review/sheet.csv").read_text("utf-8-sig"), newline="")))
    assert set(Counter(each["task"] for each in rows).values()) == {12 // len(TASKS)}

    one, other = saved(chains, "one", 2), saved(chains, "other", 1)
    review(chains, f"review.verdicts=[{one},{other}]")
    made = json.loads((chains / "review/report.json").read_text())
    assert (made["all"]["judged"], made["all"]["right"], made["simulated"]) == (12, 10, True)
    assert made["agreements"][0]["chains"] == 12
    assert made["agreements"][0]["kappa"] == pytest.approx(0.6250)
    assert "| all | 12 | 10 | 2 | 0 | 83.3% |" in (chains / "review/report.md").read_text()
    before = (chains / "review/verdicts.jsonl").read_bytes(), (chains / "review/report.json").read_bytes()
    review(chains, f"review.verdicts={one}")
    assert before == (
        (chains / "review/verdicts.jsonl").read_bytes(),
        (chains / "review/report.json").read_bytes(),
    )
    assert "0 verdicts recorded, 12 known before" in caplog.text


def test_verdicts_on_older_texts_are_refused_and_counted(
    chains: Path, caplog: pytest.LogCaptureFixture
) -> None:
    review(chains)
    path = saved(chains, "one", 0)
    review(chains, f"review.verdicts={path}")
    write_finished(chains / "chains", per_task=8, text="quite another chain")
    (chains / "review/report.json").unlink()
    review(chains, f"review.verdicts={path}")
    made = json.loads((chains / "review/report.json").read_text())
    assert (made["all"]["judged"], made["stale"]) == (0, 12)
    assert "12 verdicts of these files and 12 recorded ones are on older texts" in caplog.text


def test_nothing_is_recorded_of_files_with_a_bad_row(chains: Path, caplog: pytest.LogCaptureFixture) -> None:
    review(chains)
    good = saved(chains, "one", 0)
    bad = chains / "bad.jsonl"
    bad.write_text('{"id": "x", "text_hash": "h", "verdict": "right"}\n{"id": "x"\n')
    with pytest.raises(DataError, match=r"^review\.verdicts: 2 rows cannot be used"):
        review(chains, f"review.verdicts=[{good},{bad}]")
    assert not (chains / "review/verdicts.jsonl").exists()
    assert [line.startswith(f"{bad}:") for line in caplog.messages if "bad.jsonl" in line] == [True, True]


def test_without_the_examples_the_whole_prompt_is_shown(chains: Path) -> None:
    shutil.rmtree(chains / "data")
    review(chains)
    assert (chains / "review/sheet.html").read_text().count("<article") == 12


def test_without_chains_it_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"manifest.json: no such file.*build_chains.sh"):
        review(tmp_path)


# the page in a browser


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A page in headless Chromium, by its debugging protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    async def value(self, expression: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_person_can_judge_save_and_come_back(chains: Path) -> None:
    import aiohttp

    review(chains)
    sheet, downloads, profile = chains / "review/sheet.html", chains / "downloads", chains / "browser"
    downloads.mkdir()

    async def judge() -> None:
        for _ in range(300):
            if (profile / "DevToolsActivePort").is_file():
                break
            await asyncio.sleep(0.05)
        port = (profile / "DevToolsActivePort").read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(each for each in await answer.json() if each["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Browser(socket)
                await page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
                await page.call("Page.navigate", url=sheet.as_uri())
                while (
                    await page.value(
                        "document.readyState + document.querySelectorAll('article.current').length"
                    )
                    != "complete1"
                ):
                    await asyncio.sleep(0.05)
                for key in ("1", "2", "n", "n", "o", "1", "Escape", "3", "0", "1"):
                    await page.press(key)
                await page.value(
                    "document.querySelectorAll('article')[5].querySelector('button.unsure').click()"
                )
                await page.value(
                    "(() => { const field = document.getElementById('reviewer'); field.value = 'one';"
                    " field.dispatchEvent(new Event('input')); })()"
                )
                await page.call("Page.reload")
                await asyncio.sleep(0.5)
                counts = await page.value("document.getElementById('counts').textContent")
                assert counts == "5 of 12 judged: 2 right, 1 wrong, 2 unsure"
                await page.press("s")
                for _ in range(100):
                    if (downloads / "verdicts.json").is_file():
                        break
                    await asyncio.sleep(0.05)

    process = subprocess.Popen(
        [str(CHROMIUM), "--headless", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}",
         *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        asyncio.run(judge())
    finally:
        process.terminate()
        process.wait(timeout=30)
    got = json.loads((downloads / "verdicts.json").read_text())
    assert got["reviewer"] == "one"
    # Third chain: a note by the keys n, o, 1 ("n" opens the field), then unsure.
    assert [(each["verdict"], each["note"]) for each in got["verdicts"]] == [
        ("right", ""), ("wrong", ""), ("unsure", "no1"), ("right", ""), ("unsure", ""),
    ]  # fmt: skip
    review(chains, f"review.verdicts={downloads / 'verdicts.json'}")
    assert json.loads((chains / "review/report.json").read_text())["all"]["judged"] == 5
