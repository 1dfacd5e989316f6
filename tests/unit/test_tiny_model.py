"""The tiny base: a tokenizer that loses nothing, Qwen3's chat contract, a model that starts to learn."""

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from tagpr.benchmarks.minilamp.generate import draw
from tagpr.benchmarks.minilamp.reader import FaultRates, reason, tagged
from tagpr.benchmarks.minilamp.world import TASK_NAMES, population
from tagpr.configuration import compose, resolve
from tagpr.errors import StageError
from tagpr.tags import format_response
from tagpr.tiny_model.pretrain import build, response_loss, run
from tagpr.tiny_model.tokenizer import build_tokenizer
from tagpr.vocabulary import DEFINITIONS

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nx.\n</think>\n\nHo"},
    {"role": "user", "content": "Again"},
]
CHAT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n<think>\nx.\n</think>\n\nHo<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(seed=0)


@pytest.fixture(scope="module")
def reloaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


PIECES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",))),
    st.sampled_from(
        ["<think>", " </make_decision>", "\n\n", '" , and "', "<|im_end|>", ". ", "[1]", "  ", "é", "\r\n"]
    ),
)


@given(st.lists(PIECES).map("".join))
def test_any_text_survives(
    tokenizer: PreTrainedTokenizerFast, reloaded: PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert reloaded.encode(text, add_special_tokens=False) == ids
    assert reloaded.decode(ids) == text


def test_think_and_tags_are_single_tokens_that_decoders_keep(reloaded: PreTrainedTokenizerFast) -> None:
    for mark in (
        "<think>",
        "</think>",
        *(f"<{tag}>" for tag in DEFINITIONS),
        *(f"</{tag}>" for tag in DEFINITIONS),
    ):
        ids = reloaded.encode(mark, add_special_tokens=False)
        assert len(ids) == 1, mark
        assert reloaded.decode(ids, skip_special_tokens=True) == mark
    ids = reloaded.encode("a<|im_end|>", add_special_tokens=False)
    assert ids[-1] == reloaded.eos_token_id
    assert reloaded.decode(ids, skip_special_tokens=True) == "a"
    assert {reloaded.eos_token, reloaded.pad_token} == {"<|im_end|>", "<|endoftext|>"}


def test_chat_template_is_qwen3s(reloaded: PreTrainedTokenizerFast) -> None:
    def render(**options: bool) -> str:
        return str(reloaded.apply_chat_template(MESSAGES, tokenize=False, **options))

    assert render() == CHAT
    assert render(add_generation_prompt=True) == f"{CHAT}<|im_start|>assistant\n"
    assert render(add_generation_prompt=True, enable_thinking=True) == f"{CHAT}<|im_start|>assistant\n"
    closed = f"{CHAT}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert render(add_generation_prompt=True, enable_thinking=False) == closed
    with pytest.raises(Exception, match="not one of system, user, assistant"):
        reloaded.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_prompts_and_responses_are_short(reloaded: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    for user in population(1, 40, first=500):
        for task in TASK_NAMES:
            prompt, _ = draw(task, user, rng)
            chat = reloaded.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            assert len(chat) <= 128
            reasoned = reason(prompt, rng, FaultRates(sloppy=0.0))
            response = format_response(tagged(reasoned.steps), reasoned.answer)
            assert len(reloaded.encode(response)) + 1 <= 64


def test_the_tokenizer_is_reproducible(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_tokenizer(seed=0).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_model_and_tokenizer_agree() -> None:
    tokenizer, model = build(resolve(compose("base")))
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert 400_000 < model.num_parameters() < 450_000
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_loss_is_on_the_response_only_and_padding_does_not_count() -> None:
    _, model = build(resolve(compose("base")))
    short = ([11, 12, 13], [14, 15])
    long = ([21, 22], [23, 24, 25, 26, 27])
    with torch.no_grad():
        logits = torch.log_softmax(model(torch.tensor([[11, 12, 13, 14, 15]])).logits[0], -1)
        by_hand = -(logits[2, 14] + logits[3, 15]) / 2
        alone = response_loss(model, [short], padding=0)
        other = response_loss(model, [long], padding=0)
        together = response_loss(model, [short, long], padding=0)
    assert alone.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert together.item() == pytest.approx((2 * alone.item() + 5 * other.item()) / 7, rel=1e-4)


def make(tmp_path: Path, *overrides: str) -> Path:
    """Run the stage with so few steps that it takes seconds."""
    run(
        resolve(
            compose(
                "base", [f"run.outputs={tmp_path}", "base.steps=30", "base.evaluation_rows=6", *overrides]
            )
        )
    )
    return tmp_path / "base"


def test_stage_makes_a_folder_that_loads_and_then_leaves_it_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leftover = tmp_path / "base/model.partial"
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("from a killed run")
    folder = make(tmp_path)
    assert not leftover.exists()
    assert not (folder / "model/junk").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = Qwen3ForCausalLM.from_pretrained(folder / "model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(list((folder / "model").glob("*.safetensors"))) == 1
    notes = json.loads((folder / "manifest.json").read_text())["notes"]
    assert notes["synthetic"] is True
    assert 0.0 <= notes["exact_match"] <= 1.0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["base/loss"] < lines[0]["base/loss"] - 3.0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with caplog.at_level(logging.INFO):
        make(tmp_path)
    assert "is there already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_stage_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "base/model").mkdir(parents=True)
    with pytest.raises(StageError, match=r"paths\.base=.*no Hugging Face model folder"):
        make(tmp_path)


def test_stage_makes_nothing_for_a_model_of_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make(tmp_path, "setting=paper", "paths.base=Qwen/Qwen3-8B")
        make(tmp_path, "paths.base=Qwen/Qwen3-0.6B")
    assert "Qwen/Qwen3-8B as it is" in caplog.text
    assert "Qwen/Qwen3-0.6B of the Hugging Face hub" in caplog.text
    assert not list(tmp_path.iterdir())
    assert not Path("Qwen").exists()


def test_divergence_is_an_error_and_leaves_no_model(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the loss is"):
        make(tmp_path, "base.embedding_init_std=1e30", "base.steps=2")
    assert not (tmp_path / "base/model").exists()
