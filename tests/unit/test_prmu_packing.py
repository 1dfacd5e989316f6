"""The three layouts of a pair give the same logits and gradients, and nothing in a pair sees what it must not."""

import random

import pytest
import torch
from prmu_tiny import make_base
from torch.nn.functional import logsigmoid

from tagpr.errors import ConfigError
from tagpr.prmu import model as prmu_model
from tagpr.prmu.encoding import UserRows
from tagpr.prmu.packing import PACKINGS, EncodedPair, logits, pack, use_packing

PAD = 320


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[prmu_model.PreTrainedModel, UserRows]:
    base = make_base(tmp_path_factory.mktemp("packing") / "base")
    model, _, users = prmu_model.build(str(base), ["a", "b", "c"], row_std=0.3, max_tokens=512, seed=0)
    with torch.no_grad():
        model.get_parameter("score.weight").mul_(50)
    return model, users


def make_pairs(users: UserRows, count: int, seed: int = 0) -> list[EncodedPair]:
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(300) for _ in range(rng.randint(low, high))]

    pairs = []
    for _ in range(count):
        prefix = [rng.randrange(users.unknown_row, users.end), *words(5, 60)]
        pairs.append(EncodedPair(prefix + words(1, 30), prefix + words(1, 30)))
    # One response is the beginning of the other; both are a single token.
    prefix = [users.unknown_row, *words(8, 8)]
    pairs.append(EncodedPair([*prefix, 7, 8, 9], [*prefix, 7, 8]))
    pairs.append(EncodedPair([*prefix, 7], [*prefix, 8]))
    return pairs


def run(
    model: prmu_model.PreTrainedModel, pairs: list[EncodedPair], packing: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    use_packing(model, packing)  # type: ignore[arg-type]
    model.zero_grad()
    batch = pack(pairs, packing, PAD)  # type: ignore[arg-type]
    values = logits(model, batch, model.get_input_embeddings()(batch.users))
    n = len(pairs)
    (-logsigmoid(values[:n] - values[n:]).mean()).backward()
    return values.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def test_layouts_agree_in_logits_and_gradients(built: tuple[prmu_model.PreTrainedModel, UserRows]) -> None:
    model, users = built
    pairs = make_pairs(users, 12)
    found = {packing: run(model, pairs, packing) for packing in PACKINGS}
    oracle_logits, oracle = found["padding_free"]
    assert oracle_logits.std() > 0.1
    assert len(oracle) == len(list(model.parameters()))
    for packing in ("shared_prefix", "padded"):
        values, gradients = found[packing]
        assert (values - oracle_logits).abs().max() <= 1e-5 * oracle_logits.abs().max()
        for name, gradient in oracle.items():
            error = (gradients[name] - gradient).norm() / gradient.norm()
            assert error <= 1e-5, (packing, name, error)


def test_pairs_of_one_prompt_share_it_and_the_responses_they_have_in_common(
    built: tuple[prmu_model.PreTrainedModel, UserRows],
) -> None:
    model, users = built
    rng = random.Random(3)
    pairs = []
    for _ in range(3):
        prompt = [rng.randrange(users.unknown_row, users.end), *(rng.randrange(300) for _ in range(40))]
        # All begin with the same token of the response; the last is the beginning of the first.
        one, two, three = ([*prompt, 9, *(rng.randrange(300) for _ in range(12))] for _ in range(3))
        sides = [(one, two), (one, three), (two, three), (two, one[:-4])]
        pairs += [EncodedPair(*side, len(prompt)) for side in sides]
    rng.shuffle(pairs)
    batch = pack(pairs, "shared_prefix", PAD)
    assert batch.token_ids.shape[1] == 3 * (42 + 3 * 12 + 8)
    oracle_logits, oracle = run(model, pairs, "padding_free")
    values, gradients = run(model, pairs, "shared_prefix")
    assert (values - oracle_logits).abs().max() <= 1e-5 * oracle_logits.abs().max()
    for name, gradient in oracle.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    other_user = [pair.with_row(users.end) for pair in pairs]
    assert [pair.prompt_tokens for pair in other_user] == [41] * 12
    assert {pair.prompt[0] for pair in other_user} == {users.end}


def test_padding_free_is_the_stock_model_on_each_input_alone(
    built: tuple[prmu_model.PreTrainedModel, UserRows],
) -> None:
    model, users = built
    pairs = make_pairs(users, 3)
    values, _ = run(model, pairs, "shared_prefix")
    use_packing(model, "padded")
    with torch.no_grad():
        inputs = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        alone = torch.stack([model(input_ids=torch.tensor([each])).logits[0, 0] for each in inputs])
    assert (values - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_shared_tokens_stand_there_once_and_rejected_goes_on_at_their_positions(
    built: tuple[prmu_model.PreTrainedModel, UserRows],
) -> None:
    _, users = built
    pair = EncodedPair([users.unknown_row, 1, 2, 3, 4], [users.unknown_row, 1, 2, 5, 6, 7])
    batch = pack([pair, pair], "shared_prefix", PAD)
    assert batch.token_ids[0].tolist() == [PAD, 1, 2, 3, 4, 5, 6, 7] * 2
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5] * 2
    assert batch.ends.tolist() == [[0, 4], [0, 12], [0, 7], [0, 15]]
    assert batch.segments[1] == (5, 8, 0, 3)
    assert batch.users.tolist() == [users.unknown_row] * 2


def test_rejected_never_sees_chosen_nor_another_pair(
    built: tuple[prmu_model.PreTrainedModel, UserRows],
) -> None:
    model, users = built
    use_packing(model, "shared_prefix")

    def rejected(chosen: list[int], before: list[int]) -> float:
        prefix = [users.unknown_row, 1, 2]
        pairs = [
            EncodedPair([*prefix, *before, 9], [*prefix, 8]),
            EncodedPair([*prefix, *chosen], [*prefix, 5, 6]),
        ]
        batch = pack(pairs, "shared_prefix", PAD)
        with torch.no_grad():
            return logits(model, batch, model.get_input_embeddings()(batch.users))[3].item()

    assert rejected([3, 4], [1]) == pytest.approx(rejected([50, 60, 70], [90, 91, 92]), abs=1e-6)


def test_models_with_windows_are_refused(built: tuple[prmu_model.PreTrainedModel, UserRows]) -> None:
    model, _ = built
    kinds = model.config.layer_types
    model.config.layer_types = ["sliding_attention", "full_attention"]
    try:
        with pytest.raises(
            ConfigError, match=r"train_prmu\.packing=shared_prefix: the model has full_attention, sliding"
        ):
            use_packing(model, "shared_prefix")
    finally:
        model.config.layer_types = kinds
