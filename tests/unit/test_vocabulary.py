"""A user's own tags (S41): the file, how every process learns of it, and that everything goes by it."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.exploratory import ExploratoryTagging
from data_pipeline.settings import read_settings
from data_pipeline.simulated_tagger import SimulatedTagger
from data_pipeline.tagging import RestrictedTagging
from tagpr import vocabulary
from tagpr.configuration import compose, export, exported, main, resolve
from tagpr.errors import ConfigError, StageError
from tagpr.evaluation.rows import Row
from tagpr.rewards.composite import RewardWeights, score_response
from tagpr.rewards.tag import tag_reward
from tagpr.runs import check_tags_of, manifest, write_json_atomically
from tagpr.schema import PrmuScore
from tagpr.tags import check_tags, neutralise, split_response

ROOT = Path(__file__).resolve().parents[2]
FIVE = {
    "understand": "works out what is asked and given",
    "history": "looks at the user's items and what they have in common",
    "weigh": "compares candidates and references",
    "decide": "draws the findings together and settles on one option",
    "answer": "words the final answer",
}


@pytest.fixture
def five(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five tags in use."""
    path = tmp_path / "five.yaml"
    path.write_text("".join(f"{tag}: {definition}\n" for tag, definition in FIVE.items()))
    monkeypatch.setenv(vocabulary.VARIABLE, str(path))
    return path


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tags.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_in_its_order(five: Path) -> None:
    assert list(vocabulary.vocabulary().items()) == list(FIVE.items())
    assert vocabulary.vocabulary_hash() != _hash_of_the_nine()


def _hash_of_the_nine() -> str:
    code = "from tagpr.vocabulary import vocabulary_hash; print(vocabulary_hash())"
    environment = {key: value for key, value in os.environ.items() if key != vocabulary.VARIABLE}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, cwd=ROOT).strip()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "tags.yaml: holds no tags"),
        ("- a\n- b\n", "tags.yaml: holds no tags"),
        ("a: one\n", "has 1 tags"),
        ("a: one\nb: [two]\n", ":2: is no `tag: definition` line"),
        ("a: one\nb:\n", ":2: b: has no definition"),
        ("a: one\nb: ''\n", ":2: b: has no definition"),
        ("a: one\nb: ~\n", ":2: b: has no definition"),
        ("a: one\nb: |\n  two\n  lines\n", ":2: b: its definition has several lines"),
        ("a: one\nb: a <b> mark\n", ":2: b: its definition has angle brackets"),
        ("a: one\na: two\n", ":2: a: occurs twice"),
        ("a: one\nA: two\n", ":2: A: occurs twice"),
        ("a: one\nthink: two\n", ":2: think: is a mark of the chat format"),
        ("a: one\nTool_Call: two\n", ":2: Tool_Call: is a mark of the chat format"),
        ("a: one\nb c: two\n", ":2: b c: cannot be a tag"),
        ("a: one\n1b: two\n", ":2: 1b: cannot be a tag"),
        ("a: one\nb>: two\n", ":2: b>: cannot be a tag"),
        (f"a: one\n{'b' * 65}: two\n", "cannot be a tag"),
        ("a: one\nа: cyrillic\n", ":2: а: cannot be a tag"),
        ("a: one\n b: two\n", "tags.yaml:2: is no YAML"),
        ("a: &x one\nb: *x\nc: !!python/object/apply:os.system [true]\n", ":3: is no `tag: definition` line"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        vocabulary.read_vocabulary(written(tmp_path, text))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tags.vocabulary=.*none.yaml: cannot be read"):
        vocabulary.read_vocabulary(tmp_path / "none.yaml")
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        vocabulary.read_vocabulary(path)


# configuration


def test_the_configuration_exports_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vocabulary.VARIABLE, raising=False)
    written(tmp_path, "a: one\nb: two\n")
    monkeypatch.chdir(tmp_path)
    export(resolve(compose("sft", ["tags.vocabulary=tags.yaml"])))
    try:
        assert exported()[vocabulary.VARIABLE] == str(tmp_path / "tags.yaml")
        assert list(vocabulary.vocabulary()) == ["a", "b"]
        # What a parent process has exported holds in a child without the key, and null takes it back.
        export(resolve(compose("sft", [])))
        assert vocabulary.VARIABLE in exported()
        export(resolve(compose("sft", ["tags.vocabulary=null"])))
        assert vocabulary.VARIABLE not in exported()
        assert len(vocabulary.vocabulary()) == 9
    finally:
        os.environ.pop(vocabulary.VARIABLE, None)


