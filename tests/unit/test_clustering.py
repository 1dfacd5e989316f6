"""From noisy free tags to clusters, to a mapping that a person edits, to a vocabulary (S9, S10, S41)."""

import asyncio
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.clustering import Clustering, cluster, features, merge_spellings, normalise
from data_pipeline.clustering_report import render
from data_pipeline.endpoint import Unit
from data_pipeline.exploration import explore
from data_pipeline.exploratory import Proposal
from data_pipeline.mapping import (
    Entry,
    is_edited,
    main,
    proposed_mapping,
    read_mapping,
    to_vocabulary,
    write_mapping,
    write_vocabulary,
)
from data_pipeline.settings import ContextWeights, ExploratorySettings, read_settings
from data_pipeline.simulated_tagger import SimulatedTagger
from tagpr.benchmarks.minilamp import reader
from tagpr.benchmarks.minilamp.generate import draw
from tagpr.benchmarks.minilamp.world import TASK_NAMES, population
from tagpr.configuration import compose, resolve
from tagpr.embedding import load_embedder
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.schema import Chain
from tagpr.vocabulary import DEFINITIONS, read_vocabulary

WEIGHTS = ContextWeights(name=0.5, purposes=1.0, segments=1.0)
SETTINGS = ExploratorySettings(
    chains=1.0, embedder="offline", fewest_clusters=2, most_clusters=8, weights=WEIGHTS
)


def proposal(tag: str, purpose: str, segment: str, name: str = "c") -> Proposal:
    return Proposal(chain_id=name, task="lamp1", tag=tag, purpose=purpose, segment=segment)


KINDS = {
    "read the question": (["Read_Question", "task reading", "understand"], "says what is asked", "the question asks for"),
    "count votes": (["count votes", "VOTE COUNTING", "tally"], "adds up the items", "seven items say yes and two no"),
    "choose": (["choose", "Decision", "final-pick"], "settles on an answer", "so I take the second one"),
}  # fmt: skip


def three_kinds(each: int = 12) -> list[Proposal]:
    return [
        proposal(names[n % len(names)], purpose, f"{segment} number {n % 5}")
        for names, purpose, segment in KINDS.values()
        for n in range(each)
    ]


@pytest.fixture(scope="module")
def three() -> Clustering:
    return cluster(three_kinds(), SETTINGS, seed=0)


# names


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("Identify_the-Pattern", "identify pattern"),
        ("  IDENTIFY   PATTERN ", "identify pattern"),
        ("identifyPattern", "identify pattern"),
        ("the", "the"),
        ("ＦＵＬＬ width", "full width"),
        ("分析_输入", "分析 输入"),
    ],
)
def test_tags_are_normalised(tag: str, name: str) -> None:
    assert normalise(tag) == name


def test_spellings_of_one_tag_are_one() -> None:
    tags = merge_spellings(
        [
            proposal(tag, "p", "s")
            for tag in ("Identify Patterns", "identify_pattern", "IDENTIFYING PATTERNS", "decide")
        ]
    )
    assert [(tag.key, tag.count, len(tag.spellings)) for tag in tags] == [
        ("identifi pattern", 3, 3),
        ("decid", 1, 1),
    ]


@given(st.lists(st.text(max_size=20), max_size=8))
def test_normalising_never_raises_and_keeps_every_proposal(names: list[str]) -> None:
    tags = merge_spellings([proposal(name, "p", "s") for name in names])
    assert sum(tag.count for tag in tags) == len(names)
    assert len({tag.key for tag in tags}) == len(tags)


# clustering


def test_kinds_with_nothing_in_common_but_their_use_are_found(three: Clustering) -> None:
    assert len(three.clusters) == 3
    found = {frozenset(normalise(tag.name) for tag in cluster.members) for cluster in three.clusters}
    assert found == {frozenset(normalise(name) for name in names) for names, _, _ in KINDS.values()}
    assert {cluster.definition for cluster in three.clusters} == {purpose for _, purpose, _ in KINDS.values()}
    assert sum(cluster.share for cluster in three.clusters) == pytest.approx(1.0)
    assert [candidate.k for candidate in three.sweep] == list(range(2, 9))
    assert three.silhouette == max(candidate.silhouette for candidate in three.sweep)
    assert three.embedder == "hashed character n-grams (offline, no model)"
    assert len({cluster.name for cluster in three.clusters}) == 3


def test_the_same_proposals_and_seed_give_the_same_clusters_in_any_order(three: Clustering) -> None:
    shuffled = three_kinds()
    random.Random(3).shuffle(shuffled)
    again = cluster(shuffled, SETTINGS, seed=0)
    assert again.clusters == three.clusters
    assert again.sweep == three.sweep
    assert np.array_equal(again.points, three.points)


