"""Who answers: every row of a table is a method, a model folder or a model behind an OpenAI-compatible endpoint (S34)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, ListConfig, OmegaConf

from tagpr.errors import ConfigError, StageError
from tagpr.runs import check_model_folder, folder_hash

# Which recipe leaves the folder that a label stands for; a label of the user's own comes from elsewhere.
RECIPES = {
    "base": "base.sh",
    "sft": "sft.sh",
    "guided": "guided_rl.sh",
    "exploratory": "exploratory_rl.sh",
}
# Files of an evaluation that are no method's rows.
_RESERVED = ("summary", "manifest", "metrics", "config")
_RESERVED_ENDS = (".prmu", ".unanswered", ".settings")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What the evaluation itself puts into a request, or reads back in one form only.
_NOT_IN_REQUEST = ("model", "messages", "stream", "n")


@dataclass(frozen=True)
class Method:
    """One row of a table.

    ``model`` is a folder or hub id for vLLM's offline engine, or with ``endpoint`` the model's name there. ``thinking``:
    the response shows its reasoning, which is then taken apart and judged (``-R``); without it the whole response is the
    answer. ``seeds_of`` holds the folders of further training runs of the same method.
    """

    label: str
    model: str
    thinking: bool = True
    profile_size: int | None = None
    """Items in its prompts; None: as the benchmark says, 0: zero-shot."""
    temperature: float | None = None
    """Of all its answers; None: 0 for the one without a seed, ``evaluate.temperature`` for those with one."""
    endpoint: str | None = None
    """Base URL, such as https://host/v1; None: vLLM's offline engine."""
    key_variable: str | None = None
    """Environment variable that holds the endpoint's key; None: it wants none."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of a request's body; null takes one out (``temperature``, say, where the model refuses it)."""
    tokenizer: str | None = None
    """Folder or hub id whose tokens count for an endpoint's prompts; the same for all gives all the same prompts."""
    concurrency: int = 16
    retries: int = 6
    timeout_s: float = 600.0
    seeds_of: tuple[str, ...] = ()

    @property
    def prompt_tokenizer(self) -> str:
        """Folder or hub id that renders and counts its prompts."""
        return self.tokenizer or self.model

    @property
    def runs(self) -> tuple[str, ...]:
        """The folders of all its training runs; for an endpoint its one model."""
        return (self.model, *self.seeds_of)


def read_methods(config: DictConfig) -> dict[str, Method]:
    """The methods that ``evaluate.models`` and ``evaluate.only`` name, checked, in the order of ``evaluate.models``.

    A value is a folder or hub id, a list of them (training runs of one method), or a mapping with the fields of
    :class:`Method`.

    Raises:
        ConfigError: no method, an unknown label or field, or a value that cannot be meant.
        StageError: a model's folder is not there.
    """
    listed = {str(label): value for label, value in config.evaluate.models.items() if value is not None}
    only = config.evaluate.only
    chosen = list(listed) if only is None else [str(label) for label in only]
    for label in chosen:
        if label not in listed:
            raise ConfigError(f"evaluate.only={label}: no such model. Known: {', '.join(listed)}.")
    if not chosen:
        raise ConfigError("evaluate.models: names no model. Name one, label: folder.")
    for label in listed:
        if not re.fullmatch(r"[\w.-]+", label) or label in _RESERVED or label.endswith(_RESERVED_ENDS):
            raise ConfigError(f"evaluate.models.{label}: cannot name a file. Use letters, digits, . _ and -.")
    return {
        label: _method(label, value, str(config.paths.base))
        for label, value in listed.items()
        if label in chosen
    }


def settings_of(method: Method, model: str | None = None) -> dict[str, Any]:
    """What determines a method's answers besides prompts and limits; goes into ``<label>.settings.json``.

    ``model`` is the training run, one of ``method.runs``; None: the first. Neither the address of an endpoint nor the pace of
    asking counts: the same model elsewhere gives the same answers.
    """
    model = model or method.model
    settings: dict[str, Any] = {"thinking": method.thinking}
    if method.endpoint is not None:
        settings["model"] = f"endpoint:{model}"
        settings["request"] = dict(method.request)
        settings["tokenizer"] = _content(method.prompt_tokenizer)
    else:
        settings["model"] = _content(model)
    if method.temperature is not None:
        settings["temperature"] = method.temperature
    return settings


