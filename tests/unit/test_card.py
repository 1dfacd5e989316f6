"""The datasets folder, its card, and what goes to the hub: through a stand-in for its client."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from data_pipeline import publish
from data_pipeline.card import SOURCES, license_id, sources
from data_pipeline.review import run as review
from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, DataError, StageError
from tests.unit.finished_chains import TASKS, write_finished

LAMP = {"name": "lamp", "synthetic": False, "profile_size": 8, "retriever": "recency"}


def run(folder: Path, *overrides: str) -> str:
    publish.run(resolve(compose("publish_chains", [f"run.outputs={folder}", *overrides])))
    return (folder / "dataset/README.md").read_text()


def head(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    write_finished(tmp_path / "chains", per_task=8)
    return tmp_path


# the folder


def test_load_dataset_reads_every_configuration_offline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    run(folder)
    place, cache = str(folder / "dataset"), str(folder / "cache")
    loaded = datasets.load_dataset(place, cache_dir=cache)
    assert list(loaded) == ["train"]
    train = loaded["train"]
    assert train.features == publish.CHAIN_FEATURES
    assert (len(train), train[0]["judge_scores"], train[0]["gold"]) == (8 * len(TASKS), [5, 4, 5, 4], "[2]")
    source = pq.read_table(folder / "chains/sft.parquet").to_pylist()
    assert [{name: row[name] for name in source[0]} for row in train] == source
    for kind, margin in (("prp", None), ("pqp", 0.5)):
        pairs = datasets.load_dataset(place, kind, split="train", cache_dir=cache)
        assert pairs.features == publish.PAIR_FEATURES
        lines = (folder / f"chains/{kind}.jsonl").read_text().splitlines()
        assert list(pairs) == [json.loads(line) for line in lines]
        assert pairs[0]["margin"] == margin


def test_again_it_writes_the_same_bytes(folder: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (folder / "dataset").rglob("*") if path.is_file()}

    run(folder)
    before = files()
    assert len(before) == 4
    run(folder)
    assert files() == before


def test_without_pairs_there_is_no_such_configuration(folder: Path) -> None:
    run(folder)
    write_finished(folder / "chains", pairs=0)
    card = run(folder)
    assert [each["config_name"] for each in head(card)["configs"]] == ["sft"]
    assert [path.parent.name for path in (folder / "dataset/data").glob("*/*")] == ["sft"]


def test_the_cache_of_datasets_does_not_give_out_older_rows(folder: Path) -> None:
    import datasets

    def loaded() -> list[str]:
        rows = datasets.load_dataset(str(folder / "dataset"), split="train", cache_dir=str(folder / "cache"))
        return [str(row["response"]) for row in rows]

    run(folder)
    before = loaded()
    write_finished(folder / "chains", per_task=8, text="now about a lens")
    run(folder)
    after = loaded()
    assert len(after) == len(before)
    assert all("lens" in response for response in after)
    assert len(list((folder / "dataset/data/sft").iterdir())) == 1


def test_a_file_that_changed_after_the_run_is_refused(folder: Path) -> None:
    with (folder / "chains/pqp.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(
        StageError, match=r"pqp.jsonl: is missing, or is not the file that manifest.json describes"
    ):
        run(folder)


def test_what_is_missing_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"manifest.json: no such file.*bash recipes/build_chains.sh"):
        run(folder, f"paths.chains={tmp_path / 'none'}")
    path = folder / "chains/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["notes"]["benchmark"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(StageError, match="does not say of which benchmark"):
        run(folder)
    path.write_text("{")
    with pytest.raises(DataError, match="is no manifest"):
        run(folder)


# the card


def test_the_head_is_what_the_hub_reads(folder: Path) -> None:
    found = head(run(folder))
    assert found["license"] == "unknown"
    assert found["size_categories"] == ["n<1K"]
    assert {"synthetic", "simulated"} <= set(found["tags"])
    assert [each["config_name"] for each in found["configs"]] == ["sft", "prp", "pqp"]
    assert found["configs"][0]["default"] is True


def test_the_card_says_counts_thresholds_models_and_prompts(folder: Path) -> None:
    card = run(folder)
    for said in (
        "SIMULATED", "| chains asked of the teacher | 48 | 16 | 16 | 16 |", "| chosen for SFT | 24 | 8 | 8 | 8 |",
        "low_total 3", "simulated-judge", "`0123456789abcdef`", "rouge rougeL; above lamp4 0.55", "`judge_minimum` | 15",
        "`analyze_input`", "24 |", "No verdicts of people", "None: every user is made up", "Known limits",
    ):  # fmt: skip
        assert said in card, said


def test_the_card_shows_no_address_key_or_path(folder: Path) -> None:
    settings = {
        "ledger": "/home/somebody/ledger.sqlite", "tokenizer": "/data/tokenizer",
        "teacher": {"base_url": "http://10.1.2.3:8000/v1", "key_variable": "CANARY", "request": {"x": "CANARY"}, "revision": "r1"},
    }  # fmt: skip
    write_finished(
        folder / "chains",
        settings=settings,
        models={"teacher": "/data/models/Qwen3", "judge": "j", "tagger": "t"},
    )
    card = run(folder)
    assert "`Qwen3`" in card
    assert "revision r1" in card
    for secret in (
        "10.1.2.3",
        "/home",
        "/data/models",
        "/data/tokenizer",
        "CANARY",
        "ledger.sqlite",
        str(folder),
    ):
        assert secret not in card


def test_lamp_means_its_licence_for_what_is_derived(folder: Path) -> None:
    write_finished(folder / "chains", benchmark=LAMP, simulated=False)
    card = run(folder)
    assert head(card)["license"] == "cc-by-nc-sa-4.0"
    assert "SIMULATED" not in card
    for said in (
        "no commercial use",
        "same licence only",
        "real people wrote",
        "terms bind too",
        "unknown here",
    ):
        assert said in card
    with pytest.raises(
        ConfigError, match=r"^publish.license=mit: LaMP may be passed on under cc-by-nc-sa-4.0 only"
    ):
        run(folder, "publish.license=mit")


@pytest.mark.parametrize("name", ["longlamp", "pgraphrag", "dianping", "own", "another"])
def test_where_no_licence_is_known_the_card_says_so(name: str) -> None:
    found = sources({"name": name, "synthetic": False})
    assert license_id(None, found) == "unknown"
    assert license_id("cc-by-4.0", found) == "cc-by-4.0"


def test_mixed_licences_are_unknown() -> None:
    assert license_id(None, [SOURCES["lamp"], SOURCES["own"]]) == "unknown"
    with pytest.raises(ConfigError):
        license_id("cc0-1.0", [SOURCES["own"], SOURCES["lamp"]])


def test_the_review_of_these_chains_is_in_the_card_and_no_other(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = resolve(compose("review_chains", [f"run.outputs={folder}", "review.chains=12"]))
    review(config)
    rows = (folder / "review/sheet.csv").read_text("utf-8-sig").splitlines()[1:]
    cells = [line.split('","')[:2] for line in rows if line.startswith('"lamp')]
    lines = [
        {"id": name.strip('"'), "text_hash": text_hash, "verdict": "wrong" if number == 0 else "right"}
        for number, (name, text_hash) in enumerate(cells)
    ]
    path = folder / "verdicts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    review(
        resolve(
            compose("review_chains", [f"run.outputs={folder}", "review.chains=12", f"review.verdicts={path}"])
        )
    )
    assert "| all | 12 | 91.7% | 64.6% to 98.5% |" in run(folder)
    write_finished(folder / "chains", text="other chains")
    assert "No verdicts of people" in run(folder)
    assert "is a review of other chains" in caplog.text
    (folder / "review/report.json").write_text("[]")
    with pytest.raises(DataError, match=r"^publish.review="):
        run(folder)


# the hub


class FakeHub:
    """Keeps what it is told; ``fails`` is raised by the upload."""

    def __init__(self, private: bool = True, fails: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._private = private
        self._fails = fails

    def create_repo(self, repo_id: str, **arguments: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **arguments}))

    def repo_info(self, repo_id: str, *, repo_type: str) -> Any:
        self.calls.append(("repo_info", {"repo_id": repo_id, "repo_type": repo_type}))
        return SimpleNamespace(private=self._private)

    def upload_folder(self, **arguments: Any) -> None:
        self.calls.append(("upload_folder", arguments))
        if self._fails:
            raise self._fails


def test_the_fake_can_do_what_the_real_client_does() -> None:
    import inspect

    for name, arguments in (
        ("create_repo", {"repo_id", "repo_type", "private", "exist_ok"}), ("repo_info", {"repo_id", "repo_type"}),
        ("upload_folder", {"repo_id", "repo_type", "folder_path", "commit_message", "allow_patterns", "delete_patterns"}),
    ):  # fmt: skip
        assert arguments <= set(inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters)


def test_pushing_is_private_and_uploads_card_and_data_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub, tokens = FakeHub(), []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: tokens.append(token) or hub)
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    run(folder, "publish.push=owner/chains")
    assert tokens == ["hf_canary"]
    (_, made), _, (_, sent) = hub.calls
    assert made == {"repo_id": "owner/chains", "repo_type": "dataset", "private": True, "exist_ok": True}
    assert sent["folder_path"] == str(folder / "dataset")
    (folder / "dataset/private notes.txt").write_text("not for the hub")
    from huggingface_hub.utils import filter_repo_objects

    files = [
        str(path.relative_to(folder / "dataset"))
        for path in (folder / "dataset").rglob("*")
        if path.is_file()
    ]
    assert sorted(filter_repo_objects(files, allow_patterns=sent["allow_patterns"])) == [
        "README.md", *sorted(str(path.relative_to(folder / "dataset")) for path in (folder / "dataset/data").glob("*/*")),
    ]  # fmt: skip
    assert all(b"hf_canary" not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert "hf_canary" not in caplog.text


def test_a_public_repository_is_not_filled_unless_that_is_meant(folder: Path) -> None:
    hub = FakeHub(private=False)
    with pytest.raises(StageError, match=r"^publish.push=a/b: is public on the hub"):
        publish.push(folder, "a/b", True, hub)
    assert [name for name, _ in hub.calls] == ["create_repo", "repo_info"]
    publish.push(folder, "a/b", False, hub)
    assert hub.calls[-1][0] == "upload_folder"


def refused(status: int, form: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    return form("no", response=httpx.Response(status, request=httpx.Request("POST", "http://hub")))


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (refused(401), "the hub refuses (status 401)"), (refused(404, RepositoryNotFoundError), "status 404"),
        (httpx.ConnectError("x"), "cannot be reached (ConnectError)"), (httpx.ReadTimeout("x"), "cannot be reached"),
        (ConnectionError("offline"), "cannot be reached"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(folder: Path, fails: Exception, says: str) -> None:
    with pytest.raises(StageError) as caught:
        publish.push(folder, "a/b", True, FakeHub(fails=fails))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_real_client_without_a_hub_is_one_line(folder: Path) -> None:
    run(folder)
    hub = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="hf_x")
    with pytest.raises(StageError, match="the hub cannot be reached"):
        publish.push(folder / "dataset", "a/b", True, hub)


def test_the_token_comes_from_the_variable_or_the_file_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^publish.push: needs a token"):
        run(folder, "publish.push=a/b")
    assert not (folder / "dataset").exists()
    with pytest.raises(ConfigError, match=r"^publish.token_file=none: cannot be read"):
        publish.read_token("none")
    path = folder / "token"
    path.write_text(" hf_of_the_file\n")
    assert publish.read_token(str(path)) == "hf_of_the_file"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        publish.read_token(str(path))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_variable")
    assert publish.read_token(None) == "hf_of_the_variable"


@pytest.mark.parametrize(
    "name", ["chains", "a/b/c", "a b/c", "/x", "a/", "a/--b", "a/b.git", "a/" + "x" * 100]
)
def test_a_name_that_is_none_is_refused_before_anything_is_written(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^publish.push=.*Give owner/name"):
        run(folder, f"publish.push='{name}'")
    assert not (folder / "dataset").exists()


@pytest.mark.parametrize("override", ["publish.private=perhaps", "+publish.typo=1"])
def test_settings_that_cannot_be_meant_are_refused(folder: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"^publish\."):
        run(folder, override)
