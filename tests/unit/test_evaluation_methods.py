"""Who answers: what ``evaluate.models`` may say, and one line for what it may not."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tagpr.errors import ConfigError, StageError, TagPRError
from tagpr.evaluation.methods import Method, read_methods, settings_of


def folder(path: Path, weights: str = "1") -> str:
    path.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text("{}")
    (path / "model.safetensors").write_text(weights)
    return str(path)


def read(tmp_path: Path, models: dict[str, Any], only: list[str] | None = None) -> dict[str, Method]:
    return read_methods(
        OmegaConf.create(
            {"evaluate": {"models": models, "only": only}, "paths": {"base": str(tmp_path / "base")}}
        )
    )


def test_a_folder_a_list_of_training_runs_and_an_endpoint(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two", "2")
    methods = read(
        tmp_path,
        {
            "mine": one,
            "seeds": [one, two],
            "zero": {"model": one, "profile_size": 0, "thinking": False},
            "gpt-4o": {
                "model": "gpt-4o", "endpoint": "https://host/v1", "key_variable": "OPENAI_API_KEY",
                "thinking": False, "request": {"seed": 7, "temperature": None}, "concurrency": 4,
            },
            "left-out": None,
        },
    )  # fmt: skip
    assert list(methods) == ["mine", "seeds", "zero", "gpt-4o"]
    assert methods["mine"] == Method("mine", one)
    assert methods["seeds"].runs == (one, two)
    assert (methods["zero"].profile_size, methods["zero"].thinking) == (0, False)
    endpoint = methods["gpt-4o"]
    assert endpoint.request == {"seed": 7, "temperature": None}
    assert endpoint.prompt_tokenizer == str(tmp_path / "base")


def test_the_order_is_that_of_the_models_and_only_what_is_chosen_must_be_there(tmp_path: Path) -> None:
    one = folder(tmp_path / "one")
    assert list(read(tmp_path, {"a": one, "b": one, "sft": "/nowhere"}, ["b", "a"])) == ["a", "b"]


def test_settings_change_with_what_determines_the_answers(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two", "2")
    mine = Method("mine", one, seeds_of=(two,))
    assert settings_of(mine) == settings_of(Method("other", one))
    assert settings_of(mine) != settings_of(mine, two)
    assert settings_of(mine) != settings_of(Method("mine", one, thinking=False))
    asked = Method("x", "gpt", endpoint="http://a/v1", tokenizer=one, request={"seed": 1})
    assert settings_of(asked) == settings_of(
        Method("x", "gpt", endpoint="http://b/v1", tokenizer=one, request={"seed": 1})
    )
    assert settings_of(asked) != settings_of(Method("x", "gpt", endpoint="http://a/v1", tokenizer=one))
    assert settings_of(asked) != settings_of(
        Method("x", "gpt", endpoint="http://a/v1", tokenizer=two, request={"seed": 1})
    )


ENDPOINT = {"model": "m", "endpoint": "http://h/v1"}


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ({}, ConfigError, "names no model"),
        ({"a": None}, ConfigError, "names no model"),
        ({"a/b": "x"}, ConfigError, "evaluate.models.a/b: cannot name a file"),
        ({"a.unanswered": "x"}, ConfigError, "cannot name a file"),
        ({"a": "/nowhere"}, StageError, "evaluate.models.a=/nowhere: no Hugging Face folder"),
        ({"sft": "/nowhere"}, StageError, "Run `bash recipes/sft.sh`"),
        ({"a": {"endpoint": "http://h/v1"}}, ConfigError, "evaluate.models.a.model: is missing"),
        ({"a": []}, ConfigError, "evaluate.models.a.model: is missing"),
        ({"a": ["org/x", "org/x"]}, ConfigError, "names a folder twice"),
        ({"a": {**ENDPOINT, "thinkin": True}}, ConfigError, "evaluate.models.a.thinkin: no such field"),
        ({"a": {**ENDPOINT, "endpoint": "h/v1"}}, ConfigError, "is no URL"),
        ({"a": {**ENDPOINT, "endpoint": "http://u:p@h/v1"}}, ConfigError, "carries a user, password or query"),
        ({"a": {**ENDPOINT, "model": ["m", "n"]}}, ConfigError, "one model"),
        ({"a": {**ENDPOINT, "request": {"messages": []}}}, ConfigError, "request.messages: is set by the evaluation"),
        ({"a": {**ENDPOINT, "key_variable": "sk-123"}}, ConfigError, "is no name of an environment variable"),
        ({"a": {**ENDPOINT, "concurrency": 0}}, ConfigError, "concurrency=0"),
        ({"a": {**ENDPOINT, "thinking": "no"}}, ConfigError, "thinking=no: is no true or false"),
        ({"a": {"model": "org/x", "request": {"seed": 1}}}, ConfigError, "request: is for a model behind an endpoint"),
        ({"a": {"model": "org/x", "profile_size": -1}}, ConfigError, "profile_size=-1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, models: dict[str, Any], error: type[TagPRError], message: str
) -> None:
    with pytest.raises(error) as caught:
        read(tmp_path, models)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "u:p" not in str(caught.value)
    assert "sk-123" not in str(caught.value)


def test_an_unknown_label_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.only=sfd: no such model. Known: sft"):
        read(tmp_path, {"sft": "org/x"}, ["sfd"])
