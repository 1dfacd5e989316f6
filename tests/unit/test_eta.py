"""When a whole run will be done: from a ledger that is made up."""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.eta import CHAINS, FOR_PAIRS, TAGGING, Outlook, outlook
from data_pipeline.ledger import Ledger, paces
from data_pipeline.progress import time_left
from data_pipeline.settings import ChainSettings, read_settings
from data_pipeline.status import show
from data_pipeline.store import Instance, Store, store_path
from tagpr.chat.client import Reply
from tagpr.configuration import compose, resolve

NOW = 1_000_000.0
NOBODY = {"teacher": 0, "judge": 0, "explorer": 0, "tagger": 0}


def settings(*more: str) -> ChainSettings:
    return read_settings(
        resolve(
            compose(
                "build_chains",
                [
                    "chains.instances_per_task=100", "chains.rollouts=4", "chains.expected.malformed=0",
                    "chains.preferences.prp_pairs=0", "chains.preferences.pqp_pairs=0", *more,
                ],
            )
        )
    )  # fmt: skip


def fill(ledger: Ledger, kind: str, count: int, per_second: float, ends: float = NOW) -> None:
    """So many replies, the last of them at ``ends``."""
    database = ledger._database
    with database:
        database.executemany(
            "INSERT INTO unit VALUES (?, ?, 'm', '{}', 't', NULL, 'stop', 1, 0, 1, 0, ?)",
            [(f"{kind}{n}-{ends}", kind, ends - n / per_second) for n in range(count)],
        )


def position(stage: str, done: int, total: int, judged: int, **more: Any) -> dict[str, Any]:
    return {
        "stage": stage, "what": "instances", "done": done, "total": total, "at": time.time(), "instances": 600, "blanks": 0,
        "judged": judged, "seen": NOBODY, "seen_before": NOBODY, "latency": {}, **more,
    }  # fmt: skip


