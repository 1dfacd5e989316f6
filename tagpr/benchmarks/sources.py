"""Where each benchmark's raw files are, where they come from, and how their rows are read: one class a benchmark."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from tagpr.benchmarks import dianping, lamp, longlamp, own_rows, pgraphrag
from tagpr.benchmarks.download import Patience, Remote, download, download_from_hub
from tagpr.errors import ConfigError, DataError
from tagpr.schema import Example, Split

if TYPE_CHECKING:
    # Brings an HTTP client along, which only Dianping's rewrites need.
    from tagpr.benchmarks.rewriting import Rewriter

# S1: rows of LaMP's time-based split.
LAMP_ROWS: dict[str, dict[Split, int]] = {
    "lamp1": {"train": 6542, "dev": 1500},
    "lamp2": {"train": 5073, "dev": 1410},
    "lamp3": {"train": 20000, "dev": 2500},
    "lamp4": {"train": 12500, "dev": 1500},
    "lamp5": {"train": 14682, "dev": 1500},
    "lamp7": {"train": 13437, "dev": 1498},
}

# As the hub numbers the files of a split: train-00000-of-00007.parquet.
_PARTS = re.compile(r"-\d{5}-of-(\d{5})\.")

Place = tuple[str, Split]


class Source(ABC):
    """The raw files of one benchmark, as configured (``benchmark.*`` and ``prepare_data.*``)."""

    splits: tuple[Split, ...] = ("train", "dev")

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.folder = Path(config.benchmark.dir)

    @abstractmethod
    def files(self, task: str, split: Split) -> Sequence[Path]:
        """The files that hold a task's split.

        Raises:
            DataError: they are not there.
        """

    @abstractmethod
    def rows(self, task: str, split: Split, counts: Counter[str]) -> Iterator[Example]:
        """Rows in file order; what is left out or mended is added to ``counts``.

        Raises:
            DataError: missing or malformed files; the message names file and row.
        """

    def fetch(self, missing: Sequence[Place], patience: Patience) -> bool:
        """Get files from where the benchmark publishes them; False where it does not.

        Raises:
            DataError: they cannot be had.
        """
        return False

    @abstractmethod
    def instructions(self, missing: Sequence[Place]) -> str:
        """What to put where by hand."""

    def settings(self) -> dict[str, Any]:
        """What decides, beside the files, which examples come out."""
        return {}

    def expected_rows(self, task: str, split: Split) -> int | None:
        """Rows that the published split has, where that is known."""
        return None

    def missing(self, tasks: Sequence[str]) -> list[Place]:
        """Tasks and splits without files."""
        found: list[Place] = []
        for task in tasks:
            for split in self.splits:
                try:
                    self.files(task, split)
                except DataError:
                    found.append((task, split))
        return found


class MiniLamp(Source):
    """LaMP's file format; the files are written by ``prepare``."""

    def files(self, task: str, split: Split) -> Sequence[Path]:
        """Questions and outputs."""
        return lamp.split_files(self.folder, task, split)

    def rows(self, task: str, split: Split, counts: Counter[str]) -> Iterator[Example]:
        """See ``lamp.iterate_split``."""
        return lamp.iterate_split(self.folder, task, split)

    def instructions(self, missing: Sequence[Place]) -> str:
        """Every folder with files missing."""
        folders = ", ".join(f"{lamp.official_name(task)}/{split}" for task, split in missing)
        return f"{self.folder}: lacks {folders} (each with <split>_questions.json and <split>_outputs.json)."


class Lamp(MiniLamp):
    """LaMP as its server has it: by time (S1) or by user."""

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.split_by: str = _choice(config, "split_by", ("time", "user"))

    def settings(self) -> dict[str, Any]:
        """Time or user."""
        return {"split_by": self.split_by}

    def expected_rows(self, task: str, split: Split) -> int | None:
        """Of the time-based split."""
        return LAMP_ROWS[task].get(split) if self.split_by == "time" else None

    def _folder(self, task: str) -> str:
        # Plain LaMP_2 on the server is an older task, on news.
        name = lamp.official_name(task)
        return f"{name}/new" if name == "LaMP_2" else name

    def _base(self) -> str:
        base = str(self.config.prepare_data.download.lamp_address).rstrip("/")
        return f"{base}/time" if self.split_by == "time" else base

    def fetch(self, missing: Sequence[Place], patience: Patience) -> bool:
        """Questions and outputs of every missing split, to ``LaMP_<n>/<split>/``."""
        remotes = []
        for task, split in missing:
            place = self.folder / lamp.official_name(task) / split
            for name in (f"{split}_outputs.json", f"{split}_questions.json"):
                # Half of a split that somebody laid elsewhere is not filled up from the server.
                for other in (self.folder / lamp.official_name(task), self.folder):
                    if (other / name).is_file():
                        lamp.split_files(self.folder, task, split)
                address = f"{self._base()}/{self._folder(task)}/{split}/{name}"
                remotes.append(Remote(address, place / name, "prepare_data.download.lamp_address"))
        download(remotes, self.folder, patience)
        return True

    def instructions(self, missing: Sequence[Place]) -> str:
        """Every folder, and the server's address of it."""
        return (
            f"{super().instructions(missing)} Put LaMP's {self.split_by}-based split there (from "
            f"{self._base()}/LaMP_<n>/<split>/, that of LaMP_2 from {self._base()}/LaMP_2/new/<split>/), or set "
            "benchmark.dir and benchmark.tasks to what you have."
        )


