"""One JSONL a model: what a kill, another model or a second process does to it."""

import json
from pathlib import Path

import pytest

from tagpr.errors import DataError, StageError
from tagpr.evaluation.rows import Row, RowFile, Unanswered

SETTINGS = {"model": "abc", "max_prompt_tokens": 160}


def row(id_: str, seed: int | None = None, response: str = "<think>\nx\n</think>\n\n1") -> Row:
    return Row(
        id=id_,
        task="lamp3",
        user_id="7",
        seed=seed,
        prompt_tokens=10,
        items_used=8,
        items_shortened=0,
        response=response,
        response_tokens=4,
        reasoning_tokens=1,
        repetition=0.0,
        finish_reason="stop",
        thinking=True,
        thinking_cut=False,
        history=3,
        gold="1",
        seen_user=True,
        reasoning="x",
        answer="1",
        parsed="1",
        verifiable=1.0,
        format=1.0,
        tag=-1.0,
        failure="text_outside_tags",
        tags={},
    )


def filled(path: Path, *ids: str) -> Path:
    with RowFile(path, SETTINGS) as file:
        file.append(row(id_) for id_ in ids)
    return path


def test_rows_survive_closing_and_are_known_by_id_and_seed(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    with RowFile(path, SETTINGS) as file:
        file.append([row("a"), row("a", seed=3)])
        file.append([])
    with RowFile(path, SETTINGS) as file:
        assert set(file.rows) == {("a", None), ("a", 3)}
        assert file.rows["a", 3].response == row("a").response


@pytest.mark.parametrize("cut", [1, 2, 40, 300])
def test_torn_last_line_is_dropped_and_the_next_row_starts_a_line(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path / "base.jsonl", "a", "b")
    path.write_bytes(path.read_bytes()[:-cut])
    with RowFile(path, SETTINGS) as file:
        assert set(file.rows) == {("a", None)}
        file.append([row("c")])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a", "b", "c")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:50] + b"\n" + lines[2])
    with pytest.raises(DataError, match=r"base\.jsonl:2: not a row"):
        RowFile(path, SETTINGS)


def test_a_row_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match=r"row 'a' .* is there twice"):
        RowFile(path, SETTINGS)


def test_rows_of_another_model_are_kept_aside_and_made_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a")
    with RowFile(path, {**SETTINGS, "model": "other"}) as file:
        assert file.rows == {}
    old = list((tmp_path / "superseded").glob("*-base.jsonl"))
    assert len(old) == 1
    assert json.loads(old[0].read_text())["id"] == "a"
    with RowFile(path, {**SETTINGS, "model": "other"}, "refuse"):
        pass


def test_rows_of_another_model_are_refused_when_asked_to(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a")
    with pytest.raises(StageError, match=r"base\.jsonl: made with another model\. ") as caught:
        RowFile(path, {**SETTINGS, "model": "other"}, "refuse")
    assert "\n" not in str(caught.value)
    with RowFile(path, SETTINGS) as file:
        assert len(file.rows) == 1


def test_rows_without_their_settings_are_not_trusted(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a")
    (tmp_path / "base.settings.json").unlink()
    with RowFile(path, SETTINGS) as file:
        assert file.rows == {}


def test_settings_left_by_a_kill_before_the_first_row_do_not_stick(tmp_path: Path) -> None:
    (tmp_path / "base.settings.json").write_text('{"model": "older"}')
    path = filled(tmp_path / "base.jsonl", "a")
    with RowFile(path, SETTINGS, "refuse") as file:
        assert len(file.rows) == 1


def test_two_processes_cannot_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    with RowFile(path, SETTINGS):
        with pytest.raises(StageError, match="another evaluation is writing it"):
            RowFile(path, SETTINGS)
    with RowFile(path, SETTINGS):
        pass


def test_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    awkward = 'line\nbreak \u2028 "quote" \x00 你好 \ud83d alone'
    path = tmp_path / "base.jsonl"
    with RowFile(path, SETTINGS) as file:
        file.append([row("a", response=awkward)])
    with RowFile(path, SETTINGS) as file:
        assert file.rows["a", None].response == awkward


def test_rescoring_replaces_the_file_only_where_scores_changed(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a", "b")
    before = path.stat()
    with RowFile(path, SETTINGS) as file:
        file.rescore([row("a"), row("b")])
        assert path.stat().st_ino == before.st_ino
        file.rescore([row("a"), row("b").model_copy(update={"verifiable": 0.0})])
        file.append([row("c")])
    assert [json.loads(line)["verifiable"] for line in path.read_text().splitlines()] == [1.0, 0.0, 1.0]


def refused(id_: str, detail: str = "400 too long") -> Unanswered:
    return Unanswered(id=id_, seed=None, reason="refused", detail=detail)


def test_rows_without_an_answer_are_named_until_they_have_one(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a")
    with RowFile(path, SETTINGS) as file:
        file.note([refused("b"), refused("c", "half \ud83d a pair\u2028")])
    with RowFile(path, SETTINGS) as file:
        assert set(file.unanswered) == {("b", None), ("c", None)}
        assert file.unanswered["c", None].detail == "half \ud83d a pair\u2028"
        file.append([row("b")])
    with RowFile(path, SETTINGS) as file:
        assert set(file.unanswered) == {("c", None)}


def test_rows_without_an_answer_belong_to_their_settings(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a")
    with RowFile(path, SETTINGS) as file:
        file.note([refused("b")])
    with RowFile(path, {**SETTINGS, "model": "other"}) as file:
        assert file.unanswered == {}
    assert len(list((tmp_path / "superseded").glob("*-base.unanswered.jsonl"))) == 1
    # Left over where the rows themselves were removed by hand.
    with RowFile(path, {**SETTINGS, "model": "other"}) as file:
        file.note([refused("b")])
    path.unlink()
    with RowFile(path, {**SETTINGS, "model": "other"}) as file:
        assert file.unanswered == {}


def test_a_damaged_file_of_reasons_is_one_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "base.jsonl", "a")
    path.with_suffix(".unanswered.jsonl").write_text('{"id": "b"}\n')
    with pytest.raises(DataError, match=r"base\.unanswered\.jsonl:1: says of no row why"):
        RowFile(path, SETTINGS)