def test_contexts_without_a_weight_do_not_count() -> None:
    tags = merge_spellings(three_kinds())
    embedder = load_embedder("offline")
    only = features(tags, embedder, ContextWeights(name=0.0, purposes=1.0, segments=0.0))
    assert len(np.unique(only.round(6), axis=0)) == 3
    assert features(tags, embedder, WEIGHTS).shape[1] == 3 * only.shape[1]


def test_what_every_segment_says_does_not_hide_what_sets_them_apart() -> None:
    opener = "Okay, so let me think about what this user has written before, and about the text that is given here: "
    words = ("the question asks", "adding up", "take this one")
    proposals = [
        proposal(names[n % 3], "p", f"{opener}{word} {'abcde'[n % 5]}")
        for (names, _, _), word in zip(KINDS.values(), words, strict=True)
        for n in range(12)
    ]
    weights = WEIGHTS.model_copy(update={"purposes": 0.0})
    found = cluster(proposals, SETTINGS.model_copy(update={"weights": weights}), 0)
    assert {frozenset(tag.name for tag in each.members) for each in found.clusters} == {
        frozenset(normalise(name) for name in names) for names, _, _ in KINDS.values()
    }


def test_too_few_tags_are_one_clear_line() -> None:
    with pytest.raises(StageError, match=r"fewest_clusters=4: only 2 distinct tags"):
        cluster(
            [proposal("a", "p", "s"), proposal("b", "q", "t")],
            SETTINGS.model_copy(update={"fewest_clusters": 4}),
            0,
        )


def test_the_number_of_clusters_can_be_chosen() -> None:
    fixed = SETTINGS.model_copy(update={"fewest_clusters": 5, "most_clusters": 5})
    assert len(cluster(three_kinds(), fixed, 0).clusters) == 5


def test_clusters_of_odd_names_get_names_that_can_be_tags() -> None:
    odd = [
        proposal(tag, purpose, segment)
        for tag, purpose, segment in (
            [("分析", "第一步 <b>", "问题 是")] * 3
            + [("1st step", "counts\tall", "one two")] * 3
            + [("think", "is it", "xyz abc")] * 3
            + [("Think", "is it", "xyz abc")] * 3
            + [("tool call", "calls", "def ghi")] * 2
        )
    ]
    fixed = SETTINGS.model_copy(update={"fewest_clusters": 3, "most_clusters": 3})
    found = cluster(odd, fixed, 0)
    tags = to_vocabulary(Path("m"), proposed_mapping(found))
    assert len(tags) == 3
    assert all(re.fullmatch(r"[a-z_0-9]+", tag) and tag not in ("think", "tool_call") for tag in tags)
    assert not any("<" in definition for definition in tags.values())


# recovery of the tags that the simulated tagger has in mind


def simulated_proposals(chains: int, seed: int) -> tuple[list[Proposal], list[str]]:
    """Proposals for chains of MiniLaMP, and the kind that each segment really is."""
    from data_pipeline.exploratory import ExploratoryTagging

    settings = read_settings(resolve(compose("build_chains", [])))
    tagger = SimulatedTagger(settings.prompts, settings.simulated)
    tagging = ExploratoryTagging.load(settings.prompts.exploratory_tagging)
    rng = random.Random(seed)
    users = population(seed, 40)
    found: list[Proposal] = []
    for number in range(chains):
        task = TASK_NAMES[number % len(TASK_NAMES)]
        question, _ = draw(task, rng.choice(users), rng)
        reasoned = reader.reason(question, rng, reader.FaultRates(verify=0.3))
        chain = simulated_chain(str(number), task, question, reader.untagged(reasoned.steps))
        prompt = tagging.prompt(question, chain.reasoning)
        for _ in range(3):
            proposals, problem = tagging.accept(chain, tagger.reply(prompt, rng))
            if not problem:
                found += proposals
                break
    return found, [reader.segment(each.segment)[0][0] for each in found]


def simulated_chain(name: str, task: str, question: str, reasoning: str) -> Chain:
    return Chain(
        id=name, example_id=name, task=task, user_id="u", prompt=question, gold="g", rollout=0, reasoning=reasoning,
        answer="a", verifiable=1.0,
    )  # fmt: skip