class LongLamp(Source):
    """LongLaMP from the Hugging Face hub."""

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.splits = _splits(config)
        self.setting: Literal["temporal", "user"] = _choice(config, "split_by", longlamp.SETTINGS)
        self.share = config.benchmark.test_share
        if not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ConfigError(
                f"benchmark.test_share={self.share}: is not above 0 and at most 1. Use 0.1 for a tenth."
            )

    def files(self, task: str, split: Split) -> Sequence[Path]:
        """Parquet files as on the hub; where their names say how many there are, all of them."""
        found = longlamp.split_files(self.folder, task, split, self.setting)
        parts = [int(match[1]) for path in found if (match := _PARTS.search(path.name))]
        # A download that was killed between two parts must not pass for the whole split.
        if parts and len(found) < max(parts):
            raise DataError(f"{found[0].parent}: {len(found)} of {max(parts)} files of {split} are there.")
        return found

    def rows(self, task: str, split: Split, counts: Counter[str]) -> Iterator[Example]:
        """All rows, of the test split a random share (S37)."""
        share = self.share if split == "test" else 1.0
        seed = int(self.config.run.seed)
        return longlamp.iterate_split(
            self.folder, task, split, counts, setting=self.setting, share=share, seed=seed
        )

    def settings(self) -> dict[str, Any]:
        """How it is split, and the draw."""
        drawn = {"test_share": self.share, "seed": int(self.config.run.seed)} if self.share < 1 else {}
        return {"split_by": self.setting, "splits": list(self.splits), **drawn}

    def _patterns(self, missing: Sequence[Place]) -> list[str]:
        hub = {"train": "train", "dev": "val", "test": "test"}
        return [
            f"{longlamp.configuration(task, self.setting)}/{hub[split]}-*.parquet" for task, split in missing
        ]

    def fetch(self, missing: Sequence[Place], patience: Patience) -> bool:
        """The configurations' parquet files."""
        settings = self.config.prepare_data.download
        download_from_hub(
            settings.longlamp_repository,
            settings.longlamp_revision,
            self._patterns(missing),
            self.folder,
            "prepare_data.download.longlamp_repository",
        )
        return True

    def instructions(self, missing: Sequence[Place]) -> str:
        """The hub's file names."""
        return (
            f"{self.folder}: lacks {', '.join(self._patterns(missing))}. Put these files of the hub's dataset "
            f"{self.config.prepare_data.download.longlamp_repository} there, or set benchmark.dir, benchmark.tasks and "
            "benchmark.splits to what you have."
        )


class PGraphRag(Source):
    """PGraphRAG's Amazon reviews from its repository."""

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.splits = _splits(config)
        self.same_product = config.benchmark.same_product
        if not isinstance(self.same_product, bool):
            raise ConfigError("benchmark.same_product: is not true or false. Set it to one of them.")

    def files(self, task: str, split: Split) -> Sequence[Path]:
        """One file a split, whatever the task."""
        return [pgraphrag.split_file(self.folder, split)]

    def rows(self, task: str, split: Split, counts: Counter[str]) -> Iterator[Example]:
        """Users with a history."""
        return pgraphrag.iterate_split(self.folder, task, split, counts, same_product=self.same_product)

    def settings(self) -> dict[str, Any]:
        """Splits, and whether other reviews of the product stay in the history."""
        return {"splits": list(self.splits), "same_product": self.same_product}

    def _names(self, missing: Sequence[Place]) -> list[str]:
        return [f"amazon_{split}.json" for split in dict.fromkeys(split for _, split in missing)]

    def fetch(self, missing: Sequence[Place], patience: Patience) -> bool:
        """The files of the missing splits."""
        key = "prepare_data.download.pgraphrag_address"
        base = str(self.config.prepare_data.download.pgraphrag_address).rstrip("/")
        remotes = [Remote(f"{base}/{name}", self.folder / name, key) for name in self._names(missing)]
        download(remotes, self.folder, patience)
        return True

    def instructions(self, missing: Sequence[Place]) -> str:
        """The repository's file names."""
        return (
            f"{self.folder}: lacks {', '.join(self._names(missing))}. Put them there from "
            f"{self.config.prepare_data.download.pgraphrag_address}, or set benchmark.dir and benchmark.splits to what "
            "you have."
        )


