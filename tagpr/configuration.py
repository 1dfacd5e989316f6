"""Hydra configuration for every stage: compose, refuse what cannot be meant, print one line when something is wrong.

Each stage has one file ``tagpr/config/<stage>.yaml``; the command line is a list of Hydra overrides
(``benchmark.profile_size=4 setting=paper``). Hydra's compose API is used instead of ``@hydra.main`` so that no stage
changes its working directory or its logging behind the user's back.
"""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra.errors
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tagpr.benchmarks.own import VARIABLE as TASKS_VARIABLE
from tagpr.benchmarks.own import own_tasks, read_tasks
from tagpr.errors import ConfigError, TagPRError
from tagpr.vocabulary import VARIABLE as TAGS_VARIABLE
from tagpr.vocabulary import vocabulary

logger = logging.getLogger("tagpr")

# verl still accepts these top-level keys and silently ignores what they say (verl 0.9.1, V1 trainer).
DEAD_KEYS = {
    "custom_reward_function": "reward.custom_reward_function",
    "reward_model": "reward.reward_model",
    "sandbox_fusion": "reward.sandbox_fusion",
}

# Files that code far from any configuration reads, in child processes and Ray workers too: key -> environment variable.
EXPORTED = {"tags.vocabulary": TAGS_VARIABLE, "benchmark.own_tasks": TASKS_VARIABLE}


def _own_task_names(path: str | None) -> ListConfig:
    """Names in a file of own tasks; none where it cannot be used, which :func:`export` then says."""
    if not path:
        return ListConfig([])
    try:
        return ListConfig(list(read_tasks(Path(path).expanduser())))
    except ConfigError:
        return ListConfig([])


def _package_folder(name: str) -> str:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{name}: is not installed in this environment. Run `bash recipes/setup.sh`.")
    return str(spec.submodule_search_locations[0])


OmegaConf.register_new_resolver("package_folder", _package_folder, replace=True)
OmegaConf.register_new_resolver("own_task_names", _own_task_names, replace=True)


def flat(node: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries by dotted key; lists are leaves."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from flat(value, f"{at}.{name}" if at else str(name))
    else:
        yield at, node


def compose(stage: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose ``tagpr/config/<stage>.yaml`` with Hydra overrides and resolve nothing yet.

    Raises:
        ConfigError: an override is malformed, names an unknown key or option, or sets a key that verl ignores.
    """
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0].split("@", 1)[0]
        root = key.split(".", 1)[0]
        if root in DEAD_KEYS and stage.endswith("_rl"):
            raise ConfigError(
                f"{key}: verl 0.9.1 accepts this key and ignores it. Use {DEAD_KEYS[root]} instead."
            )
    try:
        with initialize_config_module("tagpr.config", version_base="1.3"):
            return hydra_compose(stage, overrides=list(overrides))
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(stage, error)) from error


def resolve(config: DictConfig) -> DictConfig:
    """Resolve interpolations in place.

    Raises:
        ConfigError: a mandatory value is missing or an interpolation points nowhere.
    """
    try:
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line("config", error)) from error
    # verl leaves what it does not use unset: the critic, its own reward model, the distillation teacher.
    ours = [
        key for key in missing if not key.startswith(("critic.", "reward.reward_model.", "distillation."))
    ]
    if ours:
        raise ConfigError(f"{ours[0]}: has no value. Set it on the command line: {ours[0]}=...")
    return config


def export(config: DictConfig) -> None:
    """Put the paths of EXPORTED into this process's environment, absolute; take out what the configuration has as null.

    Raises:
        ConfigError: a file is not there, or holds no vocabulary that can be used.
    """
    for key, variable in EXPORTED.items():
        value = OmegaConf.select(config, key)
        if not value:
            os.environ.pop(variable, None)
            continue
        path = Path(value).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"{key}={value}: no such file. Point it to a YAML file, or set null.")
        os.environ[variable] = str(path)
    vocabulary()
    own_tasks()


def exported() -> dict[str, str]:
    """What :func:`export` has set, for workers that do not inherit this process's environment."""
    return {name: os.environ[name] for name in EXPORTED.values() if name in os.environ}


def _one_line(stage: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Could not override" in lines[0]:
        key = lines[0].split("'")[1]
        return f"{key}: no such key in {stage}.yaml. `--cfg` prints every key of this stage."
    text = " ".join(lines[:2])
    return text if text.endswith(".") else f"{text}."


def main(stage: str, run: Callable[[DictConfig], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Command line of a stage: overrides in, exit status out.

    ``--cfg`` prints the composed configuration and stops. A :class:`TagPRError` is one line on standard error and
    its status (2 for wrong input); anything else is a bug and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for ours in ("tagpr", "data_pipeline", "reward_server"):
        # Explicitly: verl sets the root logger's level when it is imported.
        logging.getLogger(ours).setLevel(logging.INFO)
    for chatty in ("httpx", "httpx2", "httpcore", "openai", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        only_print = "--cfg" in arguments
        config = compose(stage, [argument for argument in arguments if argument != "--cfg"])
        if only_print:
            sys.stdout.write(OmegaConf.to_yaml(config))
        else:
            export(resolve(config))
            run(config)
    except TagPRError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        sys.exit(130)
    sys.exit(0)
