"""From clusters to a vocabulary: a mapping file that a person edits, and the vocabulary file that comes of it (S10, S41).

    python -m data_pipeline.mapping outputs/chains/tags/mapping.yaml my_tags.yaml

Then ``tags.vocabulary=my_tags.yaml`` makes every stage use it. A mapping that somebody has edited is never overwritten.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from data_pipeline.clustering import Clustering
from tagpr.errors import ConfigError, DataError, StageError, TagPRError
from tagpr.runs import write_text_atomically
from tagpr.vocabulary import FEWEST, definition_problem, name_problem, read_vocabulary, yaml_place

MAPPING, NEWER = "mapping.yaml", "mapping.new.yaml"
KEYS = frozenset({"name", "definition", "share", "members"})

_MADE = "# made by build_chains, hash of the rest: "
_HELP = """\
# Proposed tags by cluster, the largest first. Edit this file, then make a vocabulary of it:
#   python -m data_pipeline.mapping <this file> my_tags.yaml
# name: what the tag is to be called; null drops the cluster. Clusters of the same name become one tag.
# definition: what its segments do, in one line, as the tagger will read it; of merged clusters one has it, the others null.
# share (of all proposals) and members are for your information; members may be moved from one cluster to another.
"""


@dataclass(frozen=True)
class Entry:
    """A cluster of the mapping; ``line`` is where it stands in the file, 0 for one that is in none."""

    name: str | None
    definition: str | None
    members: tuple[str, ...]
    share: float = 0.0
    line: int = 0


def proposed_mapping(clustering: Clustering) -> list[Entry]:
    """The clusters as they came out, for a person to edit."""
    return [
        Entry(cluster.name, cluster.definition, tuple(tag.name for tag in cluster.members), cluster.share)
        for cluster in clustering.clusters
    ]


def write_mapping(folder: Path, entries: Sequence[Entry]) -> tuple[Path, bool]:
    """Write ``mapping.yaml``; beside it, as ``mapping.new.yaml``, where the one there has been edited.

    Returns the path of ``mapping.yaml`` and whether an edited one was kept.
    """
    path = folder / MAPPING
    text = _text(entries)
    kept = path.exists() and is_edited(path)
    write_text_atomically(folder / NEWER if kept else path, text)
    if not kept:
        (folder / NEWER).unlink(missing_ok=True)
    return path, kept


def is_edited(path: Path) -> bool:
    """Whether a mapping file differs from what was written there: its first line has the hash of the others."""
    first, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    return first != _MADE + _digest(rest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(entries: Sequence[Entry]) -> str:
    clusters = [
        {
            "name": entry.name,
            "definition": entry.definition,
            "share": round(entry.share, 4),
            "members": list(entry.members),
        }
        for entry in entries
    ]
    rest = _HELP + yaml.safe_dump(
        {"clusters": clusters}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    return f"{_MADE}{_digest(rest)}\n{rest}"


def read_mapping(path: Path) -> list[Entry]:
    """Read an edited mapping, strictly.

    Raises:
        DataError: naming file, line and what is wrong there.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}). Name a mapping file (mapping.yaml)."
        ) from error
    except yaml.YAMLError as error:
        raise DataError(
            f"{yaml_place(path, error)}: is no YAML. Mend the indentation or the quotes."
        ) from error
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    if len(pairs) != 1 or pairs[0][0].value != "clusters" or not isinstance(pairs[0][1], yaml.SequenceNode):
        raise DataError(f"{path}: is no mapping file. It has one key, clusters, and a list below it.")
    entries: list[Entry] = []
    owners: dict[str, int] = {}
    for node in pairs[0][1].value:
        entry = _entry(path, node)
        for member in entry.members:
            if member in owners:
                _refuse(
                    path,
                    entry.line,
                    f"member {member!r} is also in the cluster at line {owners[member]}",
                    "Leave it in one of them",
                )
            owners[member] = entry.line
        entries.append(entry)
    return entries


