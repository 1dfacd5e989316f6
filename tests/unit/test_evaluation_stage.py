"""The whole stage with the engine replaced: outputs, going on, and one line for everything a user can get wrong."""

import json
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from test_evaluation_prmu_scores import StubServer, logit

from tagpr.benchmarks.storage import write_examples
from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, DataError, RewardServerError, StageError, TagPRError
from tagpr.evaluation import prmu_scores, stage
from tagpr.evaluation.engines import Completion, Request
from tagpr.evaluation.generate import in_own_process
from tagpr.evaluation.methods import Method
from tagpr.evaluation.prompts import RenderedPrompt
from tagpr.schema import Example

LABELS = ["base", "sft", "guided", "exploratory"]


class FakeRenderer:
    def __init__(self, model: str, settings: object, thinking: bool = True) -> None:
        self.model = model
        self.thinking = thinking

    def render(self, example: Example) -> RenderedPrompt:
        return RenderedPrompt(f"Prompt of {example.id}", (1, 2, 3), 0, 0)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def response_text(self, text: str) -> str:
        return text

    def reasoning_tokens(self, response: str, total: int) -> int:
        return total


class FakeEngine:
    """Says what lies in ``reply.txt`` beside the model."""

    started: list[str] = []  # noqa: RUF012

    def __init__(self, method: Method, *_: object) -> None:
        self.model = method.model
        self.started.append(Path(method.model).parent.name)

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            reply = (Path(self.model) / "reply.txt").read_text()
            yield Completion(request.key, tuple(map(ord, reply)), "stop")

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubServer:
    stub = StubServer()
    monkeypatch.setattr(prmu_scores, "local_server", stub.serve)
    # By name: a process of its own imports this file, and should not have to load transformers.
    monkeypatch.setattr("tagpr.prmu.model.content_version", lambda folder: stub.version)
    return stub


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: StubServer) -> Path:
    monkeypatch.setattr(stage, "PromptRenderer", FakeRenderer)
    monkeypatch.setattr(stage, "open_engine", FakeEngine)
    monkeypatch.setattr(stage, "_has_gpu", lambda: False)
    FakeEngine.started.clear()
    for split, users in (("train", 2), ("dev", 4)):
        write_examples(
            tmp_path / "data" / "minilamp" / f"{split}.parquet",
            [
                Example(
                    id=f"{task}:{split}:{n}", task=task, split=split, user_id=str(n % users), query="q",  # type: ignore[arg-type]
                    profile=(), gold="4" if task == "lamp3" else "[1]",
                )
                for task in ("lamp1", "lamp3")
                for n in range(6)
            ],
        )  # fmt: skip
    for folder, answer in zip(("base", "sft", "guided_rl", "exploratory_rl"), "1444", strict=True):
        make_model(tmp_path / folder / "model", f"<think>\nwords.\n</think>\n\n{answer}")
    make_model(tmp_path / "prmu" / "model", "")
    return tmp_path


def make_model(folder: Path, reply: str) -> None:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    (folder / "reply.txt").write_text(reply)


def evaluate(outputs: Path, *overrides: str) -> dict:
    config = compose("evaluate", [f"run.outputs={outputs}", "evaluate.bootstrap.resamples=50", *overrides])
    stage.run(resolve(config))
    return json.loads((outputs / "evaluation" / "summary.json").read_text())