def test_the_pace_is_that_of_the_last_minutes_without_the_stops(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        fill(ledger, "teacher", 1000, 100.0, ends=NOW - 5000.0)
        fill(ledger, "teacher", 30, 2.0)
        fill(ledger, "teacher_without_profile", 30, 2.0, ends=NOW - 0.25)
        fill(ledger, "judge", 100, 5.0, ends=NOW - 200.0)
        fill(ledger, "judge", 100, 5.0)
        fill(ledger, "tagger", 5, 5.0)
        found = ledger.paces()
    assert found["teacher"].replies == 1060
    assert found["teacher"].per_second == pytest.approx(4.0, rel=0.05)
    assert found["judge"].per_second == pytest.approx(5.0, rel=0.05)
    assert (found["tagger"].replies, found["tagger"].per_second) == (5, None)
    assert (found["explorer"].replies, found["explorer"].per_second) == (0, None)


def test_all_stages_count_by_the_shares_that_have_come_through_so_far(tmp_path: Path) -> None:
    """200 of 600 instances are done: 800 chains of 2,400, of which 400 were judged and 300 kept."""
    with Ledger(tmp_path / "l.sqlite") as ledger:
        fill(ledger, "teacher", 800, 4.0)
        fill(ledger, "judge", 400, 2.0)
        fill(ledger, "tagger", 100, 3.0, ends=NOW - 9000.0)
        known = ledger.paces()
    seen = {**NOBODY, "teacher": 800, "judge": 400}
    made = outlook(settings(), position(CHAINS, 200, 600, 300, seen=seen), known)
    # 1,600 chains at 4 a second; teacher and judge work at the same time. 900 to be tagged, 100 are, at 3 a second.
    assert made.stages == pytest.approx({CHAINS: 1600 / 4.0, TAGGING: 800 / 3.0}, rel=0.02)
    assert made.seconds == pytest.approx(1600 / 4.0 + 800 / 3.0, rel=0.02)
    assert made.assumed | made.unknown | made.batched == set()


def test_a_run_that_reads_its_ledger_again_tells_the_same(tmp_path: Path) -> None:
    """It is at its 60th instance, the ledger at the 200th: what is in the ledger is not to be waited for."""
    with Ledger(tmp_path / "l.sqlite") as ledger:
        fill(ledger, "teacher", 800, 4.0)
        fill(ledger, "judge", 400, 2.0)
        fill(ledger, "tagger", 100, 3.0)
        known = ledger.paces()
    seen = {**NOBODY, "teacher": 240, "judge": 120}
    made = outlook(settings(), position(CHAINS, 60, 600, 90, seen=seen), known)
    assert made.stages == pytest.approx({CHAINS: 400.0, TAGGING: 800 / 3.0}, rel=0.02)


def test_before_there_is_anything_to_go_by_the_expected_shares_count(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        fill(ledger, "teacher", 40, 4.0)
        known = ledger.paces()
    own = settings(
        "chains.expected.accurate=0.5", "chains.expected.judged=0.5", "chains.expected.judge_reply_tokens=100",
        "chains.tagger.concurrency=10",
    )  # fmt: skip
    made = outlook(own, position(CHAINS, 10, 600, 4, seen={**NOBODY, "teacher": 40}), known)
    assert made.stages == pytest.approx({CHAINS: 2360 / 4.0}, rel=0.03)
    assert made.unknown == {TAGGING}
    assert "tagging not counted: no reply yet to tell from" in time_left(made)
    # 600 chains by ten at a time, each taking as many times the judge's second as its reply is longer.
    made = outlook(own, position(CHAINS, 10, 600, 4, latency={"judge": 1.0}), known)
    tokens = made.stages[TAGGING] / (600 / 10) * 100
    assert 30 < tokens < 90
    assert made.assumed == {TAGGING}
    assert "tagging 31 s (assumed)" in time_left(Outlook({CHAINS: 5.0, TAGGING: 31.0}, made.assumed))


def test_pairs_are_tagged_after_the_rest(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        fill(ledger, "tagger", 500, 5.0)
        known = ledger.paces()
    with_pairs = settings("chains.preferences.pqp_pairs=300", "chains.expected.untagged_in_pairs=0.5")
    at_tagging = position(TAGGING, 500, 900, 900, seen={**NOBODY, "tagger": 500})
    assert outlook(settings(), at_tagging, known).stages == pytest.approx({TAGGING: 400 / 5.0}, rel=0.02)
    assert outlook(with_pairs, at_tagging, known).stages == pytest.approx({TAGGING: 700 / 5.0}, rel=0.02)
    # Every tenth reply was malformed: 110 replies for 100 chains, and 100 chains are left.
    at_pairs = position(
        FOR_PAIRS, 100, 200, 900, seen={**NOBODY, "tagger": 500}, seen_before={**NOBODY, "tagger": 390}
    )
    assert outlook(with_pairs, at_pairs, known).stages == pytest.approx({TAGGING: 110 / 5.0}, rel=0.02)


def test_what_waits_in_batches_is_not_counted_and_says_so(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        fill(ledger, "teacher", 800, 4.0)
        known = ledger.paces()
    own = settings("chains.judge.mode=batch", "chains.tagger.mode=batch")
    made = outlook(own, position(CHAINS, 200, 600, 300, seen={**NOBODY, "teacher": 800}), known)
    assert (set(made.stages), made.batched) == ({CHAINS}, {CHAINS, TAGGING})
    at_tagging = position(TAGGING, 0, 900, 900, seen={**NOBODY, "teacher": 2400})
    assert outlook(own, at_tagging, known).batched == {TAGGING}
    assert time_left(made).endswith("the waits for batches of chains and tagging not counted")


def test_status_tells_it_from_the_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        f"paths.chains={tmp_path}", "chains.rollouts=4", "chains.preferences.prp_pairs=0", "chains.preferences.pqp_pairs=0",
        "chains.expected.malformed=0",
    ]  # fmt: skip
    config = resolve(compose("build_chains", overrides))
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger, Store(store_path(path)) as store:
        fill(ledger, "teacher", 800, 4.0)
        fill(ledger, "judge", 400, 2.0)
        fill(ledger, "tagger", 100, 0.1)
        store.fill(
            "d", lambda: [Instance(0, "e", "lamp1", "u", "g", "p", None)], set, lambda: {"kept": {"lamp1": 1}}
        )
        seen = {**NOBODY, "teacher": 800, "judge": 400}
        store.note("progress", position(CHAINS, 200, 600, 300, seen=seen))
        show(config)
        said = capsys.readouterr().out
        assert "chains: 200 of 600 instances; about 2 h 20 min left of the whole job" in said
        assert "(chains 7 min, tagging 2 h 13 min), until 20" in said
        store.note("progress", position(CHAINS, 200, 600, 300, seen=seen, at=time.time() - 7200))
        show(config)
        assert (
            "stopped 2 h 0 min ago, the same command goes on; about 2 h 20 min left"
            in capsys.readouterr().out
        )


def test_a_ledger_of_before_gets_its_index_and_looking_costs_next_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        ledger.record("k", "judge", "m", {}, Reply("x", None, "stop", 1, 0, 1))
    with sqlite3.connect(path) as database:
        database.execute("DROP INDEX unit_pace")
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        assert paces(database)["judge"].replies == 1
    with Ledger(path) as ledger:
        for query in (
            "SELECT kind, COUNT(*) FROM unit GROUP BY kind",
            "SELECT MAX(created) FROM unit WHERE kind = 'x'",
        ):
            plan = json.dumps(ledger._database.execute(f"EXPLAIN QUERY PLAN {query}").fetchall())
            assert "COVERING INDEX unit_pace" in plan
