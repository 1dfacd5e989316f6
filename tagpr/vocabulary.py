"""The set of tags that the whole system uses: the paper's nine, or a user's own from a YAML file (S11, S41).

A process learns of an own set by the environment variable ``TAGPR_TAGS``, an absolute path, which
``tagpr.configuration`` sets from ``tags.vocabulary``: child processes and Ray workers then see the same one.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import yaml

from tagpr.errors import ConfigError

VARIABLE = "TAGPR_TAGS"

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "analyze_input": "works out what is being asked and what is given",
        "examine_examples": "looks at single items of the user's history, or other evidence, one by one",
        "identify_patterns": "states a regularity that several items have in common",
        "evaluate_reference": "weighs the input against one particular outside reference",
        "compare_entities": "sets two or more candidates side by side",
        "synthesize_findings": "draws everything found so far together before choosing",
        "make_decision": "settles on one option",
        "verify_conclusion": "checks the chosen option once more for consistency",
        "formulate_conclusion": "words the final answer",
    }
)
"""The nine tags of the paper (S11), each with what its segment does. What is in use says :func:`vocabulary`."""

# Markup of Qwen3's chat format that is no control token of the form <|...|>, yet one token of its vocabulary.
CHAT_MARKUP = ("think", "tool_call", "tool_response")
LONGEST_NAME = 64
# With one tag for everything, no tag says anything.
FEWEST = 2

_NAME = re.compile(r"[A-Za-z_][\w-]*+", re.ASCII)


def vocabulary() -> Mapping[str, str]:
    """The tags in use, in order, each with its definition in one line; read once a process and file.

    Raises:
        ConfigError: the file that ``TAGPR_TAGS`` names cannot be used.
    """
    path = os.environ.get(VARIABLE)
    return _read_once(path) if path else DEFINITIONS


def vocabulary_hash() -> str:
    """Hash of names, order and definitions, for whatever must notice that another set is in use."""
    return hashlib.sha256(json.dumps(list(vocabulary().items())).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def _read_once(path: str) -> Mapping[str, str]:
    return MappingProxyType(read_vocabulary(Path(path)))


def read_vocabulary(path: Path) -> dict[str, str]:
    """Read a YAML file of ``tag: definition`` lines; their order is kept.

    Raises:
        ConfigError: the file cannot be read, or a line is no tag with its definition; naming file and line.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"tags.vocabulary={path}: cannot be read ({type(error).__name__}). "
            "Point it to a YAML file of `tag: definition` lines."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{yaml_place(path, error)}: is no YAML. Write `tag: definition` lines.") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no tags. Write `tag: definition` lines.")
    tags: dict[str, str] = {}
    for name, definition in root.value:
        where = f"{path}:{name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode) or not isinstance(definition, yaml.ScalarNode):
            raise ConfigError(f"{where}: is no `tag: definition` line. Put both on one line.")
        problem = name_problem(name.value, tags) or definition_problem(definition)
        if problem:
            raise ConfigError(f"{where}: {name.value}: {problem}")
        tags[name.value] = definition.value.strip()
    if len(tags) < FEWEST:
        raise ConfigError(f"{path}: has {len(tags)} tags. Write at least {FEWEST}.")
    return tags


def yaml_place(path: Path, error: yaml.YAMLError) -> str:
    """File and, where YAML's parser says it, line of a fault."""
    mark = getattr(error, "problem_mark", None)
    return str(path) if mark is None else f"{path}:{mark.line + 1}"


def name_problem(name: str, taken: Sequence[str] | Mapping[str, object] = ()) -> str:
    """Why ``name`` cannot be a tag beside those ``taken``, with the remedy; empty if it can."""
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        return f"cannot be a tag. Use letters, digits, _ and -, no digit or - first, at most {LONGEST_NAME} of them."
    if name.lower() in CHAT_MARKUP:
        return "is a mark of the chat format and cannot be a tag. Choose another name."
    if name.lower() in {other.lower() for other in taken}:
        return "occurs twice (capitals make no difference). Name each tag once."
    return ""


def definition_problem(node: yaml.Node) -> str:
    """Why a node is no definition, with the remedy; empty if it is one."""
    text = node.value.strip() if isinstance(node, yaml.ScalarNode) else ""
    if not text or node.tag == "tag:yaml.org,2002:null":
        return "has no definition. Say in one line what its segments do."
    if len(text.splitlines()) > 1:
        return "its definition has several lines. Say it in one."
    if "<" in text or ">" in text:
        return "its definition has angle brackets, which would read as tags. Leave them out."
    return ""
