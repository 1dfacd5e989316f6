"""Stage ``publish_chains``: ``python -m data_pipeline.publish key=value ...``.

Writes the finished chains and pairs as a folder that ``datasets.load_dataset`` reads, with its card; on demand, and privately
unless told otherwise, to the Hugging Face hub.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import httpx
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported, but not to mypy
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from data_pipeline.card import Facts, dataset_card, license_id, sources
from data_pipeline.finished import (
    REMEDY,
    check_unchanged,
    iterate_finished,
    iterate_pairs,
    read_manifest,
    sft_column,
)
from data_pipeline.settings import Settings
from tagpr.benchmarks.tasks import get_task
from tagpr.configuration import main
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.runs import check_tags_of, file_hash, write_text_atomically
from tagpr.schema import Manifest, PreferencePair
from tagpr.vocabulary import vocabulary

logger = logging.getLogger("data_pipeline")

_TEXT = datasets.Value("string")
CHAIN_FEATURES = datasets.Features(
    dict.fromkeys(("id", "example_id", "task", "user_id", "prompt", "response", "gold"), _TEXT)
    | {"judge_scores": datasets.List(datasets.Value("int8"))}
)
# Whatever a pair says of itself is published; all of it is text but for these.
_NO_TEXT = {"margin": datasets.Value("float64"), "chains": datasets.List(_TEXT)}
PAIR_FEATURES = datasets.Features({name: _NO_TEXT.get(name, _TEXT) for name in PreferencePair.model_fields})
FEATURES = {"sft": CHAIN_FEATURES, "prp": PAIR_FEATURES, "pqp": PAIR_FEATURES}
# Rows in a row group: what a reader holds in memory at a time.
_GROUP_ROWS = 500


class PublishSettings(Settings):
    """The ``publish:`` node."""

    title: str | None
    license: str | None
    review: str | None
    push: str | None
    private: bool
    token_file: str | None


class Hub(Protocol):
    """What is used of ``huggingface_hub.HfApi``."""

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> object:
        """Make the repository where it is missing."""

    def repo_info(self, repo_id: str, *, repo_type: str) -> Any:
        """Say, among others, whether it is private."""

    def upload_folder(
        self, *, repo_id: str, repo_type: str, folder_path: str, commit_message: str, allow_patterns: list[str],
        delete_patterns: list[str],
    ) -> object:  # fmt: skip
        """One commit with the folder's files."""


def run(config: DictConfig) -> None:
    """Write the folder and, with ``publish.push``, upload it. Doing it again writes the same bytes.

    Raises:
        ConfigError: a setting is wrong, or there is no token.
        StageError: there are no finished chains, they were made for other tags, or the hub refuses.
        DataError: a file is damaged.
    """
    settings = _settings(config)
    token = None if settings.push is None else read_token(settings.token_file)
    chains, folder = Path(config.paths.chains), Path(config.run.dir)
    manifest = read_manifest(chains)
    check_tags_of(chains, "paths.chains")
    check_unchanged(
        chains, manifest, {"sft.parquet", "chains.jsonl", "prp.jsonl", "pqp.jsonl", "funnel.json"}
    )
    facts = write_data(chains, folder, manifest, _review(settings, chains, manifest))
    found = sources(facts.notes["benchmark"])
    license = license_id(settings.license, found)
    title = settings.title or f"TagPR chains on {', '.join(source.title for source in found)}"
    write_text_atomically(folder / "README.md", dataset_card(facts, title, license, found))
    # Only now does nothing name the older files any more.
    for path in folder.glob("data/*/train-*.parquet"):
        if str(path.relative_to(folder)) not in facts.files.values():
            path.unlink()
    rows = ", ".join(f"{name} {number:,}" for name, number in facts.rows.items())
    logger.info(
        '%s: %s rows, licence %s%s; read it with datasets.load_dataset("%s")',
        folder, rows, license, " (SIMULATED)" if facts.simulated else "", folder,
    )  # fmt: skip
    if settings.push is not None:
        push(folder, settings.push, settings.private, huggingface_hub.HfApi(token=token))


def _settings(config: DictConfig) -> PublishSettings:
    try:
        settings = PublishSettings.model_validate(OmegaConf.to_container(config.publish, resolve=True))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(["publish", *map(str, problem["loc"])])
        raise ConfigError(f"{key}={problem['input']}: {problem['msg']}. Change it.") from error
    if settings.push is not None:
        try:
            validate_repo_id(settings.push)
        except HFValidationError:
            valid = False
        else:
            valid = settings.push.count("/") == 1
        if not valid:
            raise ConfigError(f"publish.push={settings.push}: is no name of a repository. Give owner/name.")
    return settings