def test_everything_is_written_and_a_second_run_starts_nothing(
    outputs: Path, stub: StubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = evaluate(outputs)
    folder = outputs / "evaluation"
    greedy = summary["decodings"][0]
    assert list(greedy["models"]) == LABELS
    assert greedy["models"]["sft"]["verifiable"] == {"lamp1": 0.0, "lamp3": 1.0}
    assert greedy["models"]["base"]["task_score"] == 0.5  # "1" is [1] of LaMP-1, and wrong in LaMP-3
    assert greedy["models"]["sft"]["groups"]["seen"]["users"] == 2
    assert summary["rows_selected"] == 12
    table = (folder / "table.md").read_text()
    printed = capfd.readouterr().out
    assert printed.startswith(table[: table.index("## Differences by task")])
    assert "## Failed checks" not in printed
    assert "## Failed checks" in table
    assert "12 rows of 4 users, greedy decoding" in table
    assert "Prompt of lamp1:dev:0" in (folder / "report.html").read_text()
    assert json.loads((folder / "manifest.json").read_text())["stage"] == "evaluate"
    assert FakeEngine.started == ["base", "sft", "guided_rl", "exploratory_rl"]
    assert (stub.starts, stub.running) == (1, 0)
    assert sum(map(len, stub.requests)) == 48
    evaluate(outputs)
    assert len(FakeEngine.started) == 4
    assert stub.starts == 1
    assert (folder / "table.md").read_text() == table


def test_limit_takes_all_tasks_evenly_and_a_larger_one_only_adds(outputs: Path) -> None:
    few = evaluate(outputs, "evaluate.limit=4", "evaluate.only=[sft]")
    rows = (outputs / "evaluation" / "sft.jsonl").read_text()
    assert few["decodings"][0]["models"]["sft"]["verifiable"] == {"lamp1": 0.0, "lamp3": 1.0}
    assert len(rows.splitlines()) == 4
    evaluate(outputs, "evaluate.limit=6", "evaluate.only=[sft]")
    more = (outputs / "evaluation" / "sft.jsonl").read_text()
    assert more.startswith(rows)
    assert len(more.splitlines()) == 6
    again = evaluate(outputs, "evaluate.limit=4", "evaluate.only=[sft]")
    assert again["decodings"][0]["models"]["sft"]["rows"] == 4
    assert len((outputs / "evaluation" / "sft.jsonl").read_text().splitlines()) == 6


def test_samples_stand_beside_greedy_answers(outputs: Path) -> None:
    summary = evaluate(outputs, "evaluate.seeds=[5,6]", "evaluate.only=[sft,guided]")
    assert [each["name"] for each in summary["decodings"]] == ["greedy", "sampled"]
    assert summary["decodings"][1]["models"]["sft"]["replicates"] == ["seed 5", "seed 6"]
    assert len((outputs / "evaluation" / "sft.jsonl").read_text().splitlines()) == 36


def test_a_sweep_uses_one_engine_and_adds_to_nothing_that_is_there(outputs: Path) -> None:
    alone = evaluate(outputs, "evaluate.only=[base,sft]")
    started = len(FakeEngine.started)
    sweep = [
        "evaluate.sweep.profile_sizes=[0,8,2]",
        "evaluate.sweep.retrievers=[random]",
        "evaluate.seeds=[5]",
    ]
    swept = evaluate(outputs, "evaluate.only=[base,sft]", *sweep)
    assert len(FakeEngine.started) == started + 2
    assert swept["decodings"][0] == alone["decodings"][0]
    conditions = [(point["retriever"], point["profile_size"], point["model"]) for point in swept["sweep"]]
    assert conditions == [
        (retriever, size, model)
        for retriever, size in [("recency", 8), ("recency", 0), ("recency", 2), ("random", 8)]
        for model in ("base", "sft")
    ]
    lines = (outputs / "evaluation" / "sweep" / "recency-2" / "sft.jsonl").read_text().splitlines()
    assert len(lines) == 12  # greedy answers only
    page = (outputs / "evaluation" / "report.html").read_text()
    assert "by profile items" in page
    assert "by retriever" in page
    evaluate(outputs, "evaluate.only=[base,sft]", *sweep)
    assert len(FakeEngine.started) == started + 2


def test_every_pair_of_a_sweep(outputs: Path) -> None:
    overrides = ["evaluate.sweep.profile_sizes=[0,4]", "evaluate.sweep.retrievers=[random,recency]"]
    swept = evaluate(outputs, "evaluate.only=[sft]", *overrides, "evaluate.sweep.product=true")
    conditions = [(point["retriever"], point["profile_size"]) for point in swept["sweep"]]
    assert conditions == [("recency", 8), ("random", 0), ("random", 4), ("recency", 0), ("recency", 4)]


def test_training_runs_of_one_method_are_one_row_of_the_table(outputs: Path, stub: StubServer) -> None:
    make_model(outputs / "again" / "model", "<think>\nwords.\n</think>\n\n1")
    runs = f"evaluate.models.sft=[{outputs}/sft/model,{outputs}/again/model]"
    found = evaluate(outputs, runs, "evaluate.only=[base,sft]")["decodings"][0]["models"]
    assert list(found) == ["base", "sft"]
    assert found["sft"]["replicates"] == ["run 1, greedy", "run 2, greedy"]
    assert found["sft"]["task_score"] == 0.5
    assert found["sft"]["reward"] is not None
    asked = {item["id"].split("/")[0] for items in stub.requests for item in items}
    assert asked == {"base", "sft", "sft-run2"}


def test_the_reward_is_asked_about_what_the_model_saw_and_said(outputs: Path, stub: StubServer) -> None:
    summary = evaluate(outputs, "evaluate.only=[base,sft]", "evaluate.seeds=[5]")
    asked = {item["id"]: item for items in stub.requests for item in items}
    assert len(asked) == 48
    assert asked["sft/lamp1:dev:3/5"] == {
        "id": "sft/lamp1:dev:3/5",
        "user_id": "3",
        "prompt": "Prompt of lamp1:dev:3",
        "response": "<think>\nwords.\n</think>\n\n4",
    }
    found = summary["decodings"][0]["models"]["sft"]
    personal = 1 / (1 + math.exp(-logit("Prompt of lamp1:dev:3", "4")))
    assert found["reward_parts"]["prmu"] == pytest.approx(personal)
    repetition = found["reward_parts"]["repetition"]
    assert found["reward"] == pytest.approx(0.8 * (0.5 + repetition) - 0.8 + 0.2 * personal)
    assert {each["measure"] for each in summary["decodings"][0]["differences"]} >= {"task_score", "reward"}
    assert (summary["prmu_version"], summary["reward_weights"]["gamma"]) == ("v1", 0.2)
    table, page = ((outputs / "evaluation" / name).read_text() for name in ("table.md", "report.html"))
    assert "reward (eq. 5) ↑" in table
    assert "reward (eq. 5) ↑" in page
    assert "R_PRMU 0." in page
    assert "prmu" in json.loads((outputs / "evaluation" / "manifest.json").read_text())["inputs"]


def test_another_prmu_asks_again_but_answers_nothing_again(outputs: Path, stub: StubServer) -> None:
    evaluate(outputs, "evaluate.only=[sft]")
    stub.version = "v2"
    assert evaluate(outputs, "evaluate.only=[sft]")["prmu_version"] == "v2"
    assert (stub.starts, len(FakeEngine.started)) == (2, 1)


@pytest.mark.parametrize("override", ["evaluate.reward=false", "evaluate.reward_weights.gamma=0"])
def test_without_the_reward_nobody_needs_prmu(outputs: Path, stub: StubServer, override: str) -> None:
    summary = evaluate(outputs, override, "evaluate.only=[sft]", "paths.prmu=/nowhere")
    found = summary["decodings"][0]["models"]["sft"]
    assert stub.starts == 0
    assert summary["prmu_version"] is None
    assert (found["reward"] is None) == ("false" in override)
    assert ("eq. 5" in (outputs / "evaluation" / "table.md").read_text()) == ("false" not in override)


def test_on_a_gpu_the_server_waits_until_the_memory_is_free(
    outputs: Path, stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_has_gpu", lambda: True)

    def here(function: Callable[..., int], **arguments: object) -> int:
        assert stub.starts == 0
        return function(**arguments)

    monkeypatch.setattr(stage, "in_own_process", here)
    evaluate(outputs, "evaluate.only=[base,sft]")
    assert stub.starts == 1


@pytest.mark.parametrize("gpu", [True, False])
def test_beside_an_engine_on_a_cpu_the_server_starts_at_once(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    order: list[str] = []

    class Engine(FakeEngine):
        def __init__(self, method: Method, *_: object) -> None:
            order.append("engine")
            super().__init__(method)

    def start(server: prmu_scores.BackgroundServer) -> None:
        order.append("server")
        actually_start(server)

    actually_start = prmu_scores.BackgroundServer.start
    monkeypatch.setattr(prmu_scores.BackgroundServer, "start", start)
    monkeypatch.setattr(stage, "open_engine", Engine)
    monkeypatch.setattr(stage, "_has_gpu", lambda: gpu)
    evaluate(outputs, "evaluate.only=[sft]", "evaluate.engine.process_per_model=false")
    assert order[:2] == (["engine", "server"] if gpu else ["server", "engine"])


def test_a_prompt_that_today_would_be_another_is_not_scored(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(outputs, "evaluate.only=[sft]", "evaluate.reward=false")
    monkeypatch.setattr(FakeRenderer, "render", lambda *_: RenderedPrompt("another", (1, 2), 0, 0))
    with pytest.raises(StageError, match=r"sft\.jsonl: row \S+ answers another prompt"):
        evaluate(outputs, "evaluate.only=[sft]")


def test_a_server_that_cannot_start_stops_the_stage_and_keeps_the_answers(
    outputs: Path, stub: StubServer
) -> None:
    stub.fails_to_start = True
    with pytest.raises(RewardServerError, match="reward server: exited"):
        evaluate(outputs, "evaluate.only=[sft]")
    assert len((outputs / "evaluation" / "sft.jsonl").read_text().splitlines()) == 12
    assert not (outputs / "evaluation" / "summary.json").exists()


def test_a_retrained_model_answers_again(outputs: Path) -> None:
    evaluate(outputs, "evaluate.only=[sft]")
    (outputs / "sft" / "model" / "reply.txt").write_text("<think>\nwords.\n</think>\n\n1")
    (outputs / "sft" / "model" / "model.safetensors").write_text("{1}")
    with pytest.raises(StageError, match="made with another model"):
        evaluate(outputs, "evaluate.only=[sft]", "evaluate.when_changed=refuse")
    assert evaluate(outputs, "evaluate.only=[sft]")["decodings"][0]["models"]["sft"]["task_score"] == 0.5
    assert list((outputs / "evaluation" / "superseded").glob("*sft.jsonl"))


def test_rows_scored_by_older_code_are_scored_again(outputs: Path) -> None:
    evaluate(outputs, "evaluate.only=[sft]")
    path = outputs / "evaluation" / "sft.jsonl"
    right = path.read_text()
    path.write_text(right.replace('"verifiable": 1.0', '"verifiable": 0.125'))
    assert evaluate(outputs, "evaluate.only=[sft]")["decodings"][0]["models"]["sft"]["task_score"] == 0.5
    assert path.read_text() == right


def test_a_model_of_ones_own(outputs: Path) -> None:
    make_model(outputs / "mine", "nothing")
    summary = evaluate(outputs, f"+evaluate.models.mine={outputs}/mine", "evaluate.only=[base,mine]")
    assert summary["decodings"][0]["models"]["mine"]["failures"] == {"no_think": 12}


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["evaluate.only=[sft,gided]"], ConfigError, "evaluate.only=gided: no such model"),
        (["evaluate.only=[]"], ConfigError, "names no model"),
        (["evaluate.limit=0"], ConfigError, "evaluate.limit=0"),
        (["evaluate.greedy=false"], ConfigError, "nothing to do"),
        (["evaluate.seeds=[1,1]"], ConfigError, "a seed twice"),
        (["evaluate.seeds=[1]", "evaluate.temperature=0"], ConfigError, "evaluate.temperature=0"),
        (["evaluate.when_changed=never"], ConfigError, "evaluate.when_changed=never"),
        (["evaluate.split=test"], StageError, "test.parquet: no such file. Run `bash recipes/prepare_data.sh`"),
        (["benchmark.tasks=[lamp7]"], DataError, "holds no row of benchmark.tasks"),
        (["+evaluate.models.mine=/nowhere/at/all"], StageError, "evaluate.models.mine=/nowhere/at/all"),
        (["evaluate.modles=1"], ConfigError, "evaluate.modles"),
        (["paths.guided=/nowhere"], StageError, "paths.guided=/nowhere: no such folder. Run `bash recipes/guided_rl.sh`"),
        (["paths.exploratory=/nowhere"], StageError, "recipes/exploratory_rl.sh"),
        (["paths.sft=/nowhere"], StageError, "recipes/sft.sh"),
        (["paths.prmu=/nowhere"], StageError, "paths.prmu=/nowhere: no such folder. Run `bash recipes/train_prmu.sh`"),
        (["evaluate.reward_weights.beta=much"], ConfigError, "evaluate.reward_weights.beta=much: no weight"),
        (["evaluate.sweep.profile_sizes=[-1]"], ConfigError, "evaluate.sweep.profile_sizes=-1"),
        (["evaluate.sweep.retrievers=[google]"], ConfigError, "google"),
        (["evaluate.reward_batch_items=0"], ConfigError, "evaluate.reward_batch_items=0"),
        (["+evaluate.models={a.prmu: /x}"], ConfigError, "evaluate.models.a.prmu: cannot name a file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_starts(
    outputs: Path, overrides: list[str], error: type[TagPRError], message: str
) -> None:
    with pytest.raises(error) as caught:
        evaluate(outputs, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert FakeEngine.started == []


def test_without_a_training_split_nobody_is_called_unseen(
    outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (outputs / "data" / "minilamp" / "train.parquet").unlink()
    with caplog.at_level(logging.WARNING):
        summary = evaluate(outputs, "evaluate.only=[sft]")
    assert list(summary["decodings"][0]["models"]["sft"]["groups"]) == ["unknown"]
    assert "train.parquet: missing" in caplog.text


@pytest.mark.parametrize("setting", ["minilamp", "paper"])
def test_every_setting_composes(setting: str) -> None:
    config = resolve(compose("evaluate", [f"setting={setting}"]))
    assert stage.EngineSettings(**config.evaluate.engine).max_num_seqs > 0


def echo_pid(value: int) -> int:
    logging.getLogger("tagpr").info("in a process of its own")
    if value < 0:
        os._exit(1)
    if value == 0:
        raise ConfigError("key: wrong. Mend it.")
    return os.getpid()


def test_a_model_in_a_process_of_its_own() -> None:
    assert in_own_process(echo_pid, value=1) != os.getpid()
    with pytest.raises(ConfigError, match="key: wrong"):
        in_own_process(echo_pid, value=0)
    with pytest.raises(StageError, match="the process of a model died"):
        in_own_process(echo_pid, value=-1)


def test_what_a_process_of_its_own_gets_can_be_sent_there(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []

    def send(function: object, **arguments: object) -> int:
        sent.append(pickle.dumps((function, arguments)))
        return stage.answer_with(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "in_own_process", send)
    evaluate(outputs, "evaluate.only=[base,sft]", "evaluate.engine.process_per_model=true")
    assert len(sent) == 2
