"""Which training examples a run asks the teacher about, and with which prompts (S5)."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data_pipeline.selection import draw_instances, shuffled
from data_pipeline.settings import ChainSettings
from data_pipeline.store import Instance
from tagpr.benchmarks.prompt import QueryTooLongError, build_prompt
from tagpr.benchmarks.storage import iterate_examples
from tagpr.dense_retrieval import install
from tagpr.errors import ConfigError, StageError
from tagpr.schema import Example

logger = logging.getLogger(__name__)


class Draw:
    """The training examples that are drawn, with their prompts (S5)."""

    def __init__(self, config: DictConfig, settings: ChainSettings, tasks: list[str], source: Path) -> None:
        self._config = config
        self._settings = settings
        self._tasks = tasks
        self._source = source
        self._kept: list[_Row] = []
        self._dropped: Counter[str] = Counter()

    def instances(self) -> Iterator[Instance]:
        """In the order of the file, which is read twice: only ids are in memory.

        Raises:
            DataError: a row is malformed.
            StageError: no row is of one of the tasks.
        """
        seed = self._config.run.seed
        rows: list[_Row] = []
        others: Counter[str] = Counter()
        for example in iterate_examples(self._source):
            if example.task in self._tasks:
                rows.append(_Row(example.id, example.task, example.user_id))
            else:
                others[example.task] += 1
        if not rows:
            raise StageError(
                f"{self._source}: has no example of benchmark.tasks={self._tasks}. "
                "Make it with `bash recipes/prepare_data.sh`."
            )
        if others:
            # Left out on purpose, or a task's name with a slip in it.
            named = ", ".join(f"{task} {count:,}" for task, count in sorted(others.items()))
            logger.warning(
                "%s: rows of tasks that benchmark.tasks does not name are left out: %s", self._source, named
            )
        drawn = draw_instances(rows, self._tasks, self._settings.instances_per_task, seed)
        numbers = {row.id: number for number, row in enumerate(drawn)}
        del rows
        prompt_of = _prompt_builder(self._config, self._settings.tokenizer)
        for example in iterate_examples(self._source):
            if example.id not in numbers:
                continue
            try:
                prompt = prompt_of(example, True)
            except QueryTooLongError:
                self._dropped["query_too_long"] += 1
                continue
            self._kept.append(_Row(example.id, example.task, example.user_id))
            yield Instance(
                numbers[example.id], example.id, example.task, example.user_id, example.gold, prompt,
                prompt_of(example, False),
            )  # fmt: skip

    def blank(self) -> set[str]:
        """Those that are answered without the profile as well (S15): so many of each task."""
        preferences = self._settings.preferences
        left = dict.fromkeys(self._tasks, preferences.prp_instances_per_task if preferences.prp_pairs else 0)
        chosen = set()
        for row in shuffled(self._kept, lambda row: row.id, self._config.run.seed + 1):
            left[row.task] -= 1
            if left[row.task] >= 0:
                chosen.add(row.id)
        return chosen

    def notes(self) -> dict[str, Any]:
        """What became of the rows that were drawn."""
        return {"kept": dict(Counter(row.task for row in self._kept)), "dropped": dict(self._dropped)}


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    task: str
    user_id: str


def _prompt_builder(config: DictConfig, tokenizer: str | None) -> Callable[[Example, bool], str]:
    benchmark = config.benchmark
    count_tokens = None if tokenizer is None else _token_counter(tokenizer)
    install(benchmark.retriever, benchmark.retriever_model)

    def prompt_of(example: Example, with_profile: bool) -> str:
        return build_prompt(
            example,
            benchmark.profile_size if with_profile else 0,
            benchmark.retriever,
            count_tokens,
            benchmark.max_prompt_tokens,
            seed=config.run.seed,
        ).text

    return prompt_of


# <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n in Qwen3's template, none of it split further.
TEMPLATE_TOKENS = 8


def _token_counter(name: str) -> Callable[[str], int]:
    """Tokens of a prompt in the policy's chat template: a folder with tokenizer.json, or a model on the hub.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # that is what the tokenizers library raises
        raise ConfigError(
            f"chains.tokenizer={name}: cannot be read ({type(error).__name__}). "
            "Give a folder with tokenizer.json, a model on the hub, or null for no limit."
        ) from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids) + TEMPLATE_TOKENS