def read_token(token_file: str | None) -> str:
    """The hub's token from a file, else from ``HF_TOKEN``; never the one that a login left on this machine.

    Raises:
        ConfigError: there is none.
    """
    if token_file is None:
        token = os.environ.get("HF_TOKEN", "").strip()
        if not token:
            raise ConfigError(
                "publish.push: needs a token. Put one with write access into HF_TOKEN, or name a file in publish.token_file."
            )
        return token
    try:
        token = Path(token_file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"publish.token_file={token_file}: cannot be read ({type(error).__name__}). Write the token into it."
        ) from None
    if not token:
        raise ConfigError(f"publish.token_file={token_file}: is empty. Write the token into it.")
    return token


def write_data(chains: Path, folder: Path, manifest: Manifest, review: dict[str, Any] | None) -> Facts:
    """Write ``data/<configuration>/train-<hash>.parquet`` and return what the card is to say of them.

    Raises:
        StageError: the chains were made before manifests said of which data.
        DataError: a file of the pipeline is damaged.
    """
    if "benchmark" not in manifest.notes:
        raise StageError(
            f"{chains / 'manifest.json'}: does not say of which benchmark the chains are, so nobody knows their licence. {REMEDY}"
        )
    written = {"sft": _write(folder, "sft", _chain_rows(chains))}
    for kind in ("prp", "pqp"):
        pairs = _write(folder, kind, (pair.model_dump() for pair in iterate_pairs(chains, kind)))
        if pairs[1]:  # datasets can't read a configuration without rows
            written[kind] = pairs
    tasks = sorted({task for (task,) in sft_column(chains, "task")})
    try:
        funnel = json.loads((chains / "funnel.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{chains / 'funnel.json'}: cannot be read ({type(error).__name__}). {REMEDY}"
        ) from error
    return Facts(
        manifest=manifest,
        funnel=funnel,
        rows={name: number for name, (_, number) in written.items()},
        files={name: str(path.relative_to(folder)) for name, (path, _) in written.items()},
        columns={name: list(FEATURES[name]) for name in written},
        tasks={task: get_task(task).title for task in tasks},
        tags=vocabulary(),
        review=review,
    )


def _chain_rows(chains: Path) -> Iterator[dict[str, Any]]:
    for chain in iterate_finished(chains):
        yield {name: getattr(chain, name) for name in CHAIN_FEATURES}


def _write(folder: Path, name: str, rows: Iterable[dict[str, Any]]) -> tuple[Path, int]:
    """Write one configuration with the types that ``datasets`` will see; returns the file and its rows.

    The file's name holds a hash of its content: ``datasets`` caches a local folder by its last name and the names of its files,
    and would go on giving out the rows of the last version, or of another folder.
    """
    schema = FEATURES[name].arrow_schema
    place = folder / "data" / name
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f".train.parquet.{os.getpid()}"
    rows, number = iter(rows), 0
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            while group := list(islice(rows, _GROUP_ROWS)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                number += len(group)
        path = place / f"train-{file_hash(partial)[:16]}.parquet"
        partial.replace(path)
    except OSError as error:
        raise StageError(
            f"{place}: cannot be written ({error.strerror or error}). Make room, or set run.outputs."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path, number


def _review(settings: PublishSettings, chains: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The review's report where there is one on these very chains."""
    if settings.review is None:
        return None
    path = Path(settings.review)
    if not path.is_file():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        reviewed = report["sft_parquet"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"publish.review={path}: is no report of a review ({type(error).__name__}). "
            "Make it with `bash recipes/review_chains.sh`, or set null."
        ) from error
    if reviewed != file_hash(chains / "sft.parquet"):
        logger.warning("%s: is a review of other chains; the card leaves it out", path)
        return None
    return report


def push(folder: Path, repository: str, private: bool, hub: Hub) -> None:
    """Upload the card and the data, and nothing else that may lie in the folder, as one commit.

    Raises:
        StageError: the hub refuses or cannot be reached; or the repository is public and ``private`` is asked for.
    """
    try:
        hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        # The call above leaves an existing repository as it is.
        if private and not hub.repo_info(repository, repo_type="dataset").private:
            raise StageError(
                f"publish.push={repository}: is public on the hub. Make it private there, or set publish.private=false."
            )
        hub.upload_folder(
            repo_id=repository, repo_type="dataset", folder_path=str(folder), commit_message="Chains, pairs and their card",
            allow_patterns=["README.md", "data/*/train-*.parquet"], delete_patterns=["data/**"],
        )  # fmt: skip
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise StageError(
            f"publish.push={repository}: the hub refuses (status {status}). Check that the token may write there; "
            f"{folder} is complete."
        ) from None
    except (OSError, httpx.HTTPError) as error:  # no connection, a timeout, HF_HUB_OFFLINE
        raise StageError(
            f"publish.push={repository}: the hub cannot be reached ({type(error).__name__}). Run it again later; "
            f"{folder} is complete."
        ) from None
    logger.info("%s: pushed to the hub (%s)", repository, "private" if private else "public")


if __name__ == "__main__":
    main("publish_chains", run)
