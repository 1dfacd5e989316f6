"""The engine that shares prefixes gives the same logits as the padded one, from the cache or not, alone or in a crowd."""

import random
from pathlib import Path

import pytest
import torch
from prmu_tiny import USERS, make_base, make_prmu

from reward_server.engine import TransformersEngine
from reward_server.prefix import ATTENTION, PrefixEngine, shares_prefixes
from tagpr.prmu.encoding import Encoded
from tagpr.prmu.model import Prmu, load

WORDS = ["the", "user", "likes", "short", "titles", "about", "boats", "and", "rain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prefix")
    make_prmu(root / "model", make_base(root / "base"))
    return root / "model"


@pytest.fixture(scope="module")
def prmu(folder: Path) -> Prmu:
    return load(folder)


def mixed(prmu: Prmu, groups: int, seed: int = 0) -> list[Encoded]:
    """Groups of 1 to 6 responses of different lengths, in random order; some users have no row."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(0, most)))

    inputs = []
    for _ in range(groups):
        user, prompt = rng.choice([*USERS, "nobody"]), text(60)
        inputs += [prmu.encoder.encode("a", user, prompt, text(30)) for _ in range(rng.randint(1, 6))]
    rng.shuffle(inputs)
    return inputs


@pytest.mark.parametrize("batch_tokens", [64, 700, 100_000])
@pytest.mark.parametrize("cache_bytes", [0, 40_000, 1 << 30])
def test_equals_the_padded_engine(folder: Path, prmu: Prmu, batch_tokens: int, cache_bytes: int) -> None:
    inputs = mixed(prmu, 25)
    want = TransformersEngine(prmu, 4096).score(inputs)
    engine = PrefixEngine(load(folder), batch_tokens, cache_bytes)
    for _ in range(2):  # the second time from the cache, as far as it is kept
        assert engine.score(inputs) == pytest.approx(want, abs=1e-5)
    for place in (0, 7, len(inputs) - 1):
        assert engine.score([inputs[place]])[0] == pytest.approx(want[place], abs=1e-5)
    assert max(want) - min(want) > 5


def test_another_users_id_gives_another_score(folder: Path) -> None:
    prmu = load(folder)
    engine = PrefixEngine(prmu, 1000, 1 << 30)
    texts = [prmu.encoder.encode("a", user, "boats", "rain") for user in [*USERS, "nobody", "nobody else"]]
    for _ in range(2):
        logits = engine.score(texts)
        assert len({round(logit, 4) for logit in logits[:4]}) == 4
        assert logits[3] == pytest.approx(logits[4], abs=1e-5)


def test_counts_what_the_cache_saves(folder: Path) -> None:
    prmu = load(folder)
    engine = PrefixEngine(prmu, 1000, 1 << 30)
    group = [prmu.encoder.encode("a", "ann", "boats and rain", word) for word in WORDS[:5]]
    prefix = group[0].prefix_tokens
    total = sum(len(one.token_ids) for one in group)
    engine.score(group[:3])
    assert engine.counts().cached_tokens == 2 * prefix
    engine.score(group[3:])  # a group that comes in two requests
    assert engine.counts() == (total, 4 * prefix)


def test_the_cache_is_bounded_and_drops_the_oldest(folder: Path) -> None:
    prmu = load(folder)
    one = prmu.encoder.encode("a", "ann", "boats", "rain")
    row = 2 * 2 * 1 * 32 * 4  # keys and values, layers, heads, head size, bytes of a float
    engine = PrefixEngine(prmu, 1000, 2 * row * one.prefix_tokens)
    first, second, third = (prmu.encoder.encode("a", user, "boats", "rain") for user in USERS)
    for each in (first, second, first, third):
        engine.score([each])
    assert list(engine._kept) == [tuple(each.token_ids[: each.prefix_tokens]) for each in (first, third)]
    assert engine._kept_bytes == 2 * row * one.prefix_tokens == sum(p.size for p in engine._kept.values())
    engine.close()
    assert not engine._kept


def test_bfloat16_stays_near_float32(folder: Path) -> None:
    half, whole = load(folder, dtype="bfloat16"), load(folder)
    inputs = mixed(whole, 25)
    want = torch.tensor(TransformersEngine(whole, 4096).score(inputs))
    padded = torch.tensor(TransformersEngine(half, 4096).score(inputs))
    shared = torch.tensor(PrefixEngine(half, 700, 1 << 30).score(inputs))
    spread = (want.max() - want.min()).item()
    assert (padded - want).abs().max() < 0.05 * spread
    assert (shared - want).abs().max() < 0.05 * spread


def test_models_whose_layers_see_a_window_are_scored_whole(folder: Path) -> None:
    prmu = load(folder)
    assert shares_prefixes(prmu)
    prmu.model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not shares_prefixes(prmu)


def test_the_replaced_attention_still_takes_padded_batches(folder: Path, prmu: Prmu) -> None:
    inputs = mixed(prmu, 5)
    own = load(folder)
    PrefixEngine(own, 700, 0)
    assert own.model.config._attn_implementation == ATTENTION
    assert TransformersEngine(own, 4096).score(inputs) == pytest.approx(
        TransformersEngine(prmu, 4096).score(inputs), abs=1e-5
    )
