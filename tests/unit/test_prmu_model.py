"""PRMU's model: rows are added without touching the base, and a checkpoint is what it says it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from prmu_tiny import USERS, make_base, make_prmu
from transformers import AutoConfig, AutoModelForSequenceClassification

from reward_server.prefix import PrefixEngine
from tagpr.errors import ConfigError, StageError
from tagpr.prmu import model as prmu_model
from tagpr.prmu.model import content_version, load, score_tokens
from tagpr.prmu.packing import PACKINGS, EncodedPair, logits, pack, use_packing


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("prmu")
    base = make_base(root / "base")
    make_prmu(root / "model", base)
    return base, root / "model"


def classifier_base(folder: Path, base: Path) -> Path:
    """A base that already has a reward head, like Skywork's."""
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).exists():
            shutil.copy(base / name, folder / name)
    return folder


def test_logits_without_user_rows_are_those_of_the_base(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base = classifier_base(tmp_path / "skywork", folders[0])
    model, tokenizer, users = prmu_model.build(str(base), USERS, row_std=0.3, max_tokens=64, seed=1)
    stock = AutoModelForSequenceClassification.from_pretrained(base)
    text = tokenizer.encode("which tag does this movie relate to?", add_special_tokens=False)
    with torch.no_grad():
        before = stock(input_ids=torch.tensor([text])).logits[0, 0]
        after = score_tokens(model, [text], tokenizer.pad_token_id)[0]
        with_row = score_tokens(model, [[users.unknown_row, *text]], tokenizer.pad_token_id)[0]
    assert after == before
    assert abs(with_row - before) > 1e-3


def test_a_language_model_gets_one_seeded_head_and_rows_of_the_wanted_size(
    folders: tuple[Path, Path],
) -> None:
    base = str(folders[0])
    many = [f"user{i}" for i in range(200)]
    first, tokenizer, users = prmu_model.build(base, many, row_std=0.3, max_tokens=2048, seed=1)
    again, _, _ = prmu_model.build(base, many, row_std=0.3, max_tokens=2048, seed=1)
    other, _, _ = prmu_model.build(base, many, row_std=0.3, max_tokens=2048, seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    table = first.get_input_embeddings().weight
    assert not torch.equal(table, other.get_input_embeddings().weight)
    assert len(table) == len(tokenizer) + 201 == users.end == first.config.vocab_size
    assert table[users.unknown_row :].std().item() == pytest.approx(0.3, rel=0.1)
    assert first.get_parameter("score.weight").shape == (1, 32)
    assert first.config.pad_token_id == tokenizer.pad_token_id
    assert first.config.max_position_embeddings == 2048


def test_checkpoint_is_stock_and_comes_back_whole(folders: tuple[Path, Path]) -> None:
    _, folder = folders
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Qwen3ForSequenceClassification"]
    assert config.num_labels == 1
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    prmu = load(folder)
    ids = [prmu.encoder.encode("a", user, "boats", "rain").token_ids for user in (*USERS, "nobody")]
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        ours = score_tokens(prmu.model, ids, prmu.encoder.pad_token_id)
        theirs = torch.stack([stock(input_ids=torch.tensor([i])).logits[0, 0] for i in ids])
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert len({round(value, 4) for value in ours.tolist()}) == 4, "same text, other user, other score"


def test_padding_and_company_do_not_change_a_score(folders: tuple[Path, Path]) -> None:
    prmu = load(folders[1])
    texts = ["rain", "boats and rain " * 20, "", "the user likes short titles", "x" * 90]
    ids = [prmu.encoder.encode(str(i), "ann", text, text).token_ids for i, text in enumerate(texts)]
    with torch.no_grad():
        together = score_tokens(prmu.model, ids, prmu.encoder.pad_token_id)
        alone = torch.cat([score_tokens(prmu.model, [i], prmu.encoder.pad_token_id) for i in ids])
    assert alone.std() > 0.05
    assert (together - alone).abs().max() <= 1e-5


def test_a_row_at_both_ends_scores_alike_on_every_path(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The stock model on padded batches, the layouts of training and the server's shared prefixes."""
    model, tokenizer, users = prmu_model.build(
        str(folders[0]), USERS, row_std=0.3, max_tokens=512, seed=0, place="ends"
    )
    with torch.no_grad():
        model.get_parameter("score.weight").mul_(50.0)
    prmu_model.save(tmp_path / "ends", model, tokenizer, users, "{}")
    prmu = load(tmp_path / "ends")
    assert prmu.encoder.users.place == "ends"
    inputs = [
        prmu.encoder.encode("x", user, "which tag " * times, text)
        for user in ("ann", "bob", "nobody")
        for times in (1, 9)
        for text in ("boats", "rain and boats", "")
    ]
    ids = [each.token_ids for each in inputs]
    with torch.no_grad():
        plain = score_tokens(prmu.model, ids, prmu.encoder.pad_token_id).tolist()
    assert len({round(value, 3) for value in plain}) == len(plain)
    assert PrefixEngine(load(tmp_path / "ends"), 100, 1 << 20).score(inputs) == pytest.approx(plain, abs=1e-4)
    pairs = [EncodedPair(ids[at], ids[at + 1]) for at in range(0, len(ids), 3)]
    expected = [plain[at] - plain[at + 1] for at in range(0, len(ids), 3)]
    weight = prmu.model.get_input_embeddings().weight.detach()
    for packing in PACKINGS:
        use_packing(prmu.model, packing)
        batch = pack(pairs, packing, prmu.encoder.pad_token_id)
        with torch.no_grad():
            values = logits(prmu.model, batch, weight[batch.users])
        assert (values[: len(pairs)] - values[len(pairs) :]).tolist() == pytest.approx(expected, abs=1e-4)


def test_version_is_the_content(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders[1], tmp_path / "copy")
    version = content_version(copy)
    assert version == content_version(folders[1]) == load(folders[1]).version
    (copy / "manifest.json").write_text('{"other": 1}')
    assert content_version(copy) == version
    users = json.loads((copy / "users.json").read_text())
    users["rows"] = {"ann": users["rows"]["bob"], "bob": users["rows"]["ann"], "cem": users["rows"]["cem"]}
    (copy / "users.json").write_text(json.dumps(users))
    assert content_version(copy) != version


def test_save_replaces_a_checkpoint_in_one_step(folders: tuple[Path, Path], tmp_path: Path) -> None:
    make_prmu(tmp_path / "model", folders[0], seed=1)
    (tmp_path / "model" / "stale.json").write_text("{}")
    make_prmu(tmp_path / "model", folders[0], seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "stale.json").exists()


def test_folders_that_hold_no_prmu_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = folders
    with pytest.raises(StageError, match="holds no PRMU"):
        load(base)
    with pytest.raises(ConfigError, match=r"train_prmu\.init=.*has user rows already"):
        prmu_model.build(str(folder), USERS, row_std=0.3, max_tokens=9, seed=0)
    with pytest.raises(StageError, match=r"train_prmu\.init=.*/none"):
        prmu_model.build(str(tmp_path / "none"), USERS, row_std=0.3, max_tokens=9, seed=0)

    outside = shutil.copytree(folder, tmp_path / "outside")
    config = json.loads((outside / "config.json").read_text())
    (outside / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(StageError, match="is no PRMU"):
        load(outside)

    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(StageError, match="weights cannot be loaded"):
        load(pickled)


def test_context_longer_than_the_models_is_refused(folders: tuple[Path, Path]) -> None:
    assert load(folders[1]).encoder.max_tokens == 512
    assert load(folders[1], max_tokens=100).encoder.max_tokens == 100
    with pytest.raises(ConfigError, match=r"server\.max_tokens=513"):
        load(folders[1], max_tokens=513)
