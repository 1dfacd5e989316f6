"""Run directories: metrics that go on in one file, complete checkpoints, model folders, tokens of SFT rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from tagpr.checkpoints import export_model, latest_complete, mark_complete
from tagpr.errors import DataError, StageError
from tagpr.rl.data import draw
from tagpr.runs import MetricsLog, check_model_folder
from tagpr.schema import Example
from tagpr.sft.dataset import TaggedChainDataset, encode
from tagpr.tags import format_response, split_response


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_metrics_go_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resumed_step=0)
    for step in (1, 2, 3):
        log.log({"reward/total/mean": np.float32(step), "name": "x", "bad": float("nan")}, step)
    log.finish()
    with path.open("a") as file:
        file.write('{"step": 4, "da')  # killed while writing
    log = MetricsLog(path, resumed_step=2)
    log.log({"reward/total/mean": 30.0}, 3)
    log.finish()
    assert steps_in(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[2])["data"] == {"reward/total/mean": 30.0}


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert latest_complete(tmp_path) is None
    for step in (8, 16, 24):
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
    mark_complete(tmp_path, 8)
    mark_complete(tmp_path, 16)
    # verl's own tracker may say otherwise, or be torn.
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    assert latest_complete(tmp_path) == (16, tmp_path / "global_step_16")


def test_exporting_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "actor").mkdir()
    with pytest.raises(StageError, match="holds no weights"):
        export_model(tmp_path / "actor", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_exporting_replaces_the_whole_folder(tmp_path: Path) -> None:
    ready = tmp_path / "actor" / "huggingface"
    ready.mkdir(parents=True)
    (ready / "model.safetensors").write_bytes(b"new")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").write_text("old")
    export_model(tmp_path / "actor", tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_a_hub_name_is_no_folder_of_ours(tmp_path: Path) -> None:
    check_model_folder("Qwen/Qwen3-8B", "model.path", "base.sh", may_be_hub_id=True)
    with pytest.raises(StageError, match=r"model\.path=Qwen/Qwen3-8B: no such folder"):
        check_model_folder("Qwen/Qwen3-8B", "model.path", "base.sh")


def example(task: str, number: int) -> Example:
    return Example(
        id=f"{task}-{number}", task=task, split="train", user_id="u", query="q", profile=(), gold="g"
    )


def test_drawing_rows_is_seeded_and_exact() -> None:
    examples = [example(task, number) for task in ("lamp1", "lamp2") for number in range(50)]
    drawn = draw(examples, {"lamp1": 10, "lamp2": 30}, seed=1)
    assert [sum(e.task == task for e in drawn) for task in ("lamp1", "lamp2")] == [10, 30]
    assert len({e.id for e in drawn}) == 40
    assert draw(examples, {"lamp1": 10, "lamp2": 30}, seed=1) == drawn
    assert draw(examples, {"lamp1": 10, "lamp2": 30}, seed=2) != drawn
    assert draw(examples, None, seed=1) == examples
    with pytest.raises(ValueError, match=r"rl_rows\.lamp1=51"):
        draw(examples, {"lamp1": 51}, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    from tagpr.tiny_model.tokenizer import build_tokenizer

    return build_tokenizer(0, users=40)


TAGGED = "<analyze_input> about a. </analyze_input>\n<make_decision> pick b. </make_decision>"


def test_think_survives_in_sft_tokens(tokenizer) -> None:
    response = format_response(TAGGED, "[1]")
    ids, mask = encode(tokenizer, "Which one?", response)
    trained = [token for token, on in zip(ids, mask, strict=True) if on]
    assert len(ids) == len(mask)
    assert trained[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<think>") == trained[0]
    read = split_response(tokenizer.decode(trained[:-1]))
    assert (read.reasoning, read.answer, read.problem) == (TAGGED, "[1]", "")
    prompt = tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if not on])
    assert prompt == "<|im_start|>user\nWhich one?<|im_end|>\n<|im_start|>assistant\n"


def test_sft_rows_are_refused_not_cut(tokenizer, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from omegaconf import OmegaConf

    rows = [{"id": "r1", "prompt": "Which one?", "response": format_response(TAGGED, "[1]")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sft.parquet")
    file = str(tmp_path / "sft.parquet")
    dataset = TaggedChainDataset(file, tokenizer, OmegaConf.create({"max_length": 200}))
    assert len(dataset) == 1
    assert set(dataset[0]) == {"input_ids", "position_ids", "loss_mask"}
    with pytest.raises(DataError, match=r"row r1 has \d+ tokens"):
        TaggedChainDataset(file, tokenizer, OmegaConf.create({"max_length": 20}))
    pq.write_table(pa.Table.from_pylist([{"id": "r1", "prompt": "x"}]), tmp_path / "sft.parquet")
    with pytest.raises(DataError, match="no column 'response'"):
        TaggedChainDataset(file, tokenizer, OmegaConf.create({"max_length": 200}))
