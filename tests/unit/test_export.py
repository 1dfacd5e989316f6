"""An exported model says what its run's files say, and what was measured of exactly these weights; nothing else."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from omegaconf import OmegaConf

from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.export import run as export
from tagpr.model_card import differences, measured, read_run
from tagpr.runs import folder_hash


def hugging_face(folder: Path, weights: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in (("config.json", "{}"), ("tokenizer.json", "{}"), ("model.safetensors", weights)):
        (folder / name).write_text(text)
    return folder


def training_run(folder: Path, stage: str, start: str, *overrides: str, steps: int = 24) -> Path:
    model = hugging_face(folder / "model", f"weights of {stage}")
    key = "model.path" if stage == "sft" else "actor_rollout_ref.model.path"
    config = resolve(compose(stage, [f"{key}={start}", *overrides]))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    record = {
        "stage": folder.name, "created": "2026-01-02T03:04:05+00:00", "versions": {"verl": "0.9.1"}, "git_revision": "abc",
        "inputs": {"model": "d" * 64}, "seed": 7, "notes": {"tags": ["make_decision"], "synthetic": True},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(record))
    (folder / "finished.json").write_text(json.dumps({"step": steps}))
    lines = [{"step": step, "data": {"reward/total/mean": step / 100}} for step in (1, steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert model.is_dir()
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    outputs = tmp_path / "outputs"
    training_run(outputs / "sft", "sft", "outputs/base/model")
    guided = training_run(outputs / "guided_rl", "guided_rl", "outputs/sft/model", "objective.gamma=0.4")
    (guided / "data").mkdir()
    pq.write_table(pa.table({"data_source": ["lamp1"] * 5}), guided / "data" / "train.parquet")
    return outputs


def evaluation(outputs: Path, model: Path, *overrides: str) -> None:
    folder = outputs / "evaluation"
    folder.mkdir()
    config = resolve(compose("evaluate", list(overrides)))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    record = {"created": "2026-02-03T00:00:00+00:00", "inputs": {"examples": "e", "mine": folder_hash(model)}}
    (folder / "manifest.json").write_text(json.dumps(record))
    figures = {
        "rows": 240, "users": 40, "task_score": 0.9, "reward": None, "well_formed": 1.0,
        "metrics": {"lamp1": {"rows": 40.0, "accuracy": 0.75, "unparsable": 0.0}},
        "intervals": {
            "task_score": {"mean": 0.9, "low": 0.8, "high": 1.0}, "lamp1/accuracy": {"mean": 0.75, "low": None, "high": None},
        },
    }  # fmt: skip
    summary = {
        "synthetic": True, "split": "dev", "benchmark": "minilamp", "retriever": "recency", "profile_size": 8,
        "decodings": [{"name": "greedy", "models": {"mine": figures}}],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def card(*overrides: str) -> str:
    config = resolve(compose("export", list(overrides)))
    export(config)
    target = config.export.to or f"outputs/export/{Path(config.export.run).name}"
    return (Path(target) / "README.md").read_text()


def test_the_card_tells_data_settings_and_lineage(place: Path) -> None:
    text = card("export.run=outputs/guided_rl")
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "transformers"
    assert "base_model" not in header
    assert "guided RL (GSPO, eq. 5), 24 steps" in text
    assert "SYNTHETIC users" in text
    assert "`objective.gamma=0.4`" in text
    assert "| training prompts | 5 |" in text
    assert "| alpha, beta, gamma | 0.8, 0.8, 0.4 |" in text
    assert "reward/total/mean 0.240" in text
    assert text.index("guided RL") < text.index("supervised fine-tuning")
    assert "Not measured" in text
    exported = place / "export" / "guided_rl"
    assert (exported / "model.safetensors").read_text() == "weights of guided_rl"


def test_a_hub_model_at_the_start_is_the_base_model(place: Path) -> None:
    training_run(place / "other", "sft", "Qwen/Qwen3-8B")
    assert yaml.safe_load(card("export.run=outputs/other").split("---")[1])["base_model"] == "Qwen/Qwen3-8B"


def test_figures_are_those_of_exactly_these_weights(place: Path) -> None:
    evaluation(
        place,
        place / "guided_rl" / "model",
        "evaluate.split=dev",
        "evaluate.limit=50",
        "evaluate.seeds=[1,2]",
    )
    text = card("export.run=outputs/guided_rl")
    assert (
        "`bash recipes/evaluate.sh evaluate.limit=50 evaluate.seeds=[1,2]`, 2026-02-03: 240 rows of 40 users"
        in text
    )
    assert "| mean task score (R_v) | 0.900 [0.800, 1.000] |" in text
    assert "| lamp1 accuracy | 0.750 |" in text
    assert "guided reward" not in text
    (place / "guided_rl" / "model" / "model.safetensors").write_text("trained further")
    assert "Not measured" in card("export.run=outputs/guided_rl")
    assert "Not measured" in card("export.run=outputs/sft")


def test_a_checkpoint_is_exported_by_its_step(place: Path) -> None:
    hugging_face(
        place / "guided_rl" / "checkpoints" / "global_step_8" / "actor" / "huggingface", "weights at 8"
    )
    text = card("export.run=outputs/guided_rl", "export.step=8", "export.to=outputs/at8")
    assert (place / "at8" / "model.safetensors").read_text() == "weights at 8"
    assert ", 8 steps" in text
    # Whatever was logged last was logged of other weights.
    assert "In training" not in text
    with pytest.raises(StageError, match=r"export.step=9: .* Use one of 8"):
        export(resolve(compose("export", ["export.run=outputs/guided_rl", "export.step=9"])))


def test_exporting_again_replaces_the_folder(place: Path) -> None:
    card("export.run=outputs/guided_rl")
    exported = place / "export" / "guided_rl"
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    (exported / "left_over").touch()
    card("export.run=outputs/guided_rl/model", "export.to=outputs/export/guided_rl")
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_what_cannot_be_exported_is_named(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.run"):
        export(resolve(compose("export", [])))
    with pytest.raises(DataError, match="no folder of a run"):
        export(resolve(compose("export", ["export.run=outputs"])))
    with pytest.raises(ConfigError, match="is the run itself"):
        export(resolve(compose("export", ["export.run=outputs/sft", "export.to=outputs/sft/model"])))
    (place / "sft" / "finished.json").unlink()
    with pytest.raises(StageError, match="not finished"):
        export(resolve(compose("export", ["export.run=outputs/sft"])))
    evaluation(place, place / "guided_rl" / "model")
    (place / "evaluation" / "summary.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        measured(place / "guided_rl" / "model", place / "evaluation")


def test_differences_are_settings_and_not_places(place: Path) -> None:
    read = read_run(place / "guided_rl")
    assert differences("guided_rl", read.config) == [("objective.gamma", 0.4)]
    paper = resolve(compose("guided_rl", ["setting=paper", "rl_hardware=gpu", "trainer.total_epochs=3"]))
    assert differences("guided_rl", paper) == [("trainer.total_epochs", 3)]