def test_the_nine_are_recovered_from_noisy_free_tags() -> None:
    from sklearn.metrics import adjusted_rand_score, v_measure_score

    from data_pipeline.simulated_tagger import FREE_TAGS

    proposals, true = simulated_proposals(240, seed=5)
    sweep = SETTINGS.model_copy(update={"fewest_clusters": 4, "most_clusters": 20})
    found = cluster(proposals, sweep, seed=5)
    of = found.cluster_of()
    tags = {spelling: tag.key for tag in found.tags for spelling in tag.spellings}
    guessed = [of[tags[each.tag]] for each in proposals]
    assert set(true) == set(DEFINITIONS)
    assert len(found.tags) > 40
    # Nine kinds, and what vague names there are may be one more.
    assert 9 <= len(found.clusters) <= 10
    # What is wrong in the proposals themselves is 8 % + 3 %.
    assert adjusted_rand_score(true, guessed) > 0.75
    assert v_measure_score(true, guessed) > 0.7
    # Every name that anybody gives to a kind is in the cluster of that kind's other names.
    kind_of = {" ".join(normalise(name).split()): kind for kind, names in FREE_TAGS.items() for name in names}
    known = [(kind_of[tag.name], of[tag.key]) for tag in found.tags if tag.name in kind_of]
    assert adjusted_rand_score(*zip(*known, strict=True)) > 0.95


# the page


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        assert not any(key.startswith("on") or key in ("src", "href") for key, _ in attrs)

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_the_figures_and_says_simulated(three: Clustering) -> None:
    page = Page(render(three, 36, synthetic=True))
    assert "SIMULATED" in page.text
    assert page.names.count("svg") == 2
    assert page.names.count("circle") == len(three.tags) + len(three.sweep) + 1
    for each in three.clusters:
        assert f"{each.share:.1%}" in page.text
        assert each.name in page.text
    assert "SIMULATED" not in Page(render(three, 36, synthetic=False)).text


def test_text_of_models_stays_text_on_the_page() -> None:
    attack = '</q></svg><script>alert(1)</script><img src=x onerror="x"> $title'
    page = render(cluster([
        *three_kinds(3), *(proposal("odd", attack, attack) for _ in range(4))
    ], SETTINGS, 0), 9, synthetic=False)  # fmt: skip
    page.encode("utf-8")
    assert not {"script", "img"} & set(Page(page).names)
    assert "<script>alert(1)</script>" in Page(page).text


# the mapping


def test_a_mapping_is_read_back_as_it_was_written(tmp_path: Path, three: Clustering) -> None:
    path, kept = write_mapping(tmp_path, proposed_mapping(three))
    assert not kept
    assert not is_edited(path)
    read = read_mapping(path)
    assert [(e.name, e.definition, e.members) for e in read] == [
        (e.name, e.definition, e.members) for e in proposed_mapping(three)
    ]
    assert list(to_vocabulary(path, read)) == [each.name for each in three.clusters]


def test_an_edited_mapping_is_never_overwritten(tmp_path: Path, three: Clustering) -> None:
    entries = proposed_mapping(three)
    path, _ = write_mapping(tmp_path, entries)
    assert write_mapping(tmp_path, entries[:2]) == (path, False)
    assert len(read_mapping(path)) == 2
    mine = path.read_text().replace(str(entries[0].name), "my_own_name")
    path.write_text(mine)
    assert write_mapping(tmp_path, entries) == (path, True)
    assert path.read_text() == mine
    assert len(read_mapping(tmp_path / "mapping.new.yaml")) == 3
    # Without its first line a file is somebody's own, too.
    path.write_text("\n".join(mine.splitlines()[1:]))
    assert write_mapping(tmp_path, entries)[1]
    path.unlink()
    assert write_mapping(tmp_path, entries) == (path, False)
    assert not (tmp_path / "mapping.new.yaml").exists()


EDITED = """\
clusters:
- name: read
  definition: says what is asked
  share: 0.5
  members: [read question, task reading]
- name: decide
  definition: null
  members: [choose]
- name: decide
  definition: settles on an answer
  members: [final pick]
- name: null
  members: [thinking]
"""


def test_merged_and_dropped_clusters_become_a_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping, target = tmp_path / "mapping.yaml", tmp_path / "tags.yaml"
    mapping.write_text(EDITED)
    assert main([str(mapping), str(target)]) == 0
    assert "2 tags: read, decide" in capsys.readouterr().out
    assert read_vocabulary(target) == {"read": "says what is asked", "decide": "settles on an answer"}
    assert main([str(mapping), str(target)]) == 0
    target.write_text(target.read_text().replace("settles", "decides"))
    assert main([str(mapping), str(target)]) == 2
    assert "exists and says something else" in capsys.readouterr().err
    assert main([str(mapping)]) == 2


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("clusters:", "groups:", "is no mapping file"),
        ("name: read", "name: think", r":2: name: think is a mark of the chat format"),
        ("name: read", "name: read it", r":2: name: read it cannot be a tag"),
        ("name: read", "nam: read", r":2: nam: is no key of a cluster"),
        ("name: read", "name: [read]", r":2: name: is no text"),
        ("  share: 0.5", "  name: again", r":4: name: occurs twice"),
        ("  share: 0.5", "  share: half", r"share: is no number"),
        (
            "definition: says what is asked",
            "definition: a <b> c",
            r":3: definition: its definition has angle brackets",
        ),
        ("definition: says what is asked", "definition: null", r":2: definition: read has none"),
        (
            "definition: null",
            "definition: another",
            r":9: definition: decide has another one in the cluster at line 6",
        ),
        (
            "members: [final pick]",
            "members: [choose]",
            r":9: member 'choose' is also in the cluster at line 6",
        ),
        ("members: [final pick]", "members: choose", r":11: members: is no list"),
        ("members: [final pick]", "members: [[a]]", r":11: members: is no text"),
        ("  members: [final pick]\n", "", r":9: members: is missing"),
        (
            "name: decide\n  definition: null",
            "name: Read\n  definition: x",
            r":6: name: Read differs .* capitals only",
        ),
        ("name: read", "name: null", r"leaves 1 tags"),
        ("name: read", "name: 'read", r":\d+: is no YAML"),
    ],
)
def test_a_faulty_edit_is_named_with_its_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    mapping = tmp_path / "mapping.yaml"
    assert old in EDITED
    mapping.write_text(EDITED.replace(old, new, 1))
    with pytest.raises(DataError, match=says) as error:
        write_vocabulary(mapping, tmp_path / "tags.yaml")
    assert str(mapping) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tags.yaml").exists()