@pytest.mark.parametrize("text", [None, "a: one\n"])
def test_a_bad_vocabulary_stops_every_stage_before_it_starts(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vocabulary.VARIABLE, "")
    path = tmp_path / "tags.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as end:
        main("sft", lambda config: pytest.fail("ran"), [f"tags.vocabulary={path}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(path) in error
    assert error.count("\n") == 1


def test_ray_workers_get_it(five: Path) -> None:
    launch = pytest.importorskip("tagpr.rl.launch")
    config = resolve(compose("guided_rl", []))
    assert launch.environment_of_workers(config)[vocabulary.VARIABLE] == str(five)


def test_prerequisites_get_it() -> None:
    from tagpr.stages import passed_on

    assert passed_on(["tags.vocabulary=a.yaml", "chains.size=3"], "sft") == ["tags.vocabulary=a.yaml"]


# what goes by it


def reply(*tags: str, answer: str = "[1]") -> str:
    chain = "\n".join(f"<{tag}> step {number}. </{tag}>" for number, tag in enumerate(tags))
    return f"<think>\n{chain}\n</think>\n\n{answer}"


def test_the_reward_follows(five: Path) -> None:
    def scored(text: str) -> tuple[float, str]:
        found = score_response(
            "lamp1", "[1]", text, list(range(40)), "guided", RewardWeights(), PrmuScore(
                score=0.5, logit=0.0, unknown_user=False, version="v"),
        )  # fmt: skip
        return found.tag, found.failure

    assert scored(reply("understand", "weigh", "decide")) == (0.0, "")
    assert scored(reply("analyze_input", "compare_entities", "make_decision")) == (-1.0, "tag_unknown")
    assert scored(reply("understand", "weigh", "decide", answer="<weigh>[1]"))[1] == "tag_in_answer"
    assert tag_reward("<history> a </history>") == (-1.0, "too_few_segments")
    assert neutralise("<weigh> <make_decision>") == "‹weigh› <make_decision>"


def test_an_argument_goes_before_the_vocabulary_in_use(five: Path) -> None:
    text = "<x> a </x><y> b </y><x> c </x>"
    assert check_tags(text) == "tag_unknown"
    assert check_tags(text, vocabulary=("x", "y")) == ""


def test_a_change_of_vocabulary_within_a_process_is_followed(
    five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<make_decision> a </make_decision>" * 3
    assert check_tags(text) == "tag_unknown"
    monkeypatch.delenv(vocabulary.VARIABLE)
    assert check_tags(text) == ""


def test_the_tiny_tokenizer_has_the_tags_as_tokens(five: Path) -> None:
    tokenizer = importlib.import_module("tagpr.tiny_model.tokenizer").build_tokenizer(0, users=4, learned=600)
    for tag in FIVE:
        assert len(tokenizer.encode(f"<{tag}>")) == len(tokenizer.encode(f"</{tag}>")) == 1
    assert len(tokenizer.encode("<make_decision>")) > 1


def test_tagging_follows_in_both_modes_and_the_simulated_tagger_obeys(five: Path) -> None:
    import random

    settings = read_settings(resolve(compose("build_chains", [])))
    no_faults = settings.simulated.model_copy(
        update={"tag_unknown": 0.0, "tag_rewritten": 0.0, "tag_unclosed": 0.0}
    )
    tagger = SimulatedTagger(settings.prompts, no_faults)
    source = "film with war and hero. user tags by genre. war is action but hero is classic. pick action."
    taken = set()
    for mode in ("paper", "span"):
        tagging = RestrictedTagging.load(mode, settings.prompts, 3)  # type: ignore[arg-type]
        prompt = tagging.prompt("q", source)
        assert all(f"- {tag}: {definition}" in prompt for tag, definition in FIVE.items())
        assert "analyze_input" not in prompt
        tagged = tagging.accept(source, tagger.reply(prompt, random.Random(0)))
        assert tagged.problem == ""
        taken.add(tagged.text)
    assert len(taken) == 1
    assert {line.split(">")[0].strip("<") for line in taken.pop().splitlines()} <= set(FIVE)
    schema = RestrictedTagging.load("span", settings.prompts, 3).request()["response_format"]
    assert json.dumps(list(FIVE)) in json.dumps(schema)


def test_exploratory_tagging_names_no_tag_at_all(five: Path) -> None:
    settings = read_settings(resolve(compose("build_chains", [])))
    prompt = ExploratoryTagging.load(settings.prompts.exploratory_tagging).prompt("q", "one. two.")
    assert not any(tag in prompt for tag in ("analyze_input", "make_decision"))


def test_evaluation_follows(five: Path) -> None:
    from test_evaluation_score import answered

    from tagpr.page import parts

    text = reply("understand", "weigh", "decide")
    row: Row = answered("lamp1:1", text, task="lamp1", gold="[1]")
    assert row.tags == {"understand": 1, "weigh": 1, "decide": 1}
    assert (row.tag, row.failure) == (0.0, "")
    assert parts.reasoning_blocks(split_response(text).reasoning).count('class="segment t') == 3
    assert "t5" not in parts.tag_hues(len(FIVE))
    assert parts.marked("<weigh> and <make_decision>").count("pill") == 1
    twelve = parts.tag_hues(12)
    assert len(set(twelve.split("--hue: ")[1:])) == 12


def test_manifests_name_the_tags_and_what_was_made_for_others_is_refused(
    five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json_atomically(tmp_path / "manifest.json", manifest("build_chains", {}, 0).model_dump())
    check_tags_of(tmp_path, "paths.chains")
    check_tags_of(tmp_path / "none", "paths.chains")
    monkeypatch.delenv(vocabulary.VARIABLE)
    with pytest.raises(StageError, match=r"^paths.chains: .*'understand' is not among tags.vocabulary"):
        check_tags_of(tmp_path, "paths.chains")


def test_nothing_takes_the_nine_for_granted() -> None:
    """Only these know the paper's tags by name: their definition, the synthetic world, and a prompt's worked example."""
    allowed = {
        "tagpr/vocabulary.py",
        "data_pipeline/tagging.py",
        "data_pipeline/simulated_tagger.py",
    }
    names = (*vocabulary.DEFINITIONS, "DEFINITIONS")
    found = {
        str(path.relative_to(ROOT))
        for package in ("tagpr", "data_pipeline", "reward_server")
        for path in (ROOT / package).rglob("*.py")
        if any(name in path.read_text(encoding="utf-8") for name in names)
    }
    world = "tagpr/benchmarks/minilamp/"
    assert {path for path in found if not path.startswith(world)} <= allowed


def test_no_default_argument_holds_the_vocabulary_of_import_time() -> None:
    for module in ("tagpr.tags", "tagpr.rewards.tag", "tagpr.rewards.composite"):
        for function in vars(importlib.import_module(module)).values():
            defaults = (*(getattr(function, "__defaults__", None) or ()),)
            defaults += tuple((getattr(function, "__kwdefaults__", None) or {}).values())
            assert not any(isinstance(value, tuple | dict) and "make_decision" in value for value in defaults)


def test_looking_the_vocabulary_up_costs_next_to_nothing(five: Path) -> None:
    text = reply("understand", "weigh", "decide")
    start = time.process_time()
    for _ in range(2000):
        check_tags(text)
        split_response(text)
    assert time.process_time() - start < 1.0
