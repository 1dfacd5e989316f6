"""A small selection of the evaluation's fault scripts, and the thinking budget with a real vLLM."""

from pathlib import Path

import pytest

from tagpr.errors import ConfigError
from tagpr.evaluation.engines import open_engine
from tagpr.evaluation.methods import Method
from tagpr.evaluation.prompts import PromptRenderer, PromptSettings
from tagpr.tags import THINK_CLOSE
from tests.faults import evaluation_endpoint, evaluation_kills, evaluation_replicas
from tests.faults.evaluation_setup import prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    prepare(folder, ["minilamp"])
    return folder


def test_killed_evaluations_end_like_an_undisturbed_one(outputs: Path) -> None:
    figures = evaluation_kills.disturbed(outputs, "minilamp", 2, "evaluate.limit=60", "evaluate.seeds=[1]")
    assert figures["problems"] == []
    assert 0 < figures["rows_at_kill"][1] < figures["rows"] == 120


def test_a_served_model_behind_a_bad_network_says_what_the_offline_engine_says(outputs: Path) -> None:
    figures = evaluation_endpoint.check(outputs, 24, 0.4, 1)
    assert evaluation_endpoint.problems_of(figures) == []
    assert sum(figures["faults"].values()) >= 5


def test_replicas_say_what_one_engine_says_though_one_is_killed(outputs: Path) -> None:
    figures = evaluation_replicas.check(outputs, 48, 1)
    assert evaluation_replicas.problems_of(figures) == []


def test_thinking_ends_at_the_budget_and_is_answered(outputs: Path) -> None:
    model = str(outputs / "base" / "model")
    method, settings = Method("base", model), evaluation_replicas.engine_settings()
    asked = evaluation_replicas.requests(outputs, 30, [None, 1])
    plain = PromptSettings(8, "recency", 160, 80, 0)
    with open_engine(method, settings, plain, 1.0) as engine:
        free = {each.key: each for each in engine.complete(asked) if each is not None}
    rendering = PromptRenderer(model, plain)
    close = rendering.tokenizer.convert_tokens_to_ids(THINK_CLOSE)
    # Every second chain has ended by then.
    ends = sorted(each.token_ids.index(close) for each in free.values() if close in each.token_ids)
    tokens = ends[len(ends) // 2] + 1
    budget = PromptSettings(8, "recency", 160, 80, 0, tokens)
    with open_engine(method, settings, budget, 1.0) as engine:
        found = {each.key: each for each in engine.complete(asked) if each is not None}
    assert found.keys() == free.keys()
    cut = {key: each for key, each in found.items() if each.thinking_cut}
    assert 0 < len(cut) < len(found)
    for key, each in found.items():
        text = rendering.decode(each.token_ids)
        assert len(each.token_ids) <= 80
        if each.thinking_cut:
            # The free answer up to the budget, the end of thinking, and something after it.
            assert each.token_ids[:tokens] == free[key].token_ids[:tokens]
            assert rendering.decode(each.token_ids[tokens:]).startswith(f"\n{THINK_CLOSE}\n\n")
            assert THINK_CLOSE not in rendering.decode(each.token_ids[:tokens])
        elif key[1] is None:
            # Nobody interfered: what was said is said again, though in two steps.
            assert each == free[key], text
    with pytest.raises(
        ConfigError, match=r"evaluate.thinking_tokens=79: .* nothing of benchmark.max_response_tokens=80"
    ):
        open_engine(method, settings, PromptSettings(8, "recency", 160, 80, 0, 79), 1.0)