def test_a_missing_mapping_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_mapping(tmp_path / "none.yaml")


@given(st.lists(st.tuples(st.text(min_size=1, max_size=12), st.text(max_size=12)), max_size=6))
def test_whatever_models_say_a_mapping_can_be_read_again(texts: list[tuple[str, str]]) -> None:
    import tempfile

    members = sorted({" ".join(name.split()) for name, _ in texts} - {""})
    entries = [Entry(f"tag_{n}", "does it", (member,), 0.1) for n, member in enumerate(members)]
    with tempfile.TemporaryDirectory() as folder:
        path, _ = write_mapping(Path(folder), entries)
        assert [e.members[0].strip() for e in read_mapping(path)] == [member.strip() for member in members]


# the stage


def test_exploring_leaves_report_proposals_and_mapping(tmp_path: Path) -> None:
    settings = read_settings(
        resolve(
            compose("build_chains", ["chains.exploratory.chains=120", "chains.simulated.tag_unclosed=0.1"])
        )
    )
    tagger = SimulatedTagger(settings.prompts, settings.simulated)
    rng = random.Random(0)
    users = population(0, 20)
    chains = []
    for number in range(150):
        task = TASK_NAMES[number % len(TASK_NAMES)]
        question, _ = draw(task, rng.choice(users), rng)
        reasoned = reader.reason(question, rng, reader.FaultRates())
        chains.append(simulated_chain(str(number), task, question, reader.untagged(reasoned.steps)))

    async def ask(unit: Unit) -> Any:
        assert unit.kind == "exploratory_tagger"
        assert unit.request["response_format"]["json_schema"]["name"] == "named_segments"
        text = tagger.reply(unit.prompt, random.Random(f"{unit.prompt} {unit.attempt}"))
        return type("Reply", (), {"text": text})()

    first = asyncio.run(explore(chains, ask, settings, tmp_path / "a", seed=0))
    again = asyncio.run(explore(chains[::-1], ask, settings, tmp_path / "b", seed=0))
    assert first.chains == 120
    assert first.untagged <= 2
    assert first.rejected
    assert first.clustering.clusters == again.clustering.clusters
    assert (tmp_path / "a/mapping.yaml").read_bytes() == (tmp_path / "b/mapping.yaml").read_bytes()
    assert (tmp_path / "a/clusters.html").read_bytes() == (tmp_path / "b/clusters.html").read_bytes()
    lines = (tmp_path / "a/proposals.jsonl").read_text().splitlines()
    assert tuple(map(Proposal.model_validate_json, lines)) == first.proposals
    assert not first.mapping_kept


def test_replies_that_are_all_malformed_are_one_clear_line(tmp_path: Path) -> None:
    settings = read_settings(resolve(compose("build_chains", ["chains.exploratory.chains=1"])))

    async def ask(unit: Unit) -> Any:
        return type("Reply", (), {"text": "Thought process:"})()

    with pytest.raises(StageError, match=r"none of 1 chains was tagged \(not_json 3\)"):
        asyncio.run(explore([simulated_chain("1", "lamp1", "q", "a. b.")], ask, settings, tmp_path, seed=0))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "chains.exploratory.most_clusters=3",
            "chains.exploratory.most_clusters=3: less than fewest_clusters=4",
        ),
        (
            "chains.exploratory.weights={name: 0, purposes: 0, segments: 0}",
            "chains.exploratory.weights: all are 0",
        ),
        ("chains.exploratory.fewest_clusters=1", "chains.exploratory.fewest_clusters=1"),
        ("chains.tagging.mode=both", "chains.tagging.mode=both"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_settings(resolve(compose("build_chains", [override])))