def _entry(path: Path, node: yaml.Node) -> Entry:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        _refuse(path, line, "is no cluster", f"Give it {', '.join(sorted(KEYS))}")
    fields: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if key.value not in KEYS or key.value in fields:
            what = "occurs twice" if key.value in fields else "is no key of a cluster"
            _refuse(path, key.start_mark.line + 1, f"{key.value}: {what}", f"Use {', '.join(sorted(KEYS))}")
        fields[key.value] = value
    for key in ("name", "members"):
        if key not in fields:
            _refuse(path, line, f"{key}: is missing in this cluster", "Write it, or remove the cluster")
    name = definition = None
    if not _is_null(fields["name"]):
        name = _scalar(path, "name", fields["name"])
        if problem := name_problem(name):
            _refuse(path, fields["name"].start_mark.line + 1, f"name: {name} {problem}")
        if "definition" in fields and not _is_null(fields["definition"]):
            definition = _scalar(path, "definition", fields["definition"])
            if problem := definition_problem(fields["definition"]):
                _refuse(path, fields["definition"].start_mark.line + 1, f"definition: {problem}")
    members = fields["members"]
    if not isinstance(members, yaml.SequenceNode):
        _refuse(path, members.start_mark.line + 1, "members: is no list", "Write [one, two, ...]")
    texts = tuple(_scalar(path, "members", member) for member in members.value)
    share = fields.get("share")
    try:
        part = 0.0 if share is None or _is_null(share) else float(_scalar(path, "share", share))
    except ValueError:
        _refuse(path, line, "share: is no number", "Leave it as it was written; nothing is read from it")
    return Entry(name, definition, texts, part, line)


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _scalar(path: Path, key: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        _refuse(path, node.start_mark.line + 1, f"{key}: is no text", "Write it on one line")
    return str(node.value).strip()


def _refuse(path: Path, line: int, what: str, remedy: str = "") -> NoReturn:
    raise DataError(f"{path}:{line}: {what}{'. ' + remedy + '.' if remedy else ''}")


def to_vocabulary(path: Path, entries: Sequence[Entry]) -> dict[str, str]:
    """Tag -> definition, in the order of the mapping; clusters of one name are one tag, dropped ones none.

    Raises:
        DataError: a tag has no definition or several, two names differ in capitals only, or too few tags are left.
    """
    names: list[str] = []
    found: dict[str, str] = {}
    lines: dict[str, int] = {}
    for entry in entries:
        if entry.name is None:
            continue
        if entry.name not in lines:
            if name_problem(entry.name, names):
                _refuse(
                    path,
                    entry.line,
                    f"name: {entry.name} differs from another name in capitals only",
                    "Spell them alike",
                )
            names.append(entry.name)
            lines[entry.name] = entry.line
        if entry.definition is None:
            continue
        if found.get(entry.name, entry.definition) != entry.definition:
            _refuse(
                path,
                entry.line,
                f"definition: {entry.name} has another one in the cluster at line {lines[entry.name]}",
                "Keep one, and write null for the other",
            )
        found[entry.name] = entry.definition
    for name in names:
        if name not in found:
            _refuse(path, lines[name], f"definition: {name} has none", "Say in one line what its segments do")
    if len(names) < FEWEST:
        raise DataError(f"{path}: leaves {len(names)} tags. Keep at least {FEWEST}.")
    return {name: found[name] for name in names}


def write_vocabulary(mapping: Path, target: Path) -> dict[str, str]:
    """Make the vocabulary file of a mapping. A file that is there already and says something else is left alone.

    Raises:
        DataError: the mapping cannot be used.
        StageError: the target exists and holds something else.
    """
    tags = to_vocabulary(mapping, read_mapping(mapping))
    if target.exists():
        try:
            same = list(read_vocabulary(target).items()) == list(tags.items())
        except ConfigError:
            same = False
        if not same:
            raise StageError(f"{target}: exists and says something else. Remove it, or name another file.")
        return tags
    text = f"# Tags and what their segments do, made of {mapping.name}. Use it with tags.vocabulary=<this file>.\n"
    text += yaml.safe_dump(tags, sort_keys=False, allow_unicode=True, width=1000)
    write_text_atomically(target, text)
    return tags


def main(arguments: Sequence[str]) -> int:
    """``python -m data_pipeline.mapping MAPPING VOCABULARY``; returns the exit status."""
    try:
        if len(arguments) != 2:
            raise ConfigError(
                "arguments: give two files: a mapping (mapping.yaml), and the vocabulary to make of it."
            )
        tags = write_vocabulary(Path(arguments[0]), Path(arguments[1]))
    except TagPRError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{arguments[1]}: {len(tags)} tags: {', '.join(tags)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
