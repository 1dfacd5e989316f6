"""Examples -> the rows that verl's dataset reads: rendered prompt, gold answer, who asks."""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tagpr.benchmarks.prompt import QueryTooLongError, build_prompt
from tagpr.benchmarks.storage import examples_file, read_examples
from tagpr.errors import ConfigError, DataError, StageError
from tagpr.schema import Example

logger = logging.getLogger(__name__)


def draw(examples: Sequence[Example], rows: Mapping[str, int] | None, seed: int) -> list[Example]:
    """Draw ``rows[task]`` training examples of each task without replacement (S4); None takes all.

    Raises:
        ConfigError: a task has fewer examples than asked for.
    """
    if rows is None:
        return list(examples)
    by_task = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    drawn: list[Example] = []
    for task, count in rows.items():
        if task not in by_task:
            continue
        if len(by_task[task]) < count:
            raise ConfigError(
                f"benchmark.rl_rows.{task}={count}: the training split has {len(by_task[task])} rows. Lower it."
            )
        drawn.extend(random.Random(f"{seed}/{task}").sample(by_task[task], count))
    random.Random(seed).shuffle(drawn)
    return drawn


def write_rows(
    examples: Sequence[Example],
    path: Path,
    *,
    profile_size: int,
    retriever: str,
    count_tokens: Callable[[str], int],
    max_prompt_tokens: int,
    seed: int,
) -> int:
    """Render examples and write them as verl's parquet; returns the number of rows written.

    An example whose query alone exceeds the token budget is left out, counted and logged; a prompt is never cut.

    Raises:
        DataError: no example fits.
    """
    rows, shortened, dropped = [], 0, 0
    for index, example in enumerate(examples):
        try:
            prompt = build_prompt(
                example,
                profile_size=profile_size,
                retriever=retriever,
                count_tokens=count_tokens,
                max_tokens=max_prompt_tokens,
                seed=seed,
            )
        except QueryTooLongError as error:
            logger.debug("left out: %s", error)
            dropped += 1
            continue
        shortened += prompt.items_shortened > 0
        rows.append(
            {
                "data_source": example.task,
                "prompt": [{"role": "user", "content": prompt.text}],
                "ability": "personalisation",
                "reward_model": {"style": "rule", "ground_truth": example.gold},
                "extra_info": {
                    "index": index,
                    "split": example.split,
                    "example_id": example.id,
                    "task": example.task,
                    "user_id": example.user_id,
                    "query": example.query,
                },
            }
        )
    if not rows:
        raise DataError(
            f"benchmark.max_prompt_tokens={max_prompt_tokens}: not one of {len(examples)} prompts fits. Raise it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    logger.info(
        "%s: %d prompts (%d with shortened profiles, %d left out: query longer than %d tokens)",
        path.name, len(rows), shortened, dropped, max_prompt_tokens,
    )  # fmt: skip
    return len(rows)


def check_examples(folder: str, split: str) -> Path:
    """The file of one split of the prepared examples.

    Raises:
        StageError: the data has not been prepared.
    """
    path = examples_file(folder, split)
    if not path.is_file():
        raise StageError(f"paths.examples={folder}: has no {path.name}. Run `bash recipes/prepare_data.sh`.")
    return path


def examples_of(folder: str, split: str) -> list[Example]:
    """Read one split of the prepared examples.

    Raises:
        StageError: the data has not been prepared.
    """
    return read_examples(check_examples(folder, split))