def _content(model: str) -> str:
    """A folder's hash; a hub id stands for itself."""
    return folder_hash(Path(model)) if Path(model).is_dir() else model


def check_own_folder(folder: str, label: str) -> None:
    """Refuse a folder of the user's own that is none.

    Raises:
        StageError: no Hugging Face folder is there.
    """
    if not (Path(folder) / "config.json").is_file() and not _HUB_ID.fullmatch(folder):
        raise StageError(
            f"evaluate.models.{label}={folder}: no Hugging Face folder. "
            "Point it at one with config.json, a tokenizer and *.safetensors."
        )


def _method(label: str, value: Any, base: str) -> Method:
    key = f"evaluate.models.{label}"
    if isinstance(value, ListConfig):
        value = OmegaConf.create({"model": value})
    if not isinstance(value, DictConfig):
        value = OmegaConf.create({"model": str(value)})
    fields = OmegaConf.to_container(value, resolve=True)
    assert isinstance(fields, dict)
    known = set(Method.__dataclass_fields__) - {"label", "seeds_of"}
    unknown = sorted(str(name) for name in fields if name not in known)
    if unknown:
        raise ConfigError(f"{key}.{unknown[0]}: no such field. Known: {', '.join(sorted(known))}.")
    runs = fields.pop("model", None)
    runs = [str(run) for run in (runs if isinstance(runs, list) else [runs]) if run]
    if not runs:
        raise ConfigError(f"{key}.model: is missing. Name a folder, or the model's name at the endpoint.")
    if len(set(runs)) < len(runs):
        raise ConfigError(f"{key}: names a folder twice. List each training run once.")
    given = {str(name): value for name, value in fields.items() if value is not None}
    for name, (accepts, wanted) in _CHECKS.items():
        if name in given and not accepts(given[name]):
            # A key that was put where its variable's name belongs must not come back out.
            shown = "" if name == "key_variable" else f"={given[name]}"
            raise ConfigError(f"{key}.{name}{shown}: is no {wanted}. Mend it.")
    if "endpoint" in given:
        _check_endpoint(key, given, runs)
        given.setdefault("tokenizer", base)
    else:
        for name in ("key_variable", "request", "tokenizer", "concurrency", "retries", "timeout_s"):
            if given.get(name):
                raise ConfigError(f"{key}.{name}: is for a model behind an endpoint. Set {key}.endpoint too.")
        for run in runs:
            if label in RECIPES and run == runs[0]:
                check_model_folder(run, f"paths.{label}", RECIPES[label], may_be_hub_id=label == "base")
            else:
                check_own_folder(run, label)
    return Method(label=label, model=runs[0], seeds_of=tuple(runs[1:]), **given)


def _check_endpoint(key: str, given: Mapping[str, Any], runs: list[str]) -> None:
    url = urlsplit(given["endpoint"])
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(
            f"{key}.endpoint={given['endpoint']}: is no URL. Use one like http://127.0.0.1:8000/v1."
        )
    if url.username or url.password or url.query:
        raise ConfigError(
            f"{key}.endpoint: carries a user, password or query. Put the key into a variable and name it in {key}.key_variable."
        )
    if len(runs) > 1:
        raise ConfigError(f"{key}.model: an endpoint's method has one model. Give each a label of its own.")
    for name in _NOT_IN_REQUEST:
        if name in given.get("request", {}):
            raise ConfigError(f"{key}.request.{name}: is set by the evaluation. Take it out.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CHECKS = {
    "endpoint": (lambda value: isinstance(value, str), "URL"),
    "key_variable": (
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z_]\w*", value)),
        "name of an environment variable",
    ),
    "thinking": (lambda value: isinstance(value, bool), "true or false"),
    "profile_size": (lambda value: _count(value) and value >= 0, "number of items"),
    "temperature": (lambda value: _number(value) and value >= 0, "temperature"),
    "request": (lambda value: isinstance(value, dict), "mapping of fields"),
    "tokenizer": (lambda value: isinstance(value, str), "folder or hub id"),
    "concurrency": (lambda value: _count(value) and value >= 1, "number of requests from 1 on"),
    "retries": (lambda value: _count(value) and value >= 0, "number of retries"),
    "timeout_s": (lambda value: _number(value) and value > 0, "number of seconds"),
}