class Dianping(Source):
    """Rows built from a file of posts (S37)."""

    splits = ("test",)

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.posts = self.folder / "posts.jsonl"
        self.selection = dianping.Selection(
            users=config.benchmark.users,
            min_characters=config.benchmark.min_characters,
            seed=int(config.run.seed),
        )
        self.rewriter: Rewriter | None = None
        if config.benchmark.rewriter.base_url:
            from tagpr.benchmarks import rewriting

            settings = OmegaConf.to_container(config.benchmark.rewriter, resolve=True)
            try:
                self.rewriter = rewriting.Rewriter.model_validate(settings)
            except ValidationError as error:
                problem = error.errors()[0]
                key = ".".join(map(str, problem["loc"]))
                raise ConfigError(f"benchmark.rewriter.{key}: {problem['msg']}. Correct it.") from error

    def files(self, task: str, split: Split) -> Sequence[Path]:
        """The posts."""
        if not self.posts.is_file():
            raise DataError(f"{self.posts}: missing. {self.instructions([(task, split)])}")
        return [self.posts]

    def rows(self, task: str, split: Split, counts: Counter[str]) -> Iterator[Example]:
        """One row a user."""
        if task == "dianping_paraph" and self.rewriter is None:
            raise ConfigError(
                "benchmark.rewriter.base_url: dianping_paraph needs a model that rewrites posts neutrally. Set the address of "
                "an OpenAI-compatible endpoint, or take the task out of benchmark.tasks."
            )
        return dianping.build(self.posts, [task], self.selection, counts, self.rewriter, split)

    def settings(self) -> dict[str, Any]:
        """What is drawn, and who rewrites."""
        made = {
            "users": self.selection.users,
            "min_characters": self.selection.min_characters,
            "seed": self.selection.seed,
        }
        return made | ({"rewriter": self.rewriter.model} if self.rewriter else {})

    def instructions(self, missing: Sequence[Place]) -> str:
        """The format of the file."""
        return (
            f"{self.posts}: is missing. Put your posts there, one JSON object a line: user_id, post_id, date, title, "
            "content; the paper's own were never published."
        )


class Own(Source):
    """A folder of the user's own: ``tasks.yaml`` and a JSON lines file a split."""

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.splits = own_rows.splits(self.folder)

    def files(self, task: str, split: Split) -> Sequence[Path]:
        """The split's file and the tasks'."""
        tasks = self.config.benchmark.own_tasks
        return [*([Path(tasks)] if tasks else []), own_rows.split_file(self.folder, split)]

    def rows(self, task: str, split: Split, counts: Counter[str]) -> Iterator[Example]:
        """The task's rows."""
        return own_rows.iterate_split(self.folder, task, split, counts)

    def instructions(self, missing: Sequence[Place]) -> str:
        """The files' names."""
        names = dict.fromkeys(f"{split}.jsonl" for _, split in missing)
        return f"{self.folder}: lacks {', '.join(names)}. Put your rows there, one JSON object a line."


SOURCES: Mapping[str, type[Source]] = {
    "minilamp": MiniLamp,
    "lamp": Lamp,
    "longlamp": LongLamp,
    "pgraphrag": PGraphRag,
    "dianping": Dianping,
    "own": Own,
}


def source_of(config: DictConfig) -> Source:
    """The source of ``benchmark.name``.

    Raises:
        ConfigError: no such benchmark, or a setting of it that makes no sense.
    """
    kind = SOURCES.get(config.benchmark.name)
    if kind is None:
        raise ConfigError(
            f"benchmark.name={config.benchmark.name}: is none of {', '.join(SOURCES)}. Use benchmark=<name>."
        )
    if not config.benchmark.dir:
        raise ConfigError("benchmark.dir: is empty. Name the folder with the files.")
    return kind(config)


def _choice(config: DictConfig, key: str, allowed: Sequence[str]) -> Any:
    value = config.benchmark[key]
    if value not in allowed:
        raise ConfigError(f"benchmark.{key}={value}: is neither {' nor '.join(allowed)}. Use one of them.")
    return value


def _splits(config: DictConfig) -> tuple[Split, ...]:
    known: tuple[Split, ...] = ("train", "dev", "test")
    chosen = list(config.benchmark.splits)
    if not chosen or set(chosen) - set(known) or len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"benchmark.splits={chosen}: is no list of different ones of {', '.join(known)}. Correct it."
        )
    return tuple(split for split in known if split in chosen)
