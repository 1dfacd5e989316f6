"""Sentence embeddings without a network: the hashed ones, and a tiny transformer made here (S10, S36)."""

from pathlib import Path

import numpy as np
import pytest

from tagpr.embedding import load_embedder
from tagpr.errors import ConfigError


def test_offline_brings_spellings_of_a_word_together_and_says_what_it_is() -> None:
    embedder = load_embedder("offline")
    assert "no model" in embedder.name
    vectors = embedder.encode(["make_decision", "making decisions", "compare_entities", ""])
    assert vectors.dtype == np.float32
    assert vectors.ndim == 2
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0, 1.0, 1.0, 0.0], abs=1e-6)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > far + 0.2
    assert np.array_equal(
        vectors,
        load_embedder("offline").encode(["make_decision", "making decisions", "compare_entities", ""]),
    )
    assert embedder.encode([]).shape == (0, vectors.shape[1])


@pytest.fixture(scope="module")
def plain_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of the kind Contriever is: no list of modules, so that mean pooling has to be built."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "film",
        "good",
        "bad",
    ]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_plain_transformer_is_mean_pooled_and_not_normalised(plain_transformer: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    embedder = load_embedder(str(plain_transformer), device="cpu")
    assert embedder.name == str(plain_transformer)
    texts = ["good film", "a b c d e f bad film", ""]
    vectors = embedder.encode(texts)
    model, tokenizer = (
        AutoModel.from_pretrained(plain_transformer),
        AutoTokenizer.from_pretrained(plain_transformer),
    )
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            expected = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert vector == pytest.approx(expected.numpy(), abs=1e-5)
    assert embedder.encode([]).shape == (0, 16)


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, told: str) -> None:
        with pytest.raises(ConfigError, match=told) as raised:
            load_embedder(name, key="benchmark.retriever_model")
        assert str(raised.value).startswith(f"benchmark.retriever_model={name}: ")
        assert "\n" not in str(raised.value)

    refused(str(tmp_path), "holds no model")
    refused(str(tmp_path / "none"), "no such folder")
    (tmp_path / "config.json").write_text("{}")
    refused(str(tmp_path), "cannot be loaded")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("nobody/has-this", "cannot be loaded")
