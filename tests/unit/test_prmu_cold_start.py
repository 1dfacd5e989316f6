"""New users join a trained PRMU: a row fitted to their pairs, nobody else's score changed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prmu_tiny import make_base
from test_prmu_train import habit_pairs, write

from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, DataError
from tagpr.prmu import cold_start
from tagpr.prmu import train as stage
from tagpr.prmu.model import load, score_tokens
from tagpr.schema import PreferencePair


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cold")
    write(root / "chains", habit_pairs(users=12, each=16))
    base = make_base(root / "base")
    rate = [f"train_prmu.{name}learning_rate=5e-3" for name in ("", "embedding_", "row_")]
    stage.run(
        resolve(
            compose(
                "train_prmu",
                [f"run.outputs={root}", f"paths.base={base}", "train_prmu.epochs=8", "train_prmu.batch_size=16",
                 "train_prmu.unseen_users=0.0", *rate],
            )
        )
    )  # fmt: skip
    return root


@pytest.fixture
def configure(trained: Path, tmp_path: Path) -> Callable[..., Any]:
    return lambda *overrides: resolve(compose("add_prmu_users", [f"run.outputs={trained}", *overrides]))


def newcomers() -> list[PreferencePair]:
    """Two users after the twelve that the model knows: one likes boats, the other rain."""
    return [one for one in habit_pairs(users=14, each=8) if one.user_id in ("u12", "u13")]


def test_new_users_get_rows_that_fit_them_and_old_ones_keep_their_scores(
    trained: Path, tmp_path: Path, configure: Callable[..., Any]
) -> None:
    file = tmp_path / "new.jsonl"
    few = [one for one in newcomers() if one.prompt in ("movie 0", "movie 1")]
    file.write_text("".join(one.model_dump_json() + "\n" for one in few))
    source = trained / "prmu" / "model"
    before = load(source)
    cold_start.run(configure(f"cold_start.pairs={file}", f"cold_start.target={tmp_path}/more"))
    after = load(tmp_path / "more")
    assert after.version != before.version
    assert load(source).version == before.version
    assert after.encoder.users.end == before.encoder.users.end + 2
    assert dict(list(after.encoder.users.rows.items())[:12]) == before.encoder.users.rows

    old = [before.encoder.encode("x", user, "movie 3", "boats").token_ids for user in ("u0", "u1", "nobody")]
    with torch.no_grad():
        assert torch.equal(score_tokens(before.model, old, 0), score_tokens(after.model, old, 0))
    rest = [one for one in newcomers() if one not in few]
    margins = stage.pair_margins(after, stage.encode_pairs(after.encoder, rest), 8)
    assert min(margins) > 0, "both sorts of user are served after two pairs each"
    unknown = stage.pair_margins(before, stage.encode_pairs(before.encoder, rest), 8)
    assert min(unknown) < 0 < max(unknown), "the unknown row serves at most one sort"
    notes = json.loads((tmp_path / "more" / "manifest.json").read_text())["notes"]
    assert notes["added_users"] == [{"from_version": before.version, "users": 2}]


def test_a_row_depends_on_its_own_pairs_alone(trained: Path, configure: Callable[..., Any]) -> None:
    settings = configure("cold_start.steps=5").cold_start
    prmu = load(trained / "prmu" / "model")
    one, other = ([pair for pair in newcomers() if pair.user_id == user] for user in ("u12", "u13"))
    weights = {name: value.clone() for name, value in prmu.model.named_parameters()}
    alone = cold_start.fit_rows(prmu, {"u12": one}, settings)["u12"]
    assert all(torch.equal(value, weights[name]) for name, value in prmu.model.named_parameters())
    both = cold_start.fit_rows(prmu, {"u12": one, "u13": other}, settings)
    assert torch.allclose(both["u12"], alone, atol=1e-4)
    assert not torch.allclose(both["u13"], alone, atol=0.1)


@pytest.mark.parametrize("packing", ["shared_prefix", "padding_free", "padded"])
def test_margins_with_given_rows_are_those_of_the_checkpoint_that_has_them(
    trained: Path, configure: Callable[..., Any], packing: str
) -> None:
    settings = configure(f"cold_start.packing={packing}").cold_start
    prmu = load(trained / "prmu" / "model")
    pairs = habit_pairs(users=3, each=4)
    plain = stage.pair_margins(prmu, stage.encode_pairs(prmu.encoder, pairs), 8)
    assert cold_start.margins_with(prmu, pairs, {}, settings) == pytest.approx(plain, abs=1e-4)
    weight = prmu.model.get_input_embeddings().weight.detach()
    swapped = {"u0": weight[prmu.encoder.users.rows["u1"]]}
    changed = cold_start.margins_with(prmu, pairs, swapped, settings)
    own = [place for place, pair in enumerate(pairs) if pair.user_id == "u0"]
    assert all(changed[place] * plain[place] < 0 for place in own), (
        "with another's row, the other's preference"
    )
    assert [changed[p] for p in range(12) if p not in own] == pytest.approx(plain[4:], abs=1e-4)


def test_curve_tries_the_same_pairs_for_every_size_and_none_that_a_row_was_fitted_to(
    trained: Path, configure: Callable[..., Any]
) -> None:
    settings = configure("cold_start.steps=3").cold_start
    prmu = load(trained / "prmu" / "model")
    pairs, found = cold_start.curve(prmu, newcomers(), [0, 1, 4], 2, settings, seed=0)
    assert set(found) == {0, 1, 4}
    for draw in range(2):
        tried = [[not math.isnan(margin) for margin in found[size][draw]] for size in found]
        assert tried[0] == tried[1] == tried[2]
        assert sum(tried[0]) == 8, "half of eight pairs each are kept to fit on"
    assert found[0][0] != found[4][0]
    assert len(pairs) == 16


def test_what_cannot_be_added_is_one_line(tmp_path: Path, configure: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"cold_start\.pairs: names no file"):
        cold_start.run(configure())
    file = tmp_path / "old.jsonl"
    file.write_text("".join(one.model_dump_json() + "\n" for one in habit_pairs(users=2, each=2)))
    with pytest.raises(DataError, match="all its users have rows already"):
        cold_start.run(configure(f"cold_start.pairs={file}"))
