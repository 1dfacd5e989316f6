"""PRMU's training: what is held out, what a step does, and that user rows learn what only the user decides."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prmu_tiny import make_base

from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.prmu import train as stage
from tagpr.prmu.batches import bucketed_batches, drop_ids, micro_batches, share_of
from tagpr.prmu.figures import figures, figures_by_group
from tagpr.prmu.model import load
from tagpr.prmu.packing import EncodedPair
from tagpr.prmu.pairs import pair_files, read_pairs, split_pairs
from tagpr.prmu.train import encode_pairs, pair_margins
from tagpr.runs import MetricsLog
from tagpr.schema import PreferencePair


def pair(number: int, user: str, **change: Any) -> PreferencePair:
    fields: dict[str, Any] = {
        "id": f"pair{number}", "kind": "pqp", "task": "lamp4", "user_id": user, "prompt": f"prompt {number // 2}",
        "chosen": "boats", "rejected": "rain",
    }  # fmt: skip
    return PreferencePair(**{**fields, **change})


def habit_pairs(users: int, each: int) -> list[PreferencePair]:
    """Pairs that only the user decides: half the users like boats, the others rain, whatever the prompt says."""
    pairs = []
    for user in range(users):
        for number in range(each):
            liked, other = ("boats", "rain") if user % 2 else ("rain", "boats")
            pairs.append(
                pair(user * each + number, f"u{user}", prompt=f"movie {number}", chosen=liked, rejected=other)
            )
    return pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("train") / "base")


def write(folder: Path, pairs: list[PreferencePair]) -> None:
    folder.mkdir(exist_ok=True)
    for kind in ("prp", "pqp"):
        lines = [one.model_dump_json() + "\n" for one in pairs if one.kind == kind]
        (folder / f"{kind}.jsonl").write_text("".join(lines))


@pytest.fixture
def configure(tmp_path: Path, base: Path) -> Callable[..., Any]:
    def go(*overrides: str) -> Any:
        places = [f"run.outputs={tmp_path}", f"paths.base={base}"]
        return resolve(compose("train_prmu", [*places, *overrides]))

    return go


def test_splits_hold_out_whole_users_and_whole_prompts() -> None:
    rng = random.Random(0)
    pairs = [
        pair(i, f"u{rng.randrange(20)}", prompt=f"p{rng.randrange(40)}", kind=rng.choice(["prp", "pqp"]))
        for i in range(600)
    ]
    split = split_pairs(pairs, unseen_users=0.2, heldout_prompts=0.1, seed=3)
    groups = [split.train, split.seen_users, split.unseen_users]
    assert sorted(one.id for group in groups for one in group) == sorted(one.id for one in pairs)
    trained, seen, unseen = ({one.user_id for one in group} for group in groups)
    assert len(unseen) == 4
    assert not unseen & (trained | seen)
    assert seen <= trained
    prompts = [{(one.user_id, one.prompt) for one in group} for group in groups]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == round(0.1 * (len(prompts[0]) + len(prompts[1])))
    assert split == split_pairs(pairs, unseen_users=0.2, heldout_prompts=0.1, seed=3)
    assert split != split_pairs(pairs, unseen_users=0.2, heldout_prompts=0.1, seed=4)


def test_a_users_last_prompt_is_never_held_out() -> None:
    pairs = [pair(i, f"u{i}") for i in range(10)]
    split = split_pairs(pairs, unseen_users=0.0, heldout_prompts=0.5, seed=0)
    assert (len(split.train), split.seen_users, split.unseen_users) == (10, [], [])


def test_accuracy_by_kind_task_and_rule() -> None:
    pairs = [
        pair(0, "a"),
        pair(1, "a", kind="prp", rule="x"),
        pair(2, "a", task="lamp1"),
        pair(3, "a", task="other"),
    ]
    found = {
        name: (one.accuracy, one.pairs)
        for name, one in figures_by_group(pairs, [1.0, -1.0, 0.5, 0.0]).items()
    }
    assert found["all"] == (0.5, 4)
    assert found["pqp"] == (2 / 3, 3)
    assert found["generation"] == found["lamp4"] == (0.5, 2)
    assert found["pqp/classification"] == (1.0, 1)
    assert found["rule x"] == (0.0, 1)
    assert found["other"] == (0.0, 1), "a tie is no success"


def test_calibration_on_known_margins() -> None:
    """Four pairs at a confidence of 0.88, three of them right; two at 0.5, one of them right."""
    sure = math.log(0.88 / 0.12)
    found = figures([sure, sure, sure, -sure, 1e-9, -1e-9])
    assert found.ece == pytest.approx((4 * abs(0.88 - 0.75) + 2 * 0.0) / 6)
    assert [(one.pairs, one.accuracy) for one in found.bins] == [(2, 0.5), (4, 0.75)]
    assert found.margin == pytest.approx(2 * sure / 6)
    assert math.isfinite(figures([-1e6, 1e6]).ece)


def test_batches_contain_every_pair_once_and_similar_lengths() -> None:
    rng = random.Random(0)
    pairs = [EncodedPair([1] * rng.randint(5, 200), [i]) for i in range(333)]
    batches = list(bucketed_batches(pairs, 16, random.Random(1)))
    assert sorted(one.rejected[0] for batch in batches for one in batch) == list(range(333))
    padded = sum(len(batch) * max(one.length for one in batch) for batch in batches)
    assert padded < 1.15 * sum(one.length for one in pairs)


def of_prompts(count: int, rng: random.Random) -> list[EncodedPair]:
    """One to six pairs of each prompt, in any order."""
    pairs = [
        EncodedPair([7, number, *[1] * length, 2, at], [7, number, *[1] * length, 3, at], 2 + length)
        for number, length in enumerate(rng.randrange(5, 200) for _ in range(count))
        for at in range(rng.randint(1, 6))
    ]
    rng.shuffle(pairs)
    return pairs


def test_pairs_of_a_prompt_stay_together_and_lose_their_id_together() -> None:
    pairs = of_prompts(200, random.Random(0))
    batches = bucketed_batches(pairs, 16, random.Random(1), by_prompt=True)
    assert sorted(pair for batch in batches for pair in batch) == sorted(pairs)
    assert all(len(batch) <= 16 for batch in batches)
    met = [prompt for batch in batches for prompt in {pair.prompt for pair in batch}]
    assert len(met) < 200 + len(batches), "only a batch's last prompt may go on in another"
    for batch in batches:
        dropped = drop_ids(batch, 0.5, 9, random.Random(2), by_prompt=True)
        assert [pair.prompt[1:] for pair in dropped] == [pair.prompt[1:] for pair in batch]
        assert len({pair.prompt for pair in dropped}) == len({pair.prompt for pair in batch})
        parts = list(micro_batches(batch, 6, by_prompt=True))
        assert [pair for part in parts for pair in part] == batch
        assert sum(len({pair.prompt for pair in part}) for part in parts) == len(
            {pair.prompt for pair in batch}
        ), "no prompt of six pairs or less is computed twice"
        shares = [share_of(batch, rank, 3) for rank in range(3)]
        assert [pair for share in shares for pair in share] == batch
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    rows = [pair.chosen[0] for batch in batches for pair in drop_ids(batch, 0.3, 9, random.Random(3), True)]
    assert set(rows) == {7, 9}


def test_bad_pair_files_name_file_line_and_pair(tmp_path: Path) -> None:
    with pytest.raises(
        StageError, match=r"prp\.jsonl: no preference pairs there\. Run `bash recipes/build_chains"
    ):
        pair_files(tmp_path)
    write(tmp_path, [])
    files = pair_files(tmp_path)
    with pytest.raises(DataError, match="hold no pair"):
        read_pairs(files)
    good = pair(0, "a").model_dump_json()
    for line, says in (
        ("<html>", r"pqp\.jsonl:2: line: Invalid JSON"),
        (good, "pair pair0 is there twice"),
        (pair(1, "a", rejected="boats").model_dump_json(), "pair pair1 prefers a response to itself"),
        (good.replace('"pqp"', '"other"').replace("pair0", "pair2"), r"pqp\.jsonl:2: kind"),
    ):
        files[1].write_text(good + "\n" + line + "\n")
        with pytest.raises(DataError, match=says):
            read_pairs(files)


def test_user_rows_learn_what_only_the_user_decides(
    tmp_path: Path, configure: Callable[..., Any], base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = habit_pairs(users=12, each=16)
    write(tmp_path / "chains", pairs)
    config = configure(
        "train_prmu.epochs=8", "train_prmu.learning_rate=5e-3", "train_prmu.unseen_users=0.17",
        "train_prmu.embedding_learning_rate=5e-3", "train_prmu.row_learning_rate=5e-3",
        "train_prmu.batch_size=16", "train_prmu.micro_batch_size=16",
    )  # fmt: skip
    with caplog.at_level("INFO"):
        stage.run(config)
    folder = tmp_path / "prmu" / "model"
    lines = [json.loads(line) for line in (tmp_path / "prmu" / "metrics.jsonl").read_text().splitlines()]
    numbers = lines[-1]["data"]
    assert numbers["prmu/accuracy"] >= 0.95
    assert numbers["prmu/accuracy/unknown_row/all"] == pytest.approx(0.5, abs=0.25)
    assert numbers["prmu/accuracy/unseen_users/all"] == pytest.approx(0.5, abs=0.25)
    assert all(math.isfinite(value) for line in lines for value in line["data"].values())
    assert "seen_users     unknown_row    unseen_users" in caplog.text

    prmu = load(folder)
    assert len(prmu.encoder.users.rows) == 10
    with_rows = encode_pairs(prmu.encoder, split_pairs(pairs, 0.17, 0.1, 0).seen_users)
    others = {prmu.encoder.users.rows["u0"]: "rain", prmu.encoder.users.rows["u1"]: "boats"}
    one = with_rows[0]
    first, second = (pair_margins(prmu, [one.with_row(row)], 4)[0] for row in others)
    assert first * second < 0, "the same pair, another user's id: the other response is preferred"

    before = (folder / "model.safetensors").stat().st_mtime_ns
    stage.run(config)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "the same again is not done again"
    config.train_prmu.epochs = 1
    stage.run(config)
    assert (folder / "model.safetensors").stat().st_mtime_ns != before
    assert prmu.version != load(folder).version


def test_one_step_moves_only_rows_it_has_seen_and_never_decays_them(
    tmp_path: Path, configure: Callable[..., Any], base: Path
) -> None:
    settings = configure(
        "train_prmu.epochs=1", "train_prmu.id_dropout=0.0", "train_prmu.weight_decay=0.5",
        "train_prmu.row_learning_rate=4e-3", "train_prmu.embedding_learning_rate=2e-3", "train_prmu.warmup=0.0",
    ).train_prmu  # fmt: skip
    pairs = [pair(i, "ann") for i in range(8)]
    training = stage.prepare(settings, [*pairs, pair(9, "bob")], 0)
    model, tokenizer, users = training.prmu.model, training.prmu.tokenizer, training.prmu.encoder.users
    table, rows = model.get_input_embeddings().weight, training.rows.rows
    assert len(table) == users.unknown_row
    before, rows_before = table.detach().clone(), rows.clone()
    norm_before = model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().norm()
    assert stage.train(training, pairs, settings, 0) == 1
    moved, rows_moved = (table.detach() - before).abs(), (rows - rows_before).abs()
    assert rows_moved[users.rows["bob"] - users.unknown_row].max() == 0
    assert rows_moved[0].max() == 0
    # AdamW's first step moves every coordinate by its rate: 4e-3 in the row, 2e-3 in the words beside it.
    assert rows_moved[users.rows["ann"] - users.unknown_row].median() == pytest.approx(4e-3, rel=0.05)
    word = tokenizer.encode("boats", add_special_tokens=False)[0]
    assert moved[word].median() == pytest.approx(2e-3, rel=0.05)
    untouched = tokenizer.encode("Z", add_special_tokens=False)[0]
    assert moved[untouched].max() == 0
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").norm() != norm_before


def test_dropped_ids_train_the_unknown_row(configure: Callable[..., Any]) -> None:
    settings = configure("train_prmu.epochs=1", "train_prmu.id_dropout=0.5").train_prmu
    pairs = [pair(i, "ann") for i in range(16)]
    training = stage.prepare(settings, pairs, 0)
    before = training.rows.rows.clone()
    stage.train(training, pairs, settings, 0)
    assert ((training.rows.rows - before).abs().max(dim=1).values > 0).all(), (
        "both the unknown row and the user's have moved"
    )


@pytest.mark.parametrize("place", ["first", "ends"])
def test_rows_start_at_what_their_users_prefer(configure: Callable[..., Any], place: str) -> None:
    """Around zero or, where the head reads their state, around the token that ends a response."""
    settings = configure("train_prmu.row_init_std=0.2", f"train_prmu.row_place={place}").train_prmu
    pairs = habit_pairs(users=4, each=3)
    training = stage.prepare(settings, pairs, 0)
    rows, users = training.rows.rows, training.prmu.encoder.users
    words = training.prmu.model.get_input_embeddings().weight.detach()
    boats, rain = (
        words[training.prmu.tokenizer.encode(word, add_special_tokens=False)].sum(0)
        for word in ("boats", "rain")
    )
    end = words[training.prmu.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    around = end if place == "ends" else torch.zeros_like(end)
    for user, row in users.rows.items():
        own = rows[row - users.unknown_row] - around
        likes_boats = torch.dot(own, boats - rain) > 0
        assert likes_boats == bool(int(user[1:]) % 2)
        assert own.norm() == pytest.approx(0.2 * 32**0.5, rel=0.3)
    settings.row_init = "random"
    assert torch.equal(stage.prepare(settings, pairs, 0).rows.rows[0], rows[0]), (
        "the unknown row starts at random"
    )


def test_frozen_rows_stay_and_without_rows_everybody_is_unknown(configure: Callable[..., Any]) -> None:
    settings = configure("train_prmu.epochs=1", "train_prmu.user_rows=frozen").train_prmu
    pairs = [pair(i, "ann") for i in range(16)]
    training = stage.prepare(settings, pairs, 0)
    before = training.rows.rows.clone()
    head = training.prmu.model.get_parameter("score.weight").detach().clone()
    stage.train(training, pairs, settings, 0)
    assert torch.equal(training.rows.rows, before)
    assert not torch.equal(training.prmu.model.get_parameter("score.weight"), head)
    settings.user_rows = "none"
    without = stage.prepare(settings, pairs, 0)
    assert without.prmu.encoder.users.rows == {}
    assert len(without.rows.rows) == 1


def test_gradient_is_the_mean_over_the_batch_however_it_is_cut(
    tmp_path: Path, configure: Callable[..., Any]
) -> None:
    def first_norm(micro: int, copies: int = 1) -> float:
        settings = configure(
            "train_prmu.epochs=1", "train_prmu.id_dropout=0", f"train_prmu.micro_batch_size={micro}"
        ).train_prmu  # fmt: skip
        pairs = [pair(i, "ann", prompt="rain " * i) for i in range(10)] * copies
        path = tmp_path / f"{micro}-{copies}.jsonl"
        stage.train(stage.prepare(settings, pairs, 0), pairs, settings, 0, MetricsLog(path, 0))
        return float(json.loads(path.read_text())["data"]["prmu/gradient_norm"])

    whole = first_norm(32)
    assert first_norm(3) == pytest.approx(whole, rel=1e-4)
    assert first_norm(32, copies=3) == pytest.approx(whole, rel=1e-4)


def test_a_run_that_is_cut_off_ends_as_one_that_is_not(
    tmp_path: Path, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from the last checkpoint on; metrics.jsonl too."""

    class KilledError(Exception):
        pass

    write(tmp_path / "chains", habit_pairs(4, 16))
    config = configure(
        "train_prmu.epochs=3",
        "train_prmu.batch_size=8",
        "train_prmu.checkpoint_every=4",
        "train_prmu.log_every=1",
    )
    stage.run(config)
    whole = (tmp_path / "prmu" / "model" / "model.safetensors").read_bytes()
    lines = (tmp_path / "prmu" / "metrics.jsonl").read_text()
    config = configure(
        "train_prmu.epochs=3", "train_prmu.batch_size=8", "train_prmu.checkpoint_every=4", "train_prmu.log_every=1",
        "run.name=again", f"paths.prmu={tmp_path}/again/model",
    )  # fmt: skip
    step = stage.RowTable.step
    calls = []

    def dying(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 10:
            raise KilledError
        step(self, *arguments)

    monkeypatch.setattr(stage.RowTable, "step", dying)
    with pytest.raises(KilledError):
        stage.run(config)
    assert [path.name for path in (tmp_path / "again" / "checkpoints").iterdir()] == ["step_8"]
    stage.run(config)
    assert len(calls) < 10 + len(lines.splitlines()), "it went on, and did not start again"
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == whole
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == lines
    assert not (tmp_path / "again" / "checkpoints").exists()


def test_eq_2_on_known_margins() -> None:
    """-log sigmoid(margin), averaged: 0 margin gives ln 2."""
    margins = torch.tensor([0.0, 2.0, -2.0])
    expected = (math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 3
    assert -stage.logsigmoid(margins).mean().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["train_prmu.id_dropout=1.5"], ConfigError, r"train_prmu\.id_dropout=1\.5"),
        (["train_prmu.batch_size=0"], ConfigError, r"train_prmu\.batch_size=0"),
        (["train_prmu.dtype=float16"], ConfigError, r"train_prmu\.dtype=float16"),
        (["train_prmu.packing=tight"], ConfigError, r"train_prmu\.packing=tight"),
        (["train_prmu.workers=99"], ConfigError, r"train_prmu\.workers=99"),
        (["paths.base=nowhere"], StageError, r"train_prmu\.init=nowhere: no such folder"),
        (["train_prmu.max_tokens=8"], DataError, r"item pair\d+: \d+ tokens, more than the limit of 8"),
        (["train_prmu.learning_rate=1e30"], StageError, "not finite at step"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_no_model(
    tmp_path: Path, configure: Callable[..., Any], overrides: list[str], error: type, says: str
) -> None:
    write(tmp_path / "chains", habit_pairs(4, 8))
    with pytest.raises(error, match=says):
        stage.run(configure(*overrides))
    assert not (tmp_path / "prmu" / "model").exists()


def test_missing_pairs_name_the_recipe(tmp_path: Path, configure: Callable[..., Any]) -> None:
    with pytest.raises(StageError, match=r"build_chains\.sh"):
        stage.run(configure())
