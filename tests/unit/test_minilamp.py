"""MiniLaMP: its files are LaMP's, its gold answers depend on the user, its teacher reads prompts only."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagpr.benchmarks.lamp import read_split
from tagpr.benchmarks.minilamp.generate import NEWEST, PROFILE_ITEMS, draw, write
from tagpr.benchmarks.minilamp.reader import (
    NO_FAULTS,
    OFF_TOPIC,
    FaultRates,
    quality,
    read,
    reason,
    segment,
    tagged,
    untagged,
)
from tagpr.benchmarks.minilamp.world import STYLES, TASK_NAMES, make_user, population, visible
from tagpr.benchmarks.tasks import parse_answer, render_prompt
from tagpr.errors import ConfigError, DataError
from tagpr.retrieval import select
from tagpr.schema import Example, ProfileItem
from tagpr.tags import check_tags, strip_tags

GENERATION = tuple(STYLES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilamp")
    write(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def dev(directory: Path) -> list[Example]:
    return [example for task in TASK_NAMES for example in read_split(directory, task, "dev")]


def prompt_of(example: Example, size: int) -> str:
    return render_prompt(example.task, example.query, select(example.profile, "", size, "recency"))


def drawn(task: str, index: int, seed: int = 0) -> tuple[str, str]:
    return draw(task, make_user(str(index), seed), random.Random(index))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_data(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(
            tmp_path / name,
            seed,
            train_users=6,
            dev_seen_users=2,
            train_rows_per_task=12,
            dev_rows_per_task=4,
        )
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 6 * 4 + 2
    different = {
        name for name, content in files(tmp_path / "c").items() if files(tmp_path / "a")[name] != content
    }
    assert different == files(tmp_path / "a").keys() - {"README.txt"}


def test_writing_again_mends_what_is_broken(tmp_path: Path) -> None:
    sizes = {"train_users": 2, "dev_seen_users": 1, "train_rows_per_task": 2, "dev_rows_per_task": 2}
    write(tmp_path, 1, **sizes)
    before = files(tmp_path)
    (tmp_path / "LaMP_3/train/train_outputs.json").write_text("half a fi")
    (tmp_path / "LaMP_1/dev/dev_questions.json").unlink()
    write(tmp_path, 1, **sizes)
    assert files(tmp_path) == before


@pytest.mark.parametrize("sizes", [{"dev_seen_users": 81}, {"dev_seen_users": 0}, {"dev_unseen_users": 0}])
def test_impossible_sizes_are_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="dev_"):
        write(tmp_path, 0, **sizes)
    assert not list(tmp_path.iterdir())


def test_files_have_lamps_fields(directory: Path) -> None:
    fields = {
        1: "title abstract",
        2: "description tag",
        3: "text score",
        4: "text title",
        5: "title abstract",
    }
    for number in (1, 2, 3, 4, 5, 7):
        for split, rows in (("train", 340), ("dev", 40)):
            folder = directory / f"LaMP_{number}" / split
            questions = json.loads((folder / f"{split}_questions.json").read_text())
            outputs = json.loads((folder / f"{split}_outputs.json").read_text())
            assert outputs["task"] == f"LaMP_{number}"
            assert [row["id"] for row in questions] == [row["id"] for row in outputs["golds"]]
            assert len(questions) == rows
            for row in questions:
                assert row.keys() == {"id", "input", "profile", "user_id"}
                assert len({item["id"] for item in row["profile"]}) == PROFILE_ITEMS
                for item in row["profile"]:
                    assert item.keys() == {"id", "date", *fields.get(number, "text").split()}
    assert "SYNTHETIC" in (directory / "README.txt").read_text()


def test_lamps_loader_reads_it_and_half_of_dev_is_unseen(directory: Path, dev: list[Example]) -> None:
    train = [example for task in TASK_NAMES for example in read_split(directory, task, "train")]
    assert len(train) == 2040
    assert len({example.id for example in train + dev}) == 2280
    seen = {example.user_id for example in train}
    assert len(seen) == 80
    for task in TASK_NAMES:
        of_task = [example for example in dev if example.task == task]
        assert sum(example.user_id in seen for example in of_task) == len(of_task) / 2 == 20
    assert len({example.user_id for example in dev}) == 40
    traits = json.loads((directory / "traits.json").read_text())
    assert {user for user, trait in traits.items() if trait["in_training"]} == seen


def test_profile_files_are_shuffled_but_dated(dev: list[Example]) -> None:
    in_order = 0
    for example in dev:
        dates = [item.date for item in example.profile]
        assert len(set(dates)) == PROFILE_ITEMS
        in_order += dates == sorted(dates)
    assert in_order == 0


def test_the_newest_items_determine_the_visible_part_of_the_gold(dev: list[Example]) -> None:
    rng = random.Random(0)
    right = sum(
        visible(e.task, reason(prompt_of(e, NEWEST), rng, NO_FAULTS).answer) == visible(e.task, e.gold)
        for e in dev
    )
    assert right / len(dev) >= 0.99


@pytest.mark.parametrize(
    ("task", "chance"),
    [("lamp1", 0.5), ("lamp2", 0.5), ("lamp3", 1 / 3), *((task, 0.0) for task in GENERATION)],
)
def test_without_a_profile_nobody_beats_chance(task: str, chance: float) -> None:
    rng, rows = random.Random(1), 1500
    right = 0
    for user in population(0, rows):
        query, gold = draw(task, user, rng, items=0)
        right += reason(query, rng, NO_FAULTS).answer == visible(task, gold)
    assert right / rows == pytest.approx(chance, abs=0.05)


def test_opening_words_are_evenly_spread() -> None:
    """Whoever always guesses the most frequent opening is right about 1 time in 8."""
    for task in GENERATION:
        counts = Counter(user.opening(task) for user in population(0, 4000))
        assert len(counts) == 8
        assert max(counts.values()) / 4000 < 0.16


def test_newest_items_hide_the_closing_word_and_older_ones_show_it(
    directory: Path, dev: list[Example]
) -> None:
    traits = json.loads((directory / "traits.json").read_text())
    for example in dev:
        if example.task in GENERATION:
            closing = STYLES[example.task].closings[traits[example.user_id]["closing"]]
            assert read(prompt_of(example, NEWEST)).closing == ""
            assert read(prompt_of(example, PROFILE_ITEMS)).closing == closing
            field = "text" if example.task == "lamp7" else "title"
            newest = {item.id for item in select(example.profile, "", NEWEST, "recency")}
            for item in example.profile:
                assert (item.fields[field].split()[-1] in STYLES[example.task].closings) == (
                    item.id not in newest
                )
                assert item.id in newest or item.fields[field].endswith(f" {closing}")


def test_about_a_third_of_the_golds_end_on_the_users_closing_word() -> None:
    rng = random.Random(5)
    closed = 0
    for user in population(0, 500):
        for task in GENERATION:
            _, gold = draw(task, user, rng)
            if gold != visible(task, gold):
                closed += 1
                assert gold.endswith(f" {user.closing_word(task)}")
    assert closed / 1500 == pytest.approx(0.3, abs=0.04)


def test_a_perfect_answer_is_a_valid_answer_of_the_task(dev: list[Example]) -> None:
    for example in dev:
        assert parse_answer(example.task, example.gold) == example.gold


@given(st.sampled_from(TASK_NAMES), st.integers(0, 10**6), st.sampled_from([0, 1, 3, 8, 16]))
def test_chains_are_well_formed_and_the_tagger_finds_their_tags(task: str, index: int, items: int) -> None:
    rng = random.Random(index)
    prompt, _ = draw(task, make_user(str(index), 0), rng, items)
    steps = reason(prompt, rng, FaultRates()).steps
    assert check_tags(tagged(steps)) == ""
    assert strip_tags(tagged(steps)) == untagged(steps)
    assert segment(untagged(steps)) == list(steps)


@given(st.lists(st.text("abc<>/_. \n", min_size=1).map(lambda s: " ".join(s.split()) + "."), min_size=1))
def test_the_tagger_never_rewrites_a_chain(sentences: list[str]) -> None:
    chain = " ".join(sentences)
    assert untagged(segment(chain)) == chain.strip()


def test_the_tagger_sees_nothing_in_nothing() -> None:
    assert segment(" \n") == []


def test_reasoning_depends_on_the_prompt_and_the_generator_only() -> None:
    prompt, _ = drawn("lamp4", 1)
    assert reason(prompt, random.Random(7), FaultRates()) == reason(prompt, random.Random(7), FaultRates())


def test_faults_come_at_their_rates() -> None:
    rates = FaultRates(lamp1=0.2, lamp2=0.3, lamp3=0.4, lazy=0.5, sloppy=0.1, closing=0.25)
    for task in TASK_NAMES:
        rng, faults, closed = random.Random(task), Counter[str](), 0
        for user in population(0, 1500):
            prompt, _ = draw(task, user, rng)
            reasoned = reason(prompt, rng, rates)
            faults.update(reasoned.fault.split("+"))
            closed += reasoned.answer != visible(task, reasoned.answer)
            assert ("lazy" in reasoned.fault) == reasoned.answer.startswith("The ")
        expected = 0.5 if task in GENERATION else getattr(rates, task)
        assert faults["lazy"] + faults["wrong_pattern"] == pytest.approx(1500 * expected, abs=75)
        assert faults["sloppy"] == pytest.approx(150, abs=45)
        assert closed == pytest.approx(375 if task in GENERATION else 0, abs=60)


def test_a_sloppy_chain_repeats_a_step_or_leaves_the_topic() -> None:
    repeated, left_topic = 0, 0
    for index in range(200):
        prompt, _ = drawn("lamp2", index)
        steps = reason(prompt, random.Random(index), FaultRates(sloppy=1.0)).steps
        assert len(steps) == 5
        repeated += len(set(steps)) == 4
        left_topic += any(sentence in OFF_TOPIC for _, sentence in steps)
    assert repeated + left_topic == 200
    assert 70 < repeated < 130


def test_a_closing_guess_is_right_one_time_in_four_and_always_with_a_longer_profile() -> None:
    rng, right, guesses = random.Random(2), Counter[int](), Counter[int]()
    rates = FaultRates(closing=1.0)
    for user in population(0, 600):
        for items in (NEWEST, PROFILE_ITEMS):
            prompt, _ = draw("lamp5", user, rng, items)
            right[items] += reason(prompt, rng, rates).answer.endswith(f" {user.closing_word('lamp5')}")
            guesses[items] += 1
    assert right[NEWEST] / guesses[NEWEST] == pytest.approx(0.25, abs=0.06)
    assert right[PROFILE_ITEMS] == guesses[PROFILE_ITEMS]


def test_the_judge_tells_the_faults_apart() -> None:
    kept, total = Counter[str](), Counter[str]()
    for task in TASK_NAMES:
        for index in range(300):
            prompt, _ = drawn(task, index)
            reasoned = reason(prompt, random.Random(index), FaultRates(sloppy=0.3))
            scores = quality(prompt, untagged(reasoned.steps), reasoned.answer)
            assert all(1 <= score <= 5 for score in scores)
            total[reasoned.fault] += 1
            kept[reasoned.fault] += sum(scores) > 15
    assert kept[""] == total[""] > 0
    assert kept["sloppy"] == kept["wrong_pattern"] == kept["lazy+sloppy"] == 0 < total["wrong_pattern"]
    assert 0.65 < kept["lazy"] / total["lazy"] < 0.95


def test_the_judge_refuses_an_answer_that_the_query_does_not_allow_and_a_chain_cut_short() -> None:
    for task in TASK_NAMES:
        prompt, gold = drawn(task, 4)
        good = reason(prompt, random.Random(4), NO_FAULTS)
        assert sum(quality(prompt, untagged(good.steps), good.answer)) == 20
        assert sum(quality(prompt, untagged(good.steps), "banana")) <= 15
        assert sum(quality(prompt, untagged(good.steps[:1]), gold)) <= 15
        assert sum(quality(prompt, "", gold)) <= 15


@pytest.mark.parametrize(
    "prompt",
    ["", "How do I sort a list?", "Generate a headline for the following article: The pope dances in town"],
)
def test_unreadable_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="not a MiniLaMP prompt"):
        reason(prompt, random.Random(0), NO_FAULTS)


def test_unreadable_profile_items_are_passed_over() -> None:
    items = [
        ProfileItem(id="0", fields={"text": "The mayor wi", "title": "Meet may"}),
        ProfileItem(id="1", fields={"text": "The mayor wins in town", "title": "Odd mayor wins"}),
        ProfileItem(id="2", fields={"text": "The storm moves in town", "title": "Beware storm moves"}),
    ]
    query = "Generate a headline for the following article: The river grows in town"
    prompt = render_prompt("lamp4", query, items)
    assert reason(prompt, random.Random(0), NO_FAULTS).answer == "Beware river grows"


def test_instructions_around_a_prompt_do_not_disturb_the_reader() -> None:
    for task in TASK_NAMES:
        prompt, _ = drawn(task, 9)
        wrapped = f'Think step by step, and "quote" nothing.\n\n{prompt}\n\nAnswer with <think> first.'
        assert read(wrapped) == read(prompt)
